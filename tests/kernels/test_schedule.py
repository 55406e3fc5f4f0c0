"""The schedule: every token is represented exactly once, in fewer than 6 s rows, whatever n, s and M."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile.kernels.select.schedule import Round, admitted, check_budget, make_schedule, round_of


@st.composite
def budgets(draw):
    s = 2 ** draw(st.integers(1, 9))
    return s, draw(st.integers(0, s.bit_length()))


def represented(schedule):
    """Which stream tokens an arena row stands for: start and stop, by replaying the launches."""
    start = np.full(schedule.size, -1, dtype=np.int64)
    stop = np.full(schedule.size, -1, dtype=np.int64)
    start[: schedule.tokens], stop[: schedule.tokens] = np.arange(schedule.tokens), np.arange(schedule.tokens) + 1

    def write(at, first, last):
        assert (start[at] == -1).all(), "no arena row is written twice"
        start[at], stop[at] = first, last

    for job in schedule.subsamples:
        rows = np.arange(job.rows)
        write(job.target + rows, job.source + rows * job.group, job.source + (rows + 1) * job.group)
    for launch in schedule.launches:
        for job in launch:
            rows = np.arange(job.rows * job.buckets)
            read = job.source + rows
            assert (start[read] >= 0).all(), "read before it is written"
            assert (start[read][1:] == stop[read][:-1]).all(), "rows of a launch are contiguous in the stream"
            pairs = read.reshape(-1, 2)
            write(job.target + np.arange(len(pairs)), start[pairs[:, 0]], stop[pairs[:, 1]])
    return start, stop


@given(budget=budgets(), n=st.integers(0, 20000), data=st.data())
@settings(max_examples=300)
def test_every_token_is_represented_once(budget, n, data):
    s, M = budget
    schedule = make_schedule(n, s, M)
    start, stop = represented(schedule)
    assert (start >= 0).all(), "every row of the arena is written: all of it is compacted"
    times = {data.draw(st.integers(0, n)) for _ in range(5)} | {n, min(n, 4 * s), min(n, 4 * s + 1)}
    times = np.array(sorted({admitted(t, s, M) for t in times}))
    offset, length, log2_weight = schedule.segments(times)
    for t, o, rows, w in zip(times, offset, length, log2_weight, strict=True):
        assert rows.sum() < 6 * s
        at = np.concatenate([np.arange(a, a + r) for a, r in zip(o, rows, strict=True)]).astype(int)
        weight = np.repeat(2**w, rows)
        assert (stop[at] - start[at] == weight).all(), "a row stands for as many tokens as its weight says"
        order = np.argsort(start[at])
        edges = np.concatenate([[0], stop[at][order]])
        assert (start[at][order] == edges[:-1]).all() and edges[-1] == t, "together they cover every token once"
        if t < 4 * s:
            assert (weight == 1).all(), "exact while the stream holds fewer than 4 s tokens"


def test_rows_on_average():
    s = 64
    schedule = make_schedule(4**5 * s, s, 6)
    times = np.unique([admitted(t, s, 6) for t in range(4 * s, schedule.tokens)])
    rows = schedule.segments(times)[1].sum(1)
    assert rows.max() < 6 * s
    assert rows.mean() / s == pytest.approx(3.5, abs=0.15)  # express.md: 3.5 s on average


def test_failure_budget_is_spent_at_most_once():
    total = 0.0
    for r in range(200):
        round_ = Round(r, 512, 7)
        total += round_.delta()  # half of delta_m for each closing halving
        for level in range(round_.q if r else 0):
            buckets = 3 * round_.level_rows(level) // round_.capacity(level)
            total += buckets * round_.level_delta(level)
    assert total <= 0.5


@pytest.mark.parametrize("s, M, name", [(12, 1, "s=12"), (1, 0, "s=1"), (8, 5, "inflation=5"), (8, -1, "inflation=-1")])
def test_bad_budgets(s, M, name):
    with pytest.raises(ValueError, match=name):
        check_budget(s, M)


def test_counts_that_are_not_admitted():
    schedule = make_schedule(10000, 4, 0)
    with pytest.raises(ValueError, match="not a multiple of"):
        schedule.segments(np.array([4097]))
    with pytest.raises(ValueError, match="must be within"):
        schedule.segments(np.array([10001]))
    assert round_of(4095, 4) == 4 and round_of(4096, 4) == 5 and round_of(3, 4) == 0
