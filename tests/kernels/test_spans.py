"""Sequences that are read where they lie: the kernels, interpreted, against each sequence alone; what they need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from express_compile.core.call import Call
from express_compile.kernels import express as E
from express_compile.kernels.attend import segments, segments_backward
from express_compile.kernels.attend.segments import (
    COMPACTED,
    Sources,
    causal_table,
    segment_attention_backward,
    segment_attention_reference,
    segment_attention_triton,
)
from express_compile.kernels.attend.segments_backward import segment_attention_backward_triton
from express_compile.kernels.launch import Random
from express_compile.kernels.padding import Packing
from express_compile.kernels.select import contest, thinning
from express_compile.kernels.select.schedule import make_schedule
from express_compile.kernels.spans import Spans

SEED, SCALE = torch.tensor(5), 0.3
FEW = E.Express(4, inflation=2, sinks=2, recent=5, block=16, protected=0)
KEPT = replace(FEW, protected=10)


def places_of(n: int, total: int, side: str) -> torch.Tensor:
    if side == "holes":
        return torch.randperm(total, generator=torch.Generator().manual_seed(n))[:n].sort().values
    first = {"left": total - n, "right": 0, "both": (total - n) // 2}[side]
    return torch.arange(first, first + n)


def batch(places: list[torch.Tensor], total: int, D: int = 16, Dv: int = 16) -> tuple[list, torch.Tensor]:
    """Query, key and value of 4 and 2 heads, NaN where no token is, and the padding."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(len(places), h, total, d, generator=generator) for h, d in ((4, D), (2, D), (2, Dv))]
    padding = torch.zeros(len(places), total, dtype=torch.bool)
    for b, at in enumerate(places):
        padding[b, at] = True
    for x in tensors:
        x.masked_fill_(~padding[:, None, :, None], math.nan)
    return tensors, padding


def kernels(tensors: list, config: E.Express, spans: Spans | None, tokens: int) -> tuple[torch.Tensor, ...]:
    """``(out, lse, index)`` by the kernels."""
    q, k, v = tensors
    layout = E.make_layout(config, tokens, tokens)
    index, *copies = E.thin_triton(k, v, layout, SCALE, SEED, 1, None, spans)
    sources = Sources(k, v, *copies, index if config.protected else None, spans=spans)
    return *segment_attention_triton(q, sources, layout.table, SCALE), index


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 9))
@settings(max_examples=40)
def test_spans_list_the_tokens_of_any_padding_in_order(rows: list[list[bool]], Lq: int) -> None:
    padding = torch.tensor(rows)
    spans = Spans.of_padding(padding, Lq)
    for b in range(len(rows)):
        places = padding[b].nonzero()[:, 0]
        assert torch.equal(spans.places(b), places) and spans.length[b] == len(places)
        assert torch.equal(places[spans.begin[b] :], places[places >= 9 - Lq]) and spans.lead == 9 - Lq
        if len(places):
            assert spans.first()[b] == places[0]


