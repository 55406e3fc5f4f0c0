"""What finds accesses out of bounds by kernels that have them, each beside the same without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from express_compile.kernels.launch import TensorDescriptor, jit, strided, tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="accesses are watched in Triton's interpreter")
N = 64


@pytest.fixture
def found(faults_of: Callable[..., set[str]]) -> Callable[..., set[str]]:
    """What is out of bounds in one launch, by the kind of access and the words that follow the place."""

    def of(kernel: Any, programs: int, *args: Any, **options: Any) -> set[str]:
        words = faults_of(kernel, programs, *args, **options)
        assert all(" at test_bounds.py:" in x for x in words)
        return {" ".join((x.split()[0], *x.split()[3:])) for x in words}

    return of


class _Pair(NamedTuple):
    near: Any
    far: Any


@jit
def _copy(x, pair, limit, at, ATOMIC: tl.constexpr, VOLATILE: tl.constexpr, N: tl.constexpr):
    o_n = at + tl.program_id(0) * N + tl.arange(0, N)
    b_x = tl.load(x.p + o_n, mask=o_n < limit, other=0, volatile=VOLATILE)
    p_out = pair.far[1] + o_n
    if ATOMIC:
        tl.atomic_add(p_out, b_x, mask=o_n < limit)
    else:
        tl.store(p_out, b_x, mask=o_n < limit)


@pytest.mark.parametrize("atomic, volatile", [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_what_no_mask_hides_is_inside_of_its_tensor(found, atomic, volatile, dtype) -> None:
    """Though there is memory on both sides of it: all three are views of one tensor."""
    base = torch.arange(5 * N).to(dtype)
    before = base.clone()
    x, near, out = base[N : 2 * N], base[2 * N : 3 * N], base[3 * N : 4 * N - 3]
    size, args = dtype.itemsize, (strided(x[None, None]), _Pair(near, (near, out)))
    options = dict(ATOMIC=atomic, VOLATILE=volatile, N=N)
    out.zero_()
    assert found(_copy, 2, *args, N - 3, 0, **options) == set()
    assert torch.equal(out, x[:-3])  # masked lanes are behind the end
    write = "atomic" if atomic else "store"
    out.zero_()
    assert found(_copy, 2, *args, N + 5, 0, **options) == {
        f"load of x.p, up to {5 * size} bytes behind its end",
        f"{write} of pair.far[1], up to {8 * size} bytes behind its end",
    }
    assert torch.equal(out, x[:-3]) and torch.equal(base[4 * N - 3 :], before[4 * N - 3 :]), "it was not done"
    assert found(_copy, 1, *args, 0, -2, **options) == {
        f"load of x.p, up to {2 * size} bytes before its begin",
        f"{write} of pair.far[1], up to {2 * size} bytes before its begin",
    }


def test_loads_may_go_on_to_the_end_of_16_bytes_that_their_tensor_has_a_part_of(found) -> None:
    base = torch.arange(2 * N, dtype=torch.int32)
    for x, end in ((base[: N - 3], N), (base[: N - 3].clone(), N - 3), (base[: N - 4], N - 4), (base[: N + 1], N + 4)):
        for limit in (end, end + 1):
            args = strided(x[None, None]), _Pair(x, (x, torch.zeros(2 * N, dtype=torch.int32))), limit, 0
            words = found(_copy, 2, *args, ATOMIC=False, VOLATILE=False, N=N)
            assert words == ({"load of x.p, up to 4 bytes behind its end"} if limit > end else set())


@jit
def _either(p_x, p_y, p_out, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_out + o_n, tl.load(tl.where(o_n % 2 == 0, p_x, p_y) + o_n))


def test_pointers_know_their_tensors_element_by_element(found) -> None:
    x, y, out = torch.arange(N), -torch.arange(N), torch.empty(N, dtype=torch.int64)
    assert found(_either, 1, x, y, out, N=N) == set()
    assert torch.equal(out, torch.where(torch.arange(N) % 2 == 0, x, y))
    assert found(_either, 1, x[: N // 2], y, out, N=N) == {
        f"load of p_x, up to {8 * (N // 2 - 1)} bytes behind its end"
    }


@jit
def _exchange(p_x, i):
    tl.atomic_cas(p_x + i, 0, 7)


def test_an_exchange_is_inside_of_its_tensor(found) -> None:
    x = torch.zeros(3, dtype=torch.int32)
    assert found(_exchange, 1, x[:2], 1) == set() and x.tolist() == [0, 7, 0]
    assert found(_exchange, 1, x[:2], 2) == {"atomic of p_x, up to 4 bytes behind its end"} and x.tolist() == [0, 7, 0]


@jit
def _copy_tile(x, out, i, N: tl.constexpr):
    out.store([i, 0], x.load([i, 0]))


def test_descriptors_hide_what_is_behind_their_shape_alone(found) -> None:
    x, out = torch.ones(20, 16), torch.zeros(20, 16)
    tiles = [TensorDescriptor.from_tensor(y, [16, 16]) for y in (x, out)]
    assert found(_copy_tile, 1, *tiles, 16, N=N) == set() and out.sum() == 64
    tiles[0].shape = [24, 16]
    assert found(_copy_tile, 1, *tiles, 16, N=N) == {"load of x, up to 256 bytes behind its end"}


@jit
def _by_address(p_table, p_out, i, N: tl.constexpr):
    p_x = tl.load(p_table).to(tl.pointer_type(tl.int32))
    tl.store(p_out + tl.arange(0, N), tl.load(p_x + i + tl.arange(0, N)))


def test_addresses_that_a_kernel_reads_lie_in_memory_whose_address_was_taken(accesses, found) -> None:
    x, out = torch.arange(2 * N, dtype=torch.int32), torch.empty(N, dtype=torch.int32)
    with accesses.watched():
        table = torch.tensor([x.data_ptr()])
    assert found(_by_address, 1, table, out, N, N=N) == set() and torch.equal(out, x[N:])
    assert found(_by_address, 1, table, out, N + 1, N=N) == {
        "load of an address that it read, up to 4 bytes behind its end"
    }
