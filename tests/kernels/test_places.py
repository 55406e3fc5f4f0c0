"""A step over the places of a cache by kernels: what the reference holds and attends to, whatever heads hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile.core.rows import Rows
from express_compile.kernels import held as K
from express_compile.kernels.attend import places as P
from express_compile.kernels.heads import EVERYTHING, PerHead
from express_compile.kernels.held import Held
from express_compile.kernels.launch import Random, philox_uniform
from express_compile.kernels.select.halving import Decider, get_rule, halve_reference
from express_compile.kernels.select.schedule import Halving, stage
from express_compile.kernels.select.thinning import draws_triton, halve

MIXED = (Rows(2, 20), Rows(2, 9, 8, 10), EVERYTHING, Rows(3, 40, 16), Rows(1, 5, selected=1), Rows(0, 0))


def filled(k: torch.Tensor, v: torch.Tensor, n: int, real: K.Real = None, turn: int = 0) -> Held:
    cache = Held(PerHead(MIXED), k, v, Random(torch.tensor(7), 3), 0.5, turn)
    cache.fill(k[:, :, :n], v[:, :, :n], real)
    return cache


def held_by(part: K.HeldRows) -> list[tuple[int, float]]:
    there = part.log_weight[0, 0] > -math.inf
    return sorted(zip(part.token[0, 0][there].tolist(), part.log_weight[0, 0][there].tolist(), strict=True))


def assert_same(one: Held, other: Held) -> None:
    assert one.length == other.length
    for mine, its in zip(one.parts, other.parts, strict=True):
        assert mine.left == its.left
        assert torch.equal(mine.log_weight[:, :, : its.log_weight.shape[2]], its.log_weight)
        there = its.log_weight > -math.inf
        for name in ("token", "key", "value"):
            assert torch.equal(getattr(mine, name)[:, :, : there.shape[2]][there], getattr(its, name)[there])


@pytest.mark.parametrize("multiprocessors", [132, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_hold_and_attend_to_what_the_reference_does(
    poison, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, multiprocessors: int
) -> None:
    monkeypatch.setattr(P, "device_of", lambda device: (multiprocessors, 228 << 10))  # one: by tiles of half the rows
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 270, d, generator=draw).to(dtype) for h, d in ((18, 16), (6, 16), (6, 8)))
    real = [(True,) * 254, tuple(i >= 90 for i in range(254))]
    one, other = (filled(k, v, 254, real) for _ in range(2))
    for i in range(254, 258):
        new = [x[:, :, i : i + 1] for x in (q, k, v)]
        for cache in (one, other):
            cache.settle(single=True)
            cache.prepare_step()
        expected = other.launch_step(*new)
        for _ in range(2):  # repeated, it changes nothing
            out = one.step_triton(*new)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-3
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        for cache in (one, other):
            cache.end_step()
    assert_same(one, other)


@pytest.mark.parametrize(
    ("row_bytes", "programs", "rows", "at_once"),
    [(256, 132, 128, 1), (256, 133, 64, 4), (128, 4000, 64, 4), (512, 4000, 32, 2), (1024, 4000, 32, 1)],
)
def test_tiles_are_halved_where_programs_wait_for_one_another(row_bytes, programs, rows, at_once) -> None:
    tiles = P._tiling(row_bytes, programs, torch.device("cpu"))
    assert (tiles.rows, tiles.programs) == (rows, at_once)


SIZES = st.fixed_dictionaries(
    dict(B=st.integers(1, 2), G=st.integers(1, 5), D=st.sampled_from([4, 16, 20]), Dv=st.sampled_from([4, 16, 24]))
)


@settings(max_examples=4)
@given(SIZES, st.lists(st.sampled_from(MIXED), min_size=1, max_size=3), st.integers(40, 140), st.data())
def test_steps_of_any_shape_repeat_without_a_trace(sizes, rows, n: int, data) -> None:
    """As a graph is recorded: the launches run a few times before the token counts, and leave the same bits. Tokens are
    taken back and longer steps come in between."""
    B, G, H_kv = sizes["B"], sizes["G"], len(rows)
    draw = torch.Generator().manual_seed(n)
    shapes = ((H_kv * G, sizes["D"]), (H_kv, sizes["D"]), (H_kv, sizes["Dv"]))
    q, k, v = (torch.randn(B, h, n + 40, d, generator=draw) for h, d in shapes)
    pad = data.draw(st.integers(0, n - 1), "padding of the last sequence")
    real = [(True,) * n] * (B - 1) + [tuple(i >= pad for i in range(n))]
    one, other = (Held(PerHead(tuple(rows)), k, v, Random(torch.tensor(7), 3), 0.5) for _ in range(2))
    for cache in (one, other):
        cache.fill(k[:, :, :n], v[:, :, :n], real)
    for width in data.draw(st.lists(st.sampled_from([1, 1, 1, 3, 9, 0]), min_size=2, max_size=4), "widths"):
        step = [x[:, :, n : n + width] for x in (q, k, v)]
        n += width
        for cache in (one, other):
            cache.settle(single=width == 1)
            if width == 0 and cache.exact_tail:
                cache.drop(1)
        if width == 1:
            for cache in (one, other):
                cache.prepare_step()
            first, *outs = (one.step_triton(*step) for _ in range(3))
            assert all(torch.equal(out, first) for out in outs)
            torch.testing.assert_close(first, other.launch_step(*step), rtol=1e-5, atol=1e-5)
            before = [getattr(part, name).clone() for part in one.parts for name in (*part.TENSORS, "pages", "listed")]
            one.step_triton(*step)
            after = [getattr(part, name) for part in one.parts for name in (*part.TENSORS, "pages", "listed")]
            assert all(map(torch.equal, before, after))
            for cache in (one, other):
                cache.end_step()
        elif width:
            torch.testing.assert_close(one.extend(*step), other.extend(*step), rtol=1e-5, atol=1e-5)
    for cache in (one, other):
        cache.settle()
    assert_same(one, other)


@pytest.mark.parametrize("rows", [MIXED, MIXED[4:5]], ids=["mixed", "selected"])
def test_attention_to_what_is_held_writes_nothing(rows: tuple[Rows, ...]) -> None:
    """The new token is held already, as it is by heads that select: attention reads it where it is."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h * len(rows), 140, d, generator=draw) for h, d in ((3, 20), (1, 20), (1, 12)))
    cache = Held(PerHead(rows), k, v, Random(torch.tensor(7), 3), 0.5)
    cache.fill(k[:, :, :139], v[:, :, :139], [(True,) * 139, tuple(i >= 70 for i in range(139))])
    cache.settle(single=True)
    cache.prepare_step()
    new = [x[:, :, 139:] for x in (q, k, v)]
    out = cache.step_triton(*new)
    before = [getattr(part, name).clone() for part in cache.parts for name in part.TENSORS]
    blank = [torch.full_like(x, math.nan) for x in new[1:]]
    again = P.attend_places(new[0], *blank, cache._table[1], cache._end, 0.5, holds=False)
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, before, [getattr(part, name) for part in cache.parts for name in part.TENSORS]))


