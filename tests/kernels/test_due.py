"""What steps of a cache do by themselves when it is due is what the reference does before them."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.core.rows import Rows
from express_compile.kernels import due as D
from express_compile.kernels import held as K
from express_compile.kernels.attend import places
from express_compile.kernels.attend.places import PAGE
from express_compile.kernels.heads import EVERYTHING, PerHead
from express_compile.kernels.held import Held
from express_compile.kernels.launch import Random
from express_compile.kernels.select import pages

KINDS = (
    *(Rows(2, 20), Rows(2, 9, 8, 10), EVERYTHING, Rows(3, 40, 16), Rows(1, 70, 4), Rows(2, 64, protected=40)),
    *(Rows(2, 90, 8), Rows(0, 60, 16)),
)


class Launching:
    """Steps of ``cache`` whose lines are read by the kernel; tokens are held and attended to by the reference."""

    def __init__(self, cache: Held) -> None:
        self.cache, self.did, self.late = cache, 0, 0

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, again: bool = False) -> torch.Tensor:
        cache, ends = self.cache, {n + 1 for n in self.cache.length}
        self.did += sum(x.end in ends for part in cache.parts for x in itertools.chain(*part.ahead.values()))
        self.late += sum(x.end == 0 for part in cache.parts for x in itertools.chain(*part.ahead.values()))
        cache.settle(single=True)
        cache.prepare_step()
        cache.launch_due()
        if again:
            cache._do_what_is_due(cache._end)
        out = cache._step_reference(query, key, value)
        cache.look_ahead(1)
        cache.end_step()
        return out


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(K, "_by_kernels", lambda x: True)
    monkeypatch.setattr(D, "_CHUNKS", 2)


def made(
    rows: tuple[Rows, ...], n: int, B: int, pad: int, turn: int, total: int,
    widths: tuple[int, int] = (4, 3), G: int = 2,
) -> tuple[list[torch.Tensor], Held]:  # fmt: skip
    draw, (D, Dv) = torch.Generator().manual_seed(n), widths
    shapes = (G * len(rows), D), (len(rows), D), (len(rows), Dv)
    qkv = [torch.randn(B, h, total, d, generator=draw) for h, d in shapes]
    cache = Held(PerHead(rows), *qkv[1:], Random(torch.tensor(7), 3), 0.5, turn)
    real = [(True,) * n] * (B - 1) + [tuple(i >= pad for i in range(n))]
    cache.fill(*(x[:, :, :n] for x in qkv[1:]), real)
    return qkv, cache


def live(part: K.HeldRows) -> list[list[tuple[int, float]]]:
    found = []
    for token, weight in zip(part.token.flatten(0, 1), part.log_weight.flatten(0, 1), strict=True):
        there = weight > -math.inf
        found.append(sorted(zip(token[there].tolist(), weight[there].tolist(), strict=True)))
    return found


def assert_same(one: Held, other: Held) -> None:
    """The same rows with the same bits; which of them still wait in the ring may differ between steps."""
    for cache in (one, other):
        cache.settle()
    assert one.length == other.length
    for mine, its in zip(one.parts, other.parts, strict=True):
        assert live(mine) == live(its) and mine.left == its.left
        there = its.log_weight > -math.inf
        for name in ("token", "key", "value"):
            assert torch.equal(getattr(mine, name)[:, :, : there.shape[2]][there], getattr(its, name)[there])


def assert_listed(cache: Held) -> None:
    """Every row that is held is on a page that steps read."""
    for part in cache.parts:
        if part.pages.numel():
            for b, g in torch.cartesian_prod(*map(torch.arange, part.listed.shape)).tolist():
                read = set(part.pages[b, g, : part.listed[b, g]].tolist())
                held = (part.log_weight[b, g] > -math.inf).nonzero()[:, 0] // PAGE
                assert set(held.tolist()) <= read


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.integers(90, 420), st.integers(1, 2),
    st.integers(0, 80), st.integers(0, 70),
    st.lists(st.tuples(st.sampled_from("drop long select copy fail repeat".split()), st.integers(1, 60)), max_size=4),
)  # fmt: skip
def test_steps_do_what_is_due_whatever_comes_between_them(by_kernels, rows, n, B, pad, turn, events) -> None:
    total = n + 400
    (q, k, v), cache = made(tuple(rows), n, B, pad, turn, total)
    one, other = Launching(cache), copy.deepcopy(cache)
    for event, steps in [("repeat", 3), *events, ("none", 40)]:
        for i in range(steps):
            new = [x[:, :, n : n + 1] for x in (q, k, v)]
            other.settle()
            torch.testing.assert_close(one.step(*new, again=event == "repeat"), other.extend(*new))
            n += 1
            if i == steps - 1:
                assert_listed(one.cache)
        if event == "fail":  # a step that was launched and did not end
            one.cache.settle(single=True)
            one.cache.prepare_step()
            one.cache.launch_due()
            one.cache.drop(0, 1)
        elif event == "copy":
            one.cache = copy.deepcopy(one.cache)
        elif event == "long":
            piece = [x[:, :, n : n + 7] for x in (q, k, v)]
            n += 7
            for held in (one.cache, other):
                held.settle()
                held.extend(*piece)
        elif event == "drop":
            count = min(5, one.cache.exact_tail, other.exact_tail)
            for held in (one.cache, other):
                held.drop(count)
        elif event == "select":
            order = torch.arange(B).flip(0)
            q, k, v = (x[order] for x in (q, k, v))
            for held in (one.cache, other):
                held.select(order)
    assert_same(one.cache, other)


def test_after_the_first_steps_the_host_has_nothing_to_do_before_one(by_kernels) -> None:
    rows = tuple(x for x in KINDS if not x.everything)
    (q, k, v), cache = made(rows, 700, 1, 0, 5, 1300)
    one, busy = Launching(cache), []
    due = behind = 0
    for i in range(700, 1290):
        length = cache.length[0]
        if length >= due:
            busy.append(i)
        new = [x[:, :, i : i + 1] for x in (q, k, v)]
        if length < due:  # as replays: before and behind them only what idle() says
            cache._end.fill_(length + 1)
            if length >= behind:
                cache.launch_due()
            cache._step_reference(*new)
            if length >= behind:
                cache.look_ahead(1)
            cache.end_step()
        else:
            one.step(*new)
        due, behind = cache.length[0] + cache.rest(), cache.length[0] + cache.idle()
    assert len(busy) <= 3, "the first step, what was due before anything could be decided, and a group that grows"
    _, other = made(rows, 700, 1, 0, 5, 1300)
    other.fill(*(x[:, :, 700:1290] for x in (k, v)))
    for held in (cache, other):
        held.settle()
    for mine, its in zip(cache.parts, other.parts, strict=True):  # some rows may wait in the ring a little longer
        assert live(mine) == live(its)


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of every time that a cache with lines decides what is due, of how many events each run is."""
    found: list[list[int]] = []
    look = K.HeldRows._runs

    def runs(part: K.HeldRows, *given: int) -> list[tuple[int, int]]:
        own = list(look(part, *given))
        if part._has_lines:
            found.append([several for _, several in own])
        return own

    monkeypatch.setattr(K.HeldRows, "_runs", runs)
    return found


