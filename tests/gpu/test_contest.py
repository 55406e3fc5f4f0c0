"""Contests for the protected places at real sizes."""

from __future__ import annotations

import pytest
import torch

from express_compile.kernels.select.contest import (
    CONTEST,
    Contestants,
    compete,
    compete_into,
    compete_kinds_into,
    compete_reference,
)

SINKS = 32


def keys(n, B=1, H=8, D=128, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    k = torch.randn(B, n, H, D, generator=generator, device="cuda").to(dtype)
    return (k + torch.randn(D, generator=generator, device="cuda").to(dtype)).transpose(1, 2)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("n", [8192, 32768, 131072, 524288])
def test_real_sizes(poison, judge_contests, n, D):
    """The rows of a float64 reference, up to scores within rounding; the same bits every time."""
    k = keys(n, D=D)
    contests = (n - SINKS) // CONTEST
    result = compete(k, SINKS, contests, 256)
    judge_contests(k, SINKS, *result, 1e-5)
    for _ in range(10):
        again = compete(k, SINKS, contests, 256)
        assert torch.equal(again[0], result[0]) and torch.equal(again[1], result[1])
    if n <= 32768:
        stream, places = compete_reference(k.double(), SINKS, contests, 256)
        assert (result[0] == stream).float().mean() > 0.99
        assert (result[1].sort().values == places.sort().values).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("protected", [1, 7, 100, 300, 512, 700, 3000])
def test_places(poison, judge_contests, protected, dtype):
    k = keys(9000, 2, 3, 80, dtype)
    judge_contests(k, SINKS, *compete(k, SINKS, 35, protected), 1e-5)


@pytest.mark.parametrize("B, H, n", [(1, 1, 1 << 20), (4, 32, 20000), (1, 8, 300)])
def test_few_and_many_heads(poison, judge_contests, B, H, n):
    k = keys(n, B, H, 64)
    judge_contests(k, SINKS, *compete(k, SINKS, (n - SINKS) // CONTEST, 256), 1e-5)


def test_ties_and_keys_that_are_not_numbers(poison):
    """One channel with few values: every score is exactly -1, 0 or 1, the earlier row wins, and NaN is the best."""
    k = torch.randint(-2, 3, (1, 4, 12 * CONTEST, 1), device="cuda").to(torch.bfloat16)
    k[:, 1, 9 * CONTEST + 7] = float("nan")
    stream, places = compete(k, 0, 12, 200)
    expected_stream, expected_places = compete_reference(k, 0, 12, 200)
    assert torch.equal(stream, expected_stream)
    assert torch.equal(places.sort().values, expected_places.sort().values)


@pytest.mark.parametrize("n", [8192, 32768, 131072])
def test_kinds_of_heads_beside_each_other(poison, n):
    """Bit for bit what each gets alone, every time; of all numbers of warps, and behind two numbers of sinks."""
    k, kinds, begin = keys(n, 2), [], 0
    for i, (window, protected, sinks) in enumerate(
        [(256, 256, 32), (2048, 1024, 32), (256, 64, 32), (512, 512, 32), (4096, 4096, 32), (1024, 2048, 32), (0, 9, 4)]
    ):
        contests, heads = (n - sinks - window) // CONTEST, tuple(range(i, 8, 2))
        rows = contests * protected + (i % 2) * max(0, contests * CONTEST - protected)
        kinds.append(Contestants(heads, sinks, contests, protected, rows, begin))
        begin += -(-2 * len(heads) * rows // 4) * 4
    for _ in range(5):
        index = torch.full((begin,), -1, dtype=torch.int32, device="cuda")
        zeros = compete_kinds_into(index, k, tuple(kinds), 1000)
        assert zeros.shape == (1000,) and not zeros.any()
        for kind in kinds:
            heads = torch.tensor(kind.heads, dtype=torch.int32, device="cuda")
            alone = torch.full((2, len(heads), kind.index_rows), -1, dtype=torch.int32, device="cuda")
            compete_into(alone, k, kind.sinks, kind.contests, kind.protected, heads)
            assert torch.equal(index[kind.begin : kind.begin + alone.numel()].view_as(alone), alone)


def test_graph_capture():
    k, other = keys(8192), keys(8192, seed=1)
    compete(k, SINKS, 31, 256)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream, places = compete(k, SINKS, 31, 256)
    k.copy_(other)
    graph.replay()
    expected_stream, expected_places = compete(other, SINKS, 31, 256)
    assert torch.equal(stream, expected_stream) and torch.equal(places, expected_places)
