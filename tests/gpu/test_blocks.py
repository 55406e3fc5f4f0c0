"""Choosing blocks of keys at real sizes: the kernel's decisions, independence of the batch, CUDA graphs, no sync."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from express_compile.kernels.select import hopper
from express_compile.kernels.select.blocks import BlockConfig, select_blocks_triton

UNEVEN = BlockConfig(5, sinks=70, recent=33, samples=3, stride=40, block=32)


def tokens(H: int, H_kv: int, n: int, Lq: int, D: int, dtype: torch.dtype, B: int = 2) -> tuple[torch.Tensor, ...]:
    """Queries ``[B, H, Lq, D]`` and keys ``[B, H_kv, n, D]`` that lie token by token."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(B, n, heads, D, generator=generator, device="cuda") for heads in (H, H_kv))
    return (2 * q).to(dtype).transpose(1, 2)[:, :, n - Lq :], k.to(dtype).transpose(1, 2)


@pytest.fixture(autouse=True, params=[0, hopper.LONG], ids=["any length", "long"])
def specialised_from(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for Hopper at these lengths, too, and the other one."""
    monkeypatch.setattr(hopper, "LONG", request.param)


@pytest.mark.parametrize(
    ("dtype", "D", "H", "H_kv", "Lq", "config"),
    [
        (torch.bfloat16, 128, 8, 2, 4000, BlockConfig(16)),
        (torch.bfloat16, 128, 8, 2, 1, BlockConfig(3, samples=4)),
        (torch.bfloat16, 128, 14, 2, 2666, UNEVEN),
        (torch.float16, 64, 6, 6, 4000, BlockConfig(16)),
        (torch.bfloat16, 256, 2, 1, 2666, UNEVEN),
        (torch.float16, 80, 4, 4, 2666, UNEVEN),
        (torch.float32, 64, 9, 3, 2666, UNEVEN),
        (torch.float32, 20, 6, 1, 4000, BlockConfig(16)),
    ],
)
def test_the_kernel_chooses_the_best_and_for_every_sequence_alone(
    judge_blocks: Callable[..., None], dtype: torch.dtype, D: int, H: int, H_kv: int, Lq: int, config: BlockConfig
) -> None:
    q, k = tokens(H, H_kv, 4000, Lq, D, dtype)
    for start in (None, torch.tensor([4000 - Lq, 4000 - Lq + min(150, Lq - 1)], device="cuda")):
        chosen = select_blocks_triton(q, k, config, D**-0.5, start)
        judge_blocks(chosen, q, k, config, D**-0.5, start)
        alone = select_blocks_triton(q[1:], k[1:], config, D**-0.5, None if start is None else start[1:])
        assert torch.equal(chosen[1:], alone)


def test_no_sync_and_a_cuda_graph_chooses_the_same() -> None:
    q, k = tokens(8, 2, 8000, 8000, 128, torch.bfloat16, B=1)
    config = BlockConfig(16, samples=2)
    expected = select_blocks_triton(q, k, config, 0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_blocks_triton(q, k, config, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = select_blocks_triton(q, k, config, 0.1)
    chosen.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(chosen, expected)
