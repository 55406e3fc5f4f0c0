"""Pages of keys on a GPU: the reference's means, and its choice up to masses that rounding makes change places."""

from __future__ import annotations

import math

import pytest
import torch

from express_compile.kernels.select import pages as S


def assert_alike(chosen, wanted, mass):
    """The same pages, ascending, up to masses that rounding makes change places."""
    for b, rows in enumerate(zip(chosen.tolist(), wanted.tolist(), strict=True)):
        for h, (mine, theirs) in enumerate(zip(*rows, strict=True)):
            assert mine.count(S.NONE) == theirs.count(S.NONE)
            listed = mine[: len(mine) - mine.count(S.NONE)]
            assert listed == sorted(set(listed)) and S.NONE not in listed
            least = min((mass[b, h, p].item() for p in set(theirs) - set(mine)), default=0.0)
            assert all(mass[b, h, p] >= 0.97 * least for p in set(mine) - set(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "B, H, H_kv, n, L, D", [(2, 32, 8, 1, 9000, 128), (1, 8, 2, 4, 3333, 64), (3, 6, 1, 1, 100, 96)]
)
def test_the_kernels_choose_what_the_reference_chooses(B, H, H_kv, n, L, D, dtype):
    generator = torch.Generator(device="cuda").manual_seed(L)
    q, k = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in ((B, H, n, D), (B, H_kv, L, D))
    )
    first = torch.randint(0, L // 4, (B,), generator=generator, device="cuda", dtype=torch.int32)
    end = L - torch.randint(0, L // 4, (B,), generator=generator, device="cuda", dtype=torch.int32)
    place = torch.arange(L, device="cuda")
    expected = S.means_reference(k, (place >= first[:, None]) & (place < end[:, None]))
    means = torch.zeros_like(expected)
    S.update_means(means, k, first, end)
    there = (torch.arange(means.shape[2], device="cuda") * S.SUB < end[:, None])[:, None, :, None].expand_as(means)
    torch.testing.assert_close(means[there], expected[there], rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    given = (q, expected, 0.3, (first, end), 9, 30, 100)
    assert_alike(S.choose_triton(*given), S.choose_reference(*given), S.page_mass(q, expected, 0.3, first, end))
    assert torch.equal(S.choose_triton(*given), S.choose_triton(*given))


@pytest.mark.parametrize(
    "B, H, H_kv, L, D, dtype",
    [
        (1, 32, 8, 131072, 128, torch.bfloat16), (8, 32, 8, 20000, 128, torch.bfloat16),
        (2, 6, 2, 700, 80, torch.float16), (1, 4, 2, 300000, 64, torch.float32),
        (1, 1, 1, 700000, 64, torch.bfloat16), (3, 40, 2, 9001, 256, torch.float32),
    ],
)  # fmt: skip
def test_a_step_in_one_launch_lists_what_the_reference_chooses(B, H, H_kv, L, D, dtype):
    """Whichever program is done last, the same bits; other work in between leaves its own numbers in the memory."""
    generator = torch.Generator(device="cuda").manual_seed(L)
    q, k, v, *held = (
        torch.randn(B, h, n, D, generator=generator, device="cuda").to(dtype)
        for h, n in ((H, 1), (H_kv, 1), (H_kv, 1), (H_kv, L), (H_kv, L))
    )
    end = L - torch.randint(0, L // 4, (B,), generator=generator, device="cuda", dtype=torch.int32)
    token = torch.zeros(B, H_kv, L, dtype=torch.int32, device="cuda")
    place = torch.arange(L, device="cuda")
    tokens = S.Tokens(*held, token, token.float(), S.means_reference(held[0], place < end[:, None] - 1))
    done = torch.zeros(B, H_kv, 2, dtype=torch.int32, device="cuda")
    chosen = torch.zeros(B, H_kv, S.listed(9, 30, 100), dtype=torch.int32, device="cuda")
    found = []
    for i in range(60):
        S.step_pages(q, k, v, tokens, end, 0.3, S.Listing(9, 30, 100, chosen, done))
        torch.empty(1 << (6 + i % 20), device="cuda").fill_(math.nan)
        found.append((chosen.clone(), done.clone()))
    assert all(torch.equal(found[0][0], pages) and not counts.any() for pages, counts in found)
    for b, n in enumerate(end.tolist()):
        assert torch.equal(tokens.key[b, :, n - 1], k[b, :, 0]) and torch.equal(tokens.value[b, :, n - 1], v[b, :, 0])
        assert (tokens.token[b, :, n - 1] == n - 1).all()
    expected = S.means_reference(tokens.key, place < end[:, None])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(tokens.means, expected, rtol=tolerance, atol=tolerance)
    given = (q, tokens.means, 0.3, (torch.zeros_like(end), end))
    assert_alike(chosen, S.choose_reference(*given, 9, 30, 100), S.page_mass(q, tokens.means, 0.3, *given[3]))
