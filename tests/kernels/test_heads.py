"""Plans per KV head: every head sees the rows that its plan says, whatever the others see."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.core.call import Call
from express_compile.core.method import METHODS, cost_at
from express_compile.core.policy import Policy
from express_compile.core.rows import Rows, from_numbers, to_numbers
from express_compile.core.spec import AttentionSpec, Mask, Site
from express_compile.kernels import express as E
from express_compile.kernels import heads as P
from express_compile.kernels.attend import decode
from express_compile.kernels.attend import last as last_module
from express_compile.kernels.attend import mixed as mixed_module
from express_compile.kernels.attend.job import BLOCKS as CHOSEN_BLOCKS
from express_compile.kernels.attend.job import HEAD, KEYS, PART, SEQUENCE, SHIFT, STOP, TABLE
from express_compile.kernels.attend.last import attend_last, last_gradients
from express_compile.kernels.attend.segments import (
    SegmentTiles,
    segment_attention_backward,
    segment_attention_triton,
)
from express_compile.kernels.attend.segments_backward import segment_attention_backward_triton
from express_compile.kernels.launch import Widths
from express_compile.kernels.select import blocks, thinning
from express_compile.kernels.select.blocks import NONE, rows_visible, select_blocks_reference, select_blocks_triton
from express_compile.kernels.select.contest import CONTEST, compete_reference
from express_compile.planning import choose
from express_compile.planning.choose import Question, answer, plan
from express_compile.planning.devices import shipped
from express_compile.planning.predict import MARGIN, predict

SEED = torch.tensor(7)
WINDOW, CORE, PLACES = Rows(2, 9), Rows(2, 9, 8), Rows(3, 5, protected=20)
KEPT, BLOCKS, WHOLE = Rows(2, 9, 8, 20), Rows(2, 9, selected=1), Rows(everything=True)
SOURCES = [WINDOW, CORE, PLACES, KEPT, BLOCKS, WHOLE, Rows()]


def op(q, k, v, rows, padding=None, block=16, layer=3, min_length=0, **options):
    given = {"halving": "balanced", "inflation": -1, "flatten": 0.0, **options}
    numbers = to_numbers(rows)
    return METHODS["heads"].op(
        q, k, v, padding, SEED, 0.5, layer, rows=numbers, block=block, min_length=min_length, **given
    )


def mask_of(rows: Rows, q, k, block: int) -> torch.Tensor:
    """Which tokens each query sees, written out: bool ``[B, H_kv, Lq, Lk]``; of rows without thinned ones."""
    (B, H_kv, Lk, _), Lq = k.shape, q.shape[2]
    if rows.selected:
        config = P.BlockConfig(rows.selected, rows.sinks, rows.recent, block=block)
        return rows_visible(select_blocks_reference(q, k, config, 0.5), config, Lq, Lk)
    seen = torch.zeros(B, H_kv, Lq, Lk, dtype=torch.bool)
    for i in range(Lq):
        position = Lk - Lq + i
        first = max(0, position - (position - rows.sinks - rows.recent) % block)  # of the block of queries
        left = max(0, first - rows.recent - rows.sinks)  # tokens that left sinks and tail
        if rows.protected:
            left = left // CONTEST * CONTEST
            places = compete_reference(k, rows.sinks, left // CONTEST, rows.protected)[1]
            if left:
                seen[:, :, i].scatter_(2, places[:, :, -1, : min(rows.protected, left)].long(), True)
        seen[:, :, i, : rows.sinks] = True
        seen[:, :, i, min(rows.sinks, first) + left :] = True
        seen[:, :, i, position + 1 :] = False
    return torch.ones_like(seen).tril(Lk - Lq) if rows.everything else seen


def masked(q, k, v, rows: list[Rows], block: int) -> torch.Tensor:
    """Attention by masks, in which thinned heads are those of Express for all heads."""
    H_kv, G = k.shape[1], q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for h, own in enumerate(rows):
        heads = slice(h * G, h * G + G)
        if own.thinned:
            config = E.Express(own.thinned, own.sinks, own.recent, own.protected, block=block)
            out[:, heads] = E.express_reference(q, k, v, config, 0.5, SEED, 3)[0][:, heads]
            continue
        seen = mask_of(own, q[:, heads], k[:, h : h + 1], block)
        out[:, heads] = F.scaled_dot_product_attention(
            q[:, heads], k[:, h : h + 1], v[:, h : h + 1], seen, scale=0.5, enable_gqa=True
        )
    assert len(rows) == H_kv
    return out


# -- what a head sees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", SOURCES, ids=str)
@pytest.mark.parametrize("Lq", [700, 60])
def test_every_source_alone_is_the_mask_that_is_written_out(tokens, rows, Lq):
    q, k, v = tokens(700, B=1, Lq=Lq)
    torch.testing.assert_close(op(q, k, v, [rows])[0], masked(q, k, v, [rows] * 2, 16))


@pytest.mark.parametrize("rows", [Rows(2, 9, 8), Rows(2, 9, 8, 20), Rows(0, 0, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_rows_for_all_heads_are_express_bit_for_bit(tokens, rows, dtype):
    q, k, v = tokens(700, dtype=dtype)
    padding = torch.arange(700) >= torch.tensor([[0], [120]])
    own = dict(s=rows.thinned, sinks=rows.sinks, recent=rows.recent, protected=rows.protected)
    options = dict(halving="balanced", inflation=-1, flatten=0.0, block=16, min_length=0)
    for real in (None, padding):
        expected = METHODS["express"].op(q, k, v, real, SEED, 0.5, 3, **own, **options)
        for given_rows in ([rows], [rows, rows]):
            for x, e in zip(op(q, k, v, given_rows, real), expected, strict=True):
                assert torch.equal(x, e)


def test_a_head_draws_the_numbers_of_its_own_place_in_the_layer(tokens):
    """Of what is kept, the same tokens: alone, beside others, and among all."""
    _, k, v = tokens(600, H_kv=3)
    layout = E.make_layout(E.Express(8, 2, 9, 20, block=16), 600, 600)
    every = E.thin_reference(k, v, layout, 0.5, SEED, 3)
    small = [x.float() for x in (k, v)]
    for heads in ([1], [0, 2], [2, 1]):
        names = torch.tensor(heads, dtype=torch.int32)
        own = E.thin_reference(k, v, layout, 0.5, SEED, 3, names)
        assert torch.equal(own, every[:, heads])
        kernel, *copies = E.thin_triton(*small, layout, 0.5, SEED, 3, names)
        kernel, expected = (
            x[:, :, : layout.copied] for x in (kernel, E.thin_reference(*small, layout, 0.5, SEED, 3, names))
        )
        assert torch.equal(kernel, expected) and expected.numel()
        for x, copy in zip(small, copies, strict=True):
            assert torch.equal(copy, E.gather_rows(x[:, heads], kernel))
    unnamed = E.thin_reference(k[:, 1:], v[:, 1:], layout, 0.5, SEED, 3)
    assert not torch.equal(unnamed, every[:, 1:]), "or the test shows nothing"


@st.composite
def any_rows(draw):
    kind = draw(st.sampled_from(["everything", "selected", "kept"]))
    if kind == "everything":
        return WHOLE
    sinks, recent = draw(st.sampled_from([0, 1, 32, 70])), draw(st.sampled_from([0, 5, 64]))
    if kind == "selected":
        return Rows(sinks, recent, selected=draw(st.integers(1, 3)))
    return Rows(sinks, recent, draw(st.sampled_from([0, 2, 8, 32])), draw(st.sampled_from([0, 0, 7, 64])))


@given(
    rows=st.lists(any_rows(), min_size=1, max_size=4),
    n=st.sampled_from([1, 15, 64, 200, 513, 650]),
    past=st.sampled_from([0, 0, 40, 300]),
    group=st.integers(1, 2),
    block=st.sampled_from([16, 64, 128]),
)
@settings(max_examples=25)
def test_any_mixture_gives_every_head_its_own_rows(tokens, rows, n, past, group, block):
    H_kv = len(rows)
    Lq = max(1, n - past)
    q, k, v = tokens(n, B=1, H=group * H_kv, H_kv=H_kv, Lq=Lq)
    out, lse = op(q, k, v, rows, block=block)
    torch.testing.assert_close(out, masked(q, k, v, rows, block))
    reference, reference_lse = P.heads_reference(q, k, v, rows, 0.5, SEED, 3, block)
    assert torch.equal(out, reference) and torch.equal(lse, reference_lse) and lse.isfinite().all()


@pytest.mark.parametrize("rows", SOURCES, ids=str)
def test_a_head_is_exact_while_there_are_no_more_tokens_than_its_rows(tokens, rows):
    n = 400 if rows.everything else int(P.exact_up_to(rows))
    if n:
        q, k, v = tokens(n)
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
        torch.testing.assert_close(op(q, k, v, [rows])[0], exact)
        params = METHODS["heads"].params(Site(), Policy(methods=[P.PerHead([rows], block=16)]))
        assert not METHODS["heads"].approximates(params, n)
        assert METHODS["heads"].approximates(params, n + 400) != rows.everything


@pytest.mark.parametrize("source", ["sinks", "recent", "thinned", "protected", "selected"])
def test_rows_that_a_text_does_not_have_take_no_memory(tokens, source):
    q, k, v = (x.requires_grad_() for x in tokens(700))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=expected.dtype)
    of_head = torch.autograd.grad((expected * seed)[:, :2].sum(), (q, k, v))
    for rows in ([Rows(**{source: 2**40})], [Rows(**{source: 2**40}), Rows(recent=16)]):
        out = op(q, k, v, rows)[0]
        torch.testing.assert_close(out[:, :2], expected[:, :2])
        grads = torch.autograd.grad((out * seed)[:, :2].sum(), (q, k, v))
        for x, y in zip(grads, of_head, strict=True):
            torch.testing.assert_close(x, y)
        seen = P.rows_seen(P.PerHead(rows, last=0), 700)
        assert np.array_equal(seen[0], np.arange(1, 701)) and (len(rows) == 1 or seen[1].max() < 700)


@pytest.mark.parametrize("rows", SOURCES, ids=str)
def test_the_rows_that_a_query_sees_are_counted(tokens, rows):
    q, k, _ = tokens(900, B=1, H=1, H_kv=1)
    v = torch.eye(900, dtype=torch.float64)[None, None]
    read = (op(q, k, v, [rows])[0][0, 0] > 0).sum(-1)
    assert np.array_equal(P.rows_seen(P.PerHead([rows], block=16), 900)[0], read.numpy())


@pytest.mark.parametrize("rows", [[x] for x in SOURCES] + [[CORE, BLOCKS], [WHOLE, KEPT]], ids=str)
def test_later_tokens_change_no_bit_of_earlier_queries(tokens, rows):
    q, k, v = tokens(700, B=1, dtype=torch.float32)
    out, lse = op(q, k, v, rows)
    for at in (1, 130, 512, 699):
        other = [torch.cat([x[:, :, :at], -9 * x[:, :, at:]], 2) for x in (q, k, v)]
        changed, changed_lse = op(*other, rows)
        assert torch.equal(changed[:, :, :at], out[:, :, :at])
        assert torch.equal(changed_lse[:, :, :at], lse[:, :, :at])
        assert not torch.equal(changed[:, :, at:], out[:, :, at:]), "or the test shows nothing"


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[x] for x in SOURCES] + [[CORE, BLOCKS], [WHOLE, WINDOW]], ids=str)
def test_gradcheck_of_every_source(tokens, rows):
    """With the choice held fixed: within the finite differences none flips."""
    leaves = [x.requires_grad_() for x in tokens(150, 2, 2 if len(rows) == 2 else 1, 1, 2, 2)]
    if any(x.protected for x in rows):
        rows = [Rows(1, 3, protected=2, thinned=4 * bool(x.thinned)) for x in rows]
        leaves = [x.requires_grad_() for x in tokens(290, 2, 1, 1, 1, 1)]
    assert torch.autograd.gradcheck(lambda *x: op(*x, [replace(r) for r in rows])[0], leaves, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("rows", [CORE, KEPT, BLOCKS], ids=str)
def test_gradients_with_padding_and_a_past_are_those_of_the_sequences_alone(tokens, rows):
    q, k, v = (x.requires_grad_() for x in tokens(330, Lq=300))
    padding = torch.arange(330) >= torch.tensor([[40], [0]])
    grad = torch.randn(2, 4, 300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad(op(q, k, v, [rows, WINDOW], padding)[0], (q, k, v), grad)
    alone = [x.detach()[:1, :, at:].requires_grad_() for x, at in ((q, 10), (k, 40), (v, 40))]
    expected = torch.autograd.grad(op(*alone, [rows, WINDOW])[0], alone, grad[:1, :, 10:])
    for x, e in zip(found, expected, strict=True):
        torch.testing.assert_close(x[:1, :, x.shape[2] - e.shape[2] :], e)
        assert (x[0, :, : x.shape[2] - e.shape[2]] == 0).all()


# -- as an op ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [[CORE, BLOCKS], [WHOLE, WINDOW], [KEPT]], ids=str)
def test_opcheck(tokens, rows, padded):
    q, k, v = (x.requires_grad_() for x in tokens(150))
    padding = torch.arange(150) >= torch.tensor([[0], [30]]) if padded else None
    options = dict(rows=to_numbers(rows), halving="balanced", inflation=-1, flatten=0.0, block=16, min_length=0)
    args = (q, k, v, padding, SEED, 0.5, 3)
    torch.library.opcheck(METHODS["heads"].op, args, options)
    out, lse = (x.detach() for x in METHODS["heads"].op(*args, **options))
    plain = (x.detach() for x in (q, k, v))
    torch.library.opcheck(
        torch.ops.express_compile.heads_backward.default, (out, out, lse, *plain, padding, SEED, 0.5, 3), options
    )


class Net(torch.nn.Module):
    """Queries, keys and values of one sequence: features of ``x`` ``[B, n, 64]``."""

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(2, (-1, 8)).transpose(1, 2) for part in x.split([32, 16, 16], 2)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.split(x), is_causal=True, enable_gqa=True)


def test_other_lengths_are_not_compiled_again():
    torch._dynamo.reset()
    net, options = Net(), {"methods": [P.PerHead([CORE, BLOCKS])], "strict": True}
    compiled = torch.compile(net, backend="express", options=options)
    for i, n in enumerate((300, 700, 512)):
        x = torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n))
        torch._dynamo.mark_dynamic(x, 1)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            out = compiled(x)
        expected, exact = P.heads_reference(*net.split(x), [CORE, BLOCKS], 8**-0.5, torch.tensor(0))[0], net(x)
        torch.testing.assert_close(out[:, 2:], expected[:, 2:])  # blocks draw nothing
        assert (out - exact).norm() > 0.1 * exact.norm()


def test_no_size_of_a_call_has_to_be_more_than_nothing():
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        B, H, n = shape
        q, k, v = (torch.randn(B, heads, n, 8) for heads in (H, H // 2, H // 2))
        assert op(q, k, v, [CORE, BLOCKS])[0].shape == (B, H, n, 8)


# -- the kernels, in the interpreter -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [BLOCKS, Rows(70, 5, selected=3), Rows(0, 0, selected=2)], ids=str)
@pytest.mark.parametrize("Lq", [215, 60])
def test_the_kernels_attend_to_selected_rows_as_the_reference_does(tokens, rows, Lq):
    q, k, v = tokens(215, B=1, Lq=Lq, dtype=torch.float32, D=16, Dv=16)
    call = Call(q, k, v, None, SEED, 0.5, 3)
    config = P.PerHead([rows], block=16).config(rows)
    chosen = select_blocks_reference(q, k, config, 0.5)
    sources, index, table = P._selected(call, config, chosen)
    out, lse = segment_attention_triton(q, sources, table, 0.5)
    expected, expected_lse = op(q, k, v, [rows])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    found = segment_attention_backward_triton(grad, q, sources.gathered(), out, lse, table, 0.5)
    slow = segment_attention_backward(grad, q, sources.gathered(), expected, expected_lse, table, 0.5)
    for x, e in zip(found, slow, strict=True):
        torch.testing.assert_close(x, e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [WINDOW, PLACES], ids=str)
def test_the_kernels_attend_without_a_coreset_as_the_reference_does(tokens, rows):
    q, k, v = tokens(540, B=1, dtype=torch.float32, D=16, Dv=16)
    layout = E.make_layout(P.PerHead([rows], block=16).config(rows), 540, 540)
    index, *copies = E.thin_triton(k, v, layout, 0.5, SEED, 3)
    expected = E.thin_reference(k, v, layout, 0.5, SEED, 3)  # places of one contest have no order
    places = max(rows.protected, 1)
    assert torch.equal(*(x.unflatten(2, (-1, places)).sort().values for x in (index, expected)))
    assert not copies[0].numel() and expected.numel() == 2 * rows.protected * 2
    sources = P.Sources(k, v, *copies, index if rows.protected else None)
    out, _ = segment_attention_triton(q, sources, layout.table, 0.5)
    torch.testing.assert_close(out, op(q, k, v, [rows])[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="session")
def small(tokens: Callable[..., list[torch.Tensor]]) -> Callable[..., tuple[Call, P.PerHead]]:
    """A call of heads that differ, and what is asked of them."""

    def make(rows: list[Rows], n: int, Lq: int | None = None, B: int = 1, **own: Any) -> tuple[Call, P.PerHead]:
        q, k, v = tokens(n, B=B, H=len(rows), H_kv=len(rows), D=16, Dv=16, Lq=Lq, dtype=torch.float32)
        return Call(q, k, v, None, SEED, 0.5, 3), P.PerHead(rows, **{"block": 32, **own})

    return make


@pytest.mark.parametrize(
    ("rows", "n", "Lq", "last"),
    [
        ([WINDOW, BLOCKS, WHOLE, KEPT], 310, None, 45),
        ([BLOCKS, Rows(40, 9, selected=2), Rows(2, 9, selected=3), WHOLE, WHOLE], 250, None, 0),
        ([CORE, PLACES, CORE, KEPT, Rows(2, 9, 16), Rows(0, 0, selected=1)], 350, 60, 59),
        ([BLOCKS], 300, 100, 32),
        ([KEPT], 150, None, 40),
        ([Rows(2, 9, selected=1), Rows(2, 9, selected=2)], 210, None, 1),
    ],
    ids=str,
)
def test_one_launch_for_all_heads_gives_each_what_the_reference_gives(tokens, rows, n, Lq, last, judge_together):
    """Two sequences, two query heads for each KV head; whatever was in the memory that it takes."""

    q, k, v = tokens(n, H=2 * len(rows), H_kv=len(rows), D=16, Dv=12, Lq=Lq, dtype=torch.float32)
    judge_together(q, k, v, rows, last)


def test_other_jobs_would_overwrite_the_last_queries_if_they_had_no_end(small, accesses, faults_of, monkeypatch):
    call, own = small([WINDOW], 210, last=9)
    expected = P.heads_reference(call.query, call.key, call.value, own, 0.5, SEED, 3)[0]

    def judged() -> tuple[bool, int]:
        with accesses.watched() as faults:
            out, _ = P.together(call, own, None, 9)
        return torch.allclose(out[:, :, -9:], expected[:, :, -9:], rtol=1e-4, atol=1e-5), len(faults)

    assert judged() == (True, 0)
    P._together.cache_clear()
    lists = mixed_module.Mixture.lists

    def endless(self: mixed_module.Mixture, *given: Any) -> tuple[np.ndarray, ...]:
        jobs, *others = lists(self, *given)
        jobs[:, STOP] = 210
        return jobs, *others

    monkeypatch.setattr(mixed_module.Mixture, "lists", endless)
    right, faults = judged()
    P._together.cache_clear()
    assert not right and faults


@pytest.mark.parametrize("halving", ["balanced", "kernel", "uniform"])
def test_heads_with_other_coresets_are_thinned_in_the_same_launches_as_they_are_alone(small, launches_of, halving):
    """Bit for bit; streams of tokens and of losers of contests, with buckets of several tiles."""
    rows, launches = [PLACES, Rows(2, 9, 32, 20), CORE, Rows(5, 9, 32)], launches_of(thinning)
    call, own = small(rows, 320, B=2, halving=halving)
    what, statistics = P._together(own, 2, 1, len(rows), 320, 320, mixed=False), halving != "uniform"

    def kept(call: Call) -> tuple[torch.Tensor, ...]:
        launches.clear()
        index = torch.zeros(what.indexed, dtype=torch.int32)
        copies = tuple(torch.zeros(what.copied, 16) for _ in range(2))
        P._thin(call, what.thinned, index, copies)
        return index, *copies

    found = kept(call)
    kernels = [kernel for kernel, _ in launches]
    assert kernels == [thinning._describe_kernel, thinning._thin_kernel][1 - statistics :]
    assert not torch.equal(found[0], kept(replace(call, layer=4))[0])
    launches.clear()
    index, *copies = (torch.zeros_like(x) for x in found)
    for one in what.thinned:
        P._thin(call, (one,), index, tuple(copies))
    assert all(map(torch.equal, found, (index, *copies)))
    assert len(launches) == 1 + 2 + 2 + 2 * statistics  # zeros come with a contest, statistics not for CORE


def test_tiles_are_made_once_for_layers_whose_heads_have_the_same_rows_in_another_order(small):
    rows = [Rows(2, 9, 32, 20), CORE, Rows(5, 9, 32)]
    made = []
    for order in (rows, rows[::-1], rows[1:] + rows[:1]):
        call, own = small(order, 340)
        P.together(call, own, None)
        made.append(thinning._tiles.cache_info().misses)
    assert made[0] == made[1] == made[2]


def test_heads_whose_blocks_begin_together_choose_in_two_launches_what_they_choose_alone(small, launches_of):
    rows = [BLOCKS, Rows(2, 9, selected=2), WINDOW, Rows(2, 41, selected=3), BLOCKS, Rows(2, 20, selected=1)]
    call, own = small(rows, 330, B=2)
    alone = {}
    for group in P.groups(own.rows, len(rows)):
        if group.rows.selected:
            few = group.of(call)
            alone[group] = select_blocks_triton(few.query, few.key, own.config(group.rows), 0.5)
    launches = launches_of(blocks)
    found = {}
    for family in P._families(own, len(rows), len(rows), 330):
        chosen = P._choose(call, family, None)
        for group in family.groups:
            found[group], beyond = chosen[:, family.at(group)].tensor_split([group.rows.selected], 3)
            assert (beyond == NONE).all()
    assert found.keys() == alone.keys() and all(torch.equal(found[x], alone[x]) for x in alone)
    # of two sequences: four heads, and the one whose blocks of queries begin elsewhere
    assert [grid[-1] for _, grid in launches] == [8, 8, 2, 2]


@given(
    rows=st.lists(any_rows(), min_size=2, max_size=3),
    n=st.sampled_from([1, 64, 290]),
    past=st.sampled_from([0, 40]),
    block=st.sampled_from([32, 128]),
)
@settings(max_examples=8)
def test_one_launch_for_any_mixture(small, rows, n, past, block):
    call, own = small(rows, n, max(1, n - past), block=block)
    out, lse = P.together(call, own, None)
    expected, expected_lse = P.heads_reference(call.query, call.key, call.value, own, 0.5, SEED, 3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(1,), (0, 2), (2, 3)])
def test_heads_are_copied_from_all_and_back(tokens, heads: tuple[int, ...]) -> None:
    """Two query heads each, values of another width and log-sum-exps of none, another number of queries than keys."""
    q, k, v = tokens(150, H=8, H_kv=4, D=16, Dv=24, Lq=20, dtype=torch.float32)
    every = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, q[..., 0].contiguous())
    q_heads = tuple(2 * h + i for h in heads for i in range(2))
    own = [q_heads if x.shape[1] == 8 else heads for x in every]
    expected = [x[:, list(few)] for x, few in zip(every, own, strict=True)]
    few = [torch.full_like(x, math.nan) for x in expected]
    P._copy_heads(every[:3], few[:3], own[:3], into=False)
    P._copy_heads(every[3:], few[3:], own[3:], into=False)
    assert all(map(torch.equal, few, expected))
    outputs = [torch.zeros_like(x) for x in (every[0], every[3])]
    P._copy_heads((few[0], few[3]), outputs, (q_heads, q_heads), into=True)
    for out, x in zip(outputs, (every[0], every[3]), strict=True):
        assert torch.equal(out[:, q_heads], x[:, q_heads]) and out.count_nonzero() == x[:, q_heads].count_nonzero()


def test_one_launch_reads_heads_where_a_projection_of_all_of_them_left_them(small):
    rows = [WINDOW, BLOCKS, CORE]
    call, own = small(rows, 300)
    packed = torch.cat([x.transpose(1, 2) for x in (call.query, call.key, call.value)], 2)
    q, k, v = (x.transpose(1, 2) for x in packed.split(3, 2))
    assert not q.is_contiguous() and torch.equal(q, call.query)
    found, expected = (P.together(x, own, None) for x in (replace(call, query=q, key=k, value=v), call))
    for x, e in zip(found, expected, strict=True):
        assert torch.equal(x, e)


@given(
    rows=st.lists(any_rows(), min_size=1, max_size=4),
    n=st.sampled_from([1, 64, 290, 1000]),
    past=st.sampled_from([0, 40, 200]),
    block=st.sampled_from([32, 128]),
    B=st.integers(1, 2),
    hopper=st.booleans(),
    mixed=st.booleans(),
    last=st.sampled_from([0, 0, 1, 16, 45, 200]),
)
def test_every_query_of_every_head_that_is_not_exact_is_in_one_job_and_long_jobs_come_first(
    rows, n, past, block, B, hopper, mixed, last
):
    """And a job with its table, its part of the buffers, and as many rows as the query sees; exact heads may be there,
    too."""
    Lq, group = max(1, n - past), 2
    last = min(last, Lq - 1)
    own = P.PerHead(rows, block=block, last=last)
    what = P._together(own, B, group, len(rows), Lq, n, mixed, last)
    exact = [h for h, x in enumerate(rows) if n <= P.exact_up_to(x)]
    if mixed and what.mixture is not None:
        exact = []
    assert [h for group in what.exact for h in group.heads] == exact
    if what.mixture is None:
        assert len(exact) == len(rows)
        return
    of_tiles = SegmentTiles(Widths(8, 8, 16, 16), 16, 16, 4, 1, hopper)
    jobs, start, tiles, _, tail, *_ = what.mixture.lists(of_tiles, B)
    covered = np.zeros((B, group * len(rows), Lq), int)
    rows_of = P.rows_seen(own, n)[:, n - Lq :]
    loads = []
    for job in jobs.tolist():
        first = job[PART] * 16 - job[SHIFT]
        own_queries = slice(max(0, first), min(first + 16, job[STOP]))
        covered[job[SEQUENCE], job[HEAD], own_queries] += 1
        block_of = job[TABLE] + job[PART] // (block // 16)
        listed = tiles[start[3 * block_of] : start[3 * block_of + 3], 1].sum()
        end = own_queries.stop
        seen = listed + KEYS * job[CHOSEN_BLOCKS] + n - Lq + end - tail[block_of]
        if n == Lq:  # rows_seen is of a prefill of all tokens
            assert seen == rows_of[job[HEAD] // group, end - 1]
        loads.append(len(tiles[start[3 * block_of] : start[3 * block_of + 3]]) + 4 * job[CHOSEN_BLOCKS]
                     + -(-(n - Lq + end - tail[block_of]) // 16))  # fmt: skip
    seen_by = [h for h in range(group * len(rows)) if h // group not in exact]
    assert (covered[:, seen_by] == 1).all() and covered.sum() == B * len(seen_by) * Lq
    loads = np.array(loads) + mixed_module.STARTING
    assert (loads[1:] <= loads[:-1] * 2**0.5).all()
    dealt, *_, begin = what.mixture.lists(of_tiles, B, 7)
    assert sorted(dealt.tolist()) == sorted(jobs.tolist()) and begin[[0, -1]].tolist() == [0, len(jobs)]
    together = jobs[:, [int(HEAD), int(PART)]].reshape(-1, group, 2)
    assert (together[:, :, 0] // group == together[:, :1, 0] // group).all(), "heads that read the same are neighbours"
    assert (together[:, :, 1] == together[:, :1, 1]).all()


def test_jobs_are_dealt_out_so_that_no_program_waits_long_for_another():
    """Where the next job is always that of the program which is done first; in turns some had both long jobs and as
    many others as all."""
    load = np.array([256] * 32 + [70] * 9 + [12, 10] * 2000 + [2] * 500)
    length = np.ceil(2 * np.log2(load))
    for programs in (132, 7, 5000):
        order, begin = mixed_module.dealt(load, length, programs)
        assert sorted(order) == list(range(len(load))) and len(begin) == programs + 1
        own = [order[a:b] for a, b in pairwise(begin)]
        assert all((np.diff(x) > 0).all() for x in own), "the longest first"
        busy = np.array([load[x].sum() for x in own])
        assert busy.max() <= max(load.max(), 1.01 * busy.mean() + 2)
        turns = np.append(load, np.zeros(-len(load) % programs)).reshape(-1, programs)
        turns[1::2] = turns[1::2, ::-1]
        assert programs != 132 or turns.sum(0).max() > 1.3 * busy.max()


# -- the last queries of a call ------------------------------------------------------------------------------------


@given(
    n=st.integers(60, 200), past=st.sampled_from([0, 37]), last=st.integers(1, 40), B=st.integers(1, 2),
    shape=st.sampled_from([(4, 2), (6, 1), (2, 2)]),
)  # fmt: skip
@settings(max_examples=12)
def test_the_last_queries_see_everything_and_the_others_do_not_change(tokens, n, past, last, B, shape):
    H, H_kv = shape
    q, k, v = tokens(n, B=B, H=H, H_kv=H_kv, Lq=n - past)
    rows = [WINDOW, BLOCKS][:H_kv]
    out, lse = op(q, k, v, rows, last=last)
    plain, plain_lse = op(q, k, v, rows)
    exact, exact_lse = op(q, k, v, [WHOLE] * H_kv)
    n_last = min(last, n - past)
    torch.testing.assert_close(out[:, :, -n_last:], exact[:, :, -n_last:])
    torch.testing.assert_close(lse[:, :, -n_last:], exact_lse[:, :, -n_last:])
    assert torch.equal(out[:, :, :-n_last], plain[:, :, :-n_last])
    assert torch.equal(lse[:, :, :-n_last], plain_lse[:, :, :-n_last])
    assert not torch.allclose(out[:, :, -1], plain[:, :, -1])


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
def test_the_last_queries_are_those_of_each_sequence_whatever_its_padding(tokens, side):
    """By the reference, each sequence alone, and by what the kernels do with a whole batch."""
    n, last = 120, 11
    q, k, v = tokens(n, B=3)
    padding = torch.ones(3, n, dtype=torch.bool)
    if side in ("left", "both"):
        padding[0, :30], padding[1, :111] = False, False
    if side in ("right", "both"):
        padding[0, 90:], padding[2, 7:] = False, False
    if side == "holes":
        padding[0, 20:50], padding[1, 100:104] = False, False
    rows = [WINDOW, KEPT]
    out, lse = op(q, k, v, rows, padding=padding, last=last)
    plain, plain_lse = op(q, k, v, rows, padding=padding)
    call = Call(q, k, v, padding, SEED, 0.5, 3)
    found = plain.clone(), plain_lse.clone()
    attend_last(call, last, found)
    exact, exact_lse = op(q, k, v, [WHOLE, WHOLE], padding=padding)
    for b, real in enumerate(padding):
        places = real.nonzero()[:, 0]
        ends = places[places > places[-1] - last]  # the last places of the batch's kernel may have holes
        for (x, x_lse), own in ((found, ends), ((out, lse), places[-last:])):
            torch.testing.assert_close(x[b, :, own], exact[b, :, own])
            torch.testing.assert_close(x_lse[b, :, own], exact_lse[b, :, own])
            others = torch.ones(n, dtype=torch.bool)
            others[own] = False
            assert torch.equal(x[b, :, others], plain[b, :, others])
            assert torch.equal(x_lse[b, :, others], plain_lse[b, :, others])


@given(
    n=st.integers(1, 90), past=st.sampled_from([0, 61]), last=st.integers(1, 20),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]), left=st.integers(0, 160), right=st.integers(0, 160),
    kind=st.sampled_from(["", "padded", "holes"]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernels_give_the_last_queries_what_their_reference_gives(
    tokens, poison, monkeypatch, n, past, last, heads, left, right, kind, seed
):
    """In pieces of up to 6 queries, and nothing of padding, which holds NaN; other queries keep what they have."""
    monkeypatch.setattr(decode, "MAX_QUERIES", 6)
    (H, H_kv), L = heads, n + past
    q, k, v = tokens(L, H=H, H_kv=H_kv, D=20, Dv=12, Lq=n, dtype=torch.float32)
    padding, place = None, torch.arange(L)
    if kind:
        padding = torch.stack([place >= left, place < L - right])
        if kind == "holes":
            padding &= torch.rand(padding.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        k, v = (x.masked_fill(~padding[:, None, :, None], math.nan) for x in (k, v))
    call, results = Call(q, k, v, padding, SEED, 0.5, 3), []
    for fits in (False, True):
        results.append((torch.full((2, H, n, 12), 7.0), torch.full((2, H, n), 8.0)))
        monkeypatch.setattr(last_module, "fits", lambda *x, fits=fits: fits)
        attend_last(call, last, results[-1])
    (expected, expected_lse), (out, lse) = results
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(lse == 8, expected_lse == 8) and out.isfinite().all()
    if not kind:
        assert (lse != 8).all(1).sum(1).tolist() == [min(last, n)] * 2


@pytest.mark.parametrize(("n", "Lq", "last"), [(36, 36, 5), (40, 20, 17), (64, 3, 20)])
def test_gradients_with_exact_last_queries(tokens, n, Lq, last):
    q, k, v = (x.requires_grad_() for x in tokens(n, B=1, D=2, Dv=1, Lq=Lq))
    rows = [WINDOW, PLACES]
    assert torch.autograd.gradcheck(lambda *x: op(*x, rows, last=last)[0], (q, k, v))
    a, b = (torch.autograd.grad(op(q, k, v, rows, last=x)[0].sum(), k)[0] for x in (0, last))
    assert not torch.allclose(a, b)


def test_gradients_of_padded_batches_with_exact_last_queries(tokens):
    """What the kernels' route adds up is what every sequence gives alone."""
    n, last = 90, 7
    q, k, v = tokens(n, B=2)
    padding = torch.ones(2, n, dtype=torch.bool)
    padding[0, :40] = padding[1, 60:] = False
    out, lse = op(q, k, v, [WHOLE, WHOLE], padding=padding)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(out.shape, generator=generator, dtype=out.dtype) * padding[:, None, :, None]
    hidden = ~padding[:, None, :, None]
    unreadable = (x.masked_fill(hidden, math.nan) for x in (k, v))
    rest, added = last_gradients(Call(q, *unreadable, padding, SEED, 0.5, 3), last, grad, out, lse)
    ends = torch.zeros_like(padding)
    ends[0, -last:] = ends[1, 60 - last : 60] = True
    assert torch.equal(rest, grad * ~ends[:, None, :, None])
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    again = op(*inputs, [WHOLE, WHOLE], padding=padding)[0]
    expected = torch.autograd.grad(again, inputs, grad * ends[:, None, :, None])
    for x, e in zip(added, expected, strict=True):
        torch.testing.assert_close(x, e)


