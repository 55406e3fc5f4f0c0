"""Races of kernels, and what they access out of bounds: found in Triton's interpreter, which runs one program after the
other and so never meets a race, and finds some memory behind a tensor.

Inside of :func:`watched` every load, store and atomic of a launch is noted, and programs that use atomics run side by
side: each waits before it, and before a volatile load, until the others have come as far. Where two accesses touch the
same memory and one stores, a GPU must keep their order, too:

* of two programs, by an atomic that releases behind the first and one that acquires before the second
  (happens-before, by vector clocks: Lamport 1978; Flanagan & Freund 2009, FastTrack);
* of one program, by a barrier between its threads, where the second loads what the first stored unless each thread
  loads what it stored itself: the same addresses, at least one per thread.

What a program loads and then stores has no such rule, as the value that is stored waits for the load.

What no mask hides must be inside of the tensor that the pointer stems from, between its first and its last element, be
there other tensors around it or not: pointers carry the number of their operand in bits that addresses do not have. Those
that a kernel reads from memory have none, and must be inside of a storage whose address somebody took. What is outside is
noted and not touched. Kernels in Gluon do not run in the interpreter.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import itertools
import linecache
import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

LOAD, STORE, ATOMIC = "load", "store", "atomic"
SIDE_BY_SIDE = 4  # programs
WARP = 32  # threads
ADDRESS = np.uint64((1 << 48) - 1)
Clock = dict[int, int]  # of other programs: the number of their last access that has happened before


class Access(NamedTuple):
    """kind: LOAD, STORE or ATOMIC. number: in the order of the launch. barriers: that the program had passed. clock: of
    the program, which is replaced and not changed. relaxed: a volatile load, in no race with atomics."""

    kind: str
    program: int
    number: int
    barriers: int
    clock: Clock
    relaxed: bool
    place: str
    pointers: np.ndarray
    size: int


@dataclass
class Program:
    number: int
    grid_idx: tuple[int, ...]
    args: dict[str, Any]
    clock: Clock = field(default_factory=dict)
    barriers: int = 0


class Operands:
    """The tensors that a launch is given, by number; 0 is memory whose address somebody took, in ``taken``."""

    def __init__(self, arguments: dict[str, Any], taken: dict[int, StorageWeakRef]) -> None:
        self.names, self.begin, self.end = ["an address that it read", *_tensors_of(arguments)], [0], [0]
        self._taken = taken

    def number(self, x: torch.Tensor) -> int:
        """Of the next one, as it is in a pointer."""
        high, begin = len(self.begin) << 48, x.data_ptr()
        elements = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        self.begin.append(high + begin)
        self.end.append(high + begin + elements * x.element_size())
        return high

    def are_inside(self, first: int, last: int, size: int) -> bool:
        """Whether all that is ``size`` bytes at ``first``, ``last`` and between is."""
        operand = first >> 48
        return 0 < operand < len(self.end) and self.begin[operand] <= first and last + size <= self.end[operand]

    def outside(self, pointers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each the number of its operand, and how many bytes are outside, negative before its begin."""
        pointers, operand = pointers.astype(np.int64), (pointers >> np.uint64(48)).astype(np.int64)
        operand = np.where(operand < len(self.end), operand, 0)
        begin, end = np.array(self.begin)[operand], np.array(self.end)[operand]
        if (read := operand == 0).any():
            begin[read], end[read] = self._around(pointers[read])
        return operand, np.where(pointers < begin, pointers - begin, np.maximum(pointers + size - end, 0))

    def _around(self, pointers: np.ndarray) -> np.ndarray:
        """Begin and end of the memory that each is in or behind."""
        alive = [(0, 0)]
        for begin, (bytes_, storage) in self._taken.items():
            if not storage.expired():
                alive.append((begin, begin + bytes_))
        found = np.array(sorted(alive))
        return found[np.searchsorted(found[:, 0], pointers, "right") - 1].T


