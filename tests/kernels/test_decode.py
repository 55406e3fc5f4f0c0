"""Split decoding attention in the interpreter: the reference, which is SDPA's, whatever rows there are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels.attend import decode as K


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 16 rows, several programs, several looks at padding: short caches have all that long ones have."""
    monkeypatch.setattr(K, "tiling", lambda row_bytes, shared: K.Tiling(16, 4, 2, 1))
    monkeypatch.setattr(K, "device_of", lambda device: (7, 1 << 18))
    monkeypatch.setattr(K, "_SCANNED", 32)
    monkeypatch.setattr(K, "PAGE", 32)


def tokens(B, H, H_kv, n, L, D=16, Dv=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, n, D), (B, H_kv, L, D), (B, H_kv, L, Dv))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def rows_of(kind: str, B: int, H_kv: int, L: int, n: int, seed: int) -> K.Rows:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(n, L + 1, (B,), generator=generator, dtype=torch.int32)
    left = torch.randint(0, L, (B, 1), generator=generator)
    place = torch.arange(L)
    pages = torch.rand(B, H_kv, -(-L // K.PAGE), generator=generator).argsort(-1).to(torch.int32)
    pages[torch.rand(pages.shape, generator=generator) < 0.3] = -1
    weight = torch.randn(B, H_kv, L, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.3] = -math.inf
    given = {
        "lengths": lengths, "left": place >= left, "filled": (place < lengths[:, None]) & (place >= left),
        "holes": torch.rand(B, L, generator=generator) < 0.3, "weights": weight, "pages": pages,
    }  # fmt: skip
    chosen = kind.split()
    padding = next((given[name] for name in ("left", "filled", "holes") if name in chosen), None)
    named = {"lengths": "lengths", "log_weight": "weights", "pages": "pages"}
    return K.Rows(padding=padding, **{name: given[x] for name, x in named.items() if x in chosen})


@given(
    L=st.integers(1, 150),
    n=st.sampled_from([1, 1, 2, 5, 16]),
    at_once=st.sampled_from([16, 4]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (4, 1)]),
    sizes=st.sampled_from([(16, 16), (20, 24), (32, 8)]),
    kind=st.sampled_from(
        ["", "lengths", "left", "filled", "holes", "weights", "pages", "lengths weights", "lengths pages holes",
         "lengths holes weights pages"],
    ),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernels_give_what_the_reference_gives(
    poison, small_tiles, monkeypatch, L, n, at_once, heads, sizes, kind, dtype, seed
):
    monkeypatch.setattr(K, "MAX_QUERIES", at_once)
    L = max(L, n)
    q, k, v = tokens(2, *heads, n, L, *sizes, dtype=dtype, seed=seed)
    rows = rows_of(kind, 2, heads[1], L, n, seed)
    expected, expected_lse = K.decode_reference(q, k, v, 0.25, rows)
    out, lse = K.decode_triton(q, k, v, 0.25, rows)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [K.decode_triton, K.decode_reference])
@pytest.mark.parametrize("kind", ["lengths", "filled", "holes", "weights", "pages"])
def test_rows_that_there_are_not_are_never_read_and_the_bits_are_the_same_every_time(small_tiles, attention, kind):
    q, k, v = tokens(2, 4, 2, 1, 130)
    rows = rows_of(kind, 2, 2, 130, 1, seed=3)
    expected = attention(q, k, v, 0.25, rows)
    hidden = ~K.visible_rows(q, k, rows).any(2)
    assert hidden.any(), "the test has something to hide"
    for x in (k, v):
        x[hidden] = math.nan
    out, lse = attention(q, k, v, 0.25, rows)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and out.isfinite().all()


@pytest.mark.parametrize("attention", [K.decode_triton, K.decode_reference])
@pytest.mark.parametrize("n", [1, 7])
def test_it_is_the_attention_of_pytorch(attention, n):
    """Over a static cache that is a strided view, filled up to other lengths, padded on the left."""
    B, H, H_kv, L, D = 3, 6, 2, 300, 32
    q, k, v = tokens(B, H, H_kv, n, L, D, D)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    lengths, left = torch.tensor([300, 129, 40], dtype=torch.int32), torch.tensor([0, 13, 21])
    place = torch.arange(L)
    padding = place >= left[:, None]
    own = place < (lengths[:, None] - n + 1 + torch.arange(n))[..., None]
    mask = (own & padding[:, None])[:, None]
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    out, _ = attention(q, k, v, 0.3, K.Rows(lengths=lengths, padding=padding))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_query_without_rows_gives_zero():
    q, k, v = tokens(2, 2, 1, 1, 40)
    for rows in (
        K.Rows(lengths=torch.zeros(2, dtype=torch.int32)),
        K.Rows(padding=torch.zeros(2, 40, dtype=torch.bool)),
        K.Rows(pages=torch.full((2, 1, 3), -1, dtype=torch.int32)),
    ):
        for attention in (K.decode_triton, K.decode_reference):
            out, lse = attention(q, k, v, 0.25, rows)
            assert (out == 0).all() and (lse == -math.inf).all()


def test_broken_keys_that_are_read_show():
    q, k, v = tokens(1, 2, 1, 1, 200)
    k[0, 0, 150] = math.nan
    assert K.decode_triton(q, k, v, 0.25, K.Rows())[0].isnan().all()


@pytest.mark.parametrize(
    "sequences, blocks, at_once, expected",
    [(8, 2048, 264, 32), (64, 512, 264, 4), (256, 512, 264, 1), (8, 5, 264, 5), (160, 512, 264, 3), (1000, 9, 264, 1)],
)
def test_as_many_programs_share_a_head_as_keep_the_device_busy(sequences, blocks, at_once, expected):
    assert K.splits_of(sequences, blocks, at_once) == expected


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(lengths=torch.zeros(3, dtype=torch.int32)), "lengths: torch.int32 of shape"),
        (dict(padding=torch.zeros(2, 30)), "padding: torch.float32"),
        (dict(log_weight=torch.zeros(2, 1, 30, dtype=torch.float64)), "log_weight: torch.float64"),
        (dict(pages=torch.zeros(2, 1, 1, dtype=torch.int64)), "pages: torch.int64"),
    ],
)
def test_rows_that_do_not_fit_are_named(change, words):
    q, k, v = tokens(2, 2, 1, 1, 30)
    with pytest.raises(ValueError, match=words):
        K.decode_attention(q, k, v, 0.25, **change)
    with pytest.raises(ValueError, match="key, value: shapes"):
        K.decode_attention(q, k, v[:, :, 1:], 0.25)


