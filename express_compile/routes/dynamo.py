"""Dynamo with a backend of ours: what it cannot convert runs as it is, and nothing of ours stays in its caches."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch._C._dynamo.eval_frame import (
    _debug_get_cache_entry_list,
    _FrameAction,
    _FrameExecStrategy,
    reset_code,
)
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.guards import CheckFunctionManager, DeletedGuardManagerWrapper
from torch._dynamo.types import ConvertFrameReturn
from torch.nn.modules import module as nn_module

from .module_code import code_writes_attention, is_module, writes_attention

_WITH_ALL_IT_CALLS = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
_TRIES = 3
_GAVE_UP = "Dynamo gave it up (TORCH_LOGS=graph_breaks shows why)"


class Failure(NamedTuple):
    """A frame that ran as it was. code: of which function; attention: whether it seems to hold some."""

    code: CodeType
    reason: str
    attention: bool
    strategy: _FrameExecStrategy = _WITH_ALL_IT_CALLS


_converting: ContextVar[bool] = ContextVar("express_compile_converting", default=False)
_failures: ContextVar[list[Failure] | None] = ContextVar("express_compile_failures", default=None)


def is_converting() -> bool:
    """Whether Dynamo traces in this thread for one of us, and not for somebody else's ``torch.compile``."""
    return _converting.get()


def cannot_capture() -> str | None:
    """Why Dynamo would capture nothing at this moment; it must not be asked, for then it never tries again."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "it was called inside a transform of torch.func (vmap, grad, jvp, ...)"
    if torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals():
        return "it was called inside a TorchDispatchMode"
    return None


class Compiled:
    """``torch.compile(function, backend=backend)`` for a program that has to go on whatever Dynamo says.

    A frame that Dynamo gives up runs as it is, and what it calls is tried by itself. So does one at which it raises,
    but with all that it calls: nothing of it has run by then, so nothing runs twice. Hooks of modules are guarded,
    and what looks at the tensors that are saved for backward (``torch.utils.checkpoint``) does not see those of the
    tracing.

    raises: for which errors of ``backend`` a call raises ``BackendCompilerFailed``.
    before: is called before a frame is converted.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        backend: Callable[..., Any],
        raises: Callable[[Exception], bool] = lambda error: False,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._backend, self._raises, self._before = backend, raises, before
        self._codes: dict[int, CodeType] = {}
        self._failed: dict[int, tuple[int, Failure | None]] = {}
        self._managers: dict[int, CheckFunctionManager] = {}
        self._hooks: tuple[int, ...] = ()
        self._root = getattr(function, "__code__", None)
        context: Any = torch._dynamo.optimize(backend)
        if (convert := getattr(context, "callback", None)) is not None:  # not where TORCHDYNAMO_DISABLE is set
            self._convert = convert
            context.callback = _Callback(self, convert._torchdynamo_orig_backend)
        self._run = context(function)
        _close_waiting()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Failure]]:
        """The result, and what ran as it was on the way."""
        if (hooks := _global_hooks()) != self._hooks:  # Dynamo guards those of a module only
            self.close()
            self._hooks = hooks
        failures: list[Failure] = []
        token = _failures.set(failures)
        _close_waiting()
        try:
            result = self._run(*args, **kwargs)
        finally:
            _failures.reset(token)
            _close_waiting()
        for failure in {id(failure.code): failure for failure in failures}.values():  # it failed in Dynamo only
            tries, _ = self._failed.get(id(failure.code), (0, None))
            self._failed[id(failure.code)] = tries + 1, failure
        return result, failures

    def convert(self, frame: Any, *state: Any) -> ConvertFrameReturn:
        """What Dynamo calls for every frame that it has no code for, or none whose guards hold."""
        code = frame.f_code
        tries, failure = self._failed.get(id(code), (0, None))
        if tries < _TRIES:
            try:
                with convert_frame.compile_lock, _conversion():
                    self._before()
                    result = self._convert(frame, *state)
                if result.guarded_code is not None:
                    self._codes[id(code)] = code
                    guards = result.guarded_code.guard_manager
                    self._managers |= {id(m): m for _, m in _finalizers() if m.guard_manager is guards}
            except Exception as error:
                if isinstance(error, BackendCompilerFailed) and self._raises(error.inner_exception):
                    raise
                failure = Failure(code, _first_line(error), _has_attention(frame, whole=True))
            else:
                if result.guarded_code is not None or not (code is self._root or _has_attention(frame)):
                    return result
                failure = Failure(code, _GAVE_UP, code is not self._root, result.frame_exec_strategy)
        assert failure is not None, "it was tried, or has failed before"
        if (failures := _failures.get()) is not None:
            failures.append(failure)
        # so the next call of this code comes by here
        return ConvertFrameReturn(frame_exec_strategy=failure.strategy, apply_to_code=False)

    def close(self) -> None:
        """Free what Dynamo keeps of this one, and nothing else."""
        eval_frame.cached_backends.pop(id(self._backend), None)
        with convert_frame.compile_lock:
            guards = [manager.guard_manager for manager in self._managers.values()]
            for code in self._codes.values():
                _forget(code, guards)
            for finalizer, manager in _finalizers():
                if id(manager) in self._managers:
                    finalizer.detach()
            if self._root is not None:
                reset_code(self._root)  # it may be told to be skipped
            self._codes.clear()
            self._managers.clear()
            self._failed.clear()


