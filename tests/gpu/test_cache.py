"""What a cache holds on a GPU: filled by the kernels of a prefill, and token by token, the same rows."""

from __future__ import annotations

import math

import pytest
import torch

from express_compile.core.rows import Rows
from express_compile.kernels.heads import EVERYTHING, PerHead
from express_compile.kernels.held import Held, HeldRows, weighted_attention
from express_compile.kernels.launch import Random

ROWS = (Rows(4, 60), Rows(4, 60, 64), EVERYTHING, Rows(4, 60, 64, 128), Rows(4, 60, 64), Rows(4, 60, selected=2))


def tokens(n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, heads, n, 64, generator=draw, dtype=dtype, device="cuda") for heads in (12, 6, 6)]


def rows_of(part: HeldRows) -> list[list[tuple[int, int]]]:
    found = []
    for log_weight, token in zip(part.log_weight.flatten(0, 1), part.token.flatten(0, 1), strict=True):
        there = log_weight > -math.inf
        weights = log_weight[there].exp().round().long().tolist()
        found.append(sorted(zip(token[there].tolist(), weights, strict=True)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefill_and_updates_hold_the_same_rows(dtype: torch.dtype) -> None:
    """By a rule that only draws: others may decide otherwise where their rounding differs."""
    q, k, v = tokens(3000, dtype)
    caches = [Held(PerHead(ROWS, "uniform"), k, v, Random(torch.tensor(7, device="cuda"), 3), 0.125) for _ in range(2)]
    caches[0].fill(k, v)
    for first in range(0, 3000, 30):
        piece = slice(first, first + 30)
        caches[1].settle()
        caches[1].extend(q[:, :, piece], k[:, :, piece], v[:, :, piece])
    caches[1].settle()
    for one, other in zip(caches[0].parts, caches[1].parts, strict=True):
        if one.config is None or not one.config.protected:  # scores of contests are sums in another order
            assert rows_of(one) == rows_of(other)
        assert torch.equal((one.log_weight > -math.inf).sum(2), (other.log_weight > -math.inf).sum(2))


def test_weighted_attention_is_that_of_the_cpu() -> None:
    q, k, v = tokens(500, torch.bfloat16)
    log_weight = torch.randint(0, 5, (2, 6, 500), device="cuda") * math.log(2)
    log_weight[..., ::7] = -math.inf
    for n in (1, 5):
        out, lse = weighted_attention(q[:, :, :n], k, v, log_weight, 0.125)
        expected = weighted_attention(*(x.cpu() for x in (q[:, :, :n], k, v, log_weight)), 0.125)
        torch.testing.assert_close(out.cpu(), expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.cpu(), expected[1], rtol=1e-3, atol=1e-3)
