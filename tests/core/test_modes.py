"""Dispatch modes of several threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils import _python_dispatch as torchs
from torch.utils._python_dispatch import TorchDispatchMode, is_in_any_mode_without_ignore_compile_internals

from express_compile.core.modes import ONE_THREAD, OneThreadMode


class _Counts:
    """What a mode sees."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class One(_Counts, OneThreadMode):
    """One of ours."""


class Any(_Counts, TorchDispatchMode):
    """One that does not wait."""


def overlapping(kind: type[TorchDispatchMode]) -> tuple[bool, list[int]]:
    """Two threads, of which the second one begins while the first is in a mode and ends behind it: whether PyTorch
    takes itself to be in a mode then, and what each has seen."""
    entered, leave, asks = threading.Event(), threading.Event(), threading.Event()
    modes = [kind(), kind()]

    def first() -> None:
        with modes[0]:
            entered.set()
            torch.zeros(1)
            assert leave.wait(60)

    def second() -> None:
        assert entered.wait(60)
        asks.set()
        with modes[1]:
            if kind is Any:
                leave.set()
                threads[0].join()
            torch.zeros(1)

    threads = [threading.Thread(target=x) for x in (first, second)]
    for thread in threads:
        thread.start()
    if kind is One:
        assert asks.wait(60)
        threads[1].join(0.2)
        assert threads[1].is_alive() and modes[1].seen == 0, "it waits"
        leave.set()
    for thread in threads:
        thread.join(60)
    return is_in_any_mode_without_ignore_compile_internals(), [mode.seen for mode in modes]


def test_modes_of_two_threads_leave_pytorch_in_none() -> None:
    assert overlapping(One) == (False, [1, 1])


def test_those_that_do_not_wait_leave_it_in_one() -> None:
    flags = [x for x in vars(torchs) if x.startswith("_is_in_") and isinstance(getattr(torchs, x), bool)]
    before = {x: getattr(torchs, x) for x in flags}
    stuck, seen = overlapping(Any)
    for name, value in before.items():
        setattr(torchs, name, value)
    torchs.set_is_in_mode_without_ignore_compile_internals(False)
    assert stuck and seen == [1, 1]


def test_they_nest_in_one_thread_and_are_left_after_an_error() -> None:
    outer, inner = One(), One()
    with pytest.raises(KeyError), outer, inner:
        torch.zeros(1)
        raise KeyError
    assert (outer.seen, inner.seen) == (1, 1)
    free: list[bool] = []

    def other() -> None:
        free.append(ONE_THREAD.acquire(blocking=False))
        ONE_THREAD.release()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert free == [True]
    assert not is_in_any_mode_without_ignore_compile_internals()