@pytest.mark.parametrize(("rows", "n"), [(Rows(3, 90, 16), 700), (Rows(0, 200, 8), 300), (Rows(2, 200, 4), 330)])
def test_many_subsampling_groups_are_decided_at_once(by_kernels, monkeypatch, decisions, rows: Rows, n: int) -> None:
    """One after the other they would take the host as many times as long; each is due when it was."""
    counts = {}
    for lines in (1, D.LINES):
        for module in (D, K):
            monkeypatch.setattr(module, "LINES", lines)
        (q, k, v), cache = made((rows,), n, 1, 0, 5, n + 170)
        one, other = Launching(cache), copy.deepcopy(cache)
        decisions.clear()
        for i in range(n, n + 160):
            new = [x[:, :, i : i + 1] for x in (q, k, v)]
            other.settle()
            torch.testing.assert_close(one.step(*new), other.extend(*new))
        assert_same(cache, other)
        counts[lines] = len(decisions), sum(map(sum, decisions)), max(map(max, decisions))
    (each, alone, _), (fewer, events, most) = counts.values()
    assert each == alone and abs(alone - events) <= D.LINES and most > 1
    assert fewer <= each / 2


def test_layers_take_turns_to_decide_many_groups(by_kernels, decisions) -> None:
    often = [0] * 160
    for turn in range(8):
        (q, k, v), cache = made((Rows(0, 200, 16),), 700, 1, 0, turn, 1000)
        one = Launching(cache)
        for i in range(700, 990):
            before = len(decisions)
            one.step(*(x[:, :, i : i + 1] for x in (q, k, v)))
            if i >= 830:  # from the second time on
                often[i - 830] += len(decisions) - before
    assert sum(often) >= 8 * 2 and max(often) == 1


def test_a_step_that_is_launched_twice_does_the_same_again(by_kernels) -> None:
    """Launches come before the token counts, and once more where a graph is recorded."""
    rows = (Rows(2, 9, 8, 10), Rows(3, 40, 16))
    (q, k, v), cache = made(rows, 300, 1, 0, 5, 700)
    one, other, due = Launching(cache), copy.deepcopy(cache), 0
    for i in range(300, 640):
        new = [x[:, :, i : i + 1] for x in (q, k, v)]
        other.settle()
        expected = other.extend(*new)
        if due < 3 and i > 310 and any(part.does(slice(0, 1), i) for part in cache.parts):
            due += 1
            cache.settle(single=True)
            cache.prepare_step()
            outs = [cache.launch_step(*new) for _ in range(2)]
            assert torch.equal(*outs)
            torch.testing.assert_close(outs[0], expected, rtol=1e-5, atol=1e-5)
            cache.look_ahead(1)
            cache.end_step()
        else:
            one.step(*new)
    assert due == 3
    assert_same(cache, other)