def test_rows_seen_and_cost_count_the_last_queries():
    own = P.PerHead([WINDOW, WHOLE], block=16, last=4)
    seen, plain = P.rows_seen(own, 50), P.rows_seen(replace(own, last=0), 50)
    assert seen[0, -4:].tolist() == [47, 48, 49, 50] and (seen[:, :-4] == plain[:, :-4]).all()
    spec = AttentionSpec(1, 4, 2, 1000, 1000, 8, 8, torch.bfloat16, "cuda", 0.5, Mask(causal=True))
    params = {"rows": to_numbers([WINDOW]), **replace(own, rows=(WINDOW,)).pack(), "min_length": 0}
    padded = replace(spec, mask=Mask(causal=True, padding=True))
    with_exact, read = {"rows": to_numbers([WINDOW, WHOLE])}, 2 * 2 * 1000 * 16
    for at, rows, more in ((spec, {}, (4, 0, 0)), (spec, with_exact, (2, 0, 0)), (padded, {}, (4, read, 2))):
        with_last, without = (cost_at("heads", at, {**params, **rows, "last": x}) for x in (4, 0))
        assert with_last.scores - without.scores == more[0] * 4 * 1000
        assert (with_last.bytes - without.bytes, with_last.launches - without.launches) == more[1:]
    short = replace(spec, Lq=11, Lk=11)
    assert cost_at("heads", short, params) == cost_at("heads", short, {**params, "last": 0})


