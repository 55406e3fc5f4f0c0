"""Contests for the protected places at real sizes."""

from __future__ import annotations

import pytest
import torch

from express_compile.kernels.select.contest import CONTEST, compete, compete_reference

SINKS = 32


def tokens(n, B=1, H=8, D=128, Dv=128, dtype=torch.bfloat16, seed=0):
    """Keys ``[B, H, n, D]`` and values ``[B, H, n, Dv]`` around a mean."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def drawn(size):
        x = torch.randn(B, n, H, size, generator=generator, device="cuda").to(dtype)
        return (x + torch.randn(size, generator=generator, device="cuda").to(dtype)).transpose(1, 2)

    return drawn(D), drawn(Dv)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("n", [8192, 32768, 131072, 524288])
def test_real_sizes(poison, judge_contests, n, D):
    """The rows of a float64 reference, up to scores within rounding; the same bits every time."""
    k, v = tokens(n, D=D, Dv=D)
    contests = (n - SINKS) // CONTEST
    result = compete(k, v, SINKS, contests, 256)
    judge_contests(k, v, SINKS, *result, 1e-5)
    for _ in range(10):
        again = compete(k, v, SINKS, contests, 256)
        assert torch.equal(again[0], result[0]) and torch.equal(again[1], result[1])
    if n <= 32768:
        stream, places = compete_reference(k.double(), v.double(), SINKS, contests, 256)
        assert (result[0] == stream).float().mean() > 0.99
        assert (result[1].sort().values == places.sort().values).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("protected", [1, 7, 100, 300, 512, 700, 3000])
def test_places(poison, judge_contests, protected, dtype):
    k, v = tokens(9000, 2, 3, 80, 48, dtype)
    judge_contests(k, v, SINKS, *compete(k, v, SINKS, 35, protected), 1e-5)


@pytest.mark.parametrize("B, H, n", [(1, 1, 1 << 20), (4, 32, 20000), (1, 8, 300)])
def test_few_and_many_heads(poison, judge_contests, B, H, n):
    k, v = tokens(n, B, H, 64, 64)
    judge_contests(k, v, SINKS, *compete(k, v, SINKS, (n - SINKS) // CONTEST, 256), 1e-5)


def test_ties_and_rows_that_are_not_numbers(poison):
    """One channel with few numbers: similarities are exactly -1, 0 or 1, the earlier row wins, and NaN is the best."""
    k, v = torch.randint(-2, 3, (2, 1, 4, 12 * CONTEST, 1), device="cuda").to(torch.bfloat16)
    k[:, 1, 9 * CONTEST + 7] = v[:, 2, 9 * CONTEST + 7] = float("nan")
    stream, places = compete(k, v, 0, 12, 200)
    expected_stream, expected_places = compete_reference(k, v, 0, 12, 200)
    assert torch.equal(stream, expected_stream)
    assert torch.equal(places.sort().values, expected_places.sort().values)


def test_graph_capture():
    given, other = tokens(8192), tokens(8192, seed=1)
    compete(*given, SINKS, 31, 256)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream, places = compete(*given, SINKS, 31, 256)
    for x, y in zip(given, other, strict=True):
        x.copy_(y)
    graph.replay()
    expected_stream, expected_places = compete(*other, SINKS, 31, 256)
    assert torch.equal(stream, expected_stream) and torch.equal(places, expected_places)
