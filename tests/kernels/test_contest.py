"""Contests for the protected places: the kernels give the reference's rows, in the reference's order."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels.launch import _kind
from express_compile.kernels.select import contest as C
from express_compile.kernels.select.contest import (
    CONTEST,
    Contestants,
    compete,
    compete_into,
    compete_kinds_into,
    compete_reference,
    saved_together,
)

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


# -- several kinds of heads ------------------------------------------------------------------------------------------

H_KV, IN_FRONT = 4, 5  # KV heads; entries of an index in front of what competes


def laid_out(*kinds):
    """Kinds of (heads, sinks, contests, protected, with losers), one behind the other, and how long their index is."""
    found, begin = [], 0
    for heads, sinks, contests, protected, losers in kinds:
        rows = IN_FRONT + contests * protected + losers * max(0, contests * CONTEST - protected)
        found.append(Contestants(tuple(heads), sinks, contests, protected, rows, begin))
        begin += -(-2 * len(heads) * rows // 4) * 4
    return tuple(found), begin


def assert_as_alone(k, kinds, size, judge=None):
    """Bit for bit, of two sequences; nothing else is written. ``judge``: of losers and places."""
    index = torch.full((size,), -1, dtype=torch.int32)
    compete_kinds_into(index, k, kinds)
    for kind in kinds:
        own = index[kind.begin : kind.begin + 2 * len(kind.heads) * kind.index_rows].view(2, len(kind.heads), -1)
        heads, alone = torch.tensor(kind.heads, dtype=torch.int32), torch.full_like(own, -1)
        compete_into(alone, k, kind.sinks, kind.contests, kind.protected, heads)
        assert torch.equal(own, alone)
        stream, places = compete_reference(k[:, heads], kind.sinks, kind.contests, kind.protected)
        found = own[:, :, IN_FRONT:].split([own.shape[2] - IN_FRONT - places[0, 0].numel(), places[0, 0].numel()], 2)
        found = found[0], found[1].unflatten(2, places.shape[2:])
        if judge is None:
            assert_same(found, (stream[:, :, : found[0].shape[2]], places))
        elif found[0].shape[2] == stream.shape[2]:
            judge(k[:, heads], kind.sinks, *found, 1e-5)
        index[kind.begin : kind.begin + own.numel()] = -1
    assert (index == -1).all()


@given(
    kinds=st.lists(
        st.tuples(
            st.lists(st.integers(0, H_KV - 1), min_size=1, max_size=H_KV, unique=True),
            st.sampled_from([0, 0, 3]),
            st.integers(0, 3),
            st.sampled_from(PROTECTED),
            st.booleans(),
        ),
        min_size=2,
        max_size=4,
    ),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kinds_of_heads_get_beside_each_other_what_each_gets_alone(poison, judge_contests, kinds, ties, seed):
    """With one channel of few values, whose scores are exact, that is what the reference says."""
    k, (kinds, size) = keys(3 * CONTEST + 9, 2, H_KV, 1 if ties else 20, seed=seed), laid_out(*kinds)
    assert_as_alone(k.round() if ties else k, kinds, size, None if ties else judge_contests)


@pytest.mark.parametrize("programs", [2048, 1])
def test_kinds_with_other_numbers_of_contests_and_groups(poison, launches_of, programs):
    """Nine and eight contests in groups of two have the same sums; seven, each a group of its own, have others."""
    launches, k = launches_of(C), keys(9 * CONTEST, 2, H_KV)
    kinds, size = laid_out(((0,), 0, 8, 100, True), ((0, 1), 0, 9, 256, True), ((1,), 0, 7, 200, True))
    with mock.patch.object(C, "_PROGRAMS", programs):
        assert_as_alone(k, kinds, size)
    grids = [grid for _, grid in launches][:6]
    each = 2 if programs == 1 else 1
    both, alone = 2 * (3 + 8 // each) + 4 * (4 + -(-9 // each)), 2 * (6 + 7)
    assert grids == [(5, 1, 4), (9, 4), (both,), (7, 1, 2), (7, 2), (alone,)]
    assert saved_together(kinds) == (3, 8 + 2 * 9 - 2 * 9)


def test_keys_are_scored_once_and_kinds_with_the_same_constants_compete_in_one_launch(poison, launches_of):
    launches, k = launches_of(C), keys(3 * CONTEST, 2, H_KV)
    of_key, of_kinds = [C._sum_kernel, C._score_kernel], C._contest_kernel
    one, two, three = ((0, 2), 0, 3, 100, True), ((2, 0), 0, 2, 256, True), ((2, 3), 0, 3, 100, False)
    many, more, other = ((0,), 0, 3, 257, True), ((3, 1), 0, 2, 512, True), ((0, 1), 2, 2, 100, True)
    for kinds, kernels in (
        ([one], [*of_key, of_kinds]),
        ([one, two], [*of_key, of_kinds]),
        ([one, three, two], [*of_key, of_kinds, of_kinds]),
        ([many, one, more, three], [*of_key, of_kinds, of_kinds, of_kinds]),
        ([other, one, two], 2 * [*of_key, of_kinds]),
        ([((0,), 0, 0, 100, False), one], [*of_key, of_kinds]),
    ):
        kinds, size = laid_out(*kinds)
        launches.clear()
        found = compete_kinds_into(torch.empty(size, dtype=torch.int32), k, kinds, 9)
        assert torch.equal(found, torch.zeros(9, dtype=torch.int64)) and found.data_ptr() % 16 == 0
        assert [kernel for kernel, _ in launches] == kernels
        assert saved_together(kinds)[0] == 3 * len(kinds) - len(kernels)
    assert [grid for _, grid in launches][:2] == [(3, 1, 4), (3, 4)], "of two sequences of two heads"
    assert compete_kinds_into(torch.empty(0, dtype=torch.int32), k, laid_out(((0,), 0, 0, 9, True))[0], 9) is None


def test_a_mixture_compiles_what_its_kinds_alone_do(monkeypatch):
    """However many they are, and whatever heads, contests and places they have: a kernel takes seconds to compile."""
    compiled = set()

    def launch(kernel, grid, *args, **constants):
        compiled.add((kernel, *constants.items(), _kind(args, general=True)))

    def compiled_for(*kinds):
        compiled.clear()
        kinds, size = laid_out(*kinds)
        compete_kinds_into(torch.empty(size, dtype=torch.int32), k, kinds)
        return set(compiled)

    monkeypatch.setattr(C, "launch", launch)
    k = keys(9 * CONTEST, 2, H_KV)
    one, two, three = ((2, 0), 0, 8, 100, True), ((1,), 0, 9, 200, True), ((0, 3), 0, 9, 256, False)
    many, more = ((0,), 0, 8, 300, False), ((3, 1), 0, 9, 512, False)
    for kinds, constants in (([one, two], 1), ([three, two, one], 2), ([two, many, three, one, more], 3)):
        found = compiled_for(*kinds)
        assert found == set().union(*map(compiled_for, kinds))
        assert len(found) == 2 + constants, "and sums and scores"