def test_more_heads_than_the_kernels_take_are_an_error():
    with pytest.raises(ValueError, match="query: 65 heads per key head"):
        K.decode_triton(*tokens(1, 65, 1, 1, 30), 0.25, K.Rows())


@pytest.mark.parametrize("n, group, own", [(40, 4, 14), (64, 4, 16), (17, 2, 9), (13, 10, 5), (2, 64, 1)])
def test_more_queries_than_fit_are_calls_of_their_own_with_other_ends(small_tiles, launches_of, n, group, own):
    """In the same two launches. To see a row less would show."""
    launches = launches_of(K)
    q, k, v = tokens(2, group, 1, n, 100)
    lengths = torch.tensor([100, 83])
    out, _ = K.decode_triton(q, k, v, 0.25, K.Rows(lengths))
    stops, grids = range(n, 0, -own), [grid for _, grid in launches]
    assert len(grids) <= 2 and grids[0][0] % len(stops) == 0 and (grids[0][0] > len(stops)) == (len(grids) == 2)
    for stop in stops:
        piece = slice(max(0, stop - own), stop)
        alone, near = (
            K.decode_reference(q[:, :, piece], k, v, 0.25, K.Rows(lengths - (n - stop) - less))[0] for less in (0, 1)
        )
        torch.testing.assert_close(out[:, :, piece], alone, rtol=1e-5, atol=1e-5)
        assert (out[:, :, piece] - near).abs().amax((0, 1, 3)).min() > 1e-4


def test_how_many_queries_a_program_takes_follows_from_the_heads_of_a_key_head():
    assert [K.queries_at_once(group) for group in (1, 4, 5, 8, 64, 65)] == [16, 16, 12, 8, 1, 0]
