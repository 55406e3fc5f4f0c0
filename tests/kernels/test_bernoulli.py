"""Bernoulli score sampling: the reference's rounding in a kernel, features that are not read, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from express_compile.core.call import Call
from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, Site, feature_major, layer_key
from express_compile.kernels import santa as S
from express_compile.kernels.attend import bernoulli as Be
from express_compile.kernels.attend import sampled as K
from express_compile.kernels.launch import Random
from express_compile.planning.choose import plan
from express_compile.report.explain import explain

SEED = torch.tensor(11)
OPTIONS = dict(draws=[8], fraction=0.0, sampler="sys", shared=True, min_length=0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 keys, several per program and several programs."""
    sizes = dict(TILE=16, WIDE_TILE=16, SCORE_PROGRAMS=2, CHUNK=32, SUMMED=2, DRAW_PROGRAMS=0)
    for name, size in sizes.items():
        monkeypatch.setattr(K, name, size)


def tokens(Lq, n, B=1, H=2, H_kv=1, D=16, dtype=torch.float32, seed=0):
    """Queries, keys that lie feature by feature, values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, Lq, D), (B, H_kv, D, n), (B, H_kv, n, D))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return (3 * q).to(dtype), k.to(dtype).mT, v.to(dtype)


def masks_of(names, B, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(B, n, generator=generator) < 0.8
    lengths = torch.tensor([n, n // 2, 2])[:B]
    return {name: x for name, x in (("padding", padding), ("lengths", lengths)) if name in names}


def step_of(q, k, padding=None, lengths=None):
    return S.visible_keys(q.shape[0], q.shape[2], k.shape[2], padding, lengths, q.device).sum(-1)


def sampled(q, k, v, draws, scale=0.25, seed=SEED, layer=5, offset=None, **forms):
    """The kernels, with every form and option by its name."""
    return K.santa_triton(Call.of(S.OP, (q, k, v, None, seed, scale, layer), forms), draws, offset=offset)


def error(x, truth):
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


# ---------------------------------------------------------------------------------------------- the rounding


@given(
    n=st.integers(3, 40),
    Lq=st.sampled_from([1, 3]),
    D=st.sampled_from([16, 20]),
    levels=st.sampled_from([1, 4, 7, 256]),
    masked=st.sampled_from([(), ("padding",), ("lengths",), ("padding", "lengths")]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25, phases=[Phase.generate])
def test_the_kernel_rounds_as_the_reference(n, Lq, D, levels, masked, dtype, seed):
    """The same integers, also for queries of 0, and for those that see no key because their sequence is too short."""
    q, k, _ = tokens(Lq, n, 3, 2, D=D, dtype=dtype, seed=seed)
    q[0, 0, 0] = 0
    masks = masks_of(masked, 3, n, seed)
    step = step_of(q, k, **masks)
    expected = Be.round_query(q, levels, SEED, 5, step)
    padding = masks["padding"].view(torch.uint8) if "padding" in masks else None
    masked = padding, masks.get("lengths")
    counts, unit = Be.round_query_triton(q, n, levels, Random(SEED, 5), step[:, -1].contiguous(), *masked)
    counts = counts.double()
    assert counts.abs().max() == levels and torch.equal(counts, counts.round())
    torch.testing.assert_close((counts * unit[..., None]).float(), expected, rtol=2.0**-22, atol=0)


def test_no_bias_in_any_dtype_and_the_share_of_features():
    """20,000 roundings of 2 heads of 32 features: by Bonferroni's bound an unbiased rounding stays within 4.5 standard
    errors everywhere with probability 0.9995. Rounding the result to bfloat16 would not, nor rounding to nearest."""
    R, levels = 20_000, 12
    q = tokens(1, 8, H=2, D=32)[0].bfloat16()
    step = torch.arange(R)[:, None]  # of each another one: they draw for themselves
    rounded = Be.round_query(q.expand(R, -1, -1, -1), levels, SEED, 0, step)
    unit = q.double().abs().amax(-1, keepdim=True) / levels
    f = (q.double() / unit).abs().frac()
    scale = (unit**2 * f * (1 - f) / R).sqrt() + 1e-7 * unit

    def worst(x):
        return ((x.double().mean(0, keepdim=True) - q.double()) / scale).abs().max()

    assert rounded.dtype == torch.float32 and worst(rounded) < 4.5
    assert worst(rounded.bfloat16()) > 9
    assert worst((q.double() / unit).round() * unit) > 9
    few = Be.round_query(q.expand(R, -1, -1, -1), 2, SEED, 0, step)
    expected = Be.feature_probability(q, 1, 2)
    read = (few != 0).any(1).squeeze(1).double().mean(0)
    assert ((read - expected[0, 0]).abs() <= 4.5 * (expected[0, 0] * (1 - expected[0, 0]) / R).sqrt() + 1e-9).all()
    assert 0.5 < expected.mean() < 0.9


def test_share_of_features():
    """The figures of the docstring: one query, then four of a KV head."""
    torch.manual_seed(0)
    for q, one, four in ((torch.randn(400, 4, 1, 128), 0.73, 0.995), (_laplace(400, 4, 1, 128), 0.55, 0.96)):
        assert abs(Be.feature_probability(q, 4, 4).mean() - one) < 0.01
        assert abs(Be.feature_probability(q, 1, 4).mean() - four) < 0.01
    assert Be.feature_probability(torch.zeros(1, 2, 1, 8), 1, 4).sum() == 0


def _laplace(*shape):
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)


# ------------------------------------------------------------------------------------------------ the scores


@given(
    n=st.integers(20, 110),
    Lq=st.sampled_from([1, 1, 3]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    levels=st.sampled_from([1, 3, 8]),
    masked=st.sampled_from([(), ("padding",), ("padding", "lengths")]),
    D=st.sampled_from([16, 20]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=20, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_draws_are_those_of_the_reference(poison, small_tiles, n, Lq, heads, levels, masked, D, seed):
    q, k, v = tokens(Lq, n, 2, *heads, D, seed=seed)
    more = dict(bernoulli=levels, **masks_of(masked, 2, n, seed))
    draws = torch.full(heads[:1], 6)
    expected, expected_lse = S.santa_reference(Call.of(S.OP, (q, k, v, None, SEED, 0.25, 5), dict(**more)), draws)
    out, lse = sampled(q, k, v, draws.tolist(), **more)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [2, 64])
def test_half_precision(small_tiles, levels):
    """All rows: the rounded query loses nothing to the dtype, as its entries are integers."""
    q, k, v = tokens(2, 70, 2, 4, 2, dtype=torch.float16)
    out, _ = sampled(q, k, v, None, bernoulli=levels)
    rounded = Be.round_query(q.double(), levels, SEED, 5, step_of(q, k))
    mask = torch.ones(2, 70, dtype=torch.bool).tril(68)
    more = dict(attn_mask=mask, scale=0.25, enable_gqa=True)
    truth = F.scaled_dot_product_attention(rounded, k.double(), v.double(), **more)
    plain = F.scaled_dot_product_attention(q, k, v, **more)
    allowed = error(plain, F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **more))
    assert error(out, truth) <= 2 * allowed
    assert error(plain, truth) > 5 * allowed, "the control: an unrounded query would not pass"


def test_features_that_no_query_needs_are_not_read(small_tiles):
    """They are NaN in memory and nothing changes; a single NaN in one that is needed shows."""
    q, k, v = tokens(1, 60, 2, 4, 2, D=32)
    expected = sampled(q, k, v, [6] * 4, bernoulli=2)
    needed = (Be.round_query(q, 2, SEED, 5, step_of(q, k)) != 0).unflatten(1, (2, 2)).any(2).any(2)  # [B, H_kv, D]
    assert 0.3 < needed.double().mean() < 0.9
    rest = k.mT.masked_fill(~needed[..., None], math.nan).mT
    assert feature_major(rest)
    out = sampled(q, rest, v, [6] * 4, bernoulli=2)
    assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))
    b, h, d = needed.nonzero()[0].tolist()
    rest[b, h, 7, d] = math.nan
    lse = sampled(q, rest, v, [6] * 4, bernoulli=2)[1]
    wrong = (lse != expected[1]).view(2, 2, 2).any(2)
    assert wrong.nonzero().tolist() == [[b, h]], "and only there"


@pytest.mark.parametrize("room", [64, 62])
def test_keys_that_lie_feature_by_feature_are_read_where_they_are(small_tiles, monkeypatch, room):
    """A slice of a longer cache, also one whose rows are not aligned; the bits are those of token-major keys."""
    q, k, v = tokens(1, 61, 2, 4, 2)
    cache = torch.full((2, 2, 16, room), math.nan)
    cache[..., :61] = k.mT
    sliced = cache[..., :61].mT
    assert feature_major(sliced) and K._keys_at_once(sliced) == (4 if room == 64 else 1)
    for draws in ([6] * 4, None):
        expected = sampled(q, k.contiguous(), v, draws)
        with monkeypatch.context() as without:
            without.setattr(K, "describe", None)  # which copies what it cannot describe
            found = sampled(q, sliced, v, draws)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_same_seed_same_bits_and_another_seed_rounds_anew(small_tiles):
    q, k, v = tokens(1, 60)
    run = lambda seed, layer: sampled(q, k, v, None, seed=seed, layer=layer, bernoulli=3)[0]  # noqa: E731
    base = run(SEED, 5)
    assert torch.equal(base, run(SEED, 5))
    assert not torch.equal(base, run(SEED + 1, 5)) and not torch.equal(base, run(SEED, 6))


# --------------------------------------------------------------------------------------------- the front door


def op(q, k, v, **options):
    return METHODS["santa"].op(q, k, v, None, SEED, 0.25, 5, **{**OPTIONS, **options})[0]


def test_the_op_rounds_and_leaves_short_caches_exact():
    q, k, v = tokens(1, 60, 2, 4, 2, dtype=torch.float64)
    draws = torch.full((4,), 8)
    for key in (k, k.contiguous()):
        expected, _ = S.santa_reference(Call.of(S.OP, (q, key, v, None, SEED, 0.25, 5), dict(bernoulli=4)), draws)
        assert torch.equal(op(q, key, v, bernoulli=4), expected)
    assert error(op(q, k, v, bernoulli=4), op(q, k, v)) > 0.05
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(op(q, k, v, draws=[60], bernoulli=4), exact)
    for bad in (-1, 257, 1.5, True, "4"):
        with pytest.raises(ValueError, match="bernoulli=.*: must be an integer from 0"):
            METHODS["santa"].params(Site(), Policy(method_options={"santa": {"bernoulli": bad}}))
    with pytest.raises(ValueError, match="bernoulli=257: must be an integer from 0"):
        op(q, k, v, bernoulli=257)


def test_refused_on_cuda_unless_keys_lie_feature_by_feature():
    sizes = dict(B=1, H=4, H_kv=2, Lq=1, Lk=200, D=16, Dv=16, dtype=torch.float32, scale=0.25)
    policy = Policy(methods=("santa",), min_length=0, method_options={"santa": {"bernoulli": 4}})
    for device, features, verdict in (
        ("cpu", False, "rewritten"),
        ("cuda", False, "refused"),
        ("cuda", True, "rewritten"),
    ):
        site = AttentionSpec(**sizes, device=device, mask=Mask(), feature_major=features)
        decision = plan(site, policy)
        assert decision.verdict == verdict
        assert verdict == "rewritten" or decision.reason.startswith(
            "bernoulli=4 needs keys that lie feature by feature on CUDA"
        )
        assert decision.verdict == "refused" or decision.params["bernoulli"] == 4
        assert plan(site, Policy(methods=("santa",), min_length=0)).verdict == "rewritten"


class Step(torch.nn.Module):
    """One decoding step over a cache ``[B, H, D, n]`` of keys, by SDPA or written out."""

    def __init__(self, written_out: bool, by_token: bool = False) -> None:
        super().__init__()
        self.written_out, self.by_token = written_out, by_token

    def forward(self, q, k, v):
        if self.by_token:
            k = k.mT.contiguous().mT
        if self.written_out:
            return (q @ k * 0.25).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k.mT, v, scale=0.25)


@pytest.mark.parametrize("written_out", [False, True])
def test_the_layout_is_seen_when_compiling(written_out):
    q, k, v = tokens(1, 60, 2, 2, 2)
    more = dict(methods=["santa"], budget=8, method_options={"santa": {"bernoulli": 4}})
    for by_token in (False, True):
        (site,) = explain(Step(written_out, by_token), q, k.mT, v, **more).sites
        assert site.verdict == "rewritten" and site.spec.feature_major is not by_token
    step = torch.compile(Step(written_out), backend="express", options={**more, "seed": 11}, dynamic=True)
    out = METHODS["santa"].op(q, k, v, None, SEED, 0.25, layer_key(""), **{**OPTIONS, "bernoulli": 4})[0]
    torch.testing.assert_close(step(q, k.mT, v), out)
    assert error(out, Step(written_out)(q, k.mT, v)) > 0.05
