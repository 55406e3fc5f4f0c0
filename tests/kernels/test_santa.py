"""SANTA: unbiased to the last bit of the grid, variances that agree with draws, and the rules that must fail."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from express_compile.core.call import Call
from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.sites import record_sites
from express_compile.core.spec import AttentionSpec, Mask, Site, layer_key
from express_compile.kernels import santa as S
from express_compile.planning.choose import plan
from express_compile.planning.measure import calls_of
from express_compile.quality.draws import measure_layers
from express_compile.report.explain import explain
from express_compile.routes.eager import restore_attention, rewrite_attention

SEED = torch.tensor(77)
OPTIONS = dict(draws=[16], fraction=0.0, sampler="sys", shared=True, min_length=0)
COMBS = ["sys", "strat", "sys-3"]


def tokens(Lq, Lk, B=1, H=1, H_kv=1, D=4, Dv=3, dtype=torch.float64, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (sharpness * q).to(dtype), k.to(dtype), v.to(dtype)


def op(q, k, v, padding=None, seed=SEED, scale=0.5, layer=3, lengths=None, **options):
    return METHODS["santa"].op(q, k, v, padding, seed, scale, layer, lengths, **{**OPTIONS, **options})


def softmax(q, k, padding=None, lengths=None, scale=0.5):
    """Probabilities ``[B, H_kv, g, Lq, Lk]`` and the keys that every query sees."""
    visible = S.visible_keys(q.shape[0], q.shape[2], k.shape[2], padding, lengths, q.device)
    return S.probabilities(q, k, visible, scale)[0], visible


def exact(q, k, v, visible=None, scale=0.5):
    Lq, Lk = q.shape[2], k.shape[2]
    mask = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq) if visible is None else visible[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def realistic(n=8192, d=8, heads=1, seed=0):
    """One query over n keys: a sink, a lognormal background and a favour for the last tokens; correlated values."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2.5 * torch.randn(1, 1, heads, 1, n, generator=generator, dtype=torch.float64)
    scores = scores + 3 * torch.exp(-torch.arange(n - 1, -1, -1.0, dtype=torch.float64) / 200)
    scores[..., 0] = scores[..., 1:].logsumexp(-1) + math.log(0.65 / 0.35)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    walk = noise.cumsum(0) - F.pad(noise.cumsum(0), (0, 0, 64, 0))[:n]
    return scores.softmax(-1), (1 + walk / 8 + noise / 2)[None, None]


# ------------------------------------------------------------------------------------ 1: no bias, no statistics


def assert_unbiased(mean, expected, M):
    assert ((mean - expected).abs() <= 1 / M + 1e-6).all(), f"off by {(mean - expected).abs().max():.3f}"


def average_counts(comb, sampler, M):
    """Counts averaged over the offsets ``k / M``; offsets of different strata move together, each over all values."""
    step = (2**comb.bits // M)[..., None]
    size = comb.strata // (S.strata_per_offset(sampler) or comb.strata + 1) + 1
    apart = torch.randint(M, (size,), generator=torch.Generator().manual_seed(1))
    return sum(S.hits(comb, sampler, (apart + k) % M * step) for k in range(M)) / M


@pytest.mark.parametrize("sampler", COMBS)
@pytest.mark.parametrize("shared", [False, True])
def test_no_bias_when_the_offset_takes_every_value(sampler, shared):
    p, _ = realistic(heads=4)
    draws = torch.tensor([128, 128, 32, 300])
    comb = S.make_comb(p, draws, shared)
    mean = average_counts(comb, sampler, 64)
    expected = p * draws[:, None, None]
    if shared:
        expected = expected.mean((2, 3), keepdim=True).clamp(max=1)
        assert comb.always.sum() >= 3
    assert_unbiased(mean, expected, 64)
    assert (mean.sum(-1) - expected.sum(-1)).abs().max() <= 1 / 64 + 1e-3


@given(
    Lk=st.integers(1, 40),
    Lq=st.integers(1, 16),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (16, 1)]),
    draws=st.integers(1, 40),
    sampler=st.sampled_from(COMBS),
    shared=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_bias_in_exact_arithmetic(Lk, Lq, heads, draws, sampler, shared, padded, seed):
    """All 2**6 offsets of a coarse grid: the mean weight is the probability (shared), or that of the grid (not)."""
    Lq = min(Lq, Lk)
    q, k, _ = tokens(Lq, Lk, 2, *heads, seed=seed)
    padding = torch.rand(2, Lk, generator=torch.Generator().manual_seed(seed)) < 0.7 if padded else None
    p, visible = softmax(q, k, padding)
    S_h = torch.randint(1, draws + 1, (heads[0],), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "fraction_bits", lambda draws: torch.full_like(draws, 6).long())
        comb = S.make_comb(p, S_h, shared)
    mean = average_counts(comb, sampler, 64) * comb.weight
    if shared:
        torch.testing.assert_close(mean, p, rtol=1e-12, atol=1e-12)
        return
    torch.testing.assert_close(mean, comb.expected * comb.weight, rtol=1e-12, atol=0)
    assert (mean.sum(-1) - visible.any(-1)[:, None, None].double()).abs().max() < 1e-12, (
        "S draws wherever there is a key"
    )
    assert ((mean > 0) <= visible[:, None, None]).all(), "of visible keys"
    S_h = S_h.view(heads[1], -1, 1, 1)
    slack = torch.where(comb.prefix < S_h << 6, 0.5, Lk / 2) / 2**6 / S_h
    assert ((mean - p).abs() <= slack + 1e-12).all(), "rounded to nearest; the last ones take what is left"


# ---------------------------------------------------------------------------------- 7: the rules that must fail


def published_budgets(weights, draws, sort):
    """Draws per tile: the integer part, and one more for the largest fractional parts in the order of ``sort``."""
    share = draws * weights
    budget = share.floor()
    order = sort(share - budget)[: int(draws - budget.sum())]
    return budget.index_add(0, order, torch.ones(len(order), dtype=budget.dtype))


def padded_bitonic_sort(keys):
    """Places in descending order, as a bitonic network of the next power of two sorts them that treats the slots
    behind the last one as minus infinity and drops what is written there. Entries get lost."""
    T = len(keys)
    size = 1 << (T - 1).bit_length()
    slots = [(float(key), place) for place, key in enumerate(keys)]
    virtual = (-math.inf, 0)
    width = 2
    while width <= size:
        distance = width // 2
        while distance:
            for i in range(size):
                j = i ^ distance
                if j > i:
                    a, b = slots[i] if i < T else virtual, slots[j] if j < T else virtual
                    if (a[0] < b[0]) == (i & width == 0) and a[0] != b[0]:
                        a, b = b, a
                    if i < T:
                        slots[i] = a
                    if j < T:
                        slots[j] = b
            distance //= 2
        width *= 2
    return torch.tensor([place for key, place in slots if key > -math.inf], dtype=torch.int64)


def tile_counts(p, budget, tile, M):
    """Counts averaged over the offsets ``(k + 1/2) / M``, every tile drawing its own budget."""
    tiles = F.pad(p, (0, -len(p) % tile)).view(-1, tile)
    prefix = (tiles * (budget / tiles.sum(-1))[:, None]).cumsum(-1)
    prefix[:, -1] = budget
    offsets = (torch.arange(M, dtype=torch.float64) + 0.5) / M
    counts = (offsets[:, None, None] + prefix).floor()
    return counts.diff(dim=-1, prepend=counts.new_zeros(M, len(tiles), 1)).mean(0).flatten()[: len(p)]


