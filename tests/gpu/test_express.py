"""The kernels at real sizes on a GPU: ``make gpu-test``. Outcomes are kept in examples/bench/results/gpu-tests.txt."""

from __future__ import annotations

import math

import pytest
import torch

from express_compile.core.method import METHODS
from express_compile.kernels import express as E
from express_compile.kernels.attend.segments import Sources, segment_attention_reference
from express_compile.kernels.exact import exact_attention
from express_compile.kernels.launch import Random

OPTIONS = dict(
    s=256, inflation=-1, sinks=32, recent=256, protected=0, halving="balanced", flatten=0.0, block=128,
    min_length=0,
)  # fmt: skip


def seed() -> torch.Tensor:
    return torch.tensor(7, device="cuda")


def tokens(n, B=1, H=8, H_kv=2, D=128, Dv=128, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((B, n, H, D), (B, n, H_kv, D), (B, n, H_kv, Dv))
    parts = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    return tuple(x.transpose(1, 2) for x in parts)  # strided as models produce them


def error(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("rule", ["kernel", "balanced", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_halving_decisions(poison, judge, rule, dtype, D):
    """Replayed in float64 along the kernel's own decisions, every decision agrees or had a margin within rounding."""
    n, s = 20000, 256
    _, k, v = tokens(n, 1, 2, 2, D, D, dtype)
    config = E.Express(s, inflation=E.default_inflation(s), sinks=32, recent=64, halving=rule, protected=0)
    layout = E.make_layout(config, n, n)
    scale = D**-0.5
    index, *_ = E.thin_triton(k, v, layout, scale, seed(), 1)
    stream = torch.arange(32, 32 + layout.schedule.tokens, device="cuda", dtype=torch.int32)
    arena = torch.cat([stream.expand(1, 2, -1), index], 2)
    judged = judge(k, v, arena, layout.schedule, config.rule, scale, seed(), 1)
    assert rule == "uniform" or judged > 10000


@pytest.mark.parametrize("D, s", [(64, 512), (128, 256), (96, 128), (64, 16)])
def test_programs_that_wait_for_each_other_leave_no_race(D, s):
    """The tiles of a bucket run side by side: thirty repetitions give the same rows, under changing load."""
    _, k, v = tokens(9000, 2, 4, 4, D, D)
    layout = E.make_layout(E.Express(s, inflation=E.default_inflation(s), sinks=32, recent=64, protected=0), 9000, 9000)
    first = E.thin_triton(k, v, layout, D**-0.5, seed(), 1)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for repetition in range(30):
        if repetition % 3 == 0:  # a matrix product beside it changes when programs start
            with torch.cuda.stream(other):
                noise = torch.tanh(noise @ noise)
        again = E.thin_triton(k, v, layout, D**-0.5, seed(), 1)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("B, n, H, H_kv", [(1, 32768, 32, 8), (2, 8192, 32, 8), (1, 1 << 20, 8, 2)])
def test_op_at_real_sizes(B, n, H, H_kv):
    """The op against its own reference attention for the rows that it chose; n up to a million."""
    q, k, v = tokens(n, B, H, H_kv)
    options = {**OPTIONS, "s": 512}
    out, lse = METHODS["express"].op(q, k, v, None, seed(), 128**-0.5, 3, **options)
    again, _ = METHODS["express"].op(q, k, v, None, seed(), 128**-0.5, 3, **options)
    assert torch.equal(out, again), "same seed, same bits"
    layout = E.make_layout(E.Express(512, inflation=7, protected=0), n, n)
    sources, index = E.select_rows(k, v, layout, 128**-0.5, Random(seed(), 3))
    copies = sources.gathered().buffers[2:]
    for x, copy in zip((k, v), copies, strict=True):
        assert torch.equal(copy, E.gather_rows(x, index))
    # a few blocks of queries in float64 are enough, and all that fits in the time
    for block in (0, n // 256, n // 128 - 1):
        own, one = layout.table.of_block(block, n)
        rows = (k, v, *copies)
        truth, truth_lse = segment_attention_reference(
            q[:, :, own].double(), Sources(*(x.double() for x in rows)), one, 128**-0.5
        )
        reference, _ = segment_attention_reference(q[:, :, own], Sources(*rows), one, 128**-0.5)
        assert error(out[:, :, own], truth) <= 2 * error(reference, truth)
        assert (lse[:, :, own] - truth_lse).abs().max() < 1e-4


@pytest.mark.parametrize("protected", [0, 256])
def test_prefill_in_chunks_is_prefill(protected):
    n = 9000
    q, k, v = tokens(n)
    run, options = METHODS["express"].op, {**OPTIONS, "protected": protected}
    whole, whole_lse = run(q, k, v, None, seed(), 128**-0.5, 3, **options)
    for first in (0, 5000, 7777, 8990):
        last = min(first + 2777, n)
        if last <= E.Express(256, inflation=6, protected=protected).exact_up_to:
            continue
        part, lse = run(q[:, :, first:last], k[:, :, :last], v[:, :, :last], None, seed(), 128**-0.5, 3, **options)
        torch.testing.assert_close(part, whole[:, :, first:last])
        torch.testing.assert_close(lse, whole_lse[:, :, first:last])


@pytest.mark.parametrize("protected", [0, 300])
def test_padding_continuation_and_gradients(protected):
    n, Lq = 3000, 1000
    q, k, v = (x.detach().requires_grad_() for x in tokens(n, 2, 4, 2, 64, 64))
    options = {**OPTIONS, "s": 64, "recent": 100, "protected": protected}
    padding = torch.ones(2, n, dtype=torch.bool, device="cuda")
    padding[0, :777] = False
    run = METHODS["express"].op
    whole = run(q, k, v, padding, seed(), 0.125, 3, **options)[0]
    part = run(q[:, :, -Lq:], k, v, padding, seed(), 0.125, 3, **options)[0]
    torch.testing.assert_close(part, whole[:, :, -Lq:])
    assert (whole[0, :, :777] == 0).all()
    config = E.Express(64, inflation=4, sinks=32, recent=100, protected=protected)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    expected = []
    for b in range(2):
        rows = padding[b].nonzero()[:, 0]
        expected.append(E.express_reference(*(x[:, :, rows] for x in leaves), config, 0.125, seed(), 3)[0][b])
    actual = torch.cat([whole[b][:, padding[b]] for b in range(2)], 1)
    assert error(actual, torch.cat(expected, 1).double()) < 1e-2
    grad = torch.randn_like(actual)
    for a, e in zip(
        torch.autograd.grad(actual, (q, k, v), grad),
        torch.autograd.grad(torch.cat(expected, 1), leaves, grad),
        strict=True,
    ):
        assert error(a, e.double()) < 2e-2


def test_opcheck_and_compile():
    q, k, v = (x.requires_grad_() for x in tokens(2500, 2, 4, 2, 64, 64, torch.float32))
    options = {**OPTIONS, "s": 64}
    run = torch.ops.express_compile.express.default
    torch.library.opcheck(run, (q, k, v, None, seed(), 0.125, 3), options)
    q, k, v = (x.detach() for x in (q, k, v))
    compiled = torch.compile(lambda *x: run(*x, None, seed(), 0.125, 3, **options)[0], fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v, None, seed(), 0.125, 3, **options)[0])


def test_cuda_graph():
    q, k, v = tokens(8192, 1, 8, 2)
    run = METHODS["express"].op
    drawn = seed()
    expected = run(q, k, v, None, drawn, 0.09, 3, **OPTIONS)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(q, k, v, None, drawn, 0.09, 3, **OPTIONS)[0]
    graph.replay()
    assert torch.equal(out, expected)
    drawn += 1  # the seed is read on the device: a replay draws with the new one
    graph.replay()
    assert not torch.equal(out, expected)
    assert torch.equal(out, run(q, k, v, None, drawn, 0.09, 3, **OPTIONS)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("Lq", [2048, 100])
def test_exact_attention(dtype, Lq):
    q, k, v = tokens(2048, 2, 8, 2, 64, 64, dtype)
    q = q[:, :, -Lq:]
    out, lse = exact_attention(q, k, v, 0.125)
    scores = (q.double() @ k.double().repeat_interleave(4, 1).mT) * 0.125
    hidden = torch.ones(Lq, 2048, dtype=torch.bool, device="cuda").triu(2048 - Lq + 1)
    scores = scores.masked_fill(hidden, -math.inf)
    truth = scores.softmax(-1) @ v.double().repeat_interleave(4, 1)
    assert error(out, truth) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert (lse.double() - scores.logsumexp(-1)).abs().max() < 1e-3


def test_tensors_on_two_devices():
    q, k, v = tokens(300, 1, 2, 1, 64, 64)
    with pytest.raises(ValueError, match="key: on cpu, but query is on cuda:0; all must be on one device"):
        METHODS["express"].op(q, k.cpu(), v, None, seed(), 0.125, 0, **OPTIONS)
    with pytest.raises(TypeError, match="query: dtype torch.float64; the kernels take"):
        METHODS["express"].op(*(x.double() for x in tokens(2500)), None, seed(), 0.125, 0, **OPTIONS)