# -- errors and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (257, ValueError), (1.5, TypeError), (True, TypeError)])
def test_how_many_last_queries_there_may_be(value, error):
    with pytest.raises(error, match=f"last={value!r}"):
        P.PerHead([CORE], last=value)


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([], ValueError, r"rows=\(\): must have an entry for every KV head"),
        (3, TypeError, "must be a list with an entry for every KV head"),
        ([Rows(thinned=1)], ValueError, r"rows\[0\]: thinned=1; must be 0, or a power of two from 2 on"),
        ([CORE, Rows(thinned=8, selected=2)], ValueError, r"rows\[1\]: 8 thinned \+ 2 selected blocks; .* count twice"),
        ([Rows(protected=8, selected=2)], ValueError, r"rows\[0\]: .* count twice"),
        ([{"sinks": -1}], ValueError, r"rows\[0\]: sinks=-1"),
        (
            {"a.b": [{"window": 3}]},
            TypeError,
            r"rows\['a.b'\]: .*rows\[0\]: .*rows: window; must be an object of everything",
        ),
        ({3: [CORE]}, TypeError, "3: must be a module path"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, error, words):
    with pytest.raises(error, match=words):
        P.PerHead(rows)


def test_what_else_does_not_fit_is_named(tokens):
    with pytest.raises(ValueError, match="inflation=9: must be an integer from 0 to 4 for s=8"):
        P.PerHead([CORE], inflation=9)
    with pytest.raises(ValueError, match="block=20: must be 16, 32, 64 or 128"):
        P.PerHead([CORE], block=20)
    q, k, v = tokens(20)
    with pytest.raises(ValueError, match="rows lists 3 heads, the call has 2 KV heads and 4 query heads"):
        op(q, k, v, [CORE] * 3)
    with pytest.raises(ValueError, match="rows: 7 numbers; must be 6 for every head: sinks, recent"):
        from_numbers([0] * 7)


