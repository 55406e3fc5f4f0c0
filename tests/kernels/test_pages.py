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
    mass = S.page_mass(q, expected, 0.3, first, end)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(heads[1])).tolist():
        mine, theirs = (set(x[b, h].tolist()) for x in (chosen, wanted))
        assert len(mine) == len(theirs) and (S.NONE in mine) == (S.NONE in theirs)
        least = min((mass[b, h, p] for p in theirs - mine), default=0.0)
        assert all(mass[b, h, p] >= 0.98 * least for p in mine - theirs), "masses that rounding changes"


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
