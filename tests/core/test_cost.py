"""Costs: expressions of sizes against counts over the real schedules, tables and masks, and against measured rows."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from express_compile.core import cost as c
from express_compile.core.call import Call
from express_compile.core.cost import Cost, floor_log2, visible_pairs
from express_compile.core.method import METHODS, Method
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, Site
from express_compile.kernels import express, thinformer
from express_compile.kernels.attend import sampled as santa_kernels
from express_compile.kernels.attend import segments
from express_compile.kernels.launch import Random
from express_compile.kernels.select import contest, thinning
from express_compile.kernels.select.schedule import Schedule

SPEED = Path(__file__).parents[2] / "examples" / "bench" / "results" / "speed.csv"
NO_MASK, POLICY = Mask(), Policy()


def site(Lq: int, Lk: int, mask: Mask = NO_MASK, sizes: tuple[int, ...] = (2, 8, 2, 64, 32)) -> AttentionSpec:
    B, H, H_kv, D, Dv = sizes
    return AttentionSpec(B, H, H_kv, Lq, Lk, D, Dv, torch.bfloat16, "cuda", 0.125, mask)


def causal(Lq: int, Lk: int) -> AttentionSpec:
    return site(Lq, Lk, Mask(causal=True, offset=Lk - Lq))


def cost_of(name: str, spec: AttentionSpec, policy: Policy = POLICY) -> Cost:
    return METHODS[name].cost(spec, METHODS[name].params(Site(spec), policy))


def dense_elements(spec: AttentionSpec, rows: int) -> int:
    """Elements of queries, outputs, and of ``rows`` keys and values."""
    return spec.B * (spec.H * spec.Lq + spec.H_kv * rows) * (spec.D + spec.Dv)


# ---------------------------------------------------------------------------------------------------- the leaf


@given(x=st.integers(1, 2**60), k=st.integers(0, 60))
def test_floor_log2(x: int, k: int) -> None:
    assert 2 ** int(floor_log2(sympy.Integer(x))) <= x < 2 ** int(floor_log2(sympy.Integer(x)) + 1)
    assert floor_log2(sympy.Integer(2) ** k) == k and floor_log2(sympy.Rational(x, x + 1)) == 0
    assert floor_log2(c.Lk).func is floor_log2 and floor_log2(c.Lk).subs(c.Lk, x) == x.bit_length() - 1


def test_numbers_need_known_sizes() -> None:
    spec = causal(100, 100)
    env = ShapeEnv()
    dynamic = env.create_unbacked_symint()
    cost = cost_of("exact", spec)
    with pytest.raises(ValueError, match=r"^Lk=u0: must be an integer"):
        cost.at(replace(spec, Lk=dynamic), 4)
    with pytest.raises(ValueError, match=r"^s=0\.5: must be an integer"):
        cost.at(spec, 0.5)
    with pytest.raises(ValueError, match=r"^B=True: must be an integer"):
        cost.at(replace(spec, B=True), 4)
    offset = cost_of("exact", replace(spec, mask=Mask(causal=True, offset=sympy.Symbol("s7"))))
    with pytest.raises(ValueError, match=r"depends on s7; a cost in numbers needs a known offset"):
        offset.at(spec, 4)


def test_offsets_of_dynamic_sizes_stay_symbols() -> None:
    """A continued prefill whose lengths are dynamic costs what it costs with the numbers put in."""
    env = ShapeEnv()
    Lq, Lk = env.create_unbacked_symint(), env.create_unbacked_symint()
    cost = cost_of("exact", replace(site(1, 1), Lq=Lq, Lk=Lk, mask=Mask(causal=True, offset=Lk - Lq)))
    assert cost == cost_of("exact", causal(10, 30)) and cost.at(causal(10, 30), 4).flops == 2 * 2 * 8 * 255 * 96


def test_every_shipped_method_has_a_cost_and_others_need_none() -> None:
    assert all(METHODS[name].cost or METHODS[name].shares for name in METHODS.shipped)
    other = Method("other", "", "", "", refuse=lambda spec, policy: None, params=lambda site, policy: {})
    assert other.cost is None


# --------------------------------------------------------------------------------------------------------- exact


def test_exact_attention() -> None:
    spec = site(300, 500, sizes=(2, 8, 2, 64, 64))
    scores = 2 * 8 * 300 * 500
    assert cost_of("exact", spec).at(spec, 4) == Cost(4 * scores * 64, 2 * dense_elements(spec, 500), 0, 1, scores)
    n = 4096
    half = cost_of("exact", causal(n, n)).at(causal(n, n), 4)
    full = cost_of("exact", site(n, n)).at(site(n, n), 4)
    assert half.flops * 2 * n == full.flops * (n + 1) and half.bytes == full.bytes
    unknown = cost_of("exact", site(n, n, Mask(causal=True, unknown="it is made up")))
    assert unknown.at(site(n, n), 4) == full, "a mask that is not proven saves nothing"


@given(
    Lq=st.integers(1, 40),
    Lk=st.integers(1, 40),
    offset=st.integers(-45, 45),
    window=st.none() | st.integers(1, 50),
    is_causal=st.booleans(),
)
@settings(max_examples=100)
def test_visible_pairs_are_those_of_the_mask(Lq, Lk, offset, window, is_causal) -> None:
    i, j = np.arange(Lq)[:, None], np.arange(Lk)[None, :]
    back = i + offset - j
    seen = (back >= 0) & (back < (window or 100)) if is_causal else np.abs(back) < (window or 100)
    mask = Mask(causal=is_causal, offset=offset, window=window)
    assert visible_pairs(site(Lq, Lk, mask)).subs({c.Lq: Lq, c.Lk: Lk}) == seen.sum()


# ------------------------------------------------------------------------------------------------------- halving


def halvings(schedule: Schedule) -> tuple[int, int, int]:
    """Entries of the halving kernel, rows that are read, and the longest chain of pairs that wait for each other."""
    entries = rows = 0
    ready = np.zeros(schedule.size, dtype=np.int64)
    for job in itertools.chain(*schedule.launches):
        m = job.rows // 2
        entries += 4 * m * (m + 1) // 2 * job.buckets  # D[j, i], j <= i: four entries each
        rows += job.rows * job.buckets
        source = ready[job.source : job.source + job.rows * job.buckets].reshape(job.buckets, job.rows)
        done = source.max(1, initial=0) + m
        ready[job.target : job.target + m * job.buckets] = done.repeat(m)
    return entries, rows + sum(job.rows for job in schedule.subsamples), int(ready.max(initial=0))


@st.composite
def prefills(draw, least: int = 5):
    """A policy and a continued prefill that is thinned, of which the closed form is exact."""
    protected = draw(st.just(0) | st.just(256) | st.integers(1, 600))
    s = 2 ** draw(st.integers(max(least, 6 if protected else 0), 9))
    policy = Policy(
        budget=s,
        sinks=draw(st.integers(0, 40)),
        window=draw(st.integers(0, 600)),
        protected=protected,
        inflation=draw(st.none() | st.integers(0, s.bit_length())),
        halving=draw(st.sampled_from(["balanced", "kernel", "uniform"])),
        method_options={"express": {"block": draw(st.sampled_from([32, 128]))}},
    )
    Lk = express.config_of(policy, 1).exact_up_to + draw(st.integers(1, 100) | st.integers(1, 30000))
    return policy, draw(st.just(Lk) | st.integers(1, Lk)), Lk


def count_express(policy: Policy, spec: AttentionSpec) -> Cost:
    """All but launches, counted over the schedule and the table that the op itself would use."""
    config = express.config_of(policy, spec.Lk)
    layout = express.make_layout(config, spec.Lq, spec.Lk)
    entries, reads, chain = halvings(layout.schedule)
    if config.halving == "uniform":
        entries = chain = 0
    width = spec.B * spec.H_kv * (spec.D + spec.Dv)
    scores = spec.B * spec.H * int(layout.table.rows_seen(spec.Lq).sum())
    flops = 2 * scores * (spec.D + spec.Dv) + 2 * width * entries
    elements = dense_elements(spec, spec.Lk) + width * (reads + 2 * layout.copied)  # written, and read once more
    if config.protected:
        left = (spec.Lk - 1 - config.sinks - config.recent) // config.block * config.block
        elements += 2 * spec.B * spec.H_kv * spec.D * left
    return Cost(flops, 2 * elements, chain, 0, scores, spec.B * spec.H_kv * entries)


@given(prefills())
@settings(max_examples=25)
def test_express_is_what_its_schedule_and_its_table_say(prefill) -> None:
    policy, Lq, Lk = prefill
    spec = causal(Lq, Lk)
    found = cost_of("express", spec, policy).at(spec, policy.budget)
    assert replace(found, launches=0) == count_express(policy, spec)


@pytest.mark.parametrize("s, percent", [(16, 6), (8, 5.5), (4, 11.5)])
def test_express_of_fewer_rows_than_a_block_is_nearly_exact(s: int, percent: float) -> None:
    policy = Policy(budget=s, sinks=0, window=0, protected=0)
    for n in (600, 3000, 20000):
        counted = count_express(policy, causal(n, n))
        found = cost_of("express", causal(n, n), policy).at(causal(n, n), s)
        assert (found.bytes, found.steps, found.entries) == (counted.bytes, counted.steps, counted.entries)
        assert abs(found.flops / counted.flops - 1) < percent / 100
        assert abs(found.scores / counted.scores - 1) < (percent + 0.5) / 100  # of which halving is no part


def test_no_term_of_express_can_be_left_out() -> None:
    """Negative control: without any one of its terms the cost is not the counted one."""
    policy, spec = Policy(budget=64, inflation=2), causal(12000, 20000)
    cost = cost_of("express", spec, policy)
    whole = count_express(policy, spec)
    for name, counted in (("flops", whole.flops), ("bytes", whole.bytes)):
        whole = getattr(cost, name).args[1].expr  # of the Piecewise: where it is thinned
        terms = [Cost(term, 0).at(spec, 64).flops for term in sympy.Add.make_args(sympy.expand_mul(whole))]
        assert len(terms) > 4 and sum(terms) == counted
        assert min(map(abs, terms)) > 1e-6 * counted


def test_short_sequences_cost_what_exact_attention_costs() -> None:
    policy = Policy(budget=64, protected=256)
    for name, spec, longest in (
        ("express", causal(900, 900), 4 * 64 + 32 + 256 + 256),
        ("thinformer", site(900, 900), 64),
        ("santa", site(1, 900), 64),
    ):
        cost, exact = cost_of(name, spec, policy), cost_of("exact", spec)
        assert cost.at(replace(spec, Lk=longest), 64) == exact.at(replace(spec, Lk=longest), 64)
        assert cost.at(replace(spec, Lk=longest + 1), 64) != exact.at(replace(spec, Lk=longest + 1), 64)
        late = cost_of(name, spec, replace(policy, min_length=1000))
        assert late.at(spec, 64) == exact.at(spec, 64) != cost.at(spec, 64)


def test_express_comes_down_to_the_floor_of_its_rows() -> None:
    """FLOPs relative to exact: ``(3.5 s + window) / (n / 2)``, and 2 to 6% more for what it leaves out: the sinks,
    half a block of queries and the halvings."""
    sizes = 1, 32, 8, 128, 128
    for s, window, low, high in ((512, 32, 1.03, 1.05), (1024, 32, 1.01, 1.05), (256, 512, 1.03, 1.06)):
        n = 4**5 * s
        spec = site(n, n, Mask(causal=True), sizes)
        policy = Policy(budget=s, window=window, protected=0)
        ratio = cost_of("express", spec, policy).at(spec, s).flops / cost_of("exact", spec).at(spec, s).flops
        assert low < ratio / ((3.5 * s + window) / (n / 2)) < high


# ---------------------------------------------------------------------------------------------------- thinformer


@given(
    h=st.integers(2, 9),
    Lq=st.integers(1, 5000),
    Lk=st.integers(5, 100_000),
    rule=st.sampled_from(["balanced", "uniform"]),
)
@settings(max_examples=60)
def test_thinformer_is_what_its_schedule_says(h: int, Lq: int, Lk: int, rule: str) -> None:
    s = 2**h
    Lk += s
    spec = site(Lq, Lk)
    schedule = thinformer.make_schedule(Lk, s)
    entries, reads, chain = halvings(schedule) if rule != "uniform" else (0, halvings(schedule)[1], 0)
    width = spec.B * spec.H_kv * (spec.D + spec.Dv)
    elements = dense_elements(spec, s) + width * (reads + schedule.size - schedule.tokens)
    found = cost_of("thinformer", spec, Policy(budget=s, halving=rule)).at(spec, s)
    assert found.flops == 2 * spec.B * spec.H * Lq * s * (spec.D + spec.Dv) + 2 * width * entries
    assert (found.bytes, found.steps) == (2 * elements, chain)
    assert (found.scores, found.entries) == (spec.B * spec.H * Lq * s, spec.B * spec.H_kv * entries)


# --------------------------------------------------------------------------------------------------------- santa


def measured_decodes() -> Iterator[tuple[AttentionSpec, int, float]]:
    """Site, draws, and value rows that were read per KV head, of the committed runs."""
    with SPEED.open() as file:
        for row in csv.DictReader(file):
            params = dict(x.split("=") for x in row["params"].split())
            if row["job"] == "decode" and row["method"] == "santa" and "rows" in params:
                sizes = tuple(int(row[x]) for x in ("B", "H", "H_kv", "D", "Dv"))
                spec = site(int(row["Lq"]), int(row["Lk"]), sizes=sizes)
                assert row["dtype"] == "bfloat16"
                yield spec, int(row["s"]), float(params["rows"])


def test_santa_reads_the_bytes_that_were_counted_on_the_gpu() -> None:
    """Of keys, stash and the rows that were read: never less than counted, and at most 4% more; 0.1% from 256 keys per
    draw on."""
    decodes = list(measured_decodes())
    assert len(decodes) >= 54
    over = Counter()
    for spec, S, rows in decodes:
        B, H, H_kv, Lq, n, D, Dv = (getattr(spec, x) for x in ("B", "H", "H_kv", "Lq", "Lk", "D", "Dv"))
        heads = B * H * Lq
        counted = 2 * (B * H_kv * (n * D + rows * Dv) + heads * (D + Dv)) + 2 * 2 * heads * n
        ratio = cost_of("santa", spec, Policy(budget=S, min_length=0)).at(spec, S).bytes / counted
        assert 0.999 < ratio
        over["all"] = max(over["all"], ratio)
        if n >= 256 * S:
            over["long"] = max(over["long"], ratio)
    assert over["all"] < 1.04 and over["long"] < 1.001


def test_santa_relative_to_exact() -> None:
    """``(1 + phi + sigma) / 2`` of the bytes of exact attention, phi of the values, sigma of the stash."""
    for (B, H, H_kv, D), n, S in itertools.product(((8, 32, 8, 128), (1, 32, 2, 64)), (8192, 131072), (64, 512)):
        spec = site(1, n, sizes=(B, H, H_kv, D, D))
        ratio = cost_of("santa", spec).at(spec, S).bytes / cost_of("exact", spec).at(spec, S).bytes
        phi, sigma = S / n, 2 * (H // H_kv) * 2 / (2 * D)
        assert ratio == pytest.approx((1 + phi + sigma) / 2, rel=0.002)


def test_santa_without_shared_rows() -> None:
    """Every head reads rows of its own, and multiplies them with its own weights alone."""
    spec, own = site(2, 4096), Policy(method_options={"santa": {"shared": False}})
    shared, apart = (cost_of("santa", spec, policy).at(spec, 16) for policy in (Policy(), own))
    assert apart.bytes - shared.bytes == 2 * spec.B * spec.H_kv * spec.Dv * (16 * 4 * 2 - 16)
    assert apart.flops == shared.flops == 2 * spec.B * spec.H * 2 * (4096 * spec.D + 16 * spec.Dv)
    assert cost_of("santa", spec, own).at(replace(spec, Lk=100), 16).bytes > shared.bytes * 100 / 4096


@pytest.mark.parametrize("Lq", [1, 3])
def test_santa_counts_keys_in_the_window(Lq: int) -> None:
    """What it costs does not depend on the keys before: it is the cost without a window over the keys in reach."""
    reach = 500 + Lq - 1
    whole = cost_of("santa", causal(Lq, reach)).at(causal(Lq, reach), 64)
    for Lk in (reach, 4096, 100_000):
        spec = replace(causal(Lq, Lk), mask=Mask(causal=True, offset=Lk - Lq, window=500))
        cost = cost_of("santa", spec)
        assert cost.at(spec, 64) == whole
        assert cost.at(spec, reach).scores == spec.B * spec.H * Lq * 500, "exact for no more keys than draws"
    assert METHODS["santa"].rows(METHODS["santa"].params(Site(spec), Policy(budget=0.1)), 100_000) == 50


# ------------------------------------------------------------------------------------------------------ launches


@pytest.mark.parametrize("protected", [0, 16])
def test_launches_of_the_kernels(monkeypatch: pytest.MonkeyPatch, protected: int) -> None:
    """As many as the launchers make, fills left out, in the interpreter where there is no GPU."""
    calls = Counter()

    def counted(launch: Any) -> Any:
        def run(kernel: Any, *args: Any, **options: Any) -> None:
            calls.update(n=kernel is not thinning._zero_kernel)
            launch(kernel, *args, **options)

        return run

    for module in (contest, santa_kernels, segments, thinformer, thinning):
        monkeypatch.setattr(module, "launch", counted(module.launch))

    def launched(cost: Cost, spec: AttentionSpec, s: int) -> bool:
        count, calls["n"] = calls["n"], 0
        return count == cost.at(spec, s).launches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = torch.zeros((), dtype=torch.int64, device=device)
    n, s = 700, 32
    q, k, v = torch.randn(3, 1, 1, n, 16, device=device)
    policy = Policy(budget=s, sinks=4, window=16, protected=protected)
    spec = site(32, n, Mask(causal=True, offset=n - 32), (1, 1, 1, 16, 16))
    layout = express.make_layout(express.config_of(policy, n), 32, n)
    index, *compacted = express.thin_triton(k, v, layout, 0.25, seed, 0)
    indexed = index if protected else None
    segments.segment_attention_triton(q[:, :, -32:], segments.Sources(k, v, *compacted, indexed), layout.table, 0.25)
    assert launched(cost_of("express", spec, policy), spec, s)
    if protected:
        return
    for Lk in (128, 100):
        spec = site(8, Lk, sizes=(1, 1, 1, 16, 16))
        schedule, rule = thinformer.make_schedule(Lk, s), thinformer.get_rule("balanced")
        decider = thinformer.Decider(rule, 0.25, Random(seed, 0))
        thinformer._thin_triton(k[:, :, :Lk], v[:, :, :Lk], None, schedule, decider)
        calls["n"] += 1  # exact attention over what is left
        assert launched(cost_of("thinformer", spec, policy), spec, s)
    spec = site(1, 200, sizes=(1, 1, 1, 16, 16))
    santa_kernels.santa_triton(Call(q[:, :, :1], k[:, :, :200], v[:, :, :200], None, seed, 0.25, 0), [8])
    assert launched(cost_of("santa", spec), spec, 8)