def _tensors_of(x: Any, name: str = "") -> Iterator[str]:
    """The names of all tensors in nested arguments."""
    if hasattr(x, "data_ptr"):
        yield name
    elif hasattr(x, "block_shape"):
        yield from _tensors_of(x.base, name)
    elif isinstance(x, dict) or hasattr(x, "_asdict"):
        for key, part in (x if isinstance(x, dict) else x._asdict()).items():
            yield from _tensors_of(part, f"{name}.{key}".removeprefix("."))
    elif isinstance(x, tuple):
        for i, part in enumerate(x):
            yield from _tensors_of(part, f"{name}[{i}]")


class Launch:
    """threads: of a program. now: the one that runs. released: by address, what had happened before a release there.
    outside: the most bytes that an access was out of bounds, by kind, place, operand, and whether before its begin."""

    def __init__(self, executor: Any, threads: int, operands: Operands) -> None:
        self.executor, self.fn, self.threads, self.operands = executor, executor.fn, threads, operands
        self.outside: dict[tuple[str, str, int, bool], int] = {}
        self.accesses: list[Access] = []
        self.released: dict[int, Clock] = {}
        self.programs: list[Program] = []
        self.now = Program(-1, (), {})
        self._turns = SideBySide()

    def collect(self, builder: Any, grid: tuple[int, ...]) -> None:
        """Run no program before the executor has called all."""

        def called(**args: Any) -> None:
            self.programs.append(Program(len(self.programs), builder.grid_idx, args))
            if len(self.programs) == math.prod(grid):
                calls = ((p.number, functools.partial(_run_program, self.fn, p.args)) for p in self.programs)
                self._turns.run(calls, resume)

        def resume(number: int) -> None:
            self.now = self.programs[number]
            builder.grid_idx = self.now.grid_idx

        self.executor.fn = called

    def wait(self) -> None:
        self._turns.wait()

    def note(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int, relaxed: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gives the addresses, and which of them are accessed."""
        mask, addresses = np.broadcast_to(mask, pointers.shape), pointers & ADDRESS
        if len(seen := pointers[mask]) and not self.operands.are_inside(int(seen.min()), int(seen.max()), size):
            operands, outside = self.operands.outside(seen, size)
            for operand, far in zip(operands[outside != 0].tolist(), outside[outside != 0].tolist(), strict=True):
                at = kind, _place(), operand, far < 0
                self.outside[at] = max(self.outside.get(at, 0), abs(far))
            mask = mask.copy()
            mask[mask] = outside == 0
        if len(seen := addresses[mask]):
            self.accesses.append(
                Access(kind, self.now.number, len(self.accesses), self.now.barriers, self.now.clock, relaxed, _place(),
                       seen.astype(np.int64), size)
            )  # fmt: skip
        return addresses, mask

    def synchronise(self, pointers: np.ndarray, mask: np.ndarray, acquires: bool, releases: bool) -> None:
        for address in np.unique(pointers[np.broadcast_to(mask, pointers.shape)]).tolist():
            if acquires:
                self.now.clock = _later(self.now.clock, self.released.get(address, {}))
            if releases:
                known = _later(self.now.clock, {self.now.number: len(self.accesses) - 1})
                self.released[address] = _later(self.released.get(address, {}), known)

    def faults(self) -> set[str]:
        """Each in words."""
        races = (self._judge(self.accesses[i], self.accesses[j]) for i, j in self._pairs())
        outside = (
            f"{self.fn.__name__}: {kind} at {place} of {self.operands.names[operand]}, up to {far} bytes "
            f"{'before its begin' if is_before else 'behind its end'}"
            for (kind, place, operand, is_before), far in self.outside.items()
        )
        return {*filter(None, races), *outside}

    def _pairs(self) -> list[list[int]]:
        """The accesses that follow each other at some address, with a store between: store and load, load and store,
        store and store."""
        if all(x.kind == LOAD for x in self.accesses):
            return []
        unit = min(x.size for x in self.accesses)
        units = [np.unique((x.pointers // unit)[:, None] + np.arange(x.size // unit)) for x in self.accesses]
        written = np.unique(np.concatenate([u for x, u in zip(self.accesses, units, strict=True) if x.kind != LOAD]))
        units = [u[np.isin(u, written, assume_unique=True)] for u in units]
        address = np.concatenate(units)
        access = np.repeat(np.arange(len(units)), [len(u) for u in units])
        order = np.lexsort((access, address))
        address, access = address[order], access[order]
        stores, at = np.array([x.kind != LOAD for x in self.accesses])[access], np.arange(len(access))
        before = np.r_[-1, np.maximum.accumulate(np.where(stores, at, -1))[:-1]]
        behind = np.r_[np.minimum.accumulate(np.where(stores, at, len(at))[::-1])[::-1][1:], len(at)]
        first = np.searchsorted(address, address)
        end = np.searchsorted(address, address, "right")
        stored, loaded = before >= first, ~stores & (behind < end)
        pairs = np.concatenate(
            [
                np.stack([access[before[stored]], access[stored]], 1),
                np.stack([access[loaded], access[behind[loaded]]], 1),
            ]
        )
        return np.unique(pairs, axis=0).tolist()

    def _judge(self, x: Access, y: Access) -> str | None:
        words = f"{self.fn.__name__}: {x.kind} at {x.place}, {y.kind} at {y.place}"
        if x.program != y.program:
            atomic = all(a.relaxed or a.kind == ATOMIC for a in (x, y))
            ordered = y.clock.get(x.program, -1) >= x.number
            return None if atomic or ordered else f"{words} of another program, in any order"
        own = np.array_equal(x.pointers, y.pointers) and len(x.pointers) >= self.threads
        is_read = x.kind != LOAD and y.kind == LOAD and not y.relaxed
        return f"{words} without a barrier" if is_read and x.barriers == y.barriers and not own else None


def _later(a: Clock, b: Clock) -> Clock:
    return {program: max(a.get(program, -1), b.get(program, -1)) for program in a.keys() | b.keys()}


def _run_program(kernel: Callable[..., None], args: dict[str, Any]) -> None:
    kernel(**args)


def _frames() -> Iterator[Any]:
    """Those of the kernel and of the device functions that it calls, the innermost first."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_run_program":
        if "triton" not in frame.f_code.co_filename.split("/") and frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


def _place() -> str:
    frames = list(_frames())[:3]
    return " from ".join(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}" for frame in frames)


def _is_used() -> bool:
    """Whether the kernel does something with what the atomic gives, which all threads of a program get: a barrier."""
    frame = next(_frames())
    return not linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("tl.atomic")


class SideBySide:
    """Runs programs, each in a thread of its own, of which one runs at a time."""

    def __init__(self) -> None:
        self._turn = threading.Semaphore(0)

    def wait(self) -> None:
        """Let the others go on; called by a program."""
        go = self._live[self._now]
        self._turn.release()
        go.acquire()

    def run(self, programs: Iterator[tuple[int, Callable[[], None]]], resume: Callable[[int], None]) -> None:
        """``resume`` is told which program goes on. Raises what a program raised; the others are left behind then."""
        self._live: dict[int, threading.Semaphore] = {}
        errors: list[BaseException] = []

        def call(number: int, program: Callable[[], None], go: threading.Semaphore) -> None:
            go.acquire()
            try:
                program()
            except BaseException as error:
                errors.append(error)
            del self._live[number]
            self._turn.release()

        while not errors:
            for number, program in itertools.islice(programs, SIDE_BY_SIDE - len(self._live)):
                go = self._live[number] = threading.Semaphore(0)
                run = contextvars.copy_context().run
                threading.Thread(target=run, args=(call, number, program, go), daemon=True).start()
            if not self._live:
                return
            for number, go in list(self._live.items()):
                self._now = number
                resume(number)
                go.release()
                self._turn.acquire()
        raise errors[0]


TAKEN: dict[int, tuple[int, StorageWeakRef]] = {}
"""Memory whose address somebody took: by where it begins, its bytes, and whether it is still there."""


@contextlib.contextmanager
def watched() -> Iterator[set[str]]:
    """Gives the faults of all launches inside, in words, as they end."""
    from triton.runtime import interpreter

    builder, found, launches = interpreter.interpreter_builder, set(), []
    Builder, Grid, Handle = interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter.TensorHandle
    load, store, barrier = Builder.create_masked_load, Builder.create_masked_store, Builder.create_barrier
    exchange, change, set_dim, call = (
        Builder.create_atomic_cas, Builder.create_atomic_rmw, Builder.set_grid_dim, Grid.__call__
    )  # fmt: skip

    def note(kind: str, pointers: Any, mask: np.ndarray, relaxed: bool = False) -> tuple[Any, Any]:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        addresses, mask = launches[-1].note(kind, pointers.data, mask, size, relaxed)
        return Handle(addresses, pointers.dtype), Handle(mask, interpreter.tl.int1)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: Any) -> Any:
        if is_volatile:
            launches[-1].wait()
        ptrs, mask = note(LOAD, ptrs, mask.data, bool(is_volatile))
        return load(self, ptrs, mask, other, cache_policy, is_volatile)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        ptrs, mask = note(STORE, ptrs, mask.data)
        return store(self, ptrs, value, mask, cache_policy)

    def atomic(pointers: Any, mask: np.ndarray, sem: Any, run: Callable[[Any, Any], Any]) -> Any:
        launch, kind = launches[-1], sem.name
        launch.wait()
        pointers, mask = note(ATOMIC, pointers, mask)
        launch.synchronise(pointers.data, mask.data, kind.startswith("ACQUIRE"), kind.endswith("RELEASE"))
        launch.now.barriers += pointers.data.size == 1 and _is_used()
        return run(pointers, mask)

    def create_atomic_rmw(self: Any, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        return atomic(ptr, mask.data, sem, lambda ptr, mask: change(self, rmwOp, ptr, val, mask, sem, scope))

    def create_atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        whole = np.ones(ptr.data.shape, bool)
        return atomic(
            ptr, whole, sem, lambda ptr, mask: exchange(self, ptr, cmp, val, sem, scope) if mask.data.all() else cmp
        )

    def create_barrier(self: Any) -> None:
        launches[-1].now.barriers += 1
        barrier(self)

    def set_grid_dim(self: Any, *grid: int) -> None:
        """What comes last before the executor calls the kernel for each program: from then on they are collected."""
        set_dim(self, *grid)
        launches[-1].collect(builder, grid)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(self.fn).bind_partial(
            *args, **{x: y for x, y in kwargs.items() if x in self.arg_names}
        )
        launches.append(Launch(self, WARP * kwargs.get("num_warps", 4), Operands(given.arguments, TAKEN)))
        try:
            call(self, *args, **kwargs)
            found.update(launches[-1].faults())
        finally:
            self.fn = launches.pop().fn

    mine = {name: value for name, value in locals().items() if name.startswith(("create_", "set_grid"))}
    with _marked(launches), mock.patch.multiple(Builder, **mine), mock.patch.object(Grid, "__call__", __call__):
        yield found


@contextlib.contextmanager
def _marked(launches: list[Launch]) -> Iterator[None]:
    """Pointers have the numbers of their operands, and it is known whose addresses were taken."""
    from triton.runtime import interpreter

    convert, address_of = interpreter._implicit_cvt, torch.Tensor.data_ptr

    def _implicit_cvt(x: Any) -> Any:
        converted = convert(x)
        if hasattr(x, "data_ptr"):
            converted.handle.data = converted.handle.data + np.uint64(launches[-1].operands.number(x))
        return converted

    def data_ptr(x: torch.Tensor) -> int:
        storage = x.untyped_storage()
        TAKEN[storage.data_ptr()] = storage.nbytes(), StorageWeakRef(storage)
        return address_of(x)

    with (
        mock.patch.object(interpreter, "_implicit_cvt", _implicit_cvt),
        mock.patch.object(torch.Tensor, "data_ptr", data_ptr),
    ):
        yield
