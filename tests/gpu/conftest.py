"""What the GPU tests of several methods share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from express_compile.kernels import express as E
from express_compile.kernels.launch import philox_uniform
from express_compile.kernels.select.halving import HalvingRule, halving_matrix, shortened, walk
from express_compile.kernels.select.schedule import Schedule


def _judge(
    k: torch.Tensor, v: torch.Tensor, arena: torch.Tensor, schedule: Schedule, rule: HalvingRule, scale: float,
    seed: torch.Tensor, layer: int,
) -> int:  # fmt: skip
    """Replay every halving of ``arena`` ``[B, H, schedule.size]`` (token indices) in float64 along its own decisions:
    each agrees or had a margin within rounding. Returns the number of decisions judged.
    """
    judged = 0
    for launch in schedule.launches:
        for job in launch:
            source = arena[:, :, job.source : job.source + job.rows * job.buckets].unflatten(2, (job.buckets, job.rows))
            kept = arena[:, :, job.target : job.target + job.rows * job.buckets // 2].unflatten(2, (job.buckets, -1))
            second = kept == source[..., 1::2]
            assert (second | (kept == source[..., 0::2])).all(), "one row of every pair, in order"
            pairs = torch.arange(job.rows // 2, device="cuda")
            bucket = torch.arange(job.first, job.first + job.buckets, device="cuda")[:, None]
            head = torch.arange(k.shape[1], device=k.device)[:, None, None]
            draws = philox_uniform(seed, layer, pairs, bucket, job.stage, head).expand(*k.shape[:2], -1, -1)
            if rule.name == "uniform":
                distinct = source[..., 0::2] != source[..., 1::2]
                assert torch.equal(second[distinct], (draws < 0.5)[distinct])
                continue
            keys, values = (E.gather_rows(shortened(x), source).double() for x in (k, v))
            matrix = halving_matrix(keys, values, scale, rule.centre, rule.flatten)
            gain = rule.gain(job.rows, job.delta)
            own, alpha, product = walk(matrix, draws.double(), gain, second)
            # float32 scores of size |k|^2: a relative error of 2^-20 in every entry that alpha sums up
            slack = 2.0**-20 * matrix.abs().sum(-2) * (1 + scale * keys.square().sum(-1).amax(-1)[..., None])
            margin = (alpha - (1 - 2 * draws.double()) * gain * product).abs()
            assert not ((own != second) & (margin > slack)).any(), job
            judged += second.numel()
    return judged


@pytest.fixture
def judge() -> Callable[..., int]:
    return _judge