@pytest.mark.parametrize("tiles, sort", [(128, "right"), (118, "right"), (118, "padded")])
def test_the_published_budget_rule_is_biased(tiles, sort):
    p = realistic(n=64 * tiles, seed=3)[0].flatten()
    draws, mass = 128, p.view(tiles, 64).sum(-1)
    budget = published_budgets(
        mass, draws, padded_bitonic_sort if sort == "padded" else lambda x: x.argsort(descending=True)
    )
    assert budget.sum() == draws and ((budget - draws * mass).abs() < 1).all()
    mean = tile_counts(p, budget, 64, 512)
    assert_unbiased(mean, p * draws * (budget / draws / mass).repeat_interleave(64), 512)  # it is what was analysed
    with pytest.raises(AssertionError, match="off by 0.[3-9]"):
        assert_unbiased(mean, p * draws, 512)
    with pytest.raises(AssertionError, match="off by"):  # weighted by tile mass instead: tiles without a draw are lost
        reweighted = mean * (draws * mass / budget.clamp(min=1)).repeat_interleave(64)
        assert_unbiased(reweighted, p * draws, 512)


@pytest.mark.parametrize("T, lost", [(118, 48), (126, 30), (129, 1), (200, 72), (257, 1), (128, 0)])
def test_the_published_sort_loses_entries(T, lost):
    keys = torch.rand(T, generator=torch.Generator().manual_seed(T), dtype=torch.float64)
    assert T - len(padded_bitonic_sort(keys).unique()) == lost


# ---------------------------------------------------------------------------------------------- 2: invariants


