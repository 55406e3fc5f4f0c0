"""Thinformer on a GPU: which rows it keeps, attention over them, gradients, CUDA graphs, no recompilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from express_compile.core.method import METHODS
from express_compile.kernels import launch as _triton
from express_compile.kernels import thinformer as T
from express_compile.kernels.select.halving import Decider, get_rule

OPTIONS = dict(s=64, fraction=0.0, g=-1, halving="balanced", flatten=0.0, min_length=0)
HALVES = [torch.float16, torch.bfloat16]


def tensors(Lq, Lk, B=1, H=4, H_kv=2, D=64, Dv=None, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shapes = ((B, H, Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv or D))
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(number, device="cuda")


def decider(rule: str, scale: float = 0.125, seed: int = 5) -> Decider:
    return Decider(get_rule(rule), scale, T.Random(seed_of(seed), 3))


def op(q, k, v, padding=None, seed=5, layer=3, **options):
    scale = q.shape[-1] ** -0.5
    return METHODS["thinformer"].op(q, k, v, padding, seed_of(seed), scale, layer, **{**OPTIONS, **options})


def over_rows(q, k, v, index, seen=None, dtype=torch.float64):
    """Attention over the chosen rows, in float64 unless told."""
    rows = (T.gather_rows(x, index).to(dtype) for x in (k, v))
    mask = None if seen is None else seen[:, None, None]
    return F.scaled_dot_product_attention(q.to(dtype), *rows, mask, enable_gqa=True)


def relative(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


def padding_of(B, Lk, lengths, seed=0):
    padding = torch.zeros(B, Lk, dtype=torch.bool)
    for b, length in enumerate(lengths):
        padding[b, torch.randperm(Lk, generator=torch.Generator().manual_seed(seed + b))[:length]] = True
    return padding.cuda()


@pytest.mark.parametrize("rule", ["kernel", "balanced"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("Lk, s, D", [(16384, 256, 128), (9000, 512, 64), (777, 32, 40), (700, 4, 256)])
def test_halving_decisions(poison, judge, rule, dtype, Lk, s, D):
    """Of the stretched stream, level by level."""
    _, k, v = tensors(1, Lk, 2, D=D, dtype=dtype)
    schedule, scale = T.make_schedule(Lk, s), D**-0.5
    n, A = schedule.tokens, schedule.size - schedule.tokens
    stream = T.stretch_reference(None, torch.tensor([Lk, Lk], device="cuda"), n, s, 2, seed_of(5), 3).int()
    index = torch.cat([stream[:, :, :A].contiguous(), stream], 2)
    T.thin(k, v, index, schedule, 0, decider(rule, scale))
    arena = torch.cat([stream, index[:, :, :A]], 2)
    assert judge(k, v, arena, schedule, get_rule(rule), scale, seed_of(5), 3) == 4 * (n - s)
    chosen, keys, values, _ = T.select(k, v, None, s, decider(rule, scale))
    assert torch.equal(chosen, arena[:, :, -s:])
    assert torch.equal(keys, T.gather_rows(k, chosen)) and torch.equal(values, T.gather_rows(v, chosen))


@pytest.mark.parametrize("Lk", [2048, 5000])
@pytest.mark.parametrize("padded", [False, True])
def test_coins_select_exactly_what_the_reference_selects(Lk, padded):
    """The uniform rule depends on no rounding: stream, stages and buckets are the reference's, row by row."""
    _, k, v = tensors(1, Lk, 3)
    padding = padding_of(3, Lk, (Lk, 300, 10)) if padded else None
    index, *_ = T.select(k, v, padding, 64, decider("uniform", seed=9))
    cpu = [x if x is None else x.cpu() for x in (k, v, padding)]
    expected, *_ = T.select(*cpu, 64, T.Decider(get_rule("uniform"), 0.125, T.Random(torch.tensor(9), 3)))
    assert torch.equal(index.cpu().long(), expected.long())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    "Lq, Lk, D, Dv", [(1000, 1000, 64, 64), (3000, 4096, 128, 128), (17, 900, 96, 64), (16, 500, 40, 72)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_over_the_rows(dtype, Lq, Lk, D, Dv, padded):
    q, k, v = tensors(Lq, Lk, 3, D=D, Dv=Dv, dtype=dtype)
    lengths = (Lk, 40, 0)
    padding = padding_of(3, Lk, lengths) if padded else None
    out, lse = op(q, k, v, padding)
    index, _, _, counts = T.select(k, v, padding, 64, decider("balanced", D**-0.5))
    seen = None if counts is None else torch.arange(64, device="cuda") < counts[:, None]
    truth = over_rows(q, k, v, index, seen)
    reference = over_rows(q, k, v, index, seen, dtype)
    if padded:
        assert counts.tolist() == [64, 40, 0]
        assert (out[2] == 0).all() and (lse[2] == -math.inf).all()
        out, truth, reference = out[:2], truth[:2], reference[:2]
    assert relative(out, truth) <= 2 * relative(reference, truth)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("Lq, Lk", [(300, 64), (64, 7), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_short_sequences_are_exact(dtype, Lq, Lk, padded):
    q, k, v = tensors(Lq, Lk, 2, dtype=dtype)
    padding = padding_of(2, Lk, (Lk, (Lk + 1) // 2)) if padded else None
    mask = None if padding is None else padding[:, None, None]
    out, lse = op(q, k, v, padding)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
    reference = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert relative(out, truth) <= 2 * relative(reference, truth) + 1e-7
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double().repeat_interleave(2, 1)) / 8
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [16384, 131072, 1 << 20])
def test_long(n):
    """Unbiased where it can be checked: constant values give constants, and the stream reaches the whole sequence."""
    q, k, v = tensors(256, n, H=2, H_kv=1)
    out, _ = op(q, k, torch.ones_like(v), s=256)
    assert (out.float() - 1).abs().max() < 0.01
    index, *_ = T.select(k, v, None, 256, decider("balanced"))
    rows = index[0, 0].sort().values
    assert rows.min() < n / 32 and rows.max() > n - n / 32 and rows.unique().numel() == 256
    assert rows.diff().max() < n / 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("Lq, Lk, D", [(600, 900, 64), (2000, 2000, 128), (100, 50, 64)])
def test_gradients(dtype, padded, Lq, Lk, D):
    """Against float64 autograd over the same rows; the same bits at every call."""
    q, k, v = (x.requires_grad_() for x in tensors(Lq, Lk, 3, D=D, dtype=dtype))
    padding = padding_of(3, Lk, (Lk, 30, 0)) if padded else None
    out, _ = op(q, k, v, padding)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    again = torch.autograd.grad(out, (q, k, v), grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    with torch.no_grad():
        index, _, _, counts = T.select(k, v, padding, 64, decider("balanced", D**-0.5))
    seen = None if counts is None else torch.arange(index.shape[2], device="cuda") < counts[:, None]
    B = 2 if padded else 3  # a sequence without any key has no gradient that PyTorch's backends agree on
    results = []
    for precision in (torch.float64, dtype):
        leaves = [x[:B].detach().to(precision).requires_grad_() for x in (q, k, v)]
        result = over_rows(*leaves, index[:B], None if seen is None else seen[:B], precision)
        results.append(torch.autograd.grad(result, leaves, grad[:B].to(precision)))
    for a, truth, reference in zip(actual, *results, strict=True):
        assert relative(a[:B], truth) <= 2 * relative(reference, truth) + torch.finfo(dtype).eps
        assert (a[B:] == 0).all()


def test_cuda_graph_draws_anew():
    q, k, v = tensors(500, 3000)
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def call():
        return METHODS["thinformer"].op(q, k, v, None, seed, 0.125, 3, **OPTIONS)[0]

    expected = [call()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    assert torch.equal(out, expected[0])
    seed += 1
    graph.replay()
    assert torch.equal(out, call()) and not torch.equal(out, expected[0])


def test_one_compilation_for_all_lengths():
    for Lk in (2048, 4096):  # with and without stretching
        op(*tensors(Lk, Lk + Lk // 8))
        op(*tensors(Lk, Lk))
    before = len(_triton._compiled)
    for Lk in (2500, 3333, 5000, 8192, 9999):
        op(*tensors(Lk, Lk))
    assert len(_triton._compiled) == before


@pytest.mark.parametrize("H, H_kv", [(1, 1), (12, 12), (16, 2), (9, 3)])
def test_groups(H, H_kv):
    q, k, v = tensors(300, 700, 2, H, H_kv)
    out, _ = op(q, k, v)
    index, *_ = T.select(k, v, None, 64, decider("balanced"))
    truth = over_rows(q, k, v, index)
    assert relative(out, truth) <= 2 * relative(over_rows(q, k, v, index, None, q.dtype), truth)