@pytest.mark.parametrize(
    "config, total, lengths, side",
    [(FEW, 80, (75, 0, 41), side) for side in ("left", "both", "holes", "packed")] + [(KEPT, 275, (270, 30), "packed")],
)
def test_the_kernels_give_every_sequence_the_bits_that_it_has_alone(config, total, lengths, side):
    places = [places_of(n, total, "left" if side == "packed" else side) for n in lengths]
    tensors, padding = batch(places, total)
    alone = [[x[b : b + 1, :, at].contiguous() for x in tensors] for b, at in enumerate(places)]
    spans, given = Spans.of_padding(padding, total), tensors
    if side == "packed":  # one behind the other, as one tensor that all sequences share
        starts = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        spans = Spans.of_packed(starts, int(starts[-1]))
        places = [torch.arange(a, b) for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
        given = [torch.cat(x, 2).expand(len(lengths), -1, -1, -1) for x in zip(*alone, strict=True)]
    out, lse, _ = kernels(given, config, spans, total)
    for b, (n, at) in enumerate(zip(lengths, places, strict=True)):
        if n:
            own_out, own_lse, _ = kernels(alone[b], config, None, n)
            assert torch.equal(out[b][:, at], own_out[0]) and torch.equal(lse[b][:, at], own_lse[0])
        rest = torch.ones(out.shape[2], dtype=torch.bool)
        rest[at] = False
        assert (out[b][:, rest] == 0).all() and (lse[b][:, rest] == -math.inf).all()


@pytest.mark.parametrize("Lq, side", [(33, "left"), (60, "holes")])
def test_the_kernels_agree_with_the_reference_also_in_their_gradients(Lq, side):
    places = [places_of(n, 110, side) for n in (110, 70, 3)]
    (q, k, v), padding = batch(places, 110, 16, 24)
    q, spans, layout = q[:, :, 110 - Lq :], Spans.of_padding(padding, Lq), E.make_layout(FEW, 110, 110)
    sources, index = E.select_rows(k, v, layout, SCALE, Random(SEED, 1), spans)
    given, _, _ = E.thin_triton(k, v, layout, SCALE, SEED, 1, None, spans)
    seen = torch.zeros(layout.size, dtype=torch.bool)
    for first, rows in layout.table.segments[layout.table.segments[..., 0] == COMPACTED][:, 1:]:
        seen[first : first + rows] = True
    assert torch.equal(index[0, :, seen], given[0, :, seen]) and seen.sum() == 20
    expected = segment_attention_reference(q, sources, layout.table, SCALE)
    found = segment_attention_triton(q, sources, layout.table, SCALE)
    for x, e in zip(found, expected, strict=True):
        torch.testing.assert_close(x, e, rtol=1e-4, atol=1e-5)
    grad = torch.where(padding[:, None, 110 - Lq :, None], torch.randn(found[0].shape), math.nan)
    arguments = (grad, q, sources, *expected, layout.table, SCALE)
    truth = segment_attention_backward(*arguments)
    for x, e in zip(segment_attention_backward_triton(*arguments), truth, strict=True):
        torch.testing.assert_close(x, e, rtol=1e-3, atol=1e-4)
    assert all(e.isfinite().all() and e.abs().sum() > 1 for e in truth)
    shifted = spans._replace(start=spans.start + 1, length=spans.length - 1)
    wrong, _ = segment_attention_triton(q, sources._replace(spans=shifted), layout.table, SCALE)
    assert not torch.allclose(wrong, found[0], atol=0.1), "one place further"


def test_a_row_of_the_arena_reaches_as_far_as_the_rows_that_it_was_chosen_from():
    schedule = make_schedule(700, 8, 2)
    reach = thinning._reach(schedule)
    chosen = torch.arange(schedule.size)
    for pick in schedule.subsamples:  # the last of every group, and of every pair the second
        chosen[pick.target : pick.target + pick.rows] = chosen[pick.source :][pick.group - 1 :: pick.group][: pick.rows]
    for job in (job for launch in schedule.launches for job in launch):
        rows = chosen[job.source : job.source + job.rows * job.buckets]
        chosen[job.target : job.target + len(rows) // 2] = rows[1::2]
        for bucket in range(job.buckets):
            own = reach[job.target + bucket * job.rows // 2 :][: job.rows // 2]
            assert (own == rows[(bucket + 1) * job.rows - 1] + 1).all()
    assert len(schedule.launches) > 3 and reach.max() == 700


# -- what it needs ---------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of all memory that operations make, and the names of those that read a number back."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.bytes, self.read = 0, []
        self.known = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in given}  # none is made where one was

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "local_scalar" in func.name() or "nonzero" in func.name():
            self.read.append(func.name())
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.known[x.untyped_storage().data_ptr()] = x.untyped_storage()
                self.bytes += x.untyped_storage().nbytes()
        return result


@contextmanager
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are not launched: the host does all else."""
    with monkeypatch.context() as patch:
        for module in (segments, segments_backward, thinning, contest):
            patch.setattr(module, "launch", lambda *args, **options: None)
        yield


@pytest.mark.parametrize("protected", [0, 256])
def test_a_padded_batch_needs_as_much_memory_as_its_keys_and_values_and_reads_nothing_back(monkeypatch, protected):
    B, n, D = 3, 16384, 64
    key, value = (torch.randn(B, 2, n, D) for _ in range(2))
    query, padding = torch.empty(B, 8, n, D), torch.ones(B, n, dtype=torch.bool)
    padding[1, : n // 3], padding[2, -17:] = False, False
    config, given = E.Express(512, sinks=32, recent=256, protected=protected), key.nbytes + value.nbytes
    with nothing_runs(monkeypatch):
        kernels([query, key, value], config, Spans.of_padding(padding, n), n)  # makes its tables, which are kept
        with Allocations(query, key, value) as used:
            out, lse, _ = kernels([query, key, value], config, Spans.of_padding(padding, n), n)
    assert 0.5 * given < used.bytes - out.nbytes - lse.nbytes < 1.05 * given
    assert not used.read
    with Allocations(query, key, value) as packed:
        pad = Packing(padding)
        for x in (query, key, value):
            pad.pack(x)
    assert packed.bytes > 5 * given, "the count sees what a packed copy needs"


def test_float32_rows_are_scaled_by_the_tokens_of_their_own_sequence():
    tensors, padding = batch([torch.arange(5, 30), torch.arange(40)], 40)
    key = tensors[1].clone()
    key[1, 1, 3, 2] = 50.0
    spans = Spans.of_padding(padding, 40)
    largest = spans.largest(key)
    assert largest[1, 1] == 50 and torch.equal(largest[0], key[0, :, 5:30].abs().amax((1, 2)))
    starts = torch.tensor([0, 25, 65], dtype=torch.int32)
    packed = torch.cat([key[:1, :, 5:30], key[1:]], 2).expand(2, -1, -1, -1)
    assert torch.equal(Spans.of_packed(starts, 65).largest(packed), largest)


# -- packed sequences ------------------------------------------------------------------------------------------------

OPTIONS = dict(
    s=8, inflation=-1, sinks=2, recent=9, protected=0, halving="balanced", flatten=0.0, block=16, min_length=0
)


def packed(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, D: int = 8, Dv: int = 12) -> tuple:
    generator, T = torch.Generator().manual_seed(1), sum(lengths)
    tensors = [torch.randn(T, h, d, generator=generator, dtype=dtype) for h, d in ((4, D), (2, D), (2, Dv))]
    return *tensors, torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("changed", [{}, {"protected": 10}, {"min_length": 120}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_sequences_get_the_bits_that_each_has_alone_and_its_gradients(changed, dtype):
    lengths, options = (130, 1, 0, 300, 90), {**OPTIONS, **changed}
    *tensors, starts = packed(lengths, dtype)
    leaves = [x.requires_grad_() for x in tensors]
    out, lse = E.VARLEN(*leaves, starts, 300, SEED, SCALE, 3, **options)
    grad = torch.randn(out.shape, dtype=dtype)
    grads = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        own = [x[a:b].detach().transpose(0, 1)[None].requires_grad_() for x in leaves]
        alone, alone_lse = E.OP(*own, None, SEED, SCALE, 3, **options)
        assert torch.equal(out[a:b], alone[0].transpose(0, 1)) and torch.equal(lse[:, a:b], alone_lse[0])
        for x, e in zip(grads, torch.autograd.grad(alone, own, grad[a:b].transpose(0, 1)[None]), strict=True):
            assert torch.equal(x[a:b], e[0].transpose(0, 1))
    assert out.shape == (521, 4, 12) and lse.shape == (4, 521)


@pytest.mark.parametrize("changed", [{}, {"min_length": 120}, {"min_length": 400}])
def test_the_form_of_packed_sequences_that_a_gpu_runs_gives_the_same(changed):
    """In one pass over all of them, in float64."""
    *tensors, starts = packed((130, 0, 300, 90), torch.float64)
    options = {**OPTIONS, **changed}
    out, lse = E.VARLEN(*tensors, starts, 300, SEED, SCALE, 3, **options)
    shared = [x.transpose(0, 1)[None].expand(4, -1, -1, -1) for x in tensors]
    into = segments.Outputs(torch.zeros_like(out), torch.zeros_like(lse))
    own = segments.Outputs(into.out.transpose(0, 1)[None].expand(4, -1, -1, -1), into.lse[None].expand(4, -1, -1))
    E.attend_over(Call(*shared, None, SEED, SCALE, 3, options=options), Spans.of_packed(starts, 520), 300, own)
    torch.testing.assert_close(into.out, out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(into.lse, lse, rtol=1e-10, atol=1e-12)


def test_tokens_of_no_sequence_get_zeros_and_a_compiler_knows_the_shapes():
    *tensors, starts = packed((40, 25))
    out, lse = E.VARLEN(*tensors, starts[:2], 40, SEED, SCALE, 3, **OPTIONS)
    assert (out[40:] == 0).all() and (lse[:, 40:] == -math.inf).all() and out[:40].abs().sum() > 1
    given = (*tensors, starts, 40, SEED, SCALE, 3)
    torch.library.opcheck(E.VARLEN, given, OPTIONS, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"query": torch.zeros(1, 65, 4, 8)}, ValueError, r"query: shape \(1, 65, 4, 8\); must be \[tokens, heads"),
        ({"query": torch.zeros(9, 4, 8)}, ValueError, "key: 65 tokens; must be as many as those of query, 9"),
        ({"cu_seqlens": torch.tensor([0, 65])}, TypeError, "cu_seqlens: dtype torch.int64; must be torch.int32"),
        ({"cu_seqlens": torch.tensor(3, dtype=torch.int32)}, ValueError, r"cu_seqlens: shape \(\) on cpu; must be"),
        ({"cu_seqlens": torch.tensor([0, 70], dtype=torch.int32)}, ValueError, r"cu_seqlens=\[0, 70\]: must rise"),
        ({"max_seqlen": 39}, ValueError, "at most 65, by at most max_seqlen=39 at a time"),
        ({"max_seqlen": 0}, ValueError, "max_seqlen=0: must be 1 or more"),
    ],
)
def test_errors_of_packed_sequences_name_the_argument(change, error, words):
    names = ("query", "key", "value", "cu_seqlens")
    arguments = {**dict(zip(names, packed((40, 25)), strict=True)), "max_seqlen": 40, **change}
    with pytest.raises(error, match=words):
        E.VARLEN(*arguments.values(), SEED, SCALE, 3, **OPTIONS)


def test_attention_that_is_exact_for_all_is_causal_attention():
    places = [torch.arange(7, 47), torch.arange(13)]
    (q, k, v), padding = batch(places, 50)
    sources = Sources.tokens(k, v, Spans.of_padding(padding, 50))
    out, _ = segment_attention_triton(q, sources, causal_table(50, 50), SCALE)
    for b, at in enumerate(places):
        own = [x[b : b + 1, :, at] for x in (q, k, v)]
        exact = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True, scale=SCALE, enable_gqa=True)
        torch.testing.assert_close(out[b : b + 1, :, at], exact, rtol=1e-4, atol=1e-5)
