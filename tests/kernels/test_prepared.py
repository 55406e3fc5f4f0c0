"""Calls that became code: kernels get what they would get without, whatever is different from what was recorded."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import driver
from triton.runtime.driver import driver as active

from express_compile.kernels import launch as launching
from express_compile.kernels import op as ops
from express_compile.kernels import prepared
from express_compile.kernels.launch import Launcher, TensorDescriptor

LAUNCHER_OF = Launcher.of
KERNEL = SimpleNamespace(name="kernel")
CONSTANT = torch.arange(4, dtype=torch.float64)


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "ENABLED", True)


def kernel(out: int, a: tuple[int, ...], b: tuple[int, ...], random: tuple[int, int], scale: float, step: int) -> None:
    """Writes five numbers that depend on all that it is given, from memory by addresses, as one on a GPU would; or adds
    them to what is there."""

    def total(address: int, size: int, stride: int) -> float:
        every = np.frombuffer((ctypes.c_double * ((size - 1) * stride + 1)).from_address(address))[::stride]
        return float((every * np.arange(1, size + 1)).sum())

    seed, layer = ctypes.c_int64.from_address(random[0]).value, random[1]
    written = np.frombuffer((ctypes.c_double * 5).from_address(out))
    written[:] = written if step % 8 < 2 else 0
    written += total(*a) + scale * total(*b) + 1000.0 * layer + seed + step + np.arange(5)


def launch(*args: Any, general: tuple[bool, ...] = (False, False, False, True, False, False)) -> None:
    """As :func:`launching.launch`, of :func:`kernel`."""
    kernel(*addresses(args))
    if (watch := getattr(launching._watch, "by", None)) is not None:
        watch(KERNEL, (7, 3), args, general)


def addresses(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return tuple(map(addresses, x)) if isinstance(x, tuple) else x


def launcher(compiled: Any) -> Launcher:
    def call(*args: Any) -> None:
        assert compiled is KERNEL and args[:6] == (7, 3, 1, 77, "fixed", 2.5)
        kernel(*args[6:])

    return Launcher(call, ("fixed", 2.5), False, {}, lambda *_: [])


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[None]:
    """CPU tensors pass for those of a GPU on which :func:`kernel` runs."""
    with (
        mock.patch.object(prepared, "current_device", lambda: -1),
        mock.patch.object(prepared, "current_stream", lambda index: 77),
        mock.patch.object(Launcher, "of", launcher),
    ):
        yield


class Body:
    """The body of an op, and how often it ran: ``program`` says what it computes and launches."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, seed: torch.Tensor, scale: float, layer: int, *, program: list[int]
    ) -> tuple[torch.Tensor, ...]:
        self.runs += 1
        found = [x, y, CONSTANT[1:]]
        for step in program:
            kind, (a, b) = step % 8, (found[step // k % len(found)] for k in (8, 64))
            if kind < 4:
                out = x.new_zeros(3, 5)[1] if kind == 0 else x.new_empty(9)[2:7]
                if kind == 1:
                    out.fill_(1.5)
                launch(out, *((z, len(z), z.stride(0)) for z in (a, b)), (seed, layer), scale, step)
                found.append(out)
            elif kind == 4:
                found.append(a[len(a) // 2 :])
            elif kind == 5:
                found.append(a.expand(2, len(a)).unbind(0)[1][: len(a) // 2 + 1 : 2])
            else:
                found.append(a.cos() if kind == 6 else torch.cat([a, b])[:9])
        return found[-1], found[len(found) // 2]


def tensors(length: int, stride: int, offset: int, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    x, y = (torch.randn(64, dtype=torch.float64)[offset:][: length * stride : stride] for _ in range(2))
    return [x, y, torch.tensor(seed)]


CALLS = st.lists(st.tuples(st.integers(2, 3), st.integers(1, 2), st.integers(0, 2), st.sampled_from((0.5, 2.0)),
                           st.sampled_from((3, 5, 1 << 33))), min_size=6, max_size=14)  # fmt: skip


@settings(max_examples=25)
@given(program=st.lists(st.integers(0, 1 << 12), min_size=1, max_size=9), calls=CALLS)
def test_every_call_gives_what_its_body_gives(program: list[int], calls: list[tuple[Any, ...]]) -> None:
    body, kinds = Body(), {}
    run = prepared.prepared(body, 4)
    for i, (length, stride, offset, scale, layer) in enumerate(calls):
        x = tensors(length, stride, offset, i)
        before = body.runs
        outs = run(*x, scale, layer, program=program)
        seen = kinds.setdefault((length, stride, offset % 2, scale, layer < 1 << 31), [])
        seen.append(layer)
        # one run, two recordings, and for the second layer one more
        other_layer = len(set(seen[1:-1])) == 1 != len(set(seen[1:]))
        assert body.runs - before == (len(seen) <= 3 or other_layer)
        assert all(map(torch.equal, outs, Body()(*x, scale, layer, program=program)))


def times_run(body: Callable[..., Any], calls: list[tuple[Any, ...]], layer_at: int | None = None) -> int:
    """How often the body ran for such calls, each of which gave what it gives."""
    runs = []

    def counted(*args: Any) -> Any:
        runs.append(args)
        return body(*args)

    run = prepared.prepared(counted, layer_at)
    for args in calls:
        torch.testing.assert_close(run(*args), body(*args), rtol=0, atol=0)
    return len(runs)


def launched(x: torch.Tensor, layer: int = 0, step: int = 4, **options: Any) -> torch.Tensor:
    out = x.new_empty(5)
    launch(out, (x, len(x), 1), (x, len(x), 1), (SEED, layer), 1.0, step, **options)
    return out


SEED = torch.tensor(7)
X = [torch.randn(4, dtype=torch.float64) for _ in range(8)]


def test_a_call_is_code_from_the_fourth_of_its_kind_on() -> None:
    assert times_run(launched, [(x,) for x in X]) == 3
    assert times_run(lambda x: x.cos() + x, [(x,) for x in X]) == 3


def test_where_it_is_turned_off_bodies_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "ENABLED", False)
    assert times_run(launched, [(x,) for x in X]) == len(X)


def test_what_is_read_back_is_never_prepared() -> None:
    for read in (lambda x: x * float(x[0]), lambda x: x[x > 0], lambda x: x[: int(x.argmax()) + 1]):
        assert times_run(read, [(x,) for x in X]) == len(X)


def test_what_changes_from_call_to_call_is_never_prepared() -> None:
    other = itertools.count(4, 8)
    run = prepared.prepared(lambda x: launched(x, step=next(other)))
    results = [run(X[0])[0].item() for _ in range(8)]
    assert np.diff(results) == pytest.approx(8)
    run, other = prepared.prepared(lambda x: x * torch.tensor(float(next(other)), dtype=x.dtype)), itertools.count()
    assert all(torch.equal(run(X[0]), X[0] * i) for i in range(8))


def test_a_layer_that_a_kernel_is_not_general_in_or_that_sizes_follow_from_has_code_of_its_own() -> None:
    calls = [(X[0], layer) for layer in (3, 3, 3, 3, 5, 5, 5, 3, 5)]
    assert times_run(launched, calls, 1) == 4
    special = (False,) * 6
    assert times_run(lambda x, layer: launched(x, layer, general=special), calls, 1) == 6
    assert times_run(lambda x, layer: launched(x[:layer]), [(X[0], n) for n in (2, 3, 4, 2, 3, 4, 2)], 1) == 7


def test_one_tensor_for_two_is_not_recorded_but_may_be_given_to_code() -> None:
    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(5)
        launch(out, (x, 4, 1), (y, 4, 1), (SEED, 0), 2.0, 4)
        return out

    assert (
        times_run(
            both, [(X[0], X[0]), (X[1], X[1]), (X[2], X[2]), (X[0], X[1]), (X[1], X[2]), (X[3], X[3]), (X[4], X[5])]
        )
        == 5
    )
    whole = torch.randn(8, dtype=torch.float64)
    halves = [(whole[:4], whole[4:]), (whole[4:], whole[:4]), (X[0], X[1]), (whole[:4], X[3])]
    assert times_run(both, halves) == 3


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func)
        return func(*args, **(kwargs or {}))

    found: list[Any] = []


def test_who_watches_sees_what_the_body_does() -> None:
    run = prepared.prepared(launched)
    for x in X[:4]:
        run(x)
    with Seen() as seen:
        run(X[3])
    assert seen.found == [torch.ops.aten.new_empty.default]
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[print]), launch_exit_hook=None)
    runs = times_run(launched, [(x,) for x in X])
    with mock.patch.object(launching, "triton", SimpleNamespace(knobs=SimpleNamespace(runtime=hooks))):
        assert launching.is_hooked() and times_run(launched, [(x,) for x in X]) == len(X) > runs
        hooks.launch_enter_hook.calls.clear()
        assert not launching.is_hooked()


def test_forgotten_calls_run_again() -> None:
    body = Body()
    run = prepared.prepared(body, 4)
    for _ in range(5):
        run(*tensors(3, 1, 0, 0), 1.0, 2, program=[2, 3])
    prepared.forget()
    run(*tensors(3, 1, 0, 0), 1.0, 2, program=[2, 3])
    assert body.runs == 4


def test_threads_get_their_own_results() -> None:
    run, wrong = prepared.prepared(launched, 1), []

    def work(i: int) -> None:
        for n in range(40):
            x = torch.full((4,), float(i * 100 + n), dtype=torch.float64)
            if not torch.equal(run(x, i), launched(x, i)):
                wrong.append((i, n))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_calls_of_two_threads_that_overlap_leave_pytorch_in_no_mode() -> None:
    x, began, end = torch.zeros(2), [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def work(i: int) -> None:
        def body() -> torch.Tensor:
            began[i].set()
            assert end[i].wait(60)
            return x + i

        prepared._Kind().learn(0, [x], body)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for i, thread in enumerate(threads):
        thread.start()
        assert began[i].wait(60)
    for i, thread in enumerate(threads):  # the one that began first ends first
        end[i].set()
        thread.join()
    assert not torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals()


LIBRARY = torch.library.Library("express_compile_tests", "FRAGMENT")
LIBRARY.define("total(Tensor x, Tensor y, Tensor? z, float scale, int layer, *, int[] steps, int more=0) -> Tensor")
TOTAL = torch.ops.express_compile_tests.total.default


def total(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor | None, scale: float, layer: int, *, steps: list[int],
    more: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The body of ``TOTAL``."""
    out = x.new_empty(5)
    other = y if z is None else z
    launch(out, (x, len(x), x.stride(0)), (other, len(other), other.stride(0)), (SEED, layer), scale, 8 * steps[0] + 4)
    launch(out, (y, len(y), y.stride(0)), (x, len(x), x.stride(0)), (SEED, layer), scale, 8 * more)
    return out


class Way:
    """``TOTAL`` past the dispatcher, with CPU tensors for those of CUDA; counts how often it went through it, and how
    often the body ran."""

    def __init__(self) -> None:
        self.dispatched = self.runs = 0
        run = prepared.prepared(self._body, 4)
        self.library = torch.library.Library("express_compile_tests", "IMPL")
        self.library.impl("total", run, "CPU")
        self.call = prepared.directly(self._op, run, ops._is_plain, 4)

    def _body(self, *args: Any, **options: Any) -> torch.Tensor:
        self.runs += 1
        return total(*args, **options)

    def _op(self, *args: Any, **options: Any) -> torch.Tensor:
        self.dispatched += 1
        out: torch.Tensor = TOTAL(*args, **options)
        return out

    def passes(self, *args: Any, **options: Any) -> bool:
        """Whether a call passed the dispatcher. It gave what the body gives."""
        before = self.dispatched
        out = self.call(*args, **options)
        assert torch.equal(out, total(*args, **options))
        return self.dispatched == before


@contextlib.contextmanager
def made_way() -> Iterator[Way]:
    keys = torch._C.DispatchKey

    def is_next(raw: int) -> bool:
        below = torch._C.DispatchKeySet.from_raw_repr(raw) & torch._C._after_autograd_keyset
        return below.highestPriorityTypeId() == keys.CPU

    plain = {keys.CPU, keys.AutogradCPU}
    with mock.patch.multiple(ops, _PLAIN=plain, _is_next=is_next):
        way = Way()
        try:
            yield way
        finally:
            way.library._destroy()


def pair(length: int = 3, stride: int = 1, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (torch.randn(64, dtype=torch.float64)[offset:][: length * stride : stride] for _ in range(2))
    return x, y


@settings(max_examples=25)
@given(calls=st.lists(st.tuples(st.integers(2, 3), st.integers(1, 2), st.integers(0, 2), st.booleans(),
                                st.sampled_from((0.5, 2.0)), st.sampled_from((3, 5)), st.sampled_from((1, 2)),
                                st.sampled_from((None, 0, 3))), min_size=1, max_size=9))  # fmt: skip
def test_calls_past_the_dispatcher_give_what_bodies_give(calls: list[tuple[Any, ...]]) -> None:
    with made_way() as way:
        for length, stride, offset, third, scale, layer, step, more in calls * 6:
            (x, y), (z, _) = pair(length, stride, offset), pair()
            way.passes(
                x, y, z if third else None, scale, layer, steps=[step], **({} if more is None else {"more": more})
            )
        if len(set(calls)) == 1:
            assert (way.runs, way.dispatched) == (3, 4)


def test_a_call_passes_the_dispatcher_only_with_what_one_like_it_was_called_with() -> None:
    steps = [1]
    with made_way() as way:
        for n in range(6):
            assert way.passes(*pair(), None, 2.0, 3, steps=steps) is (n > 3)
        assert [way.passes(*pair(), None, 2.0, layer, steps=steps) for layer in (7, 5, 9, 3)] == [
            False,
            True,
            True,
            True,
        ]
        others: list[tuple[Any, ...]] = [
            (*pair(4), None, 2.0, 3), (*pair(3, 2), None, 2.0, 3), (*pair(3, 1, 1), None, 2.0, 3),
            (*pair(), pair()[0], 2.0, 3), (*pair(), None, 3.0, 3), (*pair(), None, 2.0, 1 << 33),
            (pair()[0], torch.nn.Parameter(pair()[1], requires_grad=False), None, 2.0, 3),
        ]  # fmt: skip
        for other in others:
            assert not way.passes(*other, steps=steps), other
            way.passes(*pair(), None, 2.0, 3, steps=steps)
            assert way.passes(*pair(), None, 2.0, 3, steps=steps)
        assert not way.passes(*pair(), None, 2.0, 3, steps=[2])
        way.passes(*pair(), None, 2.0, 3, steps=steps)
        steps[0] = 5
        assert not way.passes(*pair(), None, 2.0, 3, steps=steps)
        x, y = pair()
        assert torch.equal(way.call(x, y, None, scale=2.0, layer=3, steps=[1]), total(x, y, None, 2.0, 3, steps=[1]))


def test_where_the_dispatcher_has_something_to_do_calls_go_there() -> None:
    x, y = pair()

    def known(way: Way) -> bool:
        return [way.passes(x, y, None, 2.0, 3, steps=[1]) for _ in range(7)][-1]

    with made_way() as way:
        assert known(way)
        grad = x.clone().requires_grad_()
        assert not way.passes(grad, y, None, 2.0, 3, steps=[1])
        with torch.no_grad():
            way.passes(grad, y, None, 2.0, 3, steps=[1])
        assert known(way)
        with Seen(), torch.no_grad():
            assert not way.passes(x, y, None, 2.0, 3, steps=[1])
        with torch.autograd.forward_ad.dual_level():
            assert not way.passes(x, y, None, 2.0, 3, steps=[1])
        with torch.profiler.profile() as profile:
            assert not way.passes(x, y, None, 2.0, 3, steps=[1])
        assert "express_compile_tests::total" in {event.name for event in profile.events()}
        with torch.device("cpu"):  # a mode that sees functions
            assert not way.passes(x, y, None, 2.0, 3, steps=[1])
        before, expected = way.dispatched, total(x, y, None, 2.0, 3, steps=[1])
        torch.func.vmap(lambda z: way.call(x, y, None, 2.0, 3, steps=[1]) + z)(torch.zeros(2))
        traced = torch.jit.trace(lambda x: way.call(x, y, None, 2.0, 3, steps=[1]), x, check_trace=False)
        assert "express_compile_tests::total" in str(traced.graph)
        torch.func.functionalize(lambda x: way.call(x, y, None, 2.0, 3, steps=[1]))(x)
        for _ in range(5):
            negative = torch._neg_view(x.neg())  # whose memory has other values
            assert torch.equal(way.call(negative, y, None, 2.0, 3, steps=[1]), expected)
        assert way.dispatched == before + 8
        with torch.inference_mode():
            for _ in range(3):
                passed = way.passes(x, y, None, 2.0, 3, steps=[1])
            assert passed
        assert known(way)
        prepared.forget()
        assert not way.passes(x, y, None, 2.0, 3, steps=[1])


def test_only_plain_tensors_pass_the_dispatcher() -> None:
    x = torch.zeros(3)
    with made_way():
        assert ops._is_plain([x, torch.nn.Parameter(x)])
        with torch.autocast("cpu"), torch.inference_mode():
            assert ops._is_plain([x, torch.zeros(3)])
        assert not ops._is_plain([x, torch._neg_view(x)])
        assert not ops._is_plain([torch._efficientzerotensor(3)])
        with FakeTensorMode():
            assert not ops._is_plain([torch.zeros(3)])
        assert not ops._is_plain([x.to_sparse()])
        found = []
        torch.func.vmap(lambda z: (found.append(ops._is_plain([x, z])), z)[1])(torch.zeros(2, 3))
        torch.func.grad(lambda z: (found.append(ops._is_plain([x])), z.sum())[1])(x)
        assert found == [False, False]
    assert not ops._is_plain([x])


LIVES = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 9)), max_size=12)


@given(lives=LIVES)
def test_memory_that_lives_at_once_does_not_overlap(lives: list[tuple[int, int]]) -> None:
    own = [(size, i, i + length) for i, (size, length) in enumerate(lives)]
    begins, total = prepared.places(own)
    spans = [(range(first, last + 1), a, a + size) for (size, first, last), a in zip(own, begins, strict=True)]
    for (s, a, b), (t, c, d) in itertools.combinations(spans, 2):
        assert not set(s) & set(t) or b <= c or d <= a
    assert all(begin % 512 == 0 for begin in begins) and total == max([b for *_, b in spans], default=0)
    # no more than if nothing shared, and if all do not meet, no more than the largest
    assert total <= sum(-(-size // 512) * 512 for size, *_ in own)
    if all(length == 0 for _, length in lives):
        assert total == max([size for size, _ in lives], default=0)


def most_at_once(lives: list[tuple[int, int, int]]) -> int:
    steps = {step for _, first, last in lives for step in (first, last)}
    return max([sum(-(-n // 512) * 512 for n, first, last in lives if first <= x <= last) for x in steps], default=0)


def allocated(lives: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """The life of the allocation that ``lives`` share."""
    return prepared.places(lives)[1], min(first for _, first, _ in lives), max(last for *_, last in lives)


@given(lives=LIVES, others=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 20), st.integers(0, 9)), max_size=6))
def test_allocations_take_little_more_than_what_lives_at_once(
    lives: list[tuple[int, int]], others: list[tuple[int, int, int]]
) -> None:
    own = [(size, i, i + length) for i, (size, length) in enumerate(lives)]
    beside = [(size, first, first + length) for size, first, length in others]
    parts = prepared.shared(own, beside)
    assert sorted(itertools.chain(*parts)) == list(range(len(own)))
    taken = most_at_once([*(allocated([own[i] for i in part]) for part in parts), *beside])
    assert taken <= 65 / 64 * most_at_once([*own, *beside])
    if lives and not beside and all(length == 0 for _, length in lives):
        assert len(parts) == 1


def test_allocations_of_heads_of_four_kinds_take_no_more_than_what_lives_at_once() -> None:
    """The bytes and steps of tests/gpu/test_prepared.py's "heads". An H200 counted 4,671,352 bytes, where the body took
    4,270,584, as 417,792 bytes of the 26th step shared an allocation that was there from the 13th on, and did not share
    their place with the 400,384 that were gone by then."""
    lives = [
        (22624, 12, 32), (330752, 13, 32), (330752, 14, 32), (2560, 15, 19), (20480, 16, 20), (16384, 17, 21),
        (400384, 22, 24), (417792, 25, 27), (384, 28, 32), (4608, 29, 31),
    ]  # fmt: skip
    results, counters = [(3072000, 0, 33), (96000, 1, 33)], [(632, 23, 24), (664, 26, 27)]
    others = [*results, (768000, 5, 8), (24000, 5, 11), *counters]
    assert most_at_once([*lives, *others]) == 4271616
    (part,) = prepared.shared(lives, others)
    assert part == tuple(range(len(lives)))
    assert most_at_once([allocated(lives), *others]) <= 1.001 * 4271616


@pytest.mark.parametrize("new", [torch.Tensor.new_empty, torch.Tensor.new_zeros])
def test_memory_that_is_gone_makes_room_for_tensors_that_come(new: Callable[..., torch.Tensor]) -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        scratch, kept = new(x, 1000), x.new_empty(500)
        launch(scratch[:5], (x, 4, 1), (x, 4, 1), (SEED, 0), 1.0, 4)
        launch(kept[:5], (scratch, 5, 1), (x, 4, 1), (SEED, 0), 1.0, 4)
        out = x.new_empty(1000)
        launch(out, (kept, 5, 1), (x, 4, 1), (SEED, 0), 1.0, 4)
        return out

    sizes: list[int] = []
    peaks, empty = [0], prepared._empty_strided

    def allocated(*args: Any) -> torch.Tensor:
        out = empty(*args)
        sizes.append(out.nbytes)
        peaks.append(sum(sizes))
        weakref.finalize(out, sizes.remove, out.nbytes)
        return out

    run = prepared.prepared(body)
    with mock.patch.object(prepared, "_empty_strided", allocated):
        for x in X:
            assert torch.equal(run(x)[:5], body(x)[:5])
    assert max(peaks) == 1500 * 8


def compiled_with(launch: Callable[..., Any], signature: dict[int, Any], metadata: Any = None, **scratch: int) -> Any:
    """A compiled kernel as Triton keeps it."""

    class Run:
        launch_cooperative_grid, launch_pdl, gsan_enabled = False, True, False
        arg_annotations, kernel_signature = "annotations", b"signature"
        global_scratch_size, profile_scratch_size = scratch.get("scratch", 0), 0

    Run.__module__ = driver.__name__
    run = Run()
    run.launch = launch  # type: ignore[attr-defined]
    source, about = SimpleNamespace(signature=signature), SimpleNamespace(tensordesc_meta=metadata)
    return SimpleNamespace(run=run, function=99, packed_metadata=(4, 1, 0), src=source, metadata=about)


@pytest.mark.parametrize("version", launching.LAUNCHERS)
def test_the_function_of_a_launcher_gets_what_triton_gives_it(version: str) -> None:
    """The arguments of ``CudaLauncher.__call__`` of each version, without hooks and scratch memory."""
    compiled = compiled_with(print, {0: "*fp32", 1: "i32"})
    if version == "3.6":
        del type(compiled.run).kernel_signature
    with mock.patch.object(launching, "_TRITON", version):
        found = LAUNCHER_OF(compiled)
        assert found is not None and found.call is print and found.metadata == {}
        middle = (99, False, True, None, None, (4, 1, 0), None, None, None)
        if version != "3.6":
            middle = (99, False, True, (4, 1, 0), None, None, None, None, None, "annotations", b"signature")
        assert (found.fixed, found.nested) == (middle, version != "3.6")
        assert LAUNCHER_OF(compiled_with(print, {}, scratch=8)) is None
        with mock.patch.object(type(compiled.run), "__module__", "triton.backends.compiler"):
            assert LAUNCHER_OF(compiled) is None
    for unknown in ("3.5", "3.10", "4.0", ""):
        with mock.patch.object(launching, "_TRITON", unknown):
            assert LAUNCHER_OF(compiled) is None


def test_without_a_known_launcher_bodies_run_as_before() -> None:
    with mock.patch.object(Launcher, "of", lambda compiled: None):
        assert times_run(launched, [(x,) for x in X]) == len(X)


TENSOR = dict(swizzle=3, elem_size=2, elem_type=10, block_size=[1, 1, 64, 128], fp4_padded=False)


@settings(max_examples=20)
@given(L=st.integers(1, 300), D=st.sampled_from((64, 80, 128)), encoded=st.booleans(), at=st.integers(0, 3))
def test_a_descriptor_is_passed_as_triton_passes_it(L: int, D: int, encoded: bool, at: int) -> None:
    """As the Triton that is installed, whatever the address; an address that comes again is not encoded again."""
    memory = torch.zeros(at * 16 + 2 * L * D, dtype=torch.bfloat16)
    x = memory[at * 16 :].view(1, 2, L, D)
    descriptor = TensorDescriptor(x, [1, 2, L, D], [2 * L * D, L * D, D, 1], [1, 1, 64, 128])
    signature, given = {0: "*fp32", 1: "tensordesc<bf16[1, 1, 64, 128]>", 2: "i32"}, [TENSOR] if encoded else []
    passed: list[Any] = []
    wrapped = driver.wrap_handle_tensordesc(lambda *args: passed.append(args[13:]), signature, given)
    encoding = mock.Mock(side_effect=lambda *args: ("map", repr(args)))
    utils = SimpleNamespace(fill_tma_descriptor_tiled=encoding, fill_tma_descriptor=encoding)
    with mock.patch.object(active, "_active", SimpleNamespace(utils=utils)):
        found = LAUNCHER_OF(compiled_with(wrapped, signature, given))
        assert found is not None
        wrapped(*range(13), *([(x, descriptor, 5)] if found.nested else (x, descriptor, 5)))
        like = copy.copy(descriptor)
        like.base = None
        encode, behind = found.encoder(1, like)
        for _ in range(3):
            first = encode(x.data_ptr()) if encode else x.data_ptr()
        assert encoding.call_count == 2 * encoded
    (passed,) = passed
    passed = passed[0] if found.nested else passed
    expected = [y.data_ptr() if isinstance(y, torch.Tensor) else y for y in passed]
    assert [x.data_ptr(), first, *behind, 5] == expected


def test_only_a_call_that_goes_to_cuda_next_leaves_out_the_dispatcher() -> None:
    keys = torch._C.DispatchKey
    plain = torch._C.DispatchKeySet(keys.CUDA) | torch._C.DispatchKeySet(keys.AutogradCUDA)
    assert ops._is_next(plain.raw_repr())
    for key in (keys.Python, keys.Functionalize):
        assert not ops._is_next((plain | torch._C.DispatchKeySet(key)).raw_repr())
    cpu = torch._C.DispatchKeySet(keys.CPU) | torch._C.DispatchKeySet(keys.AutogradCPU)
    assert not ops._is_next(cpu.raw_repr())


def test_a_build_with_cuda_runs_where_there_is_no_driver() -> None:
    """There PyTorch raises if it is asked for the device, before and behind the import of this package."""
    program = """
import torch
def fails():
    raise RuntimeError("Found no NVIDIA driver on your system")
torch._C._cuda_getDevice = fails
from express_compile import METHODS, Rows
from express_compile.core.rows import to_numbers
from express_compile.kernels import exact
x = torch.randn(1, 2, 40, 8)
step = exact.OP(x[:, :, -1:], x, x, None, 0.3)
options = dict(rows=to_numbers([Rows(2, 9)]), halving="balanced", inflation=-1, flatten=0.0, block=16, min_length=0)
out, _ = METHODS["heads"].op(x, x, x, None, torch.tensor(0), 0.3, 1, **options)
assert step.shape == (1, 2, 1, 8) and out.shape == x.shape
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
