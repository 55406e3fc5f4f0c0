"""Pages of keys that a decoding step reads: the kernels in the interpreter against the reference, what is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels.select import pages as S


def tokens(B, H, H_kv, n, L, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(shape, generator=generator) for shape in ((B, H, n, D), (B, H_kv, L, D)))
    first = torch.randint(0, L // 2 + 1, (B,), generator=generator, dtype=torch.int32)
    end = first + 1 + (torch.rand(B, generator=generator) * (L - first)).int()
    return 4 * q, k, first, end


def assert_alike(chosen, wanted, mass):
    """The same pages, ascending, up to masses that rounding makes change places."""
    for b, h in torch.cartesian_prod(*map(torch.arange, chosen.shape[:2])).tolist():
        mine, theirs = (x[b, h].tolist() for x in (chosen, wanted))
        assert mine.count(S.NONE) == theirs.count(S.NONE)
        listed = mine[: len(mine) - mine.count(S.NONE)]
        assert listed == sorted(set(listed)) and S.NONE not in listed
        least = min((mass[b, h, p] for p in set(theirs) - set(mine)), default=0.0)
        assert all(mass[b, h, p] >= 0.98 * least for p in set(mine) - set(theirs)), "masses that rounding changes"


def means_of(key, first, end):
    place = torch.arange(key.shape[2])
    return S.means_reference(key, (place >= first[:, None]) & (place < end[:, None]))


@given(
    L=st.integers(1, 900), n=st.sampled_from([1, 1, 4]), heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    D=st.sampled_from([16, 24]), pages=st.sampled_from([1, 3, 20]), sinks=st.sampled_from([0, 4, 65]),
    recent=st.sampled_from([16, 64, 130]), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernels_choose_what_the_reference_chooses(poison, L, n, heads, D, pages, sinks, recent, seed):
    q, k, first, end = tokens(2, *heads, n, L, D, seed)
    means = torch.full((2, heads[1], -(-L // S.SUB), D), float("nan"))
    S.means_triton(means, k, first, end)
    expected = means_of(k, first, end)
    there = (torch.arange(means.shape[2]) * S.SUB < end[:, None])[:, None, :, None].expand_as(means)
    torch.testing.assert_close(means[there], expected[there], rtol=1e-5, atol=1e-6)
    chosen = S.choose_triton(q, expected, 0.3, (first, end), pages, sinks, recent)
    wanted = S.choose_reference(q, expected, 0.3, (first, end), pages, sinks, recent)
    assert_alike(chosen, wanted, S.page_mass(q, expected, 0.3, first, end))


@pytest.mark.parametrize("warps, at_once", [(2112, 64), (36, 0)])  # rows are added up one by one, too
@given(
    L=st.integers(1, 1700), group=st.integers(1, 5), D=st.sampled_from([16, 24]), heads=st.sampled_from([None, (2, 0)]),
    pages=st.sampled_from([1, 3]), sinks=st.sampled_from([0, 65]), recent=st.sampled_from([1, 130]), data=st.data(),
)  # fmt: skip
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_step_holds_the_token_and_lists_what_the_reference_chooses(
    monkeypatch, poison, warps, at_once, L, group, D, heads, pages, sinks, recent, data
):
    """Of all heads of a layer, or of some in any order; repeated, it leaves the same bits."""
    monkeypatch.setattr(S, "_WARPS", warps)
    monkeypatch.setattr(S, "_LISTED", at_once)
    generator = torch.Generator().manual_seed(L)
    q, k, v, held_k, held_v = (
        torch.randn(2, h, n, d, generator=generator)
        for h, n, d in ((3 * group, 1, D), (3, 1, D), (3, 1, 8), (3, L, D), (3, L, 8))
    )
    q, end = 4 * q, torch.tensor([L, data.draw(st.integers(1, L), "tokens of the other sequence")], dtype=torch.int32)
    own = list(heads or range(3))
    place = torch.arange(L)
    there = (place < end[:, None] - 1)[:, None].expand(2, 3, L)
    before = S.means_reference(held_k, place < end[:, None] - 1)
    held = S.Tokens(
        held_k.masked_fill(~there[..., None], float("nan")), held_v.clone(), torch.where(there, place, 0).int(),
        torch.where(there, 0.0, float("-inf")), before,
    )  # fmt: skip
    held = S.Tokens(*(x[:, own].contiguous() for x in held))
    count, done = S.listed(pages, sinks, recent), torch.zeros(2, 3, 2, dtype=torch.int32)
    chosen = torch.full((2, len(own), count), 7, dtype=torch.int32)
    numbers = None if heads is None else torch.tensor(heads, dtype=torch.int32)
    found = []
    for _ in range(2):
        S.step_pages(q, k, v, held, end, 0.3, S.Listing(pages, sinks, recent, chosen, done), numbers)
        assert not done.any()
        found.append([x.clone() for x in (*held, chosen)])
    assert all(torch.equal(one.nan_to_num(3), other.nan_to_num(3)) for one, other in zip(*found, strict=True))
    for b, n in enumerate(end.tolist()):
        held_k[b, :, n - 1], held_v[b, :, n - 1] = k[b, :, 0], v[b, :, 0]
    there = (place < end[:, None])[:, None].expand(2, len(own), L)
    held_k, held_v, query = held_k[:, own], held_v[:, own], q.unflatten(1, (3, group))[:, own].flatten(1, 2)
    means = S.means_reference(held_k, there[:, 0])
    assert torch.equal(held.key[there], held_k[there]) and torch.equal(held.value[there], held_v[there])
    assert torch.equal(held.token, torch.where(there, place, 0)) and torch.equal(held.log_weight == 0, there)
    torch.testing.assert_close(held.means, means, rtol=1e-5, atol=1e-6)
    span = torch.zeros_like(end), end
    wanted = S.choose_reference(query, means, 0.3, span, pages, sinks, recent)
    assert_alike(chosen, wanted, S.page_mass(query, means, 0.3, *span))


def test_pages_of_four_million_tokens_are_listed():
    """More than counts of half a word of 32 bits hold. Most masses are equal, and the first of these fill the list."""
    P, count = (1 << 16) + 5, 40
    lse = torch.full((1, 1 << 17), float("nan"))
    lse[:, :P] = -20.0
    heavy = torch.tensor([5, 70, 900, P - 3])
    lse[0, heavy] = -3.0
    chosen, zero = torch.zeros(1, count, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    shape = S._Shape(1, 1, 16, 16, 16, S._TILE, S.SUB, S.PAGE, 16, 16, 1 << 17, 1, 64, 1 << 17)
    spans = S._Spans(zero, zero + P * S.PAGE)
    S._list_kernel[(1,)](chosen, lse, spans, S._Sizes(1, 1, 1, 0, 0, count, 70, 65), SHAPE=shape)
    kept = {0, 1, P - 2, P - 1, *heavy.tolist()}
    rest = [p for p in range(100) if p not in kept][: count - len(kept)]
    assert chosen[0].tolist() == sorted({*kept, *rest})


def test_sinks_and_the_last_tokens_are_listed_and_then_the_heaviest_pages():
    q, k, first, end = tokens(1, 2, 1, 1, 64 * 20, 16)
    first, end = torch.tensor([70], dtype=torch.int32), torch.tensor([64 * 18 + 5], dtype=torch.int32)
    chosen = S.choose_reference(q, means_of(k, first, end), 0.3, (first, end), 3, 10, 100)[0, 0].tolist()
    mass = S.page_mass(q, means_of(k, first, end), 0.3, first, end)[0, 0]
    assert len(chosen) == S.listed(3, 10, 100) == 7 and chosen == sorted(chosen)
    assert {1, 16, 17, 18} <= set(chosen), "the page of the first token, and those of the last 100"
    rest = [p for p in chosen if p not in (1, 16, 17, 18)]
    others = [p for p in range(1, 19) if p not in chosen]
    assert len(rest) == 3 and min(mass[rest]) >= 0.99 * max(mass[others])


@pytest.mark.parametrize("run", [S.update_means, S.means_triton])
@pytest.mark.parametrize("new", [1, 5, 16, None])
def test_means_are_kept_as_tokens_arrive(run, new):
    _, k, _, _ = tokens(2, 2, 2, 1, 200, 16)
    first, end = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([150, 64], dtype=torch.int32)
    means = means_of(k, first, end - (new or 0))
    means = torch.full_like(means, 7.0) if new is None else means
    run(means, k, first, end, new)
    there = (torch.arange(25) * S.SUB < end[:, None])[:, None, :, None].expand_as(means)
    torch.testing.assert_close(means[there], means_of(k, first, end)[there], rtol=1e-5, atol=1e-6)
