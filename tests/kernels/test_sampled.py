"""SANTA's kernels in the interpreter: the reference's draws, no bias over all offsets, exact where all rows count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.core.call import Call
from express_compile.kernels import santa as S
from express_compile.kernels.attend import sampled as K

SEED = torch.tensor(11)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 keys, several per program and several programs: small caches have all that large ones have."""
    monkeypatch.setattr(K, "TILE", 16)
    monkeypatch.setattr(K, "WIDE_TILE", 16)
    monkeypatch.setattr(K, "SCORE_PROGRAMS", 2)
    monkeypatch.setattr(K, "CHUNK", 32)
    monkeypatch.setattr(K, "SUMMED", 2)
    monkeypatch.setattr(K, "DRAW_PROGRAMS", 0)


def tokens(Lq, n, B=1, H=2, H_kv=1, D=16, Dv=16, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, Lq, D), (B, H_kv, n, D), (B, H_kv, n, Dv))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return (spread * q).to(dtype), k.to(dtype), v.to(dtype)


def sampled(q, k, v, draws, scale=0.25, seed=SEED, layer=5, offset=None, **forms):
    """The kernels, with every form and option by its name."""
    return K.santa_triton(Call.of(S.OP, (q, k, v, None, seed, scale, layer), forms), draws, offset=offset)


def error(x, truth):
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