def is_due(cache: Held) -> bool:
    return any(x.end == cache.length[b] + 1 for part in cache.parts for (b, _), (x, *_) in part.ahead.items())


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from((*KINDS, Rows(2, 5, selected=1))), min_size=1, max_size=2), st.integers(200, 400),
    st.integers(0, 80), st.sampled_from([(4, 3), (20, 16), (16, 24)]), st.integers(1, 3),
)  # fmt: skip
def test_a_step_in_which_rows_are_due_holds_what_the_reference_does(by_kernels, rows, n, pad, widths, G) -> None:
    """Its attention holds the new token in the launch behind the one that moves rows; launched again, as a graph is
    recorded, interrupted, and dropped."""
    (q, k, v), cache = made((*rows, Rows(3, 40, 16)), n, 2, pad, 5, n + 80, widths, G)
    one, other, due, i = Launching(cache), copy.deepcopy(cache), 0, n
    while due < 3 and i < n + 80:
        new = [x[:, :, i : i + 1] for x in (q, k, v)]
        i += 1
        other.settle()
        if not is_due(cache):
            one.step(*new)
            other.extend(*new)
            continue
        due += 1
        cache.settle(single=True)
        cache.prepare_step()
        first = cache.launch_step(*new)
        before = [getattr(part, name).clone() for part in cache.parts for name in part.TENSORS]
        assert torch.equal(cache.launch_step(*new), first)
        after = [getattr(part, name) for part in cache.parts for name in part.TENSORS]
        assert all(map(torch.equal, before, after))
        if due == 1:  # it did not end, and comes again
            cache.drop(0, 1)
            cache.settle(single=True)
            cache.prepare_step()
            torch.testing.assert_close(cache.launch_step(*new), first, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(first, other.extend(*new), rtol=1e-5, atol=1e-5)
        cache.look_ahead(1)
        cache.end_step()
        if due == 2 and min(cache.exact_tail, other.exact_tail):  # it ended, and comes again
            for held in (cache, other):
                held.drop(1)
                held.settle(single=held is cache)
            torch.testing.assert_close(cache.step(*new), other.extend(*new), rtol=1e-5, atol=1e-5)
    assert due == 3
    assert_same(cache, other)
    for part, its in zip(cache.parts, other.parts, strict=True):
        eights = [x.means[:, :, : -(-min(cache.length) // 8)] for x in (part, its)]
        torch.testing.assert_close(*eights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("selects", [False, True])
def test_a_step_is_one_launch_beside_the_choice_of_pages_and_one_more_where_rows_are_due(
    by_kernels, launches_of, selects: bool
) -> None:
    rows = (Rows(2, 9), Rows(2, 9, 8, 10), Rows(3, 40, 16), *[Rows(2, 5, selected=1)] * selects)
    (q, k, v), cache = made(rows, 300, 2, 30, 5, 400)
    launches, found, one = [launches_of(module) for module in (D, pages, places)], [], Launching(cache)

    def launched(new: list[torch.Tensor]) -> list[str]:
        for own in launches:
            own.clear()
        cache.launch_step(*new)
        return [kernel.fn.__name__ for own in launches for kernel, _ in own]

    always = ["_step_kernel"] * selects + ["_split_kernel"]
    for i in range(300, 360):
        new = [x[:, :, i : i + 1] for x in (q, k, v)]
        if found.count(is_due(cache)) == 1:
            one.step(*new)
            continue
        found.append(is_due(cache))
        cache.settle(single=True)
        cache.prepare_step()
        assert launched(new) == ["_due_kernel"] * found[-1] + always
        assert launched(new) == always  # as a replay does
        cache.look_ahead(1)
        cache.end_step()
    assert sorted(found) == [False, True]


def test_rows_that_are_due_never_have_the_place_of_the_new_token(by_kernels) -> None:
    """So the launch that moves them and the one that holds it write to different places."""
    (q, k, v), cache = made(tuple(x for x in KINDS if not x.everything), 700, 1, 0, 5, 1300)
    one, seen = Launching(cache), 0
    for i in range(700, 1000):
        for part in cache.parts:
            for ahead in (x for x in itertools.chain(*part.ahead.values()) if x.end):
                ((place, _, _),) = part._in_ring(ahead.end - 1, ahead.end)
                assert place not in ahead.at.tolist()
                seen += 1
        one.step(*(x[:, :, i : i + 1] for x in (q, k, v)))
    assert seen > 20