def test_numbers_of_an_op_are_rows_and_back():
    assert from_numbers(to_numbers(SOURCES)) == tuple(SOURCES)
    assert len(to_numbers([CORE])) == 6


def spec(**changes: Any) -> AttentionSpec:
    base = dict(B=1, H=4, H_kv=2, Lq=600, Lk=600, D=8, Dv=8, dtype=torch.float32, device="cpu", scale=0.5)
    return AttentionSpec(**{**base, "mask": Mask(causal=True), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(mask=Mask()), "it is not causal"),
        (dict(mask=Mask(causal=True, window=64)), "it has a sliding window of 64"),
        (dict(Lq=1, mask=Mask(causal=True, offset=599)), "decoding 1 token"),
        (dict(H_kv=4), "rows lists 2 heads, the site has 4 KV heads"),
        (dict(dropout_p=0.1), "dropout_p=0.1"),
    ],
)
def test_refusals_say_why(changes, words):
    made = plan(spec(**changes), Policy(methods=[P.PerHead([CORE, BLOCKS])]))
    assert made.verdict == "refused" and words in made.reason


def test_a_mapping_of_module_paths_is_the_plan_of_each_site():
    policy = Policy(methods=[P.PerHead({"layers.0": [CORE, BLOCKS], "layers.1": [WHOLE]})])
    first, second, third = (answer(Question(f"layers.{i}", spec=spec()), policy) for i in range(3))
    assert first.rows == (CORE, BLOCKS) and first.params["rows"] == to_numbers([CORE, BLOCKS])
    assert second.rows == (WHOLE, WHOLE) and third.verdict == "refused"
    assert third.reason == "its rows have no entry for this module"
    assert Policy.from_json(policy.to_json()) == policy
    wrong = answer(Question("layers.0", spec=spec(H_kv=4)), policy)
    assert wrong.reason == "rows lists 2 heads, the site has 4 KV heads"


