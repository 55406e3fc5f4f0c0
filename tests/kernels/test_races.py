"""The detector of races by kernels that have them, each beside the same without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from express_compile.kernels.launch import is_last, jit, tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="races are found in Triton's interpreter")
N = 256


@pytest.fixture
def found(faults_of: Callable[..., set[str]]) -> Callable[..., set[str]]:
    """The races of one launch, by the words that follow the kernel's name and the places."""

    def of(kernel: Any, programs: int, *args: Any, **options: Any) -> set[str]:
        words = faults_of(kernel, programs, *args, **options)
        assert all("test_races.py:" in x for x in words)
        return {x.rpartition("test_races.py:")[2].partition(" ")[2] for x in words}

    return of


@jit
def _by_tickets(p_ticket, p_scratch, p_out, tickets, OWN: tl.constexpr, N: tl.constexpr):
    o_n, program = tl.arange(0, N), tl.program_id(0)
    p_scratch += program * N * OWN
    ticket = tl.atomic_add(p_ticket, 1)
    while ticket < tickets:
        tl.store(p_scratch + o_n, o_n + ticket)
        tl.debug_barrier()
        tl.atomic_add(p_out + tickets + program, 1)
        tl.store(p_out + ticket, tl.sum(tl.load(p_scratch + N - 1 - o_n)))
        ticket = tl.atomic_add(p_ticket, 1)


@pytest.mark.parametrize("programs", [2, 3, 7])
def test_programs_that_draw_tickets_run_side_by_side_and_scratch_that_they_share_is_found(found, programs) -> None:
    tickets = 8
    for own in (True, False):
        ticket, out = torch.zeros(1, dtype=torch.int32), torch.zeros(tickets + programs, dtype=torch.int32)
        words = found(_by_tickets, programs, ticket, torch.empty(programs * N, dtype=torch.int32), out, tickets,
                      OWN=own, N=N)  # fmt: skip
        assert words == (set() if own else {"of another program, in any order"})
        sums = N * (N - 1) // 2 + N * torch.arange(tickets)
        assert torch.equal(out[:tickets].long(), sums) is own
        assert out[tickets:].sum() == tickets and (out[tickets:] > 0).sum() >= 2


@jit
def _hand_over(p_flag, p_x, p_out, SEM: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    if tl.program_id(0) == 0:
        tl.store(p_x + o_n, o_n)
        tl.debug_barrier()
        tl.atomic_add(p_flag, 1, sem=SEM)
    else:
        while tl.atomic_add(p_flag, 0, sem=SEM) == 0:
            pass
        tl.store(p_out + o_n, tl.load(p_x + o_n))


@pytest.mark.parametrize("sem, expected", [("acq_rel", set()), ("relaxed", {"of another program, in any order"})])
def test_what_another_program_stored_is_there_behind_an_atomic_that_acquires(found, sem, expected) -> None:
    flag, x, out = (
        torch.zeros(1, dtype=torch.int32),
        torch.empty(N, dtype=torch.int32),
        torch.zeros(N, dtype=torch.int32),
    )
    assert found(_hand_over, 2, flag, x, out, SEM=sem, N=N) == expected
    assert torch.equal(out, torch.arange(N, dtype=torch.int32))


@jit
def _last_adds_up(p_done, p_parts, p_out, WAITS: tl.constexpr):
    tl.store(p_parts + tl.program_id(0), tl.program_id(0))
    last = tl.program_id(0) == tl.num_programs(0) - 1
    if WAITS:
        last = is_last(p_done, tl.num_programs(0))
    if last:
        total = 0
        for i in range(0, tl.num_programs(0)):
            total += tl.load(p_parts + i, cache_modifier=".cg")
        tl.store(p_out, total)


def test_the_last_program_may_read_what_all_have_stored(found) -> None:
    for waits in (True, False):
        done, parts, out = (torch.zeros(n, dtype=torch.int64) for n in (1, 9, 1))
        words = found(_last_adds_up, 9, done, parts, out, WAITS=waits)
        assert words == (set() if waits else {"of another program, in any order", "without a barrier"})
        assert out.item() == 36 and not done.item()


@jit
def _reversed(p_x, p_out, BARRIER: tl.constexpr, REVERSED: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_x + o_n, o_n)
    if BARRIER:
        tl.debug_barrier()
    if REVERSED:
        o_n = N - 1 - o_n
    tl.store(p_out + o_n, tl.load(p_x + o_n))


@pytest.mark.parametrize("barrier", [True, False])
@pytest.mark.parametrize("is_reversed", [True, False])
@pytest.mark.parametrize("n", [64, 128])  # threads that store nothing load what others stored
def test_threads_of_a_program_need_a_barrier_unless_each_reads_its_own(found, barrier, is_reversed, n) -> None:
    x, out = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    words = found(_reversed, 1, x, out, BARRIER=barrier, REVERSED=is_reversed, N=n, num_warps=4)
    assert words == ({"without a barrier"} if not barrier and (is_reversed or n < 128) else set())


@jit
def _neighbours(p_x, i, N: tl.constexpr):
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_x + o_n, tl.load(p_x + o_n + i) + 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.int64])
def test_what_a_program_loads_must_not_be_what_the_next_one_stores(found, dtype) -> None:
    x = torch.zeros(4 * 64 + 1).to(dtype)
    assert found(_neighbours, 4, x, 0, N=64) == set()
    assert found(_neighbours, 4, x, 1, N=64) == {"of another program, in any order"}


@jit
def _raises(p_x):
    tl.atomic_add(p_x, 1)
    tl.static_assert(tl.program_id(0) < 2, "a third program")


def test_what_a_program_raises_is_raised(found) -> None:
    with pytest.raises(Exception, match="a third program"):
        found(_raises, 4, torch.zeros(1))
