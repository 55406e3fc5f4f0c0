"""Thinning: the kernel judged decision by decision, whole schedules against the reference, the order of tickets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels import express as E
from express_compile.kernels.launch import Random, philox_uniform
from express_compile.kernels.select import thinning as T
from express_compile.kernels.select.halving import (
    RULES,
    Decider,
    HalvingRule,
    halve_reference,
    halving_matrix,
    shortened,
    walk,
)
from express_compile.kernels.select.schedule import Halving, Schedule, make_schedule

SEED = torch.tensor(1234)
BALANCED = RULES["balanced"]


def misjudged(key, value, draws, decisions, rule, delta, scale, eps):
    """Decisions that a float64 walk along them would not have made, although the margin exceeds rounding.

    A score is off by ``eps`` times the largest |k|^2, so that each entry of D carries that relative error on
    four kernel values, and alpha adds up one such error per pair.
    """
    k, v = shortened(key).double(), shortened(value).double()
    matrix = halving_matrix(k, v, scale, rule.centre, rule.flatten)
    gain = rule.gain(k.shape[-2], delta)
    second, alpha, product = walk(matrix, draws.double(), gain, decisions)
    norm = (k - k.mean(-2, keepdim=True) if rule.centre else k).norm(dim=-1).amax(-1)
    relative = eps * (8 + 4 * scale * rule.flatten * norm**2)
    v_max = v.abs().amax((-2, -1))
    largest = (v.norm(dim=-1).amax(-1) ** 2 + v_max**2) * 4
    slack = (relative * largest)[..., None] * torch.arange(1, alpha.shape[-1] + 1)
    margin = (alpha - (1 - 2 * draws.double()) * gain * product).abs()
    return (second != decisions) & (margin > slack)


def schedule_of(tokens, *jobs):
    """A schedule of independent halvings of stream rows."""
    size = max(job.target + job.rows * job.buckets // 2 for job in jobs)
    return Schedule(tokens, 0, 0, size, (), (jobs,), (), ())


def run_kernel(key, value, rule, delta, scale):
    """Halve one bucket per sequence with the kernel: decisions ``[B, H, m]`` and the draws."""
    B, H, rows, _ = key.shape
    index = torch.full((B, H, rows // 2), -1, dtype=torch.int32)
    schedule = schedule_of(rows, Halving(0, rows, rows, 1, 3, 2, delta))
    copies = T.thin(key, value, index, schedule, 0, Decider(rule, scale, Random(SEED, 9)))
    for x, copy in zip((key, value), copies, strict=True):
        assert torch.equal(copy, E.gather_rows(x, index)), "copies of the rows that were kept"
    pairs = torch.arange(rows // 2)
    head = torch.arange(H)[:, None]
    assert torch.equal(index // 2, pairs.to(torch.int32).expand_as(index)), "one row of every pair, in order"
    return index % 2 == 1, philox_uniform(SEED, 9, pairs, 2, 3, head).expand(B, H, -1)


@given(
    name=st.sampled_from(["kernel", "balanced", "uniform"]),
    pairs=st.integers(1, 96),
    D=st.sampled_from([8, 20, 32]),
    Dv=st.sampled_from([4, 16]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decisions_are_those_of_the_reference(poison, name, pairs, D, Dv, dtype, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    key = (torch.randn(1, 2, 2 * pairs, D, generator=generator) * spread + 1).to(dtype)
    value = torch.randn(1, 2, 2 * pairs, Dv, generator=generator).to(dtype)
    rule, scale = RULES[name], D**-0.5
    decisions, draws = run_kernel(key, value, rule, 0.25, scale)
    if name == "uniform":
        assert torch.equal(decisions, draws < 0.5)
    else:
        assert not misjudged(key, value, draws, decisions, rule, 0.25, scale, 2.0**-22).any()


@pytest.mark.parametrize("pairs", [32, 80])
def test_a_wrong_decision_is_noticed(pairs):
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 1, 2 * pairs, 8, generator=generator) for _ in range(2))
    decisions, draws = run_kernel(key, value, BALANCED, 0.25, 0.35)
    assert not misjudged(key, value, draws, decisions, BALANCED, 0.25, 0.35, 2.0**-22).any()
    decisions[0, 0, 20] ^= True
    assert misjudged(key, value, draws, decisions, BALANCED, 0.25, 0.35, 2.0**-22)[0, 0, 20]


def test_outliers_do_not_break_the_walk():
    """A key 10,000 times larger than the others: all but its pair become coins, in several tiles as in one."""
    generator = torch.Generator().manual_seed(0)
    for pairs in (30, 90):
        key = torch.randn(1, 1, 2 * pairs, 8, generator=generator)
        key[0, 0, 5] *= 1e4
        value = torch.randn(1, 1, 2 * pairs, 8, generator=generator)
        decisions, draws = run_kernel(key, value, BALANCED, 0.25, 0.35)
        assert (decisions == (draws < 0.5)).float().mean() > 0.9


def test_buckets_of_different_sizes_read_through_an_index(poison):
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(2, 53, 3, 16, generator=generator).transpose(1, 2)  # as models produce it: [B, L, H, D]
    value = torch.randn(2, 53, 3, 12, generator=generator).transpose(1, 2)
    jobs = (Halving(0, 50, 4, 3, 5, 1, 0.5), Halving(12, 56, 38, 1, 6, 0, 0.1))
    stream = torch.stack([torch.randperm(50, generator=generator) + 3 for _ in range(6)]).view(2, 3, 50).int()
    index = torch.cat([torch.full((2, 3, 25), -1, dtype=torch.int32), stream], 2)
    T.thin(key, value, index, schedule_of(50, *jobs), 3, Decider(BALANCED, 0.25, Random(SEED, 9)))
    head = torch.arange(3)[:, None]
    for job in jobs:
        for i in range(job.buckets):
            source = stream[:, :, job.source + i * job.rows : job.source + (i + 1) * job.rows]
            rows = [E.gather_rows(x, source) for x in (key, value)]
            draws = philox_uniform(SEED, 9, torch.arange(job.rows // 2), job.first + i, job.stage, head)
            second = halve_reference(*rows, draws, BALANCED, job.delta, 0.25)
            at = job.target - 50 + i * job.rows // 2
            expected = torch.where(second, source[..., 1::2], source[..., 0::2])
            assert torch.equal(index[:, :, at : at + job.rows // 2], expected)
    assert torch.equal(index[:, :, 25:], stream), "the stream is only read"


@pytest.mark.parametrize(
    "n, s, M, protected, rule",
    [
        (420, 16, 2, 0, "balanced"),
        (420, 16, 2, 0, "kernel"),
        (420, 16, 2, 0, "uniform"),
        (700, 8, 0, 0, "balanced"),  # no levels: what is subsampled goes straight to E
        (800, 16, 4, 30, "balanced"),
    ],
)
def test_whole_schedules(poison, monkeypatch, n, s, M, protected, rule):
    """Levels that read copies, buckets of several tiles, subsampling, closings: all rows as in the reference."""
    monkeypatch.setattr(T, "PAIRS", 8)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(1, 2, n, 16, generator=generator) + 0.5, torch.randn(1, 2, n, 12, generator=generator)
    layout = E.make_layout(
        E.Express(s, inflation=M, sinks=3, recent=20, protected=protected, halving=rule, block=32), n, n
    )
    index, *copies = E.thin_triton(k, v, layout, 0.25, SEED, 2)
    assert torch.equal(
        index[:, :, : layout.copied], E.thin_reference(k, v, layout, 0.25, SEED, 2)[:, :, : layout.copied]
    )
    for x, copy in zip((k, v), copies, strict=True):
        assert torch.equal(copy, E.gather_rows(x, index[:, :, : layout.copied]))


# -- the order of tickets ----------------------------------------------------------------------------------------


def waits_end(tiles, table):
    """Whether every tile, in the order of ``table``, finds that all it waits for has an earlier ticket."""
    arrived = np.bincount(tiles.described[:, T.FEEDS], minlength=tiles.units)
    arrived += (arrived > 0) & (np.arange(tiles.units) < tiles.buckets)
    words = set()
    for row in table:
        if row[T.NEED] and arrived[row[T.UNIT]] < row[T.NEED]:
            return False
        if row[T.BLOCK] and row[T.WORD] - 1 not in words:
            return False
        words.add(row[T.WORD])
        if row[T.FEEDS] >= 0:
            arrived[row[T.FEEDS]] += 1
            # the last arrival computes the statistics of a bucket of several tiles
            arrived[row[T.FEEDS]] += row[T.SLOT] >= 0 and arrived[row[T.FEEDS]] == row[T.FEEDERS]
    return True


@given(
    h=st.integers(1, 8),
    data=st.data(),
    n=st.integers(0, 20000),
    pairs=st.sampled_from([8, 16, 32]),
    lanes=st.sampled_from([1, 7, 100]),
)
@settings(max_examples=60)
def test_every_tile_comes_after_what_it_waits_for(h, data, n, pairs, lanes):
    schedule = make_schedule(n, 2**h, data.draw(st.integers(0, h + 1)))
    if not schedule.launches and not schedule.subsamples:
        return
    tiles = T.Tiles(schedule, BALANCED, pairs, lanes)
    assert waits_end(tiles, tiles.table)
    assert sorted(tiles.table[:, T.WORD]) == list(range(len(tiles.table))), "every tile has one ticket"
    # together they read every row of every halving once, and write what the schedule says
    halved = tiles.table[tiles.table[:, T.ROWS] > 0]
    jobs = [job for launch in schedule.launches for job in launch]
    assert halved[:, T.VALID].sum() * 2 == sum(job.rows * job.buckets for job in jobs)
    written = np.concatenate([np.arange(row[T.TARGET], row[T.TARGET] + row[T.VALID]) for row in tiles.table])
    assert sorted(written) == list(range(schedule.tokens, schedule.size))
    if any(job.source >= schedule.tokens for job in jobs):
        assert not waits_end(tiles, tiles.table[::-1]), "a wrong order is noticed"


def test_gains_of_custom_rules():
    rule = HalvingRule("mild", lambda rows, delta: rows / 16)
    schedule = make_schedule(2000, 16, 3)
    tiles = T.Tiles(schedule, rule, 8, 4)
    assert np.array_equal(tiles.gains, tiles.table[:, T.ROWS] / 16)