@pytest.mark.parametrize("sampler", [*COMBS, "iid"])
def test_counts(sampler):
    """S draws in all, floor or ceiling of what is expected of each row, and the output is what the counts say."""
    q, k, v = tokens(3, 500, 20, 4, 2)
    p, visible = softmax(q, k)
    draws = torch.tensor([100, 100, 7, 300])
    weights = S.sample_weights(p, draws, visible.sum(-1), SEED, 3, sampler, False)
    S_h = draws.view(2, 2, 1, 1)
    counts = weights * S_h
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    counts = counts.round().long()
    assert (counts.sum(-1) == S_h[..., 0]).all()
    x = S.make_comb(p, draws, False).expected
    distance = (counts - x).abs().max()
    assert distance < 1 if sampler == "sys" else distance > 2 if sampler == "iid" else 1 < distance < 2
    out, lse = S.santa_reference(
        Call.of(S.OP, (q, k, v, None, SEED, 0.5, 3), dict(sampler=sampler, shared=False)), draws
    )
    torch.testing.assert_close(out, (counts / S_h.double() @ v[:, :, None]).flatten(1, 2), rtol=1e-12, atol=1e-12)
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.5).masked_fill(~visible[:, None], -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    constant, _ = S.santa_reference(
        Call.of(S.OP, (q, k, torch.ones_like(v), None, SEED, 0.5, 3), dict(sampler=sampler, shared=False)), draws
    )
    torch.testing.assert_close(constant, torch.ones_like(constant), rtol=1e-12, atol=0)


@pytest.mark.parametrize("draws, g, Lq", [(S.MAX_DRAWS, 16, 16), (512, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_prefixes_fit_int32(draws, g, Lq, shared):
    """The worst case for shared rows: every query has its own keys, all alike."""
    n = 64 * g * Lq
    p = torch.zeros(1, 1, g, Lq, n, dtype=torch.float64)
    for i in range(g * Lq):
        p[0, 0, i // Lq, i % Lq, 64 * i : 64 * i + 64] = 1 / 64
    comb = S.make_comb(p, torch.full((g,), draws), shared)
    bits = comb.bits.unique().item()
    assert comb.prefix.max() + 2**bits < 2**31
    assert (comb.prefix >> bits).max() <= comb.strata
    assert bits >= 8 and (shared or comb.prefix.max() == draws << bits)


def test_tiles_of_the_same_integers_give_the_same_counts():
    """What a kernel relies on: prefixes that are carried from tile to tile, in any tiling."""
    p, _ = realistic(n=1000)
    comb = S.make_comb(p, torch.tensor([128]), False)
    offset, bits = torch.tensor([12345]), comb.bits.item()
    whole = S.hits(comb, "sys", offset).flatten()
    x = comb.prefix.flatten().diff(prepend=torch.zeros(1, dtype=torch.int64)).to(torch.int32)
    for tile in (1, 7, 128):
        carry, counts = torch.tensor(2**bits - 1 - 12345, dtype=torch.int32), []
        for part in x.split(tile):
            end = carry + part.cumsum(0, dtype=torch.int32)
            counts.append((end >> bits) - ((end - part) >> bits))
            carry = end[-1]
        assert torch.equal(torch.cat(counts).long(), whole)


# -------------------------------------------------------------------------------------------- 3: exact results


@pytest.mark.parametrize("sampler", COMBS)
@pytest.mark.parametrize("shared", [False, True])
def test_flat_attention_reads_every_row_equally_often(sampler, shared):
    q, k, v = tokens(1, 64, 3, 4, 2)
    draws = torch.tensor([128, 128, 128, 128])
    out, _ = S.santa_reference(
        Call.of(S.OP, (q, 0 * k, v, None, SEED, 0.5, 0), dict(sampler=sampler, shared=shared)), draws
    )
    torch.testing.assert_close(out, exact(q, 0 * k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", COMBS)
def test_many_draws_come_close(sampler):
    """|out - exact| <= (2/S) sum |v_j| whatever is drawn; shared rows that are certain are exact."""
    q, k, v = tokens(2, 300, 2, 4, 2)
    draws = torch.full((4,), S.MAX_DRAWS)
    bound = (2 / S.MAX_DRAWS + 2**-29) * v.norm(dim=-1).sum(-1).repeat_interleave(2, 1)[..., None]
    out, _ = S.santa_reference(Call.of(S.OP, (q, k, v, None, SEED, 0.5, 0), dict(sampler=sampler, shared=False)), draws)
    error = (out - exact(q, k, v)).norm(dim=-1)
    assert (error <= bound).all() and error.max() > 1e-9
    out, _ = S.santa_reference(
        Call.of(S.OP, (q / 4, k, v, None, SEED, 0.5, 0), dict(sampler=sampler, shared=True)), draws
    )
    torch.testing.assert_close(out, exact(q / 4, k, v), rtol=1e-12, atol=1e-12)


def test_no_more_keys_than_draws_is_exact():
    q, k, v = tokens(2, 16, 2, 4, 2, dtype=torch.float32)
    torch.testing.assert_close(op(q, k, v)[0], exact(q, k, v))
    more = tokens(2, 17, 2, 4, 2, dtype=torch.float32)
    assert (op(*more)[0] - exact(*more)).abs().max() > 1e-3
    torch.testing.assert_close(op(*more, min_length=18)[0], exact(*more))


# ----------------------------------------------------------------- windows, soft-caps and sinks, written out


def formed(q, k, v, window=0, softcap=0.0, sinks=None, padding=None, lengths=None, scale=0.5):
    """``out`` and ``lse`` of the softmax as it is written on paper, query by query, in float64."""
    B, H, Lq, Lk = *q.shape[:3], k.shape[2]
    out, lse = q.new_zeros(B, H, Lq, v.shape[3]), q.new_full((B, H, Lq), -math.inf)
    for b in range(B):
        end = Lk if lengths is None else int(lengths[b])
        for h in range(H):
            keys, values = (x[b, h * k.shape[1] // H] for x in (k, v))
            for i in range(Lq):
                own = end - Lq + i
                seen = [j for j in range(Lk) if j <= own and not (window and own - j >= window)]
                seen = [j for j in seen if padding is None or padding[b, j]]
                s = keys[seen] @ q[b, h, i] * scale
                s = softcap * torch.tanh(s / softcap) if softcap else s
                mass = s.exp().sum() + (0 if sinks is None else sinks[h].to(s.dtype).exp())
                out[b, h, i] = s.exp() @ values[seen] / mass if seen else 0
                lse[b, h, i] = mass.log()
    return out, lse


FORMS = st.fixed_dictionaries(
    {
        "window": st.sampled_from([0, 1, 2, 7, 15, 40]),
        "softcap": st.sampled_from([0.0, 0.7, 5.0]),
        "sinks": st.sampled_from([None, torch.float64, torch.float32, torch.bfloat16]),
    }
)


def with_sinks(forms, H, seed=0):
    values = torch.randn(H, generator=torch.Generator().manual_seed(seed))
    return {**forms, "sinks": None if forms["sinks"] is None else values.to(forms["sinks"])}


@settings(max_examples=40)
@given(
    Lk=st.integers(1, 30),
    Lq=st.integers(1, 6),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    forms=FORMS,
    masked=st.sampled_from(["", "padding", "lengths", "both"]),
    seed=st.integers(0, 1000),
)
def test_windows_soft_caps_and_sinks_are_those_on_paper(Lk, Lq, heads, forms, masked, seed):
    """All rows: equal. Draws: hidden keys and values may be NaN, and what is drawn lies in the window."""
    Lq, forms = min(Lq, Lk), with_sinks(forms, heads[0], seed)
    q, k, v = tokens(Lq, Lk, 2, *heads, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(2, Lk, generator=generator) < 0.7 if masked in ("padding", "both") else None
    lengths = torch.randint(0, Lk + 1, (2,), generator=generator) if masked in ("lengths", "both") else None
    masks = dict(padding=padding, lengths=lengths)
    expected, expected_lse = formed(q, k, v, **forms, **masks)
    hidden = ~S.visible_keys(2, Lq, Lk, padding, lengths, q.device, forms["window"]).any(1)[:, None, :, None]
    k, v = (x.masked_fill(hidden, math.nan) for x in (k, v))
    out, lse = op(q, k, v, draws=[64], **forms, **masks)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)
    for shared in (False, True):
        drawn, lse = op(q, k, v, draws=[2], shared=shared, **forms, **masks)
        assert drawn.isfinite().all()
        torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left_out", ["window", "softcap", "sinks"])
def test_leaving_one_out_would_show(left_out):
    q, k, v = tokens(2, 40, 1, 4, 2)
    forms = dict(window=9, softcap=2.0, sinks=torch.tensor([0.0, 1.0, 2.0, 3.0]))
    expected, lse = formed(q, k, v, **forms)
    del forms[left_out]
    out, other = op(q, k, v, draws=[64], **forms)
    assert (out - expected).abs().max() > 0.05 and (other - lse).abs().min() > 0.001


@given(
    Lk=st.integers(2, 40),
    Lq=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    draws=st.integers(1, 20),
    sampler=st.sampled_from(COMBS),
    forms=FORMS,
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_no_bias_with_windows_soft_caps_and_sinks(Lk, Lq, heads, draws, sampler, forms, seed):
    """As in exact arithmetic above, for every key and for the sink, whose value is zero."""
    Lq, forms = min(Lq, Lk), with_sinks(forms, heads[0], seed)
    q, k, _ = tokens(Lq, Lk, 2, *heads, seed=seed)
    visible = S.visible_keys(2, Lq, Lk, None, None, q.device, forms["window"])
    p, lse = S.probabilities(q, k, visible, 0.5, forms["softcap"], forms["sinks"])
    assert ((p > 0).sum((2, -1)) == p.shape[2] * (visible.sum(-1)[:, None] + (forms["sinks"] is not None))).all()
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]), rtol=1e-12, atol=0)
    S_h = torch.full((heads[0],), draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "fraction_bits", lambda draws: torch.full_like(draws, 6).long())
        shared, apart = S.make_comb(p, S_h, True), S.make_comb(p, S_h, False)
    torch.testing.assert_close(average_counts(shared, sampler, 64) * shared.weight, p, rtol=1e-12, atol=1e-12)
    mean = average_counts(apart, sampler, 64) * apart.weight
    torch.testing.assert_close(mean, apart.expected / draws, rtol=1e-12, atol=1e-12)
    if forms["sinks"] is not None:  # it takes what is left of the grid: every key is rounded to nearest
        kept = slice(0, Lk)
        closed = apart.prefix[..., kept] == draws << 6
        slack = torch.where(closed, Lk / 2, 0.5) / 2**6 / draws
        assert ((mean - p)[..., kept].abs() <= slack + 1e-12).all()


def test_without_a_place_for_the_sink_the_last_key_would_be_drawn_for_it():
    """The negative control: rows of their own, a sink of half the mass."""
    q, k, v = tokens(1, 40, 1, 1)
    sink = formed(q, k, v)[1].flatten()
    p, _ = S.probabilities(q, k, torch.ones(1, 1, 40, dtype=torch.bool), 0.5, 0.0, sink)
    draws = torch.tensor([64])
    good, bad = (average_counts(S.make_comb(x, draws, False), "sys", 64)[..., :40] / 64 for x in (p, p[..., :40]))
    assert ((good - p[..., :40]).abs() < 1e-3).all() and abs(good.sum() - 0.5) < 1e-3
    assert abs(bad.sum() - 1) < 1e-12 and (bad - p[..., :40])[..., -1] > 0.4


@pytest.mark.parametrize("shared", [False, True])
def test_a_full_window_draws_anew_at_every_step(shared):
    """One more key before the window: exact attention stays the same, and the draws do not."""
    q, k, v = tokens(1, 60, 1, 4, 2, sharpness=0.3)
    before = [torch.cat([torch.full_like(x[:, :, :1], math.nan), x], 2) for x in (k, v)]
    forms = dict(window=50, sinks=torch.ones(4))
    torch.testing.assert_close(op(q, k, v, draws=[50], **forms), op(q, *before, draws=[50], **forms))
    now, later = (op(q, *x, shared=shared, **forms)[0] for x in ((k, v), before))
    assert (now - later).abs().max() > 1e-3


def test_keys_are_counted_in_the_window():
    """Exact for no more keys in reach than draws, or than min_length; a fraction of the budget is of these."""
    q, k, v = tokens(2, 60, 2, 4, 2)
    for window, close in ((15, True), (16, False)):  # two queries reach one key more
        torch.testing.assert_close(op(q, k, v, draws=[60], window=window)[0], formed(q, k, v, window)[0])
        difference = (op(q, k, v, window=window)[0] - formed(q, k, v, window)[0]).abs().max()
        assert (difference < 1e-12) == close
        torch.testing.assert_close(op(q, k, v, window=window, min_length=18)[0], formed(q, k, v, window)[0])
    tenth = op(q, k, v, window=39, draws=[0], fraction=0.1)[0]
    assert torch.equal(tenth, op(q, k, v, window=39, draws=[4])[0])


# ----------------------------------------------------------------------------- 4 and 5: statistics over 2000 seeds

R = 2000


def copies(*tensors):
    """R copies of the heads of one sequence, which draw for themselves."""
    return [x.repeat(1, R, *(1,) * (x.dim() - 2)) for x in tensors]


def apart(x):
    """What was found for such copies: ``[R, heads, ..]``."""
    return x[0].unflatten(0, (R, -1))


@pytest.fixture(scope="module")
def one_sequence():
    """Two query heads over one KV head."""
    return tokens(1, 100, 1, 2, 1, Dv=8, seed=5)


@pytest.mark.parametrize("sampler, shared", [("iid", False), *((s, shared) for s in COMBS for shared in (False, True))])
def test_unbiased_over_seeds(one_sequence, sampler, shared):
    """Hotelling's T^2/d against F(8, R - 8): above 4.1 once in 10,000 unbiased cases. Fixed seeds."""
    q, k, v = one_sequence
    out, _ = op(*copies(q, k, v), sampler=sampler, shared=shared)
    error = (apart(out) - exact(q, k, v)).squeeze(2)
    for head in (0, 1):
        x = error[:, head]
        assert x.mean(0) @ torch.linalg.solve(torch.cov(x.T), x.mean(0)) * R / 8 < 4.1
        biased = x + 0.2 * x.std(0)  # what a bias of a fifth of the noise of one step would look like
        assert biased.mean(0) @ torch.linalg.solve(torch.cov(biased.T), biased.mean(0)) * R / 8 > 4.1


@pytest.mark.parametrize("shared", [False, True])
def test_unbiased_over_seeds_with_a_window_a_soft_cap_and_sinks(one_sequence, shared):
    """As above; and the variance over these draws is the predicted one, the sink being a row of zeros."""
    q, k, v = one_sequence
    forms = dict(window=70, softcap=3.0, sinks=torch.tensor([3.0, 4.0]))
    out = apart(op(*copies(q, k, v), shared=shared, **{**forms, "sinks": forms["sinks"].repeat(R)})[0])
    error = (out - formed(q, k, v, **forms)[0]).squeeze(2)
    without = formed(q, k, v, window=70, softcap=3.0)[0].squeeze(2)
    visible = (torch.arange(100) >= 30).expand(1, 1, 100)
    p, _ = S.probabilities(q, k, visible, 0.5, 3.0, forms["sinks"])
    predicted = S.variance(p, F.pad(v, (0, 0, 0, 1)), torch.tensor([16, 16]), "sys", shared).flatten()
    for head in (0, 1):
        x = error[:, head]
        assert x.mean(0) @ torch.linalg.solve(torch.cov(x.T), x.mean(0)) * R / 8 < 4.1
        biased = out[:, head].squeeze(1) - without[:, head]
        assert biased.mean(0) @ torch.linalg.solve(torch.cov(biased.T), biased.mean(0)) * R / 8 > 20, "no sinks"
        assert abs(x.square().sum(-1).mean() / predicted[head] - 1) < 0.12


@pytest.mark.parametrize("sampler", COMBS)
@pytest.mark.parametrize("shared", [False, True])
def test_selection_frequencies(one_sequence, sampler, shared):
    """z of every row's mean count: mean z^2 about 1 (that of so few cells stays within 0.6..1.5), no z above 4.5."""
    p, visible = softmax(*one_sequence[:2])
    many = copies(p)[0]
    weights = apart(S.sample_weights(many, torch.full((2 * R,), 16), visible.sum(-1), SEED, 3, sampler, shared))
    comb = S.make_comb(p, torch.tensor([16, 16]), shared)
    counts = (weights / comb.weight)[:, :, : comb.prefix.shape[2]].nan_to_num(0)
    counts, x = counts.squeeze(3).mean(0), torch.where(comb.always, 1.0, comb.expected)[0, ..., 0, :]
    f = x.frac()
    uncertain = f * (1 - f) * R > 5
    z = ((counts - x) / (f * (1 - f) / R).sqrt())[uncertain]
    assert len(z) > 20 and z.abs().max() < 4.5
    if sampler == "sys":  # otherwise a row that two strata share has more variance
        assert 0.6 < z.square().mean() < 1.5


# ------------------------------------------------------------------------------------------------- 6: variance


@pytest.mark.parametrize("sampler, shared", [("iid", False), *((s, shared) for s in COMBS for shared in (False, True))])
def test_variance_agrees_with_draws(sampler, shared):
    """Within 5% over 2000 draws of 6 heads (averaged; a single head within 12%)."""
    q, k, v = tokens(1, 100, 1, 6, 2, Dv=8, seed=5)
    p, _ = softmax(q, k)
    draws = torch.tensor([16, 16, 16, 16, 32, 8])
    expected = S.variance(p, v, draws, sampler, shared).flatten()
    out = apart(op(*copies(q, k, v), draws=draws.tolist() * R, sampler=sampler, shared=shared)[0])
    ratio = (out - exact(q, k, v)).square().sum(-1).mean(0).flatten() / expected
    assert abs(ratio.mean() - 1) < 0.05 and (ratio - 1).abs().max() < 0.12


@pytest.mark.parametrize("sampler", COMBS)
@pytest.mark.parametrize("shared", [False, True])
def test_variance_is_the_enumeration_of_all_offsets(monkeypatch, sampler, shared):
    """On a grid of 2**7 offsets, block by block (offsets of different blocks are independent): to rounding."""
    monkeypatch.setattr(S, "fraction_bits", lambda draws: torch.full_like(draws, 7).long())
    q, k, v = tokens(2, 50, 1, 4, 2, seed=2)
    p, _ = softmax(q, k)
    draws = torch.tensor([10, 10, 4, 11])
    comb = S.make_comb(p, draws, shared)
    size = comb.strata // (S.strata_per_offset(sampler) or comb.strata + 1) + 1
    expected = 0
    for block in range(size):
        offsets = torch.zeros(2**7, size, dtype=torch.int64)
        offsets[:, block] = torch.arange(2**7)
        outs = torch.stack([S.hits(comb, sampler, u) * comb.weight @ v[:, :, None] for u in offsets])
        expected = expected + outs.var(0, correction=0).sum(-1)
    torch.testing.assert_close(S.variance(p, v, draws, sampler, shared), expected.flatten(1, 2), rtol=1e-9, atol=1e-12)


def test_closed_forms():
    """tr(Sigma)/S for iid; for strat the mass of every row split over the strata it lies in."""
    p, v = realistic(n=2048)
    n_draws = 64
    q = S.make_comb(p, torch.tensor([n_draws]), False).expected.flatten() / n_draws
    values = v[0, 0]
    trace = (q[:, None] * (values - q @ values).square()).sum()
    iid, strat, sys = (S.variance(p, v, torch.tensor([n_draws]), s, False).item() for s in ("iid", "strat", "sys"))
    assert iid == pytest.approx(trace.item() / n_draws, rel=1e-9)
    end = n_draws * q.cumsum(0)
    total = 0.0
    for m in range(n_draws):
        part = (end.clamp(max=m + 1) - (end - n_draws * q).clamp(min=m)).clamp(min=0)
        total += (part[:, None] * (values - part @ values).square()).sum().item() / n_draws**2
    assert strat == pytest.approx(total, rel=1e-6)
    assert sys < strat < 0.6 * iid


def test_the_worst_case_of_sys():
    """Flat attention over values of period n/S: every draw of sys reads the same value; sys-r caps it at r."""
    n, draws = 2048, torch.tensor([128])
    p = torch.full((1, 1, 1, 1, n), 1 / n, dtype=torch.float64)
    v = torch.randn(1, 1, n // 128, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(
        1, 1, 128, 1
    )
    iid = S.variance(p, v, draws, "iid", False)
    ratios = {s: (S.variance(p, v, draws, s, False) / iid).item() for s in ("sys", "sys-16", "strat")}
    assert ratios == pytest.approx({"sys": 128, "sys-16": 16, "strat": 1})


@pytest.mark.parametrize("sampler, shared", [("iid", False), *((s, shared) for s in COMBS for shared in (False, True))])
def test_expected_rows(sampler, shared):
    """Row by row within 4.5 standard errors of 2000 draws; for sys the sum over n of min(1, S p)."""
    p, _ = realistic(n=300, heads=2)
    draws = torch.tensor([64, 64])
    read = S.read_probability(p, draws, sampler, shared)
    many, step = copies(p)[0], torch.full((1, 1), 300)
    weights = apart(S.sample_weights(many, draws.repeat(R), step, SEED, 1, sampler, shared))
    frequency = (weights > 0)[:, :, : read.shape[2]].double().mean(0)
    assert ((frequency - read[0]).abs() <= 4.5 * (read[0] * (1 - read[0]) / R).sqrt() + 1e-3).all()
    if sampler == "sys" and not shared:
        torch.testing.assert_close(read.sum(-1), (64 * p).clamp(max=1).sum(-1), rtol=1e-6, atol=1e-3)


# ----------------------------------------------------------------------------------------------- shared rows


def test_heads_that_are_alike_read_the_same_rows():
    p, v = realistic(n=2048)
    p = p.expand(1, 1, 4, 1, -1)
    draws = torch.full((4,), 64)
    read = S.read_probability(p, draws, "sys", True)
    torch.testing.assert_close(read[0, 0, 0], (64 * p[0, 0, 0]).clamp(max=1), rtol=0, atol=2.0**-20)
    alone, together = (S.variance(p, v, draws, "sys", shared)[0, 0, 0].item() for shared in (False, True))
    assert together < 1.03 * alone, "certain rows are exact, but take up room on the comb"


def test_shared_rows_are_fewer_for_the_same_error():
    """Heads of correlation 0.9: at no more rows than independent draws read together, less than half the error."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(1, 1, heads, 1, 4096, generator=generator, dtype=torch.float64) for heads in (1, 4))
    scores = 2.5 * (0.9**0.5 * common + 0.1**0.5 * own)
    scores[..., 0] = scores[..., 1:].logsumexp(-1) + math.log(0.65 / 0.35)
    p, v = scores.softmax(-1), realistic(n=4096)[1]
    alone, shared = torch.full((4,), 64), torch.full((4,), 232)
    union = (1 - (1 - S.read_probability(p, alone, "sys", False)).prod(2)).sum()
    assert 0.9 * union < S.read_probability(p, shared, "sys", True).sum() < union
    assert S.variance(p, v, shared, "sys", True).sum() < 0.5 * S.variance(p, v, alone, "sys", False).sum()


# ------------------------------------------------------------------------------------------- steps and seeds


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sampler", [*COMBS, "iid"])
def test_same_seed_same_bits_and_every_part_of_the_counter_counts(sampler, shared):
    if shared and sampler == "iid":
        with pytest.raises(ValueError, match="sampler='iid': needs shared=False"):
            op(*tokens(1, 40), sampler="iid", shared=True)
        return
    q, k, v = tokens(2, 400, 2, 4, 2, dtype=torch.float32, sharpness=0.3)
    q, k, v = (x[:1, :1].expand(2, x.shape[1], -1, -1) for x in (q, k, v))  # all sequences and heads hold the same
    base = op(q, k, v, sampler=sampler, shared=shared)[0]
    assert torch.equal(base, op(q.clone(), k.clone(), v.clone(), sampler=sampler, shared=shared)[0])
    for change in (dict(seed=SEED + 1), dict(layer=4)):
        assert not torch.equal(base, op(q, k, v, sampler=sampler, shared=shared, **change)[0])
    assert torch.equal(base[0], base[1]), "sequences draw the same"
    assert not torch.equal(base[:, 0], base[:, 2]), "KV heads"
    assert torch.equal(base[:, 0], base[:, 1]) == shared, "heads of a KV head, unless they share"
    # the next step: one key that nobody cares for
    far = torch.cat([k[:, :, :1] * 0 - 1e4 * q[:, :2, :1].sign(), k], 2)
    later = op(q, far, torch.cat([v[:, :, :1], v], 2), sampler=sampler, shared=shared)[0]
    assert not torch.allclose(base, later, atol=1e-3)


@pytest.mark.parametrize("word", ["step", "layer"])
def test_errors_of_successive_steps_and_layers_are_independent(word):
    """2000 of them under one seed: the errors of neighbours correlate by less than 4 / sqrt(2000)."""
    p, v = realistic(n=100, d=1)
    count, head = 2000, torch.zeros(1, 1, dtype=torch.int64)
    comb = S.make_comb(p, torch.tensor([16]), False)
    drawn = []
    for i in range(count):
        step, layer = (100 + i, 3) if word == "step" else (100, i)
        thresholds = S.draw_thresholds(comb, "sys", SEED, layer, torch.full((1, 1), step), head)
        drawn.append(S.hits(comb, "sys", thresholds) * comb.weight @ v[:, :, None])
    error = torch.stack(drawn).flatten() - (p @ v[:, :, None]).flatten()
    assert error.std() > 1e-3 and error.mean().abs() < 4 * error.std() / math.sqrt(count)
    assert abs(torch.corrcoef(torch.stack([error[1:], error[:-1]]))[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize("sampler", [*COMBS, "iid"])
def test_a_chunk_of_queries_is_the_steps_one_by_one(sampler):
    """Speculative decoding verifies what decoding would have drawn, for rows that are not shared."""
    q, k, v = tokens(5, 90, 2, 4, 2)
    whole = op(q, k, v, sampler=sampler, shared=False)[0]
    for i in range(5):
        n = 90 - 4 + i
        one = op(q[:, :, i : i + 1], k[:, :, :n], v[:, :, :n], sampler=sampler, shared=False)[0]
        torch.testing.assert_close(whole[:, :, i : i + 1], one, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- masks


@settings(max_examples=15)
@given(
    Lq=st.integers(1, 16),
    Lk=st.integers(17, 60),
    heads=st.sampled_from([(1, 1), (4, 2), (16, 1)]),
    shared=st.booleans(),
    left=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_padding_and_lengths_hide_keys(Lq, Lk, heads, shared, left, seed):
    """What is hidden may be NaN and does not count: left padding and lengths give what the keys alone would."""
    q, k, v = tokens(Lq, Lk, 2, *heads, seed=seed)
    alone, _ = op(q, k, v, shared=shared)
    garbage = torch.full_like(k[:, :, :1], math.nan).expand(-1, -1, left, -1)
    nothing = torch.full_like(v[:, :, :1], math.nan).expand(-1, -1, left, -1)
    padding = (torch.arange(left + Lk) >= left).expand(2, -1)
    front = torch.cat([garbage, k], 2), torch.cat([nothing, v], 2)
    torch.testing.assert_close(op(q, *front, padding, shared=shared)[0], alone, rtol=1e-9, atol=1e-9)
    back = torch.cat([k, garbage], 2), torch.cat([v, nothing], 2)
    lengths = torch.full((2,), Lk)
    torch.testing.assert_close(op(q, *back, lengths=lengths, shared=shared)[0], alone, rtol=1e-9, atol=1e-9)
    if Lq == 1:  # a static cache as transformers masks it
        torch.testing.assert_close(op(q, *back, padding.flip(1), shared=shared)[0], alone, rtol=1e-9, atol=1e-9)


def test_ragged_lengths_and_queries_without_keys():
    q, k, v = tokens(3, 40, 4, 2, 1)
    lengths = torch.tensor([40, 21, 2, 0])
    out, lse = op(q, k, v, lengths=lengths, draws=[60])
    _, visible = softmax(q, k, None, lengths)
    assert visible.sum(-1).tolist() == [[38, 39, 40], [19, 20, 21], [0, 1, 2], [0, 0, 0]]
    seen = visible.any(-1)[:, None].expand(4, 2, 3)
    torch.testing.assert_close(out[seen], exact(q, k, v, visible)[seen])
    assert (out[~seen] == 0).all() and (lse[~seen] == -math.inf).all() and lse[seen].isfinite().all()
    sampled, lse = op(q, k, v, lengths=lengths, draws=[8])
    assert (sampled[~seen] == 0).all() and sampled.isfinite().all() and (lse[~seen] == -math.inf).all()


# -------------------------------------------------------------------------------------------- score sampling


def test_bernoulli_scores_are_unbiased_and_the_softmax_is_not():
    """4000 roundings of one query. The bias of the output falls like 1/levels^2; it is real at few levels."""
    R, D = 4000, 32
    q, k, v = tokens(1, 40, 1, 1, 1, D=D, Dv=4, sharpness=3.0)
    bias = {}
    for levels in (4, 8, 16):
        rounded = S.round_query(q.expand(R, -1, -1, -1), levels, SEED, 0, torch.arange(R)[:, None])
        unit = q.abs().max() / levels
        torch.testing.assert_close(rounded / unit, (rounded / unit).round(), rtol=0, atol=1e-9)
        f = (q / unit).abs().frac()
        variance = (unit**2 * f * (1 - f) * k.square()).sum(-1) / D  # of every score
        scores = (rounded @ k.mT).squeeze() / D**0.5
        truth = (q @ k.mT).squeeze() / D**0.5
        z = (scores.mean(0) - truth) / (variance.squeeze() / R).sqrt()
        assert z.abs().max() < 4.5, "unbiased scores"
        torch.testing.assert_close(scores.var(0), variance.squeeze(), rtol=0.15, atol=0)
        heads = (x.expand(1, R, -1, -1) for x in (q, k, v))
        out = S.santa_reference(Call.of(S.OP, (*heads, None, SEED, D**-0.5, 0), dict(bernoulli=levels)), None)[0][
            0, :, None
        ]
        error = (out - exact(q, k, v, scale=D**-0.5)).squeeze()
        t = error.mean(0) @ torch.linalg.solve(torch.cov(error.T), error.mean(0)) * R / 4
        bias[levels] = error.mean(0).norm().item()
        assert t > 20 or levels == 16, "biased softmax"
    assert bias[16] < 0.5 * bias[8] < 0.25 * bias[4]


# ------------------------------------------------------------------------------------------------- the op


def test_opcheck():
    q, k, v = tokens(2, 40, 2, 4, 2, dtype=torch.float32)
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :9] = False
    torch.library.opcheck(METHODS["santa"].op, (q, k, v, padding, SEED, 0.5, 3), OPTIONS)
    torch.library.opcheck(METHODS["santa"].op, (q, k, v, None, SEED, 0.5, 3, torch.tensor([40, 9])), OPTIONS)
    arguments = (q, k, v, padding, SEED, 0.5, 3, None, torch.randn(4, dtype=torch.float16))
    torch.library.opcheck(METHODS["santa"].op, arguments, {**OPTIONS, "window": 30, "softcap": 2.0})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    """The output differs from float64's by the rounding of the inputs, but for rows that change sides: few."""
    q, k, v = tokens(1, 300, 8, 4, 2, dtype=dtype, sharpness=0.5)
    out, lse = op(q, k, v, draws=[64])
    truth, _ = op(*(x.double() for x in (q, k, v)), draws=[64])
    assert out.dtype == dtype and lse.dtype == torch.float32
    wrong = ((out.double() - truth).abs() > 4 * torch.finfo(dtype).eps * v.abs().max().double()).double().mean()
    assert wrong < 0.05


def test_the_signature_of_0_1_0_still_runs():
    q, k, v = tokens(1, 60)
    assert all(map(torch.equal, op(q, k, v, layers=[]), op(q, k, v)))
    with pytest.raises(ValueError, match=r"layers=\[3\]: must be \[\]"):
        op(q, k, v, layers=[3])


def test_wrong_arguments():
    q, k, v = tokens(1, 40, 2, 4, 2)
    with pytest.raises(ValueError, match="query: 17 rows; must be 1 to 16"):
        op(*tokens(17, 40))
    with pytest.raises(ValueError, match=r"lengths: torch.int64 of shape \(3,\); must be torch.int64 \(2,\)"):
        op(q, k, v, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"draws: 3 numbers; must be 1 or 4 \(heads\)$"):
        op(q, k, v, draws=[3, 4, 5])
    with pytest.raises(ValueError, match="sampler='sys-0': allowed are 'sys', 'strat', 'iid'"):
        op(q, k, v, sampler="sys-0")
    with pytest.raises(ValueError, match=r"sinks: torch.int64 of shape \(3,\) on cpu; must be floats of shape \(4,\)"):
        op(q, k, v, sinks=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="window=-1: must be a number of keys, or 0 for all"):
        op(q, k, v, window=-1)
    for softcap in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"softcap={softcap}: must be above 0, or 0 for none"):
            op(q, k, v, softcap=softcap)
    with pytest.raises(RuntimeError, match="santa: sinks needs a gradient, and sampled decoding has none"):
        op(q, k, v, sinks=torch.zeros(4, requires_grad=True))[0].sum().backward()
    with pytest.raises(RuntimeError, match="santa: query, value needs a gradient, and sampled decoding has none"):
        op(q.requires_grad_(), k, v.requires_grad_())[0].sum().backward()
    assert op(q, k, v)[0].requires_grad, "that is said when a gradient is asked for, not before"


# ------------------------------------------------------------------------------------------- method and models


def spec(**changes):
    base = dict(B=1, H=4, H_kv=2, Lq=1, Lk=200, D=8, Dv=8, dtype=torch.float32, device="cpu", scale=0.3)
    base["mask"] = Mask(causal=True, offset=199)
    return AttentionSpec(**{**base, **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(Lq=200, mask=Mask(causal=True)), "it has 200 queries, .* SANTA decodes 1 to 16"),
        (dict(Lq=4, mask=Mask()), "it is not causal; .* here are 4 that see each other"),
        (dict(mask=Mask(causal=True, offset=0)), "offset 0; needed is Lk - Lq"),
        (dict(Lq=4, mask=Mask(causal=True, offset=199)), "offset 199; needed is Lk - Lq"),
        (dict(mask=Mask(unknown="opaque tensor")), "its mask is not proven: opaque tensor"),
        (dict(mask=Mask(offset=199, window=64)), "window of 63 tokens on either side; SANTA takes causal ones"),
        (dict(dropout_p=0.1), r"dropout_p=0.1\); call model.eval"),
        (dict(device="mps"), "no kernel for device mps"),
        (dict(device="cuda", dtype=torch.float64), "no kernel for torch.float64"),
        (dict(H=6), "draws lists 4 numbers, the site has 6 heads"),
    ],
)
def test_refusals_carry_their_reason(changes, reason):
    options = {"santa": {"draws": [8, 8, 16, 16]}}
    decision = plan(spec(**changes), Policy(methods=("santa",), method_options=options))
    assert decision.verdict == "refused"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(decision.reason)


def test_what_the_kernels_do_not_take():
    wide = spec(device="cuda", H=64, H_kv=2, Lq=16, mask=Mask(causal=True, offset=184))
    decision = plan(wide, Policy(methods=("santa",)))
    assert decision.reason == "32 heads per key head times 16 queries are more than 256 rows"
    alone = Policy(methods=("santa",), method_options={"santa": {"shared": False}})
    assert plan(spec(device="cuda"), alone).reason == "there is no CUDA kernel for shared=False"
    assert plan(spec(device="cuda"), Policy(methods=("santa",), min_length=0)).verdict == "rewritten"


@pytest.mark.parametrize(
    "B, H_kv, n, budget, reason",
    [
        (1, 8, 16384, 128, None),
        (1, 8, 16383, 128, r"1 x 16383 keys are 32.0 MiB; below 32 MiB exact attention .* as fast"),
        (8, 8, 4096, 256, None),
        (8, 8, 4096, 1024, None),
        (8, 8, 4096, 2048, "2048 draws from 4096 keys would read more than a quarter of them"),
        (4, 8, 4096, 512, r"4 x 4096 keys are 32.0 MiB; below 64 MiB"),
        (4, 8, 4096, 256, None),
        (1, 2, 65536, 128, r"1 x 65536 keys are 32.0 MiB; below 64 MiB"),
        (2, 2, 65536, 128, None),
        (1, 8, 16384, 0.26, "4260 draws from 16384 keys"),
    ],
)
def test_exact_attention_where_it_was_measured_to_be_as_fast(B, H_kv, n, budget, reason):
    """32 heads of size 128 in bfloat16, on CUDA; a number of keys known only at run time is decided there."""
    site = replace(
        spec(device="cuda", B=B, H=32, H_kv=H_kv, Lk=n, D=128, Dv=128, dtype=torch.bfloat16),
        mask=Mask(causal=True, offset=n - 1),
    )
    decision = plan(site, Policy(methods=("santa",), budget=budget, strict=True))
    assert decision.verdict == ("rewritten" if reason is None else "exact")
    assert re.search(reason or "causal", decision.reason)
    for same in (Policy(methods=("santa",), budget=budget, min_length=0), Policy(methods=("santa",), budget=8)):
        changed = site if same.min_length == 0 else replace(site, device="cpu")
        assert plan(changed, same).verdict == "rewritten"


def test_what_is_taken():
    window = Mask(causal=True, offset=199, window=64)
    forms = (dict(mask=window), dict(softcap=30.0), dict(sinks=True), dict(mask=window, softcap=30.0, sinks=True))
    for changes in ({}, dict(mask=Mask()), dict(Lq=16, mask=Mask(causal=True, offset=184, padding=True)), *forms):
        assert plan(spec(**changes), Policy(methods=("santa",))).verdict == "rewritten"
    both = Policy(methods=("express", "santa"))
    assert plan(spec(), both).method == "santa"
    assert plan(spec(Lq=200, mask=Mask(causal=True)), both).method == "express"
    assert plan(spec(), Policy(methods=("express",))).verdict == "refused"
    assert plan(spec(), Policy()).method == "exact", "nothing chooses it unless it is named"


def test_forms_travel_with_the_site():
    """What the op gets, what the reason says, and that a method which does not know a form is not even asked."""
    site = spec(mask=Mask(causal=True, offset=199, window=64), softcap=30.0, sinks=True)
    decision = plan(site, Policy(methods=("santa",), budget=0.5))
    assert decision.params["window"] == 64 and decision.params["softcap"] == 30.0
    assert decision.reason == "causal, offset 199, window 64 attention, with a logit soft-cap of 30 and attention sinks"
    assert not {"window", "softcap"} & set(plan(spec(), Policy(methods=("santa",))).params)
    for method, prefill in (("express", spec(Lq=200, mask=Mask(causal=True))), ("thinformer", spec(Lq=200))):
        prefill = replace(prefill, mask=Mask(causal=method == "express"))
        assert plan(prefill, Policy(methods=(method,))).verdict == "rewritten"
        for form, words in ((dict(softcap=30.0), "a logit soft-cap of 30"), (dict(sinks=True), "attention sinks")):
            refused = plan(replace(prefill, **form), Policy(methods=(method,)))
            assert refused.verdict == "refused"
            assert refused.reason == f"it has {words}, which {method} does not compute"
    refused = plan(spec(sinks=True), Policy(methods=("express",)))
    assert refused.nearest == "methods=['santa'], which takes it as it is"


def test_where_exact_attention_is_as_fast_only_keys_in_the_window_count():
    site = replace(spec(device="cuda", H=32, H_kv=8, Lk=65536, D=128, Dv=128, dtype=torch.bfloat16))
    for window, verdict in ((16384, "rewritten"), (16383, "exact"), (511, "exact")):
        windowed = replace(site, mask=Mask(causal=True, offset=65535, window=window))
        assert plan(windowed, Policy(methods=("santa",), budget=128)).verdict == verdict
    assert "1 x 511 keys" in plan(windowed, Policy(methods=("santa",), budget=100)).reason


@pytest.mark.parametrize("Lq", [1, 5, 40])
def test_exact_attention_is_timed_with_the_window(Lq):
    site = spec(Lq=Lq, Lk=40, mask=Mask(causal=True, offset=40 - Lq, window=9))
    torch.manual_seed(0)
    out = calls_of(site, "exact", {})[0]()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, H, n, 8) for H, n in ((4, Lq), (2, 40), (2, 40)))
    torch.testing.assert_close(out, formed(q, k, v, window=9, scale=0.3)[0])


def test_budgets_per_head_and_layer():
    """An integer, a fraction, one per head, and a mapping of module paths; what is not listed has the budget."""
    q, k, v = tokens(1, 400, 2, 4, 2)

    def run(budget=512, layer="a.b", **options):
        policy = Policy(budget=budget, methods=("santa",), method_options={"santa": options})
        return METHODS["santa"].op(
            q, k, v, None, SEED, 0.5, layer_key(layer), **METHODS["santa"].params(Site(spec(), layer), policy)
        )[0]

    sixteen = run(draws=16)
    assert (
        torch.equal(sixteen, run(16)) and torch.equal(sixteen, run(0.04)) and torch.equal(sixteen, run(draws=[16] * 4))
    )
    mapping = {"x.y": 32, "a.b": 16, "c": [1, 2, 3, 4]}
    assert torch.equal(sixteen, run(64, draws=mapping)) and torch.equal(sixteen, run(0.5, draws=mapping))
    assert torch.equal(run(64, layer="elsewhere", draws=mapping), run(64, layer="elsewhere"))
    assert torch.equal(run(0.5, layer="elsewhere", draws=mapping), run(200, layer="elsewhere"))
    mixed = run(draws=[16, 32, 16, 32], shared=False)
    for head, S_h in enumerate([16, 32, 16, 32]):
        assert torch.equal(mixed[:, head], run(S_h, shared=False)[:, head]), "a head does not see what others draw"
    torch.testing.assert_close(run(draws={"c": [400] * 4, "a.b": 500}), exact(q, k, v))
    for bad in (0, -1, 1.5, True, [16, 0], [], "16", 1 << 17, {"a": [1, 2], "b": [1, 2, 3]}, {"a": None}, {"a": 0}):
        with pytest.raises(ValueError, match="draws=.*: must be an integer from 1 to 65536"):
            plan(spec(), Policy(budget=0.5, methods=("santa",), method_options={"santa": {"draws": bad}}))
    with pytest.raises(ValueError, match="budget=100000: must be at most 65536 draws"):
        plan(spec(), Policy(budget=100_000, methods=("santa",)))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def generate(model, ids, mask=None, **more):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **more)[:, ids.shape[1] :]


@pytest.mark.parametrize("methods", [["santa"], ["santa", "exact"], ["express", "santa"]])
@pytest.mark.parametrize("padded", [False, True])
def test_generate(llama, methods, padded):
    """Prefill by whom it concerns, every decoding step sampled; as many draws as keys give exact decoding."""
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, : 11 * padded] = 0
    expected = generate(llama, ids, mask)
    few = dict(window=0, sinks=0) if "express" in methods else {}
    sampled = rewrite_attention(
        llama, methods=methods, budget=4, method_options={"santa": {"draws": 8}}, min_length=0, **few
    )
    with record_sites() as sites:
        generate(sampled, ids, mask)
    prefill = {"express": "express"}.get(methods[0], "exact")
    assert [site.method for site in sites] == [prefill] * 2 + ["santa"] * 10
    assert sites[0].verdict == ("rewritten" if prefill == "express" else "exact" if "exact" in methods else "refused")
    rewrite_attention(llama, methods=methods, budget=512)
    assert torch.equal(generate(llama, ids, mask), expected)
    restore_attention(llama)


SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    sliding_window=12,
)  # fmt: skip


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES))