@given(
    n=st.integers(20, 110),
    Lq=st.sampled_from([1, 1, 3]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    sampler=st.sampled_from(["sys", "strat", "sys-3"]),
    masked=st.sampled_from(["", "padding", "lengths", "both"]),
    sizes=st.sampled_from([(16, 16), (20, 24), (32, 8)]),
    window=st.sampled_from([0, 0, 1, 20, 37, 90]),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
    sinks=st.sampled_from([None, None, torch.float32, torch.float16]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_draws_are_those_of_the_reference(
    poison, small_tiles, n, Lq, heads, sampler, masked, sizes, window, softcap, sinks, seed
):
    q, k, v = tokens(Lq, n, 2, *heads, *sizes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(2, n, generator=generator) < 0.8 if masked in ("padding", "both") else None
    lengths = torch.tensor([n, n // 2]) if masked in ("lengths", "both") else None
    draws = torch.randint(2, 12, (heads[0],), generator=generator)
    sinks = None if sinks is None else (2 * torch.randn(heads[0], generator=generator)).to(sinks)
    forms = dict(padding=padding, lengths=lengths, window=window, softcap=softcap, sinks=sinks)
    expected, expected_lse = S.santa_reference(
        Call.of(S.OP, (q, k, v, None, SEED, 0.25, 5), dict(sampler=sampler, shared=True, **forms)), draws
    )
    out, lse = sampled(q, k, v, draws.tolist(), sampler=sampler, **forms)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_a_wrong_count_would_show():
    """The negative control of the test above: another seed, layer or budget is far outside its tolerance, and so
    are other windows and caps, and sinks that are left out or a little larger."""
    q, k, v = tokens(1, 100)
    forms = dict(window=40, softcap=3.0, sinks=torch.tensor([5.0, 6.0]))
    out, _ = sampled(q, k, v, [8, 8], **forms)
    others = dict(seed=SEED + 1), dict(layer=6), dict(draws=[9, 8]), dict(window=0), dict(window=30)
    moved = dict(sinks=None), dict(sinks=torch.tensor([5.2, 6.2])), dict(softcap=0.0), dict(softcap=3.3)
    for other in (*others, *moved):
        arguments = {"draws": [8, 8], **forms, **other}
        assert error(sampled(q, k, v, **arguments)[0], out) > 0.01


def test_no_bias_over_all_offsets(small_tiles):
    """Over M equidistant offsets every row's mean count is within 1 / M of what it should be, so the outputs agree
    with exact attention within ``sum_j |p_j v_j| / (M x_j)``."""
    M, n = 40, 100
    q, k, v = tokens(1, n, H=2)
    draws = [8, 8]
    exact, _ = sampled(q, k, v, None)
    mean, spread = torch.zeros_like(exact), 0.0
    for m in range(M):
        offset = torch.tensor([[int((m + 0.5) / M * 2**24)]], dtype=torch.int32)
        out, _ = sampled(q, k, v, draws, offset=offset)
        mean += out / M
        spread += error(out, exact) / M
    visible = torch.ones(1, 1, n, dtype=torch.bool)
    p, _ = S.probabilities(q, k, visible, 0.25)
    x = 8 * p.mean((2, 3), keepdim=True)
    weight = torch.where(x < 1, p / x / M, 0.0)
    bound = torch.einsum("bhgqn,bhnd->bhgqd", weight, v.double().abs()).flatten(1, 2)
    assert ((mean - exact).abs() <= bound + 1e-4).all()
    assert error(mean, exact) < spread / 8, f"one draw errs by {spread:.2f}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("Lq, H, H_kv", [(1, 4, 2), (4, 6, 1)])
def test_all_rows_are_exact_attention(poison, small_tiles, dtype, Lq, H, H_kv):
    n = 90
    q, k, v = tokens(Lq, n, 2, H, H_kv, dtype=dtype, spread=1.0)
    out, _ = sampled(q, k, v, None)
    mask = torch.ones(Lq, n, dtype=torch.bool).tril(n - Lq)
    truth, reference = (
        torch.nn.functional.scaled_dot_product_attention(
            *(x.to(d) for x in (q, k, v)), mask, scale=0.25, enable_gqa=True
        )
        for d in (torch.float64, dtype)
    )
    assert error(out, truth) <= 2 * error(reference, truth) + 1e-6


@pytest.mark.parametrize("Lq, lengths", [(1, None), (3, None), (3, [90, 70])])
def test_all_rows_with_a_window_a_soft_cap_and_sinks(poison, small_tiles, Lq, lengths):
    """Against a softmax that is written out, in float64. Without any one of the three the error is a thousand times
    as large."""
    n, window, cap = 90, 33, 4.0
    q, k, v = tokens(Lq, n, 2, 4, 2)
    sinks = torch.tensor([0.5, -1.0, 2.0, 3.0])
    masks = dict(lengths=None if lengths is None else torch.tensor(lengths))
    own = torch.tensor(lengths or [n, n])[:, None, None] - Lq + torch.arange(Lq)[:, None]
    place = torch.arange(n)
    seen = (place <= own) & (place > own - window)
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double().repeat_interleave(2, 1)) * 0.25
    weights = (cap * (scores / cap).tanh()).exp() * seen[:, None]
    mass = weights.sum(-1, keepdim=True) + sinks.double().exp()[:, None, None]
    truth = weights / mass @ v.double().repeat_interleave(2, 1)
    out, lse = sampled(q, k, v, None, window=window, softcap=cap, sinks=sinks, **masks)
    assert error(out, truth) < 1e-5 and error(lse, mass.log().squeeze(-1)) < 1e-6
    for forms in (dict(window=window, softcap=cap), dict(window=window, sinks=sinks), dict(softcap=cap, sinks=sinks)):
        assert error(sampled(q, k, v, None, **forms, **masks)[0], truth) > 0.01


def test_what_lies_before_the_window_is_not_read(poison, small_tiles, monkeypatch):
    """One length: the kernels get no such keys. Several: of tiles before the window no score is left."""
    stashes, launch = [], K.launch

    def recorded(kernel, grid, *args, **options):
        launch(kernel, grid, *args, **options)
        if kernel is K._score_kernel:
            stashes.append(args[4].u)

    monkeypatch.setattr(K, "launch", recorded)
    q, k, v = tokens(1, 110, 2, 2, 1)
    masks = dict(window=30, padding=torch.rand(2, 110) < 0.9)
    sampled(q, k, v, [8, 8], **masks)
    sampled(q, k, v, [8, 8], lengths=torch.tensor([110, 75]), **masks)
    one, several = stashes
    assert one.shape[1] == 2, "tiles of 16 for 30 keys"
    assert [x.isnan().all((1, 2)).int().tolist() for x in several] == [[1] * 5 + [0] * 2, [1] * 2 + [0] * 5]


@pytest.mark.parametrize("forms", [{}, {"window": 40}, {"softcap": 5.0}, {"bernoulli": 4}, {"sinks": torch.ones(4)}])
@pytest.mark.parametrize("draws, bad", [(None, math.inf), ([8] * 4, math.nan)])
@pytest.mark.parametrize("part", ["query", "key"])
def test_what_is_no_number_shows_where_exact_attention_shows_it(part, bad, draws, forms, small_tiles):
    """A key in every row that sees it, a query in its own alone; the other rows of its key head share its draws."""
    q, k, v = tokens(3, 60, 2, 4, 2)
    feature = (q[1, :2].abs().amin((0, 1))).argmax()  # one that rounded queries need
    if part == "query":
        q[1, 0, 1, feature] = bad
    else:
        k[1, 0, 59, feature] = bad  # the last query sees it, no other one
    out, lse = sampled(q, k, v, draws, **forms)
    want = torch.zeros(2, 4, 3, dtype=torch.bool)
    want[1, 0, 1] = part == "query"
    want[1, :2, 2] = part == "key"
    if math.isinf(bad) and part == "key":
        want &= q[..., feature] > 0  # others give it the weight 0
    if math.isinf(bad) and "softcap" in forms:
        want &= False  # tanh makes a number of it
    assert torch.equal(lse.isnan(), want)
    assert torch.equal(out.isnan(), want[..., None].expand_as(out))


def test_keys_that_are_no_numbers_count_for_nothing_where_they_are_hidden(small_tiles):
    q, k, v = tokens(1, 60, 2, 4, 2)
    padding = torch.ones(2, 60, dtype=torch.bool)
    padding[1, 20:40] = False
    dirty = k.masked_fill(~padding[:, None, :, None], math.nan)
    for draws in (None, [8] * 4):
        clean = sampled(q, k, v, draws, padding=padding)
        assert all(map(torch.equal, sampled(q, dirty, v, draws, padding=padding), clean))


def test_queries_without_keys_give_zero(small_tiles):
    q, k, v = tokens(2, 70, 2)
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[1] = False
    for x in (k, v):
        x[1] = math.nan
    out, lse = sampled(q, k, v, [4, 4], padding=padding)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and out[0].isfinite().all()
    sinks = torch.tensor([3.0, -math.inf])
    out, lse = sampled(q, k, v, [4, 4], padding=padding, sinks=sinks, window=60)
    assert (out[1] == 0).all() and (lse[1] == sinks[:, None]).all() and out[0].isfinite().all()


def test_strided_caches(small_tiles):
    """A slice of a longer cache, as transformers' static caches give, is read where it is."""
    q, k, v = tokens(1, 60, 2, 4, 2)
    expected, _ = sampled(q, k, v, [6] * 4)
    long = [torch.full((2, 2, 96, 16), math.nan) for _ in range(2)]
    for x, y in zip(long, (k, v), strict=True):
        x[:, :, :60] = y
    assert torch.equal(expected, sampled(q, *(x[:, :, :60] for x in long), [6] * 4)[0])
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(expected, sampled(q, *by_token, [6] * 4)[0])


def test_too_many_rows():
    with pytest.raises(ValueError, match="32 heads per key head times 9 queries are 288; must be at most 256"):
        sampled(*tokens(9, 60, H=32), [4] * 32)


def test_any_chunks_of_keys_draw_what_the_reference_draws(monkeypatch):
    """Where a chunk begins on the comb is where the one before it ended, also on a grid where rounding adds up."""
    for module in (S, K):
        monkeypatch.setattr(module, "grid_bits", lambda draws: 18)
    q, k, v = tokens(1, 600, B=2, H=8, H_kv=8)
    expected = S.santa_reference(Call.of(S.OP, (q, k, v, None, SEED, 0.25, 5), {}), torch.full((8,), 32))[0].flatten(
        0, 1
    )
    for chunk in (64, 256):
        monkeypatch.setattr(K, "CHUNK", chunk)
        out = sampled(q, k, v, [32] * 8)[0].flatten(0, 1)
        assert sum(error(a, e) > 1e-3 for a, e in zip(out, expected, strict=True)) <= 1, "of 16 heads"