_waiting: list[Callable[[], None]] = []


def close_when_idle(close: Callable[[], None]) -> None:
    """Call ``close``, which frees what Dynamo keeps, as soon as Dynamo cannot be looking at it, in no thread.

    For finalizers: garbage is collected inside of Dynamo, too, and to free what it walks through ends the process.
    """
    _waiting.append(close)
    _close_waiting()


def _close_waiting() -> None:
    while _waiting and not any(map(_may_look, sys._current_frames().values())):
        try:
            close = _waiting.pop()
        except IndexError:  # another thread took the last one
            return
        close()


def _may_look(frame: FrameType | None) -> bool:
    """Whether Dynamo may be looking at what it keeps: it converts a frame, or looks for code for the next one, as it
    does in all that it compiles but for what is called with it disabled."""
    looks: bool | None = None
    while frame is not None:
        code = frame.f_code
        if code.co_filename == convert_frame.__file__:
            return True
        if looks is None and code.co_filename == eval_frame.__file__:
            looks = "DisableContext" not in code.co_qualname
        frame = frame.f_back
    return bool(looks)


class _Callback:
    """What Dynamo takes for the callback of a ``torch.compile``. _torchdynamo_orig_backend: by it Dynamo finds the
    backend, whose code no other backend may run."""

    def __init__(self, compiled: Compiled, convert: Any) -> None:
        self._compiled, self._torchdynamo_orig_backend = compiled, convert

    def __call__(self, frame: Any, *state: Any) -> ConvertFrameReturn:
        return self._compiled.convert(frame, *state)


# Inside DDP, Dynamo would cut graphs into buckets; run eagerly, communication overlaps without that.
_SETTINGS = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, optimize_ddp=False)


@contextmanager
def _conversion() -> Iterator[None]:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # writes a traceback of what is said in a line
    token, disabled = _converting.set(True), log.disabled
    log.disabled = True
    try:
        with _SETTINGS, _unseen():
            yield
    finally:
        log.disabled = disabled
        _converting.reset(token)


def _global_hooks() -> tuple[int, ...]:
    kinds = (
        nn_module._global_forward_pre_hooks,
        nn_module._global_forward_hooks,
        nn_module._global_backward_pre_hooks,
        nn_module._global_backward_hooks,
    )
    return tuple(key for hooks in kinds for key in hooks)


@contextmanager
def _unseen() -> Iterator[None]:
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


def _has_attention(frame: Any, whole: bool = False) -> bool:
    """Whether the code of a frame holds attention, or if ``whole`` that of the module whose method it is."""
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
    return code_writes_attention(code, owner) or (whole and is_module(owner) and writes_attention(owner))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _forget(code: CodeType, guards: list[Any]) -> None:
    """Free what Dynamo made of ``code`` under these guards."""
    entries = [entry for entry in _debug_get_cache_entry_list(code) if not _is_deleted(entry)]
    ours = [entry for entry in entries if any(entry.guard_manager is guard for guard in guards)]
    if len(ours) == len(entries):
        reset_code(code)
        return
    for entry in ours:
        state: Any = entry.guard_manager.extra_state
        state.invalidate(entry, DeletedGuardManagerWrapper("its attention was restored"))


def _is_deleted(entry: Any) -> bool:
    return isinstance(entry.guard_manager, DeletedGuardManagerWrapper)


def _finalizers() -> Iterator[tuple[weakref.finalize, CheckFunctionManager]]:
    """What deletes guards together with an object that they look at, which may live as long as Python does."""
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        if (alive := finalizer.peek()) is not None:
            manager = getattr(getattr(alive[1], "func", None), "__self__", None)
            if isinstance(manager, CheckFunctionManager):
                yield finalizer, manager