def gemma2():
    """A window in every second layer, and a soft-cap that matters: queries are 30 times what they are at random."""
    config = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    config._attn_implementation = "eager"  # transformers 5.17 takes sdpa, which leaves the soft-cap out
    model = transformers.Gemma2ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 30
    return model


def gemma3():
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8))


def gpt_oss():
    """A window in every second layer, and sinks that take most of the mass."""
    config = transformers.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks.data, 3.0)
    return model


# the sites of a decoding step over a cache that keeps all keys: masks (o for a number), and what else is known
DECODERS = {
    mistral: (["causal, offset o, window 12"] * 2, {}),
    gemma3: (["causal, offset o, window 12"] * 2, {}),
    gemma2: (["causal, offset o, key padding", "causal, offset o"], {"softcap": "a logit soft-cap of 2"}),
    gpt_oss: (["causal, offset o, key padding", "causal, offset o"], {"sinks": "attention sinks"}),
}


@pytest.mark.parametrize("make", DECODERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("padded, evicting", [(False, True), (True, False)])
def test_generate_with_windows_soft_caps_and_sinks(make, padded, evicting):
    """As many draws as keys: the logits of exact decoding. Few draws: others. Prefill is exact always."""
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, : 33 * padded] = 0  # the window of this sequence holds padding

    def run():
        cache = {} if evicting else {"past_key_values": transformers.DynamicCache()}
        more = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return torch.stack(model.generate(ids, attention_mask=mask, **cache, **more).logits)

    expected = run()
    rewrite_attention(model, methods=["santa"], budget=512)
    with record_sites() as sites:
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)
    assert [site.method for site in sites] == ["exact"] * 2 + ["santa"] * 4
    assert sites[2].spec.Lk == (12 if evicting else 41)
    masks, forms = DECODERS[make]
    assert all(site.spec.forms == forms for site in sites)
    if not evicting:
        padding = ", key padding" if padded else ""
        seen = [re.sub(r"offset \d+", "offset o", site.mask).removesuffix(padding) for site in sites[2:4]]
        assert seen == [x.removesuffix(padding) for x in masks]
    rewrite_attention(model, methods=["santa"], budget=4)
    sampled = run()
    assert torch.equal(sampled[0], expected[0]) and (sampled[1] - expected[1]).abs().max() > 1e-3
    rewrite_attention(model, methods=["express"], budget=4)
    with record_sites() as sites:
        assert torch.equal(run(), expected)
    words = next(iter(forms.values()), None)
    assert words is None or {site.reason for site in sites} == {f"it has {words}, which express does not compute"}
    assert torch.equal(run(), expected) and restore_attention(model) is model