def test_where_memory_has_moved_or_sequences_are_others_there_is_another_table() -> None:
    k = torch.randn(2, 2, 300, 4, generator=torch.Generator().manual_seed(0))
    cache = Held(PerHead((Rows(2, 9), EVERYTHING)), k, k, Random(torch.tensor(7), 3), 0.5)
    cache.fill(k, k)
    known = cache.prepare_step()
    assert cache.prepare_step() is known
    for part in cache.parts:
        if part.config is None:
            part._grow(700)
    grown = cache.prepare_step()
    assert grown is not known
    part = cache.parts[1]
    assert cache._table[1].lines[1, 0] == part.key.data_ptr() and cache._table[1].lines[1, 6] == part.key.shape[2]
    cache.select(torch.tensor([1]))
    assert cache.prepare_step() is not grown and len(cache._table[1].lines) == 2


def test_a_single_token_behind_a_short_step_drops_all_that_are_due() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 80, 4, generator=draw) for _ in range(3))
    one, other = (Held(PerHead((Rows(2, 9), Rows(1, 6))), k, v, Random(torch.tensor(7), 3), 0.5) for _ in range(2))
    for cache in (one, other):
        cache.fill(k[:, :, :60], v[:, :, :60])
        cache.settle()
        cache.extend(*(x[:, :, 60:67] for x in (q, k, v)))
    one.settle(single=True)
    other.settle()
    for i in (67, 68):
        step = [x[:, :, i : i + 1] for x in (q, k, v)]
        torch.testing.assert_close(one.step(*step), other.extend(*step))
        assert one.rows().tolist() == [[12, 8]]  # sinks, recent tokens and the new one
        other.settle()
    one.settle()
    assert_same(one, other)