@given(
    rows=st.dictionaries(st.text(max_size=5), st.lists(any_rows(), min_size=1, max_size=3), max_size=3),
    block=st.sampled_from([16, 128]),
)
def test_plans_survive_json_and_their_plain_data(rows, block):
    own = P.PerHead(rows, block=block)
    assert P.PerHead(**own.data()) == own
    assert Policy.from_json(Policy(methods=[own]).to_json()).of("heads") == own


# -- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", SOURCES, ids=str)
def test_the_scores_of_attention_are_the_rows_that_queries_see(rows):
    n = 16_384
    own = P.PerHead([rows])
    params = METHODS["heads"].params(Site(), Policy(methods=[own]))
    at = spec(Lq=n, Lk=n, H=2)
    scores = cost_at("heads", at, params).scores
    choice = 2 * n / 128 * n / 2 if rows.selected else 0
    assert scores == pytest.approx(2 * P.rows_seen(own, n)[0].sum() + choice, rel=0.03)


def test_the_cost_of_a_mixture_is_that_of_its_heads():
    n, rows = 8192, [Rows(32, 256, 64, 64), WHOLE, Rows(32, 256, selected=8), WHOLE]
    at = spec(Lq=n, Lk=n, H=8, H_kv=4)
    params = METHODS["heads"].params(Site(), Policy(methods=[P.PerHead(rows)]))
    whole = cost_at("heads", at, params)
    alone = [cost_at("heads", replace(at, H=2, H_kv=1), {**params, "rows": to_numbers([x])}) for x in rows]
    assert whole.flops == pytest.approx(sum(x.flops for x in alone))
    assert whole.scores == pytest.approx(sum(x.scores for x in alone))
    uniform = {**params, "rows": to_numbers([Rows(32, 256, 64, 64)])}
    own = METHODS["express"].params(Site(), Policy(methods=[E.Express(64, 32, 256, 64)]))
    assert cost_at("heads", at, uniform) == cost_at("express", at, own)


