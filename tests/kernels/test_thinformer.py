"""Thinformer: exact where it must be, unbiased, better than a uniform sample; padding, gradients, refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask
from express_compile.kernels import thinformer as T
from express_compile.kernels.select.halving import get_rule
from express_compile.kernels.select.schedule import compress_schedule
from express_compile.planning.choose import plan
from express_compile.report.explain import explain

SEED = torch.tensor(77)
OPTIONS = dict(s=16, fraction=0.0, g=-1, halving="balanced", flatten=0.0, min_length=0)


def tokens(Lq, Lk, B=1, H=1, H_kv=1, D=4, Dv=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def op(q, k, v, padding=None, seed=SEED, scale=0.5, layer=3, **options):
    return METHODS["thinformer"].op(q, k, v, padding, seed, scale, layer, **{**OPTIONS, **options})


def exact(q, k, v, padding=None, scale=0.5):
    mask = None if padding is None else padding[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


@given(
    Lq=st.integers(1, 40),
    Lk=st.integers(1, 16),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    seed=st.integers(0, 1000),
    padded=st.booleans(),
)
def test_short_sequences_are_exact(Lq, Lk, heads, seed, padded):
    q, k, v = tokens(Lq, Lk, 2, *heads, seed=seed)
    padding = torch.rand(2, Lk, generator=torch.Generator().manual_seed(seed)) < 0.7 if padded else None
    out, lse = op(q, k, v, padding)
    expected = exact(q, k, v, padding)
    if padded:  # a sequence without any real key: 0, where SDPA's backends do not agree
        lonely = ~padding.any(1)
        expected[lonely] = 0
        assert (lse[lonely] == -math.inf).all()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("Lk", [65, 128, 300])
def test_every_token_is_kept_equally_often(Lk):
    """s / Lk, whatever the length: 4,000 heads of one sequence draw independently."""
    s, H = 16, 4000
    _, k, v = tokens(1, Lk)
    k, v = k.expand(1, H, Lk, 4), v.expand(1, H, Lk, 3)
    index, _, _, lengths = T.select(k, v, None, s, T.Decider(get_rule("balanced"), 0.5, T.Random(SEED, 1)))
    assert lengths is None and index.shape == (1, H, s)
    count = torch.zeros(Lk, dtype=torch.float64).index_add_(0, index.flatten(), torch.ones(H * s).double())
    p = s / Lk
    deviation = (count - H * p).abs() / math.sqrt(H * p)  # at most binomial; a token twice in a coreset is rare
    assert 0.5 < deviation.max() < 5.5


def test_better_than_a_uniform_sample():
    """On keys of rank 2, mean squared error over 30 seeds: less than half that of s uniform picks; coins are not."""
    q, k, v = tokens(40, 1024, D=2, Dv=2)
    truth = exact(q, k, v)
    ours, coins, uniform = 0.0, 0.0, 0.0
    for seed in range(30):
        ours += (op(q, k, v, seed=torch.tensor(seed), s=32)[0] - truth).square().mean()
        coins += (op(q, k, v, seed=torch.tensor(seed), s=32, halving="uniform")[0] - truth).square().mean()
        pick = torch.randperm(1024, generator=torch.Generator().manual_seed(seed))[:32]
        uniform += (exact(q, k[:, :, pick], v[:, :, pick]) - truth).square().mean()
    assert 0 < ours < 0.5 * uniform
    assert coins > 0.7 * uniform, "not any way to keep one row of each pair does"


@pytest.mark.parametrize("lengths", [(300, 100), (40, 0), (16, 17)])
def test_padding(lengths):
    """A padded key is never read, NaN or not; short sequences of the batch are exact; lonely ones 0."""
    n = 310
    q, k, v = tokens(20, n, 2, 2, 1)
    padding = torch.zeros(2, n, dtype=torch.bool)
    for b, length in enumerate(lengths):
        padding[b, torch.randperm(n, generator=torch.Generator().manual_seed(b))[:length]] = True
    for x in (k, v):
        x.masked_fill_(~padding[:, None, :, None], math.nan)
    out, _ = op(q, k, v, padding)
    assert out.isfinite().all()
    index, *_, counts = T.select(k, v, padding, 16, T.Decider(get_rule("balanced"), 0.5, T.Random(SEED, 3)))
    for b, length in enumerate(lengths):
        rows = index[b, 0, : counts[b]]
        assert len(rows) == min(length, 16) and padding[b, rows].all()
        if length <= 16:
            parts = (x[b : b + 1, :, padding[b]] for x in (k, v))
            expected = exact(q[b : b + 1], *parts) if length else torch.zeros_like(out[:1])
            torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-12, atol=1e-12)


def test_same_seed_same_bits_and_every_part_of_the_key_counts():
    q, k, v = tokens(30, 200, B=2, dtype=torch.float32)
    base = op(q, k, v)[0]
    assert torch.equal(base, op(q, k, v)[0])
    assert not torch.equal(base, op(q, k, v, seed=SEED + 1)[0])
    assert not torch.equal(base, op(q, k, v, layer=4)[0])
    same = op(*(x[:1].expand(2, -1, -1, -1) for x in (q, k, v)))[0]
    assert torch.equal(same[0], same[1]), "sequences of a batch draw the same"
    alike = op(*(x.expand(-1, 2, -1, -1) for x in (q, k, v)))[0]
    assert not torch.equal(alike[:, 0], alike[:, 1]), "heads draw for themselves"


def test_budgets():
    q, k, v = tokens(9, 1024)
    assert torch.equal(op(q, k, v, s=0, fraction=0.05)[0], op(q, k, v, s=32)[0])  # 51 rows, rounded down to 32
    q.requires_grad_()
    table, same = (op(q, k, v, **rows)[0] for rows in ({"s": 0, "table": [4, 8, 16, 16, 16, 16, 32, 64]}, {"s": 32}))
    assert torch.equal(table, same)  # the seventh entry is for 1,024 to 2,047 keys
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), q)[0] for out in (table, same)))
    q.requires_grad_(False)
    assert torch.equal(op(q, k, v, g=1)[0], op(q, k, v, s=64)[0])  # 2 * sqrt(1024)
    torch.testing.assert_close(op(q, k, v, min_length=1025)[0], exact(q, k, v), rtol=1e-12, atol=1e-12)


@given(L=st.integers(2, 10**6), extra=st.integers(0, 5), seed=st.integers(0, 2**32 - 1), H=st.integers(1, 3))
def test_stretch(L, extra, seed, H):
    """floor((i + u) L / n) in exact arithmetic, in order, and every token is there when n >= L."""
    n = 1 << ((L - 1).bit_length() + extra)
    places = sorted({0, 1, n // 3, n - 2, n - 1} & set(range(n)))
    seed = torch.tensor(seed)
    u = T.philox_uniform(seed, 5, torch.tensor(0), 0, T.stage(0, T.STRETCH), torch.arange(H))
    rank = T.stretch_reference(None, torch.tensor([L, 0]), n, n, H, seed, 5)
    for h in range(H):
        expected = [min(int((i + Fraction(u[h].item())) * L / n), L - 1) for i in places]
        assert rank[0, h, places].tolist() == expected
    assert (rank[1] == 0).all()
    steps = rank[0].diff()
    assert rank[0, :, 0].max() == 0 and (rank[0, :, -1] == L - 1).all() and 0 <= steps.min() and steps.max() <= 1
    # beside a longer sequence every row comes in runs, as often as halving them all leaves one
    if n <= 1 << 12:
        beside = T.stretch_reference(None, torch.tensor([L, 0]), 8 * n, n, H, seed, 5)
        assert torch.equal(beside, rank.repeat_interleave(8, -1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("Lk, s", [(64, 16), (100, 16)])
def test_kernels_select_what_the_reference_selects(Lk, s, padded):
    """In the interpreter: stretched stream, all halvings, copies of the rows; padded, beside one of 25 tokens."""
    B, H = 2, 2
    _, k, v = tokens(1, Lk, B, H, H, D=8, Dv=8, dtype=torch.float32)
    given = None
    if padded:
        real = torch.rand(B, Lk, generator=torch.Generator().manual_seed(1)) < 0.8
        real[1] = torch.arange(Lk) < 25
        given = T.real_first(real), real.sum(1)
    arguments = T.make_schedule(Lk, s), T.Decider(get_rule("balanced"), 0.5, T.Random(SEED, 3))
    expected = T._thin_reference(k, v, given, *arguments)
    for x, y in zip(T._thin_triton(k, v, given, *arguments), expected, strict=True):
        assert torch.equal(x.to(y.dtype), y)


@given(h=st.integers(0, 6), rounds=st.integers(0, 6))
def test_compress_schedule(h, rounds):
    """Every level halves all rows of the level before once, the last one a single bucket of 2 s."""
    s = 2**h
    schedule = compress_schedule(s << rounds, s)
    source, rows = 0, s << rounds
    for (job,) in schedule.launches:
        assert (job.source, job.rows * job.buckets) == (source, rows)
        source, rows = job.target, rows // 2
    assert rows == s and schedule.size == source + s
    if rounds:
        assert schedule.launches[-1][0].rows == 2 * s and schedule.launches[-1][0].buckets == 1
        failure = sum(job.delta * job.buckets for (job,) in schedule.launches)
        assert failure == pytest.approx(0.5 - 0.5 / (rounds + 1)), "below 1/2, however many rounds come before"
        last = compress_schedule(s << rounds - 1, s).launches
        for (job,), (own,) in zip(schedule.launches[1:], last, strict=True):
            names = ("rows", "buckets", "stage", "delta", "first")
            assert all(getattr(job, name) == getattr(own, name) for name in names), "the rounds of half as many tokens"
    with pytest.raises(ValueError, match="must be s=4 times a power of two"):
        compress_schedule(24, 4)


def test_gradients_with_the_selection_held_fixed():
    q, k, v = (x.requires_grad_() for x in tokens(20, 100, 2, 4, 2))
    padding = torch.ones(2, 100, dtype=torch.bool)
    padding[0, :90] = False
    out, _ = op(q, k, v, padding)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    actual = torch.autograd.grad(out, (q, k, v), grad)
    index, *_, counts = T.select(k, v, padding, 16, T.Decider(get_rule("balanced"), 0.5, T.Random(SEED, 3)))
    seen = torch.arange(index.shape[2]) < counts[:, None]
    result = exact(q, T.gather_rows(k, index), T.gather_rows(v, index), seen)
    for a, e in zip(actual, torch.autograd.grad(result, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_opcheck_and_gradcheck():
    q, k, v = (x.requires_grad_() for x in tokens(6, 40, 2, 2, 1, dtype=torch.float32))
    padding = torch.ones(2, 40, dtype=torch.bool)
    torch.library.opcheck(METHODS["thinformer"].op, (q, k, v, padding, SEED, 0.5, 3), OPTIONS)
    out, lse = op(q, k, v, padding)
    args = (torch.randn(2, 2, 6, 3), *(x.detach() for x in (out, lse, q, k, v)), padding, SEED, 0.5, 3)
    torch.library.opcheck(torch.ops.express_compile.thinformer_backward.default, args, OPTIONS)
    leaves = [x.requires_grad_() for x in tokens(3, 20, D=2, Dv=2)]
    assert torch.autograd.gradcheck(lambda *x: op(*x, s=8)[0], leaves, atol=1e-6)


def test_gradients_of_gradients_are_refused():
    q, k, v = (x.requires_grad_() for x in tokens(6, 40))
    (grad,) = torch.autograd.grad(op(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="thinformer_backward has no gradient; methods"):
        grad.sum().backward()


def spec(**changes):
    base = dict(B=1, H=4, H_kv=2, Lq=100, Lk=200, D=8, Dv=8, dtype=torch.float32, device="cpu", scale=0.3)
    return AttentionSpec(**{**base, **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(mask=Mask(causal=True)), "it is causal"),
        (dict(mask=Mask(unknown="opaque tensor")), "its mask is not proven: opaque tensor"),
        (dict(mask=Mask(window=64)), "window of 63 tokens on either side"),
        (dict(mask=Mask(causal=True, window=64)), "window of 64"),
        (dict(Lq=1), "1 query: to choose keys costs more"),
        (dict(Lq=15), "15 queries: to choose keys costs more"),
        (dict(dropout_p=0.1), r"dropout_p=0.1\); call model.eval"),
        (dict(device="cuda", dtype=torch.float64), "no kernel for torch.float64"),
        (dict(device="mps"), "no kernel for device mps"),
    ],
)
def test_refusals_carry_their_reason(changes, reason):
    decision = plan(spec(**changes), Policy(methods=("thinformer",)))
    assert decision.verdict == "refused"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(decision.reason)


def test_what_is_taken():
    for changes in (dict(mask=Mask()), dict(mask=Mask(padding=True)), dict(Lq=16), dict(Lq=3, Lk=3)):
        assert plan(spec(**changes), Policy(methods=("thinformer",))).verdict == "rewritten"
    with pytest.raises(ValueError, match="g=-2: must be an integer, 0 or more"):
        plan(spec(), Policy(methods=("thinformer",), method_options={"thinformer": {"g": -2}}))


class Encoder(torch.nn.Module):
    """Self-attention without a causal mask, padded keys hidden as encoders do it."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x, real):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        mask = real[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_compiled_encoder():
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(2, 150, 16)
    real = torch.ones(2, 150, dtype=torch.bool)
    real[1, 100:] = False
    report = explain(model, x, real, methods=["thinformer"], budget=16)
    assert [(site.verdict, site.method) for site in report.sites] == [("rewritten", "thinformer")]
    options = {"methods": ["thinformer"], "budget": 16, "seed": 9}
    with torch.no_grad():
        out = torch.compile(model, backend="express", options=options)(x, real)
        q, k, v = model.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        truth = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    assert out.shape == truth.shape
    error = (out - truth).norm() / truth.norm()
    assert 1e-3 < error < 0.8, "16 rows of 150 random ones"
    whole = torch.compile(model, backend="express", options={**options, "budget": 256})(x, real)
    torch.testing.assert_close(whole, truth, rtol=1e-4, atol=1e-5)