def test_steps_by_kernels_and_steps_that_settle_first_end_in_the_same_state() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 800, 4, generator=draw) for h in (12, 6, 6))
    one, other, ahead = (filled(k, v, 200, turn=turn) for turn in (0, 0, 3))
    early = 0
    for i in range(200, 480):
        new = [x[:, :, i : i + 1] for x in (q, k, v)]
        other.settle()
        outs = [other.extend(*new)]
        for cache in (one, ahead):
            if cache.rest() <= 0:
                cache.settle(single=True)
            early += any(x.until > part.left[0] for part in ahead.parts for x in itertools.chain(*part.ahead.values()))
            outs.append(cache.step(*new))
        torch.testing.assert_close(outs[1], outs[0])
        torch.testing.assert_close(outs[2], outs[0])
    for cache in (one, other, ahead):
        cache.settle()
    assert early > 20, "what is due was decided before"
    assert_same(one, other)
    assert one.length == ahead.length == [480]
    for mine, its in zip(ahead.parts, one.parts, strict=True):  # some rows may wait in the ring a little longer
        assert held_by(mine) == held_by(its)


def test_programs_share_the_blocks_of_heads_of_unequal_size() -> None:
    assert P.shares([16] * 8, 1, 132) == [16] * 8  # 128 of 132 programs have a block each
    assert P.shares([32] * 8, 32, 132) == [2] * 8
    counts = P.shares([100, 1, 7, 0], 1, 132)
    assert counts == [100, 1, 7, 1]
    lines = torch.arange(60).view(2, 3, 10)
    table = P.make_table(lines, [2, 1, 3], torch.device("cpu"))
    assert torch.equal(table.lines, lines.view(6, 10))
    assert table.programs[0, :, 10:].tolist() == [[0, 0, 2], [0, 1, 2], [1, 0, 1], [2, 0, 3], [2, 1, 3], [2, 2, 3]]
    assert torch.equal(table.programs[:, :, :10], lines[:, [0, 0, 1, 2, 2, 2]])
    assert table.done.tolist() == [[[0, 0]] * 3] * 2
    assert P.make_table(16 * lines, [1, 1, 1], torch.device("cpu")).align == 16


def test_draws_of_the_kernel_are_those_of_the_reference() -> None:
    heads = torch.tensor([5, 0, 2], dtype=torch.int32)
    for seed, first, count in ((7, 3, 100), ((2 << 32) + 9, 0, 1)):
        random = Random(torch.tensor(seed), 11, heads)
        expected = philox_uniform(random.seed, 11, first + torch.arange(count), 0, 317, heads[:, None])
        assert torch.equal(draws_triton(random, first, count, 317), expected)


@pytest.mark.parametrize("rule", ["balanced", "kernel", "uniform"])
@settings(max_examples=4)
@given(st.sampled_from([2, 4, 8, 32, 128]), SIZES, st.lists(st.integers(0, 40), min_size=1, max_size=3), st.data())
def test_one_halving_by_the_kernel_is_that_of_the_reference_with_the_numbers_of_its_heads(
    rule: str, rows: int, sizes, heads: list[int], data
) -> None:
    """Of rows that are a view of a cache's places; the seed may count heads, too."""
    draw = torch.Generator().manual_seed(rows)
    shapes = ((sizes["B"], len(heads), rows + 3, d) for d in (sizes["D"], sizes["Dv"]))
    k, v = (torch.randn(*shape, generator=draw)[:, :, 3:] for shape in shapes)
    seed = torch.tensor(7 + (data.draw(st.integers(0, 3)) << 32))
    numbers = torch.tensor(heads, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    first, number = data.draw(st.integers(0, 70)), stage(*data.draw(st.sampled_from([(1, 0), (2, 1), (9, 4)])))
    delta, pairs = data.draw(st.sampled_from([0.5, 0.1])), torch.arange(rows // 2)
    job = Halving(0, 0, rows, 1, number, first, delta)
    kept = halve(k, v, job, Decider(get_rule(rule), 0.25, Random(seed, 3, numbers)))
    draws = philox_uniform(seed, 3, pairs, first, number, numbers[:, None])
    second = halve_reference(k, v, draws, get_rule(rule), delta, 0.25)
    assert torch.equal(kept.long(), (2 * pairs + second.long()).expand_as(kept))


def test_buckets_that_are_halved_at_once_keep_what_each_of_them_keeps_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 3, 16 * 5, d, generator=draw) for d in (8, 4))
    heads = torch.tensor([4, 0, 3], dtype=torch.int32)
    decider = Decider(get_rule("balanced"), 0.25, Random(torch.tensor(7), 3, heads))
    job = Halving(0, 0, 16, 5, stage(2, 1), 9, 0.1)
    kept = halve(k, v, job, decider)
    for i in range(5):
        own = slice(16 * i, 16 * i + 16)
        alone = halve(k[:, :, own], v[:, :, own], Halving(0, 0, 16, 1, stage(2, 1), 9 + i, 0.1), decider)
        assert torch.equal(kept[:, :, 8 * i : 8 * i + 8], alone + 16 * i)
