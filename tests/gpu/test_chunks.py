"""Express in chunks on a GPU: its weights, the bits of its first chunk, and its error beside the reference's."""

from __future__ import annotations

import pytest
import torch

from express_compile.kernels.exact import exact_attention
from express_compile.kernels.express import Express
from express_compile.kernels.express_chunks import express_in_chunks
from express_compile.kernels.launch import Random

DEVICE = "cuda"


def inputs(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values about one of 32 topics, in runs of 16."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, n, 64, generator=generator) for h in (4, 2, 2))
    topic = torch.randint(32, (-(-n // 16),), generator=generator).repeat_interleave(16)[:n]
    topics, told = (torch.randn(1, 2, 32, 64, generator=generator)[:, :, topic] for _ in range(2))
    made = query, 0.7 * key + 0.5 * topics, 0.5 * value + told
    return tuple(x.to(DEVICE, dtype) for x in made)


@pytest.mark.parametrize("protected", [0, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunks", [2, 7, 8])
def test_chunks_are_those_of_the_reference(chunks: int, dtype: torch.dtype, protected: int) -> None:
    config, n = Express(64, 16, 128, protected), 1536 * chunks
    given, draws = inputs(n, dtype), Random(torch.tensor(3, device=DEVICE), 1)
    seen = torch.arange(1, n + 1, device=DEVICE)
    _, lse = express_in_chunks(given[0] * 0, *given[1:], config, 0.125, draws, chunks)
    assert ((lse.exp() - seen).abs() / seen).max() < 1e-3
    out, _ = express_in_chunks(*given, config, 0.125, draws, chunks)
    first = [x[:, :, :1536] for x in given]
    alone, _ = express_in_chunks(*first, config, 0.125, draws, 1)
    assert torch.equal(out[:, :, :1536], alone)
    host = [x.float().cpu() for x in given]
    exact = exact_attention(*host, 0.125)[0]
    reference, _ = express_in_chunks(*host, config, 0.125, Random(torch.tensor(3), 1), chunks)
    errors = [(x.float().cpu() - exact).norm().item() for x in (out, reference)]
    assert 0 < errors[0] < 1.1 * errors[1]
