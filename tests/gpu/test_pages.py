"""Pages of keys on a GPU: the reference's means, and its choice up to masses that rounding makes change places."""

from __future__ import annotations

import pytest
import torch

from express_compile.kernels.select import pages as S


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
    chosen, wanted = S.choose_triton(*given).tolist(), S.choose_reference(*given).tolist()
    mass = S.page_mass(q, expected, 0.3, first, end)
    for b in range(B):
        for h in range(H_kv):
            mine, theirs = set(chosen[b][h]), set(wanted[b][h])
            assert len(mine) == len(theirs) and (S.NONE in mine) == (S.NONE in theirs)
            least = min((mass[b, h, p].item() for p in theirs - mine), default=0.0)
            assert all(mass[b, h, p] >= 0.97 * least for p in mine - theirs)