def test_a_cache_that_evicts_draws_anew_at_every_step():
    """It holds as many keys at every step, so the position of the token advances the seed."""
    torch.manual_seed(0)
    model = rewrite_attention(mistral().eval(), methods=["santa"], budget=4, seed=5)
    seeds = []

    class Seeds(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is METHODS["santa"].op:
                seeds.append((args[1].shape[2], int(args[4])))
            return function(*args, **(kwargs or {}))

    ids = torch.randint(1, 97, (1, 8), generator=torch.Generator().manual_seed(1))
    with Seeds():
        model.generate(ids, max_new_tokens=7, do_sample=False)
    assert seeds[2::2] == [(9, 5), (10, 5), (11, 5), (12, 5 + 11), (12, 5 + 12), (12, 5 + 13)]


@pytest.mark.parametrize("make, steps", [(mistral, 3), (gemma2, 1), (gpt_oss, 1)])
def test_windows_soft_caps_and_sinks_take_part_in_the_variance(make, steps):
    """That of each layer is the mean squared error of 500 draws of its own tensors, within 15%."""
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(1))
    found = measure_layers(model, [ids], draws=6, steps=steps, seeds=1)["layers"]
    seen = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is METHODS["santa"].op:
                seen.append((args, kwargs))
            return function(*args, **(kwargs or {}))

    rewrite_attention(model, methods=["santa"], budget=6)
    with torch.no_grad():
        cache = model(ids[:, :-steps]).past_key_values
        with Calls():
            model(ids[:, -steps:], past_key_values=cache)
    (args, options), layer = seen[0], next(iter(found.values()))  # its tensors are the same in both
    exact = METHODS["santa"].op(*args, **{**options, "min_length": 1000})[0]
    errors = []
    for i in range(steps):  # every query for itself, as in decoding; 500 copies of the heads draw for themselves
        n = args[1].shape[2] - steps + 1 + i
        one = args[0][:, :, i : i + 1], args[1][:, :, :n], args[2][:, :, :n]
        many = [None if x is None else x.repeat(500) for x in args[8:]]  # sinks
        out = METHODS["santa"].op(*(x.repeat(1, 500, 1, 1) for x in one), *args[3:8], *many, **options)[0]
        errors.append((out.unflatten(1, (500, -1)) - exact[:, None, :, i : i + 1]).square().sum(-1).mean().item())
    assert sum(errors) / steps == pytest.approx(layer["variance"], rel=0.15)


