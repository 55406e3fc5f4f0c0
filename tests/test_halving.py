"""Halving: the random numbers, the rules, and the kernel judged decision by decision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels._triton import draw_uniform, jit, philox_uniform, tl
from express_compile.kernels.halving import (
    RULES,
    HalvingRule,
    get_rule,
    halve,
    halve_reference,
    halving_matrix,
    register_rule,
    walk,
)
from express_compile.kernels.schedule import Halving

SEED = torch.tensor(1234)


def draws_for(batch: int, pairs: int, seed: int = 5) -> torch.Tensor:
    counter = torch.arange(batch)[:, None]
    return philox_uniform(torch.tensor(seed), 0, torch.arange(pairs), 0, 0, counter)


# -- random numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, counter, first_word",
    [  # the known answers that Random123 ships for philox4x32-10
        ((0, 0), (0, 0, 0, 0), 0x6627E8D5),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF,) * 4, 0x408F276D),
        ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ],
)
def test_philox_known_answers(key, counter, first_word):
    words = [torch.tensor([c]) for c in counter]
    u = philox_uniform(torch.tensor(key[0]), key[1], *words)
    assert u.item() == (first_word >> 8) * 2.0**-24


@jit
def _draw_kernel(p_out, p_seed, layer, bucket, stage, sequence, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, draw_uniform(tl.load(p_seed), layer, o, bucket, stage, sequence))


def test_kernel_draws_are_those_of_the_reference():
    for seed, layer, bucket, stage, sequence in [(0, 0, 0, 0, 0), (2**32 - 1, 2**31 - 1, 77, 640, 65537)]:
        out = torch.full((64,), math.nan)
        _draw_kernel[(1,)](out, torch.tensor(seed), layer, bucket, stage, sequence, N=64)
        assert torch.equal(out, philox_uniform(torch.tensor(seed), layer, torch.arange(64), bucket, stage, sequence))


def test_draws_differ_by_every_part_of_the_counter():
    base = dict(seed=torch.tensor(1), layer=2, draw=torch.arange(256), bucket=3, stage=4, sequence=5)
    reference = philox_uniform(**base)
    for change in ({"seed": torch.tensor(2)}, {"layer": 3}, {"bucket": 4}, {"stage": 5}, {"sequence": 6}):
        assert (philox_uniform(**{**base, **change}) == reference).float().mean() < 0.05


# -- rules -------------------------------------------------------------------------------------------------------


def literal_walk(key, value, draws, rule, delta, scale):
    """The definition, term by term, for one bucket: no matrix, no shift."""
    if rule.centre:
        key = key - key.mean(0)
    v_max = value.abs().max()

    def kappa(a, b):
        return torch.exp((key[a] @ key[b]) * scale * rule.flatten) * (value[a] @ value[b] + v_max**2)

    def inner(i, j):
        return kappa(2 * i, 2 * j) - kappa(2 * i, 2 * j + 1) - kappa(2 * i + 1, 2 * j) + kappa(2 * i + 1, 2 * j + 1)

    gain, signs, kept, largest = rule.gain(len(key), delta), [], [], 0.0
    for i in range(len(key) // 2):
        alpha = -sum((sign * inner(j, i) for j, sign in enumerate(signs)), torch.tensor(0.0, dtype=key.dtype))
        b = inner(i, i).clamp(min=0).sqrt()
        largest = max(largest, b)
        a = gain * b * largest
        if alpha == 0 or b * largest == 0 or math.isinf(gain):
            p = 0.5
        elif a == 0:
            p = float(alpha < 0)
        else:
            p = 0.5 * max(0.0, 1 - (alpha / a).item())
        kept.append(draws[i].item() < p)
        signs.append(-1.0 if kept[-1] else 1.0)
    return torch.tensor(kept)


@pytest.mark.parametrize("name", ["kernel", "balanced", "uniform"])
def test_reference_is_the_definition(name):
    generator = torch.Generator().manual_seed(0)
    for trial in range(5):
        key = torch.randn(24, 5, generator=generator, dtype=torch.float64)
        value = torch.randn(24, 3, generator=generator, dtype=torch.float64)
        draws = draws_for(1, 12, trial)[0]
        literal = literal_walk(key, value, draws, RULES[name], 0.1, 0.7)
        assert torch.equal(halve_reference(key, value, draws, RULES[name], 0.1, 0.7), literal)


def discrepancy(name: str, batch: int = 100, rows: int = 512) -> float:
    """Mean |sum kept - sum dropped| for zero keys and scalar values uniform in (-1, 1)."""
    value = torch.rand(batch, rows, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    second = halve_reference(torch.zeros_like(value), value, draws_for(batch, rows // 2), RULES[name], 0.5, 1.0)
    difference = value[:, 0::2, 0] - value[:, 1::2, 0]
    return (difference * (1 - 2 * second.double())).sum(1).abs().mean().item()


def test_rules_cancel_where_theory_promises_it():
    coin = discrepancy("uniform")
    # |sum of 256 fair signs times U(-1,1) - U(-1,1)|: standard deviation sqrt(256 * 2/3), mean sqrt(2/pi) of it
    assert coin == pytest.approx(math.sqrt(256 * 2 / 3 * 2 / math.pi), rel=0.15)
    assert discrepancy("kernel") < 0.5 * coin  # express.md measured 0.20
    assert discrepancy("balanced") < 0.1 * coin  # and 0.02


@pytest.mark.parametrize("name", ["kernel", "balanced", "uniform"])
def test_every_row_is_kept_with_probability_one_half(name):
    seeds, rows = 8000, 24
    generator = torch.Generator().manual_seed(2)
    key = torch.randn(rows, 4, generator=generator).expand(seeds, rows, 4)
    value = torch.randn(rows, 2, generator=generator).expand(seeds, rows, 2)
    second = halve_reference(key, value, draws_for(seeds, rows // 2), RULES[name], 0.5, 1.0)
    z = (second.double().mean(0) - 0.5) / (0.5 / math.sqrt(seeds))
    # 12 pairs, each beyond 4.3 standard deviations with probability 1.7e-5: false alarm 2e-4 (the seed is fixed)
    assert z.abs().max() < 4.3
    # negative control: keeping the second row with probability 0.53 is seen
    biased = (draws_for(seeds, rows // 2) < 0.53).double().mean(0)
    assert ((biased - 0.5) / (0.5 / math.sqrt(seeds))).abs().max() > 4.3


@pytest.mark.parametrize("name", ["kernel", "balanced"])
def test_pairs_of_equal_rows_are_fair_coins(name):
    key = torch.randn(6, 4).repeat_interleave(2, 0)
    value = torch.randn(6, 3).repeat_interleave(2, 0)
    draws = torch.tensor([0.1, 0.9, 0.49, 0.5, 0.3, 0.7])
    assert torch.equal(halve_reference(key, value, draws, RULES[name], 0.5, 1.0), draws < 0.5)


def test_an_outlier_key_does_not_break_the_walk():
    key = torch.randn(64, 4)
    key[5] *= 1e4  # the shift makes every other entry of the kernel underflow
    draws = draws_for(1, 32)[0]
    for name in ("kernel", "balanced"):
        second = halve_reference(key, torch.randn(64, 3), draws, RULES[name], 0.5, 1.0)
        agree = (second == (draws < 0.5)).float().mean()
        assert agree > 0.9


def test_registering_rules():
    rule = register_rule(HalvingRule("test-mild", lambda rows, delta: 1.0))
    try:
        assert get_rule("test-mild") is rule
        with pytest.raises(ValueError, match="'test-mild' is registered already"):
            register_rule(HalvingRule("test-mild", lambda rows, delta: 2.0))
    finally:
        del RULES["test-mild"]
    with pytest.raises(ValueError, match="halving='nope': allowed are kernel, balanced, uniform"):
        get_rule("nope")
    with pytest.raises(ValueError, match="flatten=0"):
        HalvingRule("bad", lambda rows, delta: 1.0, flatten=0)


# -- kernel ------------------------------------------------------------------------------------------------------


def misjudged(key, value, draws, decisions, rule, delta, scale, eps):
    """Decisions that a float64 walk along them would not have made, although the margin exceeds rounding.

    A score is off by ``eps`` times the largest |k|^2, so that each entry of D carries that relative error on
    four kernel values, and alpha adds up one such error per pair.
    """
    k, v = key.double(), value.double()
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


def run_kernel(key, value, rule, delta, scale):
    """Halve one bucket per sequence with the kernel: decisions ``[B, H, m]`` and the draws."""
    B, H, rows, _ = key.shape
    arena = torch.full((B, H, rows + rows // 2), -1, dtype=torch.int32)
    arena[:, :, :rows] = torch.arange(rows, dtype=torch.int32)
    halve(arena, key, value, ((Halving(0, rows, rows, 1, 3, 2, delta),),), rule, scale, SEED, 9)
    kept = arena[:, :, rows:]
    pairs = torch.arange(rows // 2)
    counter = (torch.arange(B)[:, None] * 65536 + torch.arange(H))[..., None]
    assert torch.equal(kept // 2, pairs.to(torch.int32).expand_as(kept)), "one row of every pair, in order"
    return kept % 2 == 1, philox_uniform(SEED, 9, pairs, 2, 3, counter)


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
def test_kernel_decisions_are_those_of_the_reference(poison, name, pairs, D, Dv, dtype, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    key = (torch.randn(1, 2, 2 * pairs, D, generator=generator) * spread + 1).to(dtype)
    value = torch.randn(1, 2, 2 * pairs, Dv, generator=generator).to(dtype)
    rule, scale = RULES[name], D**-0.5
    decisions, draws = run_kernel(key, value, rule, 0.25, scale)
    if name == "uniform":
        assert torch.equal(decisions, draws < 0.5)
    else:
        assert not misjudged(key, value, draws, decisions, rule, 0.25, scale, 2.0**-22).any()


def test_a_wrong_decision_is_noticed():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(1, 1, 64, 8, generator=generator), torch.randn(1, 1, 64, 8, generator=generator)
    rule = RULES["balanced"]
    decisions, draws = run_kernel(key, value, rule, 0.25, 0.35)
    assert not misjudged(key, value, draws, decisions, rule, 0.25, 0.35, 2.0**-22).any()
    decisions[0, 0, 20] ^= True
    assert misjudged(key, value, draws, decisions, rule, 0.25, 0.35, 2.0**-22)[0, 0, 20]


def test_kernel_takes_buckets_of_different_sizes_and_strides(poison):
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(2, 50, 3, 16, generator=generator).transpose(1, 2)  # as models produce it: [B, L, H, D]
    value = torch.randn(2, 50, 3, 12, generator=generator).transpose(1, 2)
    launch = (Halving(0, 60, 4, 3, 5, 1, 0.5), Halving(12, 70, 38, 1, 6, 0, 0.1))
    rule = RULES["balanced"]
    arena = torch.full((2, 3, 100), -1, dtype=torch.int32)
    arena[:, :, :50] = torch.stack([torch.randperm(50, generator=generator) for _ in range(6)]).view(2, 3, 50)
    before = arena.clone()
    halve(arena, key, value, (launch,), rule, 0.25, SEED, 9)
    counter = (torch.arange(2)[:, None] * 65536 + torch.arange(3))[..., None]
    for job in launch:
        for i in range(job.buckets):
            source = before[:, :, job.source + i * job.rows : job.source + (i + 1) * job.rows]
            index = source.long()[..., None]
            rows = [x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in (key, value)]
            draws = philox_uniform(SEED, 9, torch.arange(job.rows // 2), job.first + i, job.stage, counter)
            second = halve_reference(*rows, draws, rule, job.delta, 0.25)
            at = job.target + i * job.rows // 2
            expected = torch.where(second, source[..., 1::2], source[..., 0::2])
            assert torch.equal(arena[:, :, at : at + job.rows // 2], expected)
            before[:, :, at : at + job.rows // 2] = expected
    assert torch.equal(arena, before), "nothing else was written"
