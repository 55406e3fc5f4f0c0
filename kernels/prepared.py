"""Calls of an op that were seen before, without the Python that decides what they launch.

What the body of an op does on CUDA follows from its options and from the shapes, strides, dtypes and alignments of its
tensors: a few launches, memory for them, seldom an operator of PyTorch. So the first calls of a kind are recorded while
they run, and become straight code: memory, addresses, launches. In it temporary memory is few allocations, in which
what does not live at once shares its place, and nothing is checked, hashed or looked up again.

Two recordings have to be equal before there is code. So a body that takes something from elsewhere, which may change
from call to call, is never prepared, nor is one that reads anything back from the device. Only the ``layer`` may
differ, where all that depends on it are numbers of kernels which are general in them: the code takes it as an argument,
and what the first two layers of a model recorded serves all of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._C._dynamo import guards
from torch.autograd import forward_ad

from express_compile.core.modes import ONE_THREAD, OneThreadMode

from .launch import DESCRIPTORS, Launcher, current_device, current_stream, is_hooked, watched_by

ENABLED = os.environ.get("EXPRESS_PREPARED") != "0"
MOST = 1024  # kinds of calls of an op that are kept
RECORDINGS = 4  # of a kind, after which there will be no code
_ALIGNED = 512  # bytes, as PyTorch's own memory

_empty_strided_cuda = getattr(guards, "_empty_strided_cuda", None)  # what the code of inductor allocates with


def _as_strided(x: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    return x.as_strided(shape, strides, x.storage_offset() + offset)


_view = getattr(guards, "_reinterpret_tensor", _as_strided)  # what it makes views with, past the dispatcher

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
without_autocast = functools.partial(torch._C._ExcludeDispatchKeyGuard, AUTOCAST)

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default, _aten.empty_strided.default,
    _aten.new_empty_strided.default,
}  # fmt: skip
_ZEROS = {_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default}
# beside these results an op gives numbers, and tensors on the CPU, which nobody reads
_READ = {_aten._scaled_dot_product_cudnn_attention.default: 2}


class _NotPreparable(Exception):
    """What a call does cannot be told without running it."""


class _Ref(NamedTuple):
    """The tensor with this number."""

    number: int


class _Layer(NamedTuple):
    """The layer of the call, where a recording had its own."""


class _Described(NamedTuple):
    """A tensor descriptor, and its tensor, which ``like`` lacks."""

    base: _Ref
    like: Any


class _General(NamedTuple):
    """An argument that a kernel is general in."""

    x: Any


@dataclass(frozen=True)
class _Tensor:
    """A tensor: shape, strides and dtype, where it comes from, the number of the one that it is a view of, or its own,
    and how many bytes behind that it begins. ``bytes``: of memory that a step allocates."""

    layout: tuple[Any, ...]
    made: str  # "given", "constant", "empty", "computed" or "view"
    root: int
    offset: int
    bytes: int


class _Op(NamedTuple):
    """``kind``: "empty" memory, a "view", or "computed". ``fresh``: the tensors in ``out`` that there were not before.
    ``several``: whether it gives more than one thing."""

    func: Any
    kind: str
    args: Any
    options: Any
    out: tuple[_Ref, ...]
    fresh: tuple[int, ...]
    several: bool


class _Launch(NamedTuple):
    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]


class Recording(OneThreadMode):
    """What this thread computes and launches in :meth:`run`, from ``given`` tensors of one device."""

    def __init__(self, given: Sequence[torch.Tensor], layer: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.tensors: list[_Tensor] = []
        self.steps: list[_Op | _Launch] = []
        self.constants: dict[int, torch.Tensor] = {}
        self.failed, self.result = False, None
        self._known: dict[int, tuple[Any, int]] = {}  # by id; an id is that of another tensor once the first is gone
        self._memory: list[tuple[int, int]] = []  # of every tensor: its storage, and where it begins
        self._device, self._thread, self._inside = given[0].device, threading.get_ident(), False
        for x in given:
            self._add(x, "given")

    def run(self, body: Callable[[], Any]) -> Any:
        """What ``body()`` gives, recorded. Only constants are kept as tensors."""
        with self, watched_by(self._launched):
            out = body()
        with self._or_failed():
            self.result = self._kept(out)
        self._known.clear()
        return out

    @contextlib.contextmanager
    def _or_failed(self) -> Iterator[None]:
        try:
            yield
        except _NotPreparable:
            self.failed = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self._inside = self._inside, True  # launches of an op of ours are part of it
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self._inside = outer
        with self._or_failed():
            self._computed(func, args, kwargs or {}, out)
        return out

    def _computed(self, func: Any, args: Any, options: Any, out: Any) -> None:
        if func is _aten.promote_types.default:  # of dtypes alone
            return
        read = leaves(out)[: _READ.get(func)]
        here = all(isinstance(x, torch.Tensor) and x.device == self._device for x in read)
        # by masks the shape of the result follows from values
        masked = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in leaves(args))
        dynamic = torch.Tag.dynamic_output_shape in func.tags and (masked or func is not _aten.index.Tensor)
        dynamic = dynamic or torch.Tag.data_dependent_output in func.tags
        if dynamic or not here or threading.get_ident() != self._thread:
            raise _NotPreparable
        given = self._kept(args), self._kept(options)
        bases = {x.number for x in leaves(given) if type(x) is _Ref}
        before, viewed = len(self.tensors), True
        for x in read:
            if self._number(x) is None:
                shared = [base for base in bases if self._memory[base][0] == x.untyped_storage()._cdata]
                if shared and (len(bases) > 1 or func._schema.is_mutable):
                    raise _NotPreparable
                viewed = viewed and bool(shared)
                self._add(x, "view" if shared else "empty" if func in _EMPTY else "computed", *shared)
        kind = "empty" if func in _EMPTY else "view" if viewed and not func._schema.is_mutable else "computed"
        results, fresh = tuple(self._kept(x) for x in read), tuple(range(before, len(self.tensors)))
        self.steps.append(_Op(func, kind, *given, results, fresh, isinstance(out, (tuple, list))))

    def _launched(self, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], general: Sequence[bool]) -> None:
        if self._inside:
            return
        with self._or_failed():
            kept = (_General(self._kept(x)) if free else self._kept(x) for x, free in zip(args, general, strict=True))
            self.steps.append(_Launch(compiled, grid, tuple(kept)))

    def _add(self, x: torch.Tensor, made: str, base: int | None = None) -> int:
        number, layout = len(self.tensors), (tuple(x.shape), x.stride(), x.dtype)
        storage = x.untyped_storage()
        root, offset = number, 0
        if base is not None:
            root = self.tensors[base].root
            offset = x.data_ptr() - self._memory[root][1] if x.numel() else 0
            if not offset and layout == self.tensors[root].layout:  # a view of all of it
                self._known[id(x)] = weakref.ref(x), root
                return root
        size = storage.nbytes() if made in ("empty", "computed") else 0
        self.tensors.append(_Tensor(layout, made, root, offset, size))
        self._memory.append((storage._cdata, x.data_ptr()))
        self._known[id(x)] = weakref.ref(x), number
        return number

    def _number(self, x: torch.Tensor) -> int | None:
        known, number = self._known.get(id(x), (None, None))
        return number if known is not None and known() is x else None

    def _kept(self, x: Any) -> Any:
        """``x`` with numbers in place of tensors."""
        if isinstance(x, torch.Tensor):
            number = self._number(x)
            if number is None:
                number = self._add(x, "constant")
                self.constants[number] = x
            if self._memory[number][1] != x.data_ptr():
                raise _NotPreparable
            return _Ref(number)
        if type(x) in DESCRIPTORS:
            like = copy.copy(x)
            like.base = None
            return _Described(self._kept(x.base), like)
        if isinstance(x, (tuple, list)):
            return tuple(map(self._kept, x)) if isinstance(x, tuple) else list(map(self._kept, x))
        return {name: self._kept(y) for name, y in x.items()} if isinstance(x, dict) else x


def leaves(x: Any, found: list[Any] | None = None) -> list[Any]:
    """What is in nested tuples, lists and dicts."""
    found = [] if found is None else found
    kind = type(x)
    if kind is tuple or kind is list or kind is dict or isinstance(x, (tuple, list, dict)) and kind not in _WHOLE:
        for y in x.values() if isinstance(x, dict) else x:
            leaves(y, found)
    else:
        found.append(x)
    return found


_WHOLE = (_Ref, _Layer)


def refs(x: Any) -> list[int]:
    """The numbers of the tensors in ``x``."""
    return [y.number for y in leaves(x) if type(y) is _Ref]


def agreed(a: Any, b: Any, layers: tuple[Any, Any] | None = None) -> Any:
    """What two recordings both say. In general arguments, and only there, the ``layers`` that they were made for may
    stand in the same place. Raises :class:`_NotPreparable` where they differ."""
    if type(a) is not type(b) or type(a) is _Ref and a != b:
        raise _NotPreparable
    if type(a) is _General:
        return agreed(a.x, b.x, layers)
    if isinstance(a, _Launch):
        args = tuple(agreed(x, y, layers if type(x) is _General else None) for x, y in zip(a.args, b.args, strict=True))
        return _Launch(agreed(a.compiled, b.compiled), agreed(a.grid, b.grid), args)
    if isinstance(a, _Described):
        return _Described(agreed(a.base, b.base), agreed(vars(a.like), vars(b.like)) and a.like)
    if a is b:
        return a
    if isinstance(a, (tuple, list)):
        if len(a) != len(b):
            raise _NotPreparable
        parts = [agreed(x, y, layers) for x, y in zip(a, b, strict=True)]
        return parts if type(a) is list else type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
    if isinstance(a, dict):
        return dict(zip(agreed(list(a), list(b)), agreed(list(a.values()), list(b.values()), layers), strict=True))
    if a is b or a == b:
        return a
    if layers is not None and (a, b) == layers:
        return _Layer()
    raise _NotPreparable


def agreement(a: Recording, b: Recording) -> Recording | None:
    """The first of two recordings, with the layer wherever they differ by it; None if they differ otherwise, or
    one of them failed."""
    constant = all(b.constants.get(i) is x for i, x in a.constants.items())
    if a.failed or b.failed or a.tensors != b.tensors or not constant:
        return None
    both = copy.copy(a)
    try:
        both.steps, both.result = agreed(a.steps, b.steps, (a.layer, b.layer)), agreed(a.result, b.result)
    except _NotPreparable:
        return None
    return both


_Life = tuple[int, int, int]  # bytes that are used from one step to another: (bytes, first, last)


def _at_once(lives: Sequence[_Life]) -> int:
    """The most bytes of ``lives`` that there are at a step."""
    changes = [change for size, first, last in lives for change in ((first, size), (last + 1, -size))]
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0)


def places(lives: Sequence[_Life]) -> tuple[list[int], int]:
    """Where in one allocation ``lives`` lie, by their first steps, so that what lives at once does not overlap; and how
    many bytes that takes. Each lies at the first place that is free: other orders saved less than 0.1% of any op's."""
    begins: list[int] = []
    for i, (size, first, _) in enumerate(lives):
        taken = sorted((begins[j], begins[j] + lives[j][0]) for j in range(i) if first <= lives[j][2])
        begin = 0
        for a, b in taken:
            if begin + size <= a:
                break
            begin = max(begin, _rounded(b))
        begins.append(begin)
    return begins, max((begin + size for begin, (size, *_) in zip(begins, lives, strict=True)), default=0)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def shared(lives: Sequence[_Life], others: Sequence[_Life]) -> list[tuple[int, ...]]:
    """Which of ``lives``, by their first steps, share an allocation, which is there from the first step of them
    to the last: as many as can while allocations and ``others`` never take more than 1/64 above what lives at
    once, in units of the allocator."""

    @functools.cache
    def whole(part: tuple[int, ...]) -> _Life:
        own = [lives[i] for i in part]
        return _rounded(places(own)[1]), min(x[1] for x in own), max(x[2] for x in own)

    beside = [(_rounded(size), first, last) for size, first, last in others]
    left = sorted(((i,) for i in range(len(lives))), key=lambda part: -lives[part[0]][0])
    most = _at_once([*map(whole, left), *beside]) * 65 // 64
    parts: list[tuple[int, ...]] = []
    while left:
        part = left.pop(0)
        for i, x in enumerate(parts):
            tried = [*parts[:i], tuple(sorted(x + part)), *parts[i + 1 :]]
            if _at_once([*map(whole, (*tried, *left)), *beside]) <= most:
                parts = tried
                break
        else:
            parts.append(part)
    return parts


