"""Contests for the protected places: the kernels give the reference's rows, in the reference's order."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels.select import contest as C
from express_compile.kernels.select.contest import CONTEST, compete, compete_reference

PROTECTED = [1, 7, 100, 256, 300, 700]


def keys(rows, B=1, H=1, D=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(B, H, rows, D, generator=generator) + torch.randn(B, H, 1, D, generator=generator)
    return k.to(dtype)


def assert_same(result, expected):
    assert torch.equal(result[0], expected[0]), "losers, in the same order"
    assert torch.equal(result[1].sort().values, expected[1].sort().values), "places"


@given(
    contests=st.integers(0, 5),
    protected=st.sampled_from(PROTECTED),
    sinks=st.sampled_from([0, 3, 300]),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    D=st.sampled_from([3, 20, 80]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=16, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernels_against_float64(poison, judge_contests, contests, protected, sinks, heads, D, dtype, seed):
    k = keys(sinks + contests * CONTEST + 5, *heads, D, dtype, seed)
    result = compete(k, sinks, contests, protected)
    judge_contests(k, sinks, *result, 1e-5)
    judge_contests(k, sinks, *compete_reference(k, sinks, contests, protected), 1e-5)


@given(
    contests=st.integers(1, 3),
    protected=st.sampled_from(PROTECTED),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_equal_scores_the_earlier_row_is_the_better_one(poison, contests, protected, dtype, seed):
    """One channel with few values: every score is exactly -1, 0 or 1, and so are the sums in every order."""
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 4.0])
    draw = torch.randint(6, (1, 2, 3 + contests * CONTEST, 1), generator=torch.Generator().manual_seed(seed))
    k = values[draw].to(dtype)
    assert_same(compete(k, 3, contests, protected), compete_reference(k, 3, contests, protected))


def test_programs_of_several_contests(poison):
    """Nine contests in groups of two, by programs of one contest and of two: the same bits."""
    k = keys(9 * CONTEST)
    result = compete(k, 0, 9, 200)
    assert_same(result, compete_reference(k, 0, 9, 200))
    with mock.patch.object(C, "_PROGRAMS", 1):
        again = compete(k, 0, 9, 200)
    assert torch.equal(again[0], result[0]) and torch.equal(again[1], result[1])


def test_strided_keys_and_keys_that_are_not_numbers(poison):
    k = keys(3 * CONTEST, 2, 2).transpose(1, 2).contiguous().transpose(1, 2)
    k[1, 0, CONTEST + 9] = float("nan")  # and with it the mean from there on
    assert_same(compete(k, 0, 3, 300), compete_reference(k, 0, 3, 300))
    assert_same(compete(k.mT.contiguous().mT, 0, 3, 300), compete_reference(k, 0, 3, 300))


def test_the_judge_sees_mistakes(judge_contests):
    k = keys(4 * CONTEST + 3)
    stream, places = compete_reference(k, 3, 4, 100)
    judge_contests(k, 3, stream, places, 1e-6)
    swapped = stream.clone()
    swapped[..., 300], swapped[..., 301] = stream[..., 301], stream[..., 300]
    with pytest.raises(AssertionError, match="position order"):
        judge_contests(k, 3, swapped, places, 1e-6)
    twice = places.clone()
    twice[:, :, 1, 0] = places[:, :, 1, 1]
    with pytest.raises(AssertionError, match="one place"):
        judge_contests(k, 3, stream, twice, 1e-6)
    early = places.clone()
    early[:, :, 0, 0] = 3 + CONTEST
    with pytest.raises(AssertionError, match="rows that came"):
        judge_contests(k, 3, stream, early, 1e-6)
    gone = places.clone()
    gone[:, :, 3, 0] = stream[0, 0, 0]
    with pytest.raises(AssertionError, match="did not leave"):
        judge_contests(k, 3, stream, gone, 1e-6)
    with pytest.raises(AssertionError, match="better rows lost"):
        judge_contests(k.flip(2), 3, stream, places, 1e-6)
    with pytest.raises(AssertionError, match="better rows lost"):  # a mean that leaves out the sinks
        judge_contests(torch.cat([k[:, :, :3] + 9, k[:, :, 3:]], 2), 3, stream, places, 1e-6)


@pytest.mark.parametrize("zeros", [1, 700])
def test_zeros_for_what_comes_next_cost_no_launch(poison, launches_of, zeros):
    launches, k = launches_of(C), keys(3 * CONTEST, H=2)
    index = torch.empty(1, 2, 3 * CONTEST - 100 + 300, dtype=torch.int32)
    found = C.compete_into(index, k, 0, 3, 100, None, zeros=zeros)
    assert torch.equal(found, torch.zeros(zeros, dtype=torch.int64)) and found.data_ptr() % 16 == 0
    assert [kernel for kernel, _ in launches] == [C._sum_kernel, C._score_kernel, C._contest_kernel]
    assert C.compete_into(index, k, 0, 3, 100, None) is None
    assert C.compete_into(index[:, :, :0], k, 0, 0, 100, None, zeros=zeros) is None
