"""On a GPU: a padded or packed batch is read where it is, and every sequence gets what it has alone, up to rounding."""

from __future__ import annotations

import pytest
import torch

from express_compile.core.method import METHODS
from express_compile.kernels import express as E
from express_compile.kernels.attend import hopper
from express_compile.kernels.attend.segments import (
    SegmentTable,
    Sources,
    causal_table,
    segment_attention_reference,
    segment_attention_triton,
)
from express_compile.kernels.spans import Spans

OPTIONS = dict(
    s=256, inflation=-1, sinks=32, recent=256, protected=0, halving="balanced", flatten=0.0, block=128, min_length=0
)
LENGTHS, TOTAL = (8192, 5461, 700, 8175), 8192


def seed() -> torch.Tensor:
    return torch.tensor(7, device="cuda")


def places_of(n: int, side: str, total: int = TOTAL) -> torch.Tensor:
    if side == "holes":
        return torch.randperm(total, generator=torch.Generator().manual_seed(n))[:n].sort().values.cuda()
    first = {"left": total - n, "right": 0, "both": (total - n) // 2}[side]
    return torch.arange(first, first + n, device="cuda")


def batch(
    side: str, D: int, dtype: torch.dtype, Dv: int | None = None, lengths: tuple[int, ...] = LENGTHS
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Query, key and value of 8 and 2 heads, NaN where no token is, the padding, and the places of the tokens."""
    generator, total = torch.Generator("cuda").manual_seed(0), max(lengths)
    places = [places_of(n, side, total) for n in lengths]
    shapes = ((len(lengths), h, total, d) for h, d in ((8, D), (2, D), (2, Dv or D)))
    tensors = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    padding = torch.zeros(len(lengths), total, dtype=torch.bool, device="cuda")
    for b, at in enumerate(places):
        padding[b, at] = True
    return [x.masked_fill(~padding[:, None, :, None], float("nan")) for x in tensors], padding, places


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize(
    "dtype, D, changed",
    [
        (torch.bfloat16, 128, {}),
        (torch.bfloat16, 128, {"protected": 256}),
        (torch.float16, 64, {"protected": 256, "min_length": 6000}),
        (torch.float32, 64, {"halving": "kernel"}),
    ],
)
def test_every_sequence_gets_what_it_has_alone_and_its_gradients(side, dtype, D, changed):
    tensors, padding, places = batch(side, D, dtype)
    options, run = {**OPTIONS, **changed}, METHODS["express"].op
    leaves = [x.requires_grad_() for x in tensors]
    out, lse = run(*leaves, padding, seed(), D**-0.5, 3, **options)
    grad = torch.randn_like(out).masked_fill(~padding[:, None, :, None], float("nan"))
    grads = torch.autograd.grad(out, leaves, grad)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    for b, at in enumerate(places):
        own = [x.detach()[b : b + 1, :, at].requires_grad_() for x in leaves]
        alone, alone_lse = run(*own, None, seed(), D**-0.5, 3, **options)
        assert relative(out[b][:, at], alone[0]) < close
        torch.testing.assert_close(lse[b][:, at], alone_lse[0], rtol=1e-3, atol=2e-3)
        for x, e in zip(grads, torch.autograd.grad(alone, own, grad[b : b + 1, :, at]), strict=True):
            assert relative(x[b][:, at], e[0]) < 2 * close
        assert (out[b][:, ~padding[b]] == 0).all() and (lse[b][:, ~padding[b]] == -float("inf")).all()
        assert all((x[b][:, ~padding[b]] == 0).all() for x in grads)


def judge_both(
    monkeypatch: pytest.MonkeyPatch, query: torch.Tensor, sources: Sources, table: SegmentTable, given: Spans
) -> None:
    """The kernel for Hopper and the other one, over the spans ``given``, by the tolerance rule: at most twice the error
    of the reference in the same precision, both against float64. And nothing where no query is."""
    if not hopper.takes(query, *sources[:2], 128, given):
        pytest.skip("this machine or its Triton is none that the kernel for Hopper is for")
    scale = query.shape[3] ** -0.5
    exact = sources._replace(**{name: getattr(sources, name).double() for name in sources._fields[:4]})
    truth, truth_lse = segment_attention_reference(query.double(), exact, table, scale)
    allowed = 2 * (segment_attention_reference(query, sources, table, scale)[0] - truth).norm()
    here = truth_lse.isfinite()
    for takes in (hopper.takes, lambda *_: False):
        monkeypatch.setattr(hopper, "takes", takes)
        (out, lse), again = (
            segment_attention_triton(query, sources._replace(spans=given), table, scale) for _ in range(2)
        )
        assert (out - truth).norm() <= allowed and (lse - truth_lse)[here].abs().max() < 1e-4
        assert (out[~here] == 0).all() and (lse[~here] == -float("inf")).all()
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def packed(tensors: list[torch.Tensor], places: list[torch.Tensor]) -> tuple[list[torch.Tensor], Spans]:
    """The tokens of a padded batch one behind the other, as one tensor that all sequences share."""
    starts = torch.tensor([0, *map(len, places)], device="cuda").cumsum(0).to(torch.int32)
    each = [torch.cat([x[b][:, at] for b, at in enumerate(places)], 1) for x in tensors]
    return [x.expand(len(places), *x.shape) for x in each], Spans.of_packed(starts, int(starts[-1]))


@pytest.mark.parametrize("side", ["left", "right", "both", "holes", "packed"])
@pytest.mark.parametrize(
    "dtype, D, Dv, protected, Lq",
    [(torch.bfloat16, 128, 128, 0, 1500), (torch.float16, 64, 128, 100, 1500), (torch.bfloat16, 128, 64, 100, 701)],
)
def test_both_kernels_attend_to_spans_as_the_reference_does(monkeypatch, poison, side, dtype, D, Dv, protected, Lq):
    """Sequences that end within a tile, shorter than one, without tokens, and without queries."""
    given, padding, places = batch("left" if side == "packed" else side, D, dtype, Dv, (1500, 0, 1, 70, 900, 1472))
    (q, k, v), spans = packed(given, places) if side == "packed" else (given, Spans.of_padding(padding, Lq))
    q = q if side == "packed" else q[:, :, 1500 - Lq :]
    layout = E.make_layout(E.Express(16, sinks=32, recent=77, protected=protected), 1500, 1500)
    index, *copies = E.thin_triton(k, v, layout, D**-0.5, seed(), 3, None, spans)
    sources = Sources(k, v, *copies, index if protected else None, spans=spans)
    judge_both(monkeypatch, q, sources, layout.table, spans)


def test_programs_of_the_kernel_for_hopper_find_their_jobs_among_many_sequences(monkeypatch, poison):
    lengths = tuple(37 * i % 150 for i in range(200))
    given, _, places = batch("right", 128, torch.bfloat16, lengths=lengths)
    (q, k, v), spans = packed(given, places)
    sources, table = Sources.tokens(k, v, spans), causal_table(149, 149)
    judge_both(monkeypatch, q, sources, table, spans)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        judge_both(monkeypatch, q, sources, table, spans._replace(begin=spans.begin + 1))


@pytest.mark.parametrize("protected", [0, 256])
def test_the_same_rows_are_kept_to_the_bit(protected):
    tensors, padding, places = batch("both", 128, torch.bfloat16)
    _, k, v = tensors
    config = E.Express(256, sinks=32, recent=256, protected=protected)
    layout = E.make_layout(config, TOTAL, TOTAL)
    index, *copies = E.thin_triton(k, v, layout, 0.09, seed(), 3, None, Spans.of_padding(padding, TOTAL))
    assert all(x.isfinite().all() for x in copies)
    for b, (n, at) in enumerate(zip(LENGTHS, places, strict=True)):
        own = E.make_layout(config, n, n)
        alone, *_ = E.thin_triton(k[b : b + 1, :, at], v[b : b + 1, :, at], own, 0.09, seed(), 3)
        for (source, first, rows), (_, other, same) in zip(
            own.table.segments[-1], layout.table.segments[len(own.table.tail) - 1], strict=False
        ):
            assert rows == same
            if source and rows:
                found, expected = index[b, :, other : other + rows], at[alone[0, :, first : first + rows].long()]
                assert torch.equal(found.sort(1).values.long(), expected.sort(1).values)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("protected", [0, 256])
def test_a_padded_batch_needs_no_more_memory_than_its_keys_and_values(side, protected):
    tensors, padding, _ = batch(side, 128, torch.bfloat16)
    given = tensors[1].nbytes + tensors[2].nbytes
    run, options = METHODS["express"].op, {**OPTIONS, "protected": protected}
    run(*tensors, padding, seed(), 0.09, 3, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = run(*tensors, padding, seed(), 0.09, 3, **options)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes
    assert 0.3 * given < used < 1.6 * given


def test_a_padded_batch_is_recorded_as_a_cuda_graph_for_any_padding():
    tensors, padding, _ = batch("left", 128, torch.bfloat16)
    tensors, other = [x.nan_to_num(0.5) for x in tensors], padding.flip(1)
    run = METHODS["express"].op
    expected = [run(*tensors, x, seed(), 0.09, 3, **OPTIONS)[0] for x in (padding, other)]
    given, number, graph = padding.clone(), seed(), torch.cuda.CUDAGraph()
    run(*tensors, given, number, 0.09, 3, **OPTIONS)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, _ = run(*tensors, given, number, 0.09, 3, **OPTIONS)
    for x, e in zip((padding, other), expected, strict=True):
        given.copy_(x)
        graph.replay()
        assert torch.equal(out, e)


@pytest.mark.parametrize("dtype, D, protected", [(torch.bfloat16, 128, 256), (torch.float32, 64, 0)])
def test_packed_sequences_get_what_each_has_alone_and_their_gradients(dtype, D, protected):
    lengths, options = (8192, 0, 3333, 1, 5000), {**OPTIONS, "protected": protected}
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [torch.randn(sum(lengths), h, D, generator=generator, device="cuda").to(dtype) for h in (8, 2, 2)]
    starts = torch.tensor((0, *lengths), device="cuda").cumsum(0).to(torch.int32)
    leaves = [x.requires_grad_() for x in leaves]
    number = seed()
    E.VARLEN(*leaves, starts, max(lengths), number, D**-0.5, 3, **options)  # makes its tables
    torch.cuda.set_sync_debug_mode("error")  # nothing is read back
    try:
        out, lse = E.VARLEN(*leaves, starts, max(lengths), number, D**-0.5, 3, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    grad = torch.randn_like(out)
    grads, close = torch.autograd.grad(out, leaves, grad), 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        own = [x[a:b].detach().transpose(0, 1)[None].requires_grad_() for x in leaves]
        alone, alone_lse = E.OP(*own, None, seed(), D**-0.5, 3, **options)
        if a < b:
            assert relative(out[a:b].transpose(0, 1), alone[0]) < close
            torch.testing.assert_close(lse[:, a:b], alone_lse[0], rtol=1e-3, atol=2e-3)
            for x, e in zip(grads, torch.autograd.grad(alone, own, grad[a:b].transpose(0, 1)[None]), strict=True):
                assert relative(x[a:b].transpose(0, 1), e[0]) < 2 * close