@functools.lru_cache(maxsize=256)
def _compiled(source: str) -> Any:
    return compile(source, "<a prepared call>", "exec")


def _is_fixed(x: Any) -> bool:
    return not any(type(y) in _WHOLE for y in leaves(x))


class _Code:
    """The Python code of a recording: a function of the layer, the tensors that were given, and their addresses."""

    def __init__(self, recording: Recording, index: int, empty: Callable[..., torch.Tensor]) -> None:
        self.tensors, self.constants = recording.tensors, recording.constants
        self.names: dict[str, Any] = {"empty": empty, "stream": current_stream, "index": index, "uint8": torch.uint8}
        self.names["view"] = _view
        self.returned = set(refs(recording.result))
        self.needed = set(self.returned)  # as tensors, not for their addresses alone
        self.steps = [step for step in reversed(recording.steps) if self._is_live(step)][::-1]
        ends: dict[int, int] = {}  # the last step that uses a tensor, or the memory that begins with it
        for i, step in enumerate(self.steps):
            used = (*step.fresh, *self._used(step)) if isinstance(step, _Op) else self._roots(step)
            ends.update((x, i) for x in used)
        self.pointed = {root for step in self.steps if isinstance(step, _Launch) for root in self._roots(step)}
        given = [i for i, x in enumerate(self.tensors) if x.made == "given"]
        self.lines = [
            f"{''.join(f't{i}, ' for i in given)} = given",
            f"{''.join(f'p{i}, ' for i in given)} = addresses",
            "s = stream(index)",
        ]
        self.work: dict[int, tuple[str, int]] = {}  # the name of an address, and how far behind it memory begins
        begun, ended = self._work(ends)
        self.held: set[int] = set()  # the tensors that it makes
        for i, step in enumerate(self.steps):
            self.lines += begun.get(i, [])
            self.lines += [self._launch(step)] if isinstance(step, _Launch) else self._op(step)
            gone = [f"t{x}" for x, end in ends.items() if end == i and x in self.held - self.returned]
            gone += ended.get(i, [])
            self.lines += [f"del {', '.join(gone)}"] if gone else []
        self.lines.append(f"return {self._word(recording.result)}")

    @property
    def computes(self) -> bool:
        """Whether operators of PyTorch run in it."""
        return any(isinstance(step, _Op) and step.kind == "computed" for step in self.steps)

    def compiled(self) -> Callable[[int, Sequence[torch.Tensor], Sequence[int]], Any]:
        source = "def call(layer, given, addresses):\n" + "".join(f"    {line}\n" for line in self.lines)
        names = {**self.names, "constants": self.constants}  # they live as long as their addresses are used
        exec(_compiled(source), names)
        return names["call"]

    def _is_live(self, step: _Op | _Launch) -> bool:
        """Whether a step has to be done; asked from the last one to the first."""
        if isinstance(step, _Op):
            if step.kind == "view" and not self.needed & set(step.fresh):
                return False
            if step.kind != "empty":
                self.needed.update(self._used(step))
        return True

    def _used(self, step: _Op) -> Iterable[int]:
        """The tensors that a step is done with: a view is one of what its memory begins with, unless in other units."""
        roots = {self.tensors[x].root for x in step.fresh}
        same = len({self.tensors[x].layout[2] for x in (*step.fresh, *roots)}) == 1
        return roots if step.kind == "view" and same else refs((step.args, step.options))

    def _roots(self, step: _Launch) -> set[int]:
        return {self.tensors[x].root for x in refs(step.args) if self._size(x)}

    def _size(self, x: int) -> int:
        return math.prod(self.tensors[x].layout[0])

    def _work(self, ends: dict[int, int]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """Places for memory that is there for its address alone; the lines that allocate it, by the steps that they
        stand before, and what is to be deleted, by the steps after which."""
        last: dict[int, int] = {}  # the last step that there is memory in, as views keep it, too
        for x, end in ends.items():
            root = self.tensors[x].root
            last[root] = max(last.get(root, 0), len(self.steps) if x in self.returned else end)
        made = {x: i for i, step in enumerate(self.steps) if isinstance(step, _Op) for x in step.fresh}
        lives = {x: (self.tensors[x].bytes, i, last[x]) for x, i in made.items() if x == self.tensors[x].root}
        bare = {x for x in lives if self.tensors[x].made == "empty" and x not in self.needed}
        own = [x for x in lives if x in bare & self.pointed]
        parts = shared([lives[x] for x in own], [life for x, life in lives.items() if x not in bare])
        begun: dict[int, list[str]] = {}
        ended: dict[int, list[str]] = {}
        for n, numbers in enumerate(parts):
            part = [own[i] for i in numbers]
            begins, size = places([lives[x] for x in part])
            self.work.update((x, (f"w{n}", begin)) for x, begin in zip(part, begins, strict=True))
            line = f"work{n} = empty({self._name((size,))}, {self._name((1,))}, uint8)"
            begun.setdefault(min(made[x] for x in part), []).extend([line, f"w{n} = work{n}.data_ptr()"])
            ended.setdefault(max(last[x] for x in part), []).append(f"work{n}")
        return begun, ended

    def _op(self, step: _Op) -> list[str]:
        if step.kind == "empty":
            fresh = [x for x in step.fresh if x in self.needed]
            lines = [f"t{x} = empty({', '.join(map(self._word, self.tensors[x].layout))})" for x in fresh]
        elif step.kind == "view" and self._used(step) == {root := self.tensors[step.fresh[0]].root}:
            fresh = [x for x in step.fresh if x in self.needed]
            lines = [f"t{x} = {self._view(x, self._word(_Ref(root)))}" for x in fresh]
        elif step.func in _ZEROS:
            fresh = list(step.fresh)
            lines = [f"t{x} = empty({', '.join(map(self._word, self.tensors[x].layout))}).zero_()" for x in fresh]
        else:
            fresh = list(step.fresh)
            named = [f"t{x.number}" if x.number in fresh else "_" for x in step.out]
            words = [self._word(x) for x in step.args] + [f"{name}={self._word(x)}" for name, x in step.options.items()]
            left = "" if not fresh else f"{', '.join(named)}, *_ = " if step.several else f"{named[0]} = "
            lines = [f"{left}{self._name(getattr(step.func, '_op', step.func))}({', '.join(words)})"]
        self.held.update(fresh)
        return lines + [f"p{x} = t{x}.data_ptr()" for x in fresh if x in self.pointed]

    def _view(self, x: int, root: str) -> str:
        """A view of ``root``, which may lie anywhere in its own memory."""
        (shape, strides, dtype), offset = self.tensors[x].layout, self.tensors[x].offset
        return f"view({root}, {self._name(shape)}, {self._name(strides)}, {self._name(offset // dtype.itemsize)})"

    def _launch(self, step: _Launch) -> str:
        launcher, words = Launcher.of(step.compiled), []
        self._name(step.compiled)  # what it has loaded lives as long as the code
        if launcher is None:
            raise _NotPreparable
        for i, x in enumerate(step.args):
            if isinstance(x, _Described):
                encode, told = launcher.encoder(i, x.like)
                address = self._argument(x.base)
                words += [f"{self._name(encode)}({address})" if encode else address, *map(self._word, told)]
            else:
                words.append(self._argument(x))
        args, fixed = ", ".join(words), ", ".join(map(self._word, launcher.fixed))
        grid, args = ", ".join(map(self._word, (*step.grid, 1, 1)[:3])), f"({args},)" if launcher.nested else args
        return f"{self._name(launcher.call)}({grid}, s, {fixed}, {args})"

    def _argument(self, x: Any) -> str:
        """What a launch is given: addresses in place of tensors."""
        if type(x) is _Ref:
            tensor, root = self.tensors[x.number], self.tensors[x.number].root
            if not self._size(x.number):
                return "0"
            if root in self.constants:
                return self._name(self.constants[root].data_ptr() + tensor.offset)
            name, begin = self.work.get(root, (f"p{root}", 0))
            return name + (f" + {self._name(begin + tensor.offset)}" if begin + tensor.offset else "")
        if type(x) is _Layer:
            return "layer"
        if isinstance(x, tuple) and not _is_fixed(x):
            return f"({''.join(f'{self._argument(y)}, ' for y in x)})"
        return self._word(x)

    def _word(self, x: Any) -> str:
        """What else there is; numbers by names, so that the code for other lengths has the same text."""
        if type(x) is _Ref:
            return self._name(self.constants[x.number]) if x.number in self.constants else f"t{x.number}"
        if isinstance(x, (tuple, list)) and not _is_fixed(x):
            words = "".join(f"{self._word(y)}, " for y in x)
            return f"[{words}]" if isinstance(x, list) else f"({words})"
        return repr(x) if x is None or type(x) is bool else self._name(x)

    def _name(self, x: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = x
        return name


# ---------------------------------------------------------------------------------------------------------------
# Calls


def _code_of(recording: Recording, index: int) -> Callable[..., Any] | None:
    """None where Triton's launchers are others than those that are known here."""
    fast = _empty_strided_cuda if index >= 0 and not torch._C._get_deterministic_algorithms() else None
    try:
        code = _Code(recording, index, fast or functools.partial(_empty_strided, index))
        call = code.compiled()
    except _NotPreparable:
        return None
    if not code.computes:
        return call

    def run(*args: Any) -> Any:
        with without_autocast(), torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    return run


def _empty_strided(index: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Also fills the memory where PyTorch was told to."""
    device = torch.device("cpu" if index < 0 else "cuda", max(index, 0))
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


@dataclass(slots=True)
class _Kind:
    """Calls of one kind: the recording of one; the code, and the only layer that it is for, if there is one."""

    recording: Recording | None = None
    call: Callable[..., Any] | None = None
    only: int | None = None
    recorded: int = 0

    def learn(self, layer: int | None, given: list[torch.Tensor], body: Callable[[], Any]) -> Any:
        """What ``body()`` gives, after which there may be code for such calls."""
        if not ONE_THREAD.acquire(blocking=False):
            return body()
        try:
            first, new = self.recording, Recording(given, layer)
            out = new.run(body)
        finally:
            ONE_THREAD.release()
        self.recorded += 1
        both = None if first is None else agreement(first, new)
        if new.failed:
            self.recorded = RECORDINGS
        elif first is None or both is None:
            self.recording = new
        elif (call := _code_of(both, given[0].get_device())) is None:
            self.recorded = RECORDINGS
        else:
            self.only = layer if layer == first.layer else None
            self.call = call
        if self.recorded >= RECORDINGS or self.call is not None and self.only is None:
            self.recording = None
        return out


_EVERY: list[dict[Any, Any]] = []


def forget() -> None:
    """Drop what was recorded of all ops, and their code: the next calls run and launch as the first ones did."""
    for kinds in _EVERY:
        kinds.clear()


def prepared(body: Callable[..., Any], layer_at: int | None = None) -> Callable[..., Any]:
    """``body`` of an op on CUDA, whose calls become code once two of a kind, the second and the third, were recorded.
    ``layer_at``: which argument is the layer."""
    kinds: dict[Any, _Kind] = {}
    _EVERY.append(kinds)

    @functools.wraps(body)
    def run(*args: Any, **options: Any) -> Any:
        if not ENABLED or is_hooked() or torch._C._len_torch_dispatch_stack():
            return body(*args, **options)
        layer: int | None = None
        given: list[torch.Tensor] = []
        addresses: list[int] = []
        key: list[Any] = [torch._C._get_deterministic_algorithms(), current_device()]
        for i, x in enumerate(args):
            if isinstance(x, torch.Tensor):
                address = x.data_ptr()
                key += (x.shape, x.stride(), x.dtype, x.get_device(), address % 16)
                given.append(x)
                addresses.append(address)
            elif i == layer_at:
                layer = x
                key.append(_is_small(x))
            else:
                key += (type(x), x)
        key += options
        key += [tuple(x) if type(x) is list else x for x in options.values()]
        found = tuple(key)
        kind = kinds.get(found)
        if kind is None:
            if len(kinds) >= MOST:
                kinds.clear()
            here = all(x.get_device() == key[1] for x in given)
            kinds[found] = _Kind(recorded=0 if here else RECORDINGS)
            return body(*args, **options)  # what comes once is not recorded
        if kind.call is not None and (kind.only is None or kind.only == layer):
            out = kind.call(layer, given, addresses)
            if (told := getattr(_asked, "told", None)) is not None:
                told[:] = run, kind, given
            return out
        if kind.recorded < RECORDINGS and len({id(x) for x in given}) == len(given):  # else who is who is not seen
            return kind.learn(layer, given, lambda: body(*args, **options))
        return body(*args, **options)

    return run


_asked = threading.local()  # .told: a list for the prepared body whose code ran last, that code, and its tensors


def _is_small(layer: int | None) -> bool:
    """Kernels that are general in the layer are compiled for either."""
    return layer is None or 0 <= layer < 1 << 31


@dataclass(slots=True)
class _Direct:
    """Arguments of an op with which code ran, of any layer or of one: what has to be equal for it to run again."""

    kind: _Kind
    is_small: bool
    count: int
    options: dict[str, Any]
    others: Callable[[Any], Any]
    values: Any
    tensors: Callable[[Any], tuple[torch.Tensor, ...]]
    guard: Any  # types, dispatch keys, dtypes, device, shapes and strides
    aligned: list[int]

    @classmethod
    def of(
        cls, kind: _Kind, given: Sequence[torch.Tensor], args: tuple[Any, ...], options: dict[str, Any],
        layer_at: int | None,
    ) -> _Direct | None:  # fmt: skip
        """None unless ``given``, the tensors that the code took, are those in ``args`` as they are."""
        at = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        if len(at) != len(given) or any(args[i] is not x for i, x in zip(at, given, strict=True)):
            return None
        rest = [i for i in range(len(args)) if i not in at and i != layer_at]
        others = operator.itemgetter(*rest) if rest else len
        own = {name: list(x) if type(x) is list else x for name, x in options.items()}  # a caller may change its list
        guard = _TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        is_small = layer_at is None or _is_small(args[layer_at])
        aligned = [x.data_ptr() % 16 for x in given]
        return cls(kind, is_small, len(args), own, others, others(args), operator.itemgetter(*at), guard, aligned)

    def run(self, layer: int | None, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the code gives, or :data:`_NOT_ALIKE`."""
        if len(args) != self.count or self.options != options or self.values != self.others(args):
            return _NOT_ALIKE
        given, only = self.tensors(args), self.kind.only
        if not self.guard.check(*given) or only is not None and only != layer or self.is_small != _is_small(layer):
            return _NOT_ALIKE
        addresses = [x.data_ptr() for x in given]
        if [address % 16 for address in addresses] != self.aligned:
            return _NOT_ALIKE
        assert self.kind.call is not None
        return self.kind.call(layer, given, addresses)


_NOT_ALIKE = object()
_DIRECT = 64  # of the same shapes: options and layers that have code of their own, strides, alignments, padding
_TensorGuards: Any = getattr(guards, "TensorGuards", None)


def directly(
    op: Callable[..., Any], body: Callable[..., Any], is_plain: Callable[[Sequence[torch.Tensor]], bool],
    layer_at: int | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """``op``, a way through PyTorch's dispatcher to ``body``, which is :func:`prepared`, without that way for calls
    like one that was seen to take it to code and back with the same tensors.

    The dispatcher takes as long as all launches: a microsecond for every option, more for lists of numbers. Where it
    has something to do, calls take it: gradients, tangents, modes, profilers and what :func:`is_plain` says no to for
    the tensors; so do calls that differ in dispatch keys, of tensors or of the thread.
    """
    if _TensorGuards is None:
        return op
    # by shapes: what ran last for every layer, and all that ran
    known: dict[Any, tuple[dict[int | None, _Direct], list[_Direct]]] = {}
    _EVERY.append(known)
    least = 2 if layer_at is None else max(2, layer_at + 1)

    def run(*args: Any, **options: Any) -> Any:
        if (
            not ENABLED
            or len(args) < least
            or torch.is_grad_enabled()
            and torch._C._any_requires_grad(*args)
            or torch._C._len_torch_dispatch_stack()
            or torch._C._is_torch_function_mode_enabled()
            or torch._C._autograd._profiler_enabled()
            or forward_ad._current_level >= 0
            or is_hooked()
        ):
            return op(*args, **options)
        query, key = args[:2]
        layer = None if layer_at is None else args[layer_at]
        if not (isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(layer, int | None)):
            return op(*args, **options)
        at = query.shape, key.shape, current_device(), torch._C._get_deterministic_algorithms()
        latest, every = known.get(at) or ({}, [])
        tried = latest.get(layer)
        if tried is not None and (out := tried.run(layer, args, options)) is not _NOT_ALIKE:
            return out
        for other in every:
            if other is not tried and (out := other.run(layer, args, options)) is not _NOT_ALIKE:
                latest[layer] = other
                return out
        told: list[Any] = []
        before, _asked.told = getattr(_asked, "told", None), told
        try:
            out = op(*args, **options)
        finally:
            _asked.told = before
        if told and told[0] is body and len(every) < _DIRECT:
            direct = _Direct.of(told[1], told[2], args, options, layer_at)
            if direct is not None and is_plain(told[2]):
                if len(known) >= MOST:
                    known.clear()
                latest[layer] = direct
                every.append(direct)
                known[at] = latest, every
        return out

    return run