def test_a_plan_beside_exact_attention_runs_where_it_is_predicted_to_be_faster(monkeypatch):
    """The more heads see everything, the later it pays, and with all of them never."""
    monkeypatch.setattr(choose, "device_of", lambda device: shipped()["NVIDIA H200"])
    shape = dict(H=32, H_kv=8, D=128, Dv=128, dtype=torch.bfloat16, device="cuda")
    lengths, first = [2**i for i in range(10, 21)], []
    for exact in (0, 2, 4, 8):
        own = P.PerHead(([WHOLE] * exact + [Rows(32, 256, selected=16), Rows(32, 256)] * 4)[:8])
        found = [answer(Question(spec=spec(Lq=n, Lk=n, **shape)), Policy(methods=[own, "exact"])) for n in lengths]
        for n, decision in zip(lengths, found, strict=True):
            times = decision.predicted_ms
            assert set(times) == {"heads", "exact"}
            assert (decision.method == "heads") == (times["heads"] * MARGIN <= times["exact"]), n
            assert decision.rows == (own.rows if decision.method == "heads" else ())
        methods = [decision.method for decision in found]
        assert methods == sorted(methods), "exact up to a length, and then not"
        first.append(methods.count("exact"))
    assert first == sorted(first) and first[0] < first[2] and first[-1] == len(lengths)


def test_fewer_exact_heads_are_predicted_to_be_faster():
    H200 = shipped()["NVIDIA H200"]
    at = spec(B=1, H=32, H_kv=8, Lq=32_768, Lk=32_768, D=128, Dv=128, dtype=torch.bfloat16, device="cuda")
    times = [
        predict("heads", at, Policy(methods=[P.PerHead([WHOLE] * i + [Rows(32, 256)] * (8 - i))]), H200)
        for i in range(9)
    ]
    assert times == sorted(times) and times[8] == predict("exact", at, Policy(), H200)