def test_several_queries_in_a_window():
    """Speculative decoding: three tokens at once, over an evicting cache too."""
    torch.manual_seed(0)
    model = mistral().eval()
    ids = torch.randint(1, 97, (2, 43), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def run(budget, **cache):
        past = transformers.DynamicCache(**cache)
        model(ids[:, :40], past_key_values=past)
        if budget:
            rewrite_attention(model, methods=["santa"], budget=budget)
        with record_sites() as sites:
            out = model(ids[:, 40:], past_key_values=past).logits
        return out, [(site.method, site.mask) for site in sites]

    for cache, offset in (({}, 40), ({"config": model.config}, 11)):
        expected, _ = run(None, **cache)
        out, sites = run(64, **cache)
        assert sites == [("santa", f"causal, offset {offset}, window 12")] * 2
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert (run(4, **cache)[0] - expected).abs().max() > 1e-3
        restore_attention(model)


@torch.no_grad()
def test_additive_masks_of_eager_attention_are_read():
    """One that holds anything else than 0 and what hides is a bias, and one that hides all keys has a meaning of its
    own in eager attention; both are refused. One that is changed between two layers is read again."""
    torch.manual_seed(0)
    model = gemma2().eval()
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    least = torch.finfo(torch.float32).min
    base = torch.zeros(2, 1, 1, 9)
    base[0, ..., :3], base[1, ..., 4] = least, -math.inf

    def step(mask):
        past = transformers.DynamicCache()
        model(ids[:, :8], past_key_values=past)
        with record_sites() as sites:
            out = model(ids[:, 8:], attention_mask={"full_attention": mask, "sliding_attention": mask},
                        past_key_values=past).logits  # fmt: skip
        return out, [(site.method, site.mask) for site in sites[-2:]]

    biased, hidden = base.clone(), base.clone()
    biased[0, ..., 5], hidden[1] = -1.0, least
    for mask, method in ((base, "santa"), (biased, "exact"), (hidden, "exact")):
        expected, _ = step(mask)
        rewrite_attention(model, methods=["santa"], budget=64)
        out, sites = step(mask)
        restore_attention(model)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert [x for x, _ in sites] == [method] * 2
        assert ("causal, offset 8, key padding" if method == "santa" else "additive mask") in sites[0][1]
    mask = base.clone()
    rewrite_attention(model, methods=["santa"], budget=64)

    def change(module, args):
        if args[0].shape[1] == 1:
            mask.copy_(biased)

    handle = model.model.layers[1].register_forward_pre_hook(change)
    assert [x for x, _ in step(mask)[1]] == ["santa", "exact"]
    handle.remove()


def test_a_bad_option_is_reported_when_the_model_is_rewritten(llama):
    with pytest.raises(ValueError, match="sampler='uniform': allowed are"):
        rewrite_attention(llama, methods=["santa"], method_options={"santa": {"sampler": "uniform"}})
    with pytest.raises(TypeError, match="unknown option 'rows'"):
        rewrite_attention(llama, methods=["santa"], method_options={"santa": {"rows": 4}})


class Decoder(torch.nn.Module):
    """One step over a cache, as a graph."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Windowed(torch.nn.Module):
    """Two tokens over a cache, each of which sees 50 keys."""

    def forward(self, q, k, v):
        own = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        place = torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, (place <= own) & (place > own - 50), enable_gqa=True)


def test_compiled_window():
    q, k, v = tokens(2, 300, 2, 4, 2, D=8, dtype=torch.float32)
    options = {"methods": ["santa"], "seed": 9}
    report = explain(Windowed(), q, k, v, **options, budget=16)
    assert [(site.method, site.mask) for site in report.sites] == [("santa", "causal, offset 298, window 50")]
    drawn, whole = (
        torch.compile(Windowed(), backend="express", options={**options, "budget": s})(q, k, v) for s in (16, 51)
    )
    torch.testing.assert_close(whole, Windowed()(q, k, v), rtol=1e-4, atol=1e-5)
    expected = op(q, k, v, seed=torch.tensor(9), scale=8**-0.5, layer=layer_key(""), draws=[16], window=50)[0]
    torch.testing.assert_close(drawn, expected)
    assert (drawn - whole).abs().max() > 0.01


def test_compiled_step():
    q, k, v = tokens(1, 300, 2, 4, 2, D=8, dtype=torch.float32)
    report = explain(Decoder(), q, k, v, methods=["santa"], budget=64)
    assert [(site.verdict, site.method) for site in report.sites] == [("rewritten", "santa")]
    options = {"methods": ["santa"], "budget": 64, "seed": 9}
    truth = exact(q, k, v, scale=8**-0.5)
    out = torch.compile(Decoder(), backend="express", options=options)(q, k, v)
    error = ((out - truth).norm() / truth.norm()).item()
    expected = op(q, k, v, seed=torch.tensor(9), scale=8**-0.5, layer=layer_key(""), draws=[64])[0]
    torch.testing.assert_close(out, expected)
    assert 1e-3 < error < 1
    whole = torch.compile(Decoder(), backend="express", options={**options, "budget": 300})(q, k, v)
    torch.testing.assert_close(whole, truth, rtol=1e-4, atol=1e-5)
