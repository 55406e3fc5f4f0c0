"""Rewriting of modules that run eagerly, by capturing their graphs: ``torch.compile`` without a compiler.

Every module that holds attention in its own code gets a :class:`Capture` as its ``forward``. The outermost one that is
called has Dynamo capture the whole call; its graphs are matched, planned and rewritten as by
``torch.compile(backend="express")`` and then run as they are, so nothing is compiled. Inner ones count only where a
part is called by itself, as ``generate()`` calls the encoder of T5. What Dynamo does not capture runs as it was, and
is reported and warned about.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from types import CodeType, FrameType, FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from ..core.call import Op, wrap_ops
from ..core.plan import Plan
from ..core.policy import Policy, Unmet
from ..core.sites import NOT_CAPTURED, SiteReport, recording
from ..passes.pipeline import plan_graph
from ..passes.place import Place, named_modules
from ..passes.site import AttentionSite
from ..planning.choose import require_matches
from .dynamo import Compiled, Failure, cannot_capture, close_when_idle, is_converting
from .module_code import writes_attention
from .program import is_inside, trace_rewritten
from .replayed import Replayed, why_not
from .tracers import cannot_trace, is_exporting, refuse_strict_export, refuse_tracers, untraced
from .watched import GraphSite, Watch

_CAPTURE = "_express_compile_capture"

_CHANGED = "the buffer that holds its mask, or its padding of 0 and 1, changed after it was looked at"
_NOT_CAPTURED = "Dynamo captured no graph of this call, so it ran as it was: "
_CAUSES = (
    "compilation is disabled (TORCHDYNAMO_DISABLE, torch.compiler.set_stance), the code cannot be captured, or it was "
    "captured too often (torch._dynamo.config.recompile_limit; torch.compiler.reset() starts anew)"
)


class _Progress:
    """The outermost call in progress. graphs: how many captured graphs have run in it; paths: of their sites."""

    def __init__(self) -> None:
        self.graphs = 0
        self.paths: set[str] = set()


_in_progress: ContextVar[_Progress | None] = ContextVar("express_compile_call", default=None)
_running: ContextVar[Capture] = ContextVar("express_compile_capture")


# --------------------------------------------------------------------------------------------- public functions


def find_modules(model: nn.Module, sites: Iterable[nn.Module] = ()) -> dict[str, nn.Module]:
    """Path -> module, for all with a ``forward`` that hold attention in their own code or that of a module inside.

    sites: modules that are rewritten in another way; what holds one of them is left out.
    """
    others = set(sites)
    found: dict[str, nn.Module] = {}
    holders = {module for module in model.modules() if writes_attention(module)}
    for path, module in named_modules(model):
        inside = set(module.modules())
        is_called = type(module).forward is not nn.Module.forward
        if is_called and inside & holders and not inside & others:
            found[path] = module
    return found


def install(model: nn.Module, modules: dict[str, nn.Module], policy: Policy, others: Iterable[str] = ()) -> None:
    """Let ``modules`` of ``model`` run with rewritten attention; random numbers are keyed by paths in ``model``.

    others: paths of its sites that are rewritten in another way.
    """
    for path, module in modules.items():
        release(module)
        module.__dict__[_CAPTURE] = Capture(module, path, policy, weakref.ref(model), frozenset(others))


def remove(model: nn.Module) -> None:
    """Undo :func:`install` in ``model``; raises ``ValueError`` for a part of a larger model that stays rewritten."""
    inside = set(model.modules())
    for module in inside & set(installed(model)):
        root = module.__dict__[_CAPTURE].root
        root = None if root is None else root()
        if root is not None and root not in inside and any(map(is_captured, root.modules())):
            raise ValueError(
                f"model={type(model).__name__}: is a part of a rewritten {type(root).__name__}, whose graphs hold its "
                "attention, too; restore or rewrite the whole model"
            )
    for module in inside:
        release(module)


def installed(model: nn.Module) -> list[nn.Module]:
    """The modules in ``model`` that :func:`install` changed, whether their calls are still captured or not."""
    return [module for module in model.modules() if _CAPTURE in module.__dict__]


def is_captured(module: nn.Module) -> bool:
    """Whether a call of this module is captured; not so for a shallow copy, or if it was given another ``forward``."""
    capture = module.__dict__.get(_CAPTURE)
    return capture is not None and capture.module is module and _reaches(module.__dict__.get("forward"), capture)


def _reaches(function: object, capture: Capture) -> bool:
    """Whether a function is ``capture`` or wraps it, as accelerate wraps what it moves between devices."""
    pending: list[object] = [function]
    seen: set[int] = set()
    while pending and len(seen) < 64:
        function = pending.pop()
        if function is capture:
            return True
        if function is None or id(function) in seen or not callable(function):
            continue
        seen.add(id(function))
        pending.append(getattr(function, "__wrapped__", None))
        if isinstance(function, functools.partial):
            pending += [function.func, *function.args, *function.keywords.values()]
        for cell in getattr(function, "__closure__", None) or ():
            pending.append(cell.cell_contents)
    return False


def release(module: nn.Module) -> None:
    """Undo what :func:`install` did to a module, or what a shallow copy of one has of it."""
    capture: Capture | None = module.__dict__.pop(_CAPTURE, None)
    if capture is None:
        return
    forward: object = module.__dict__.get("forward")
    if forward is capture:
        del module.__dict__["forward"]
        if capture.given is not None:
            module.__dict__["forward"] = capture.given
    if capture.module is module:
        capture.close()


def captures_of(model: nn.Module) -> dict[str, Capture]:
    """Module path -> what its calls run, for each module of ``model`` that is captured."""
    return {path: module.__dict__[_CAPTURE] for path, module in named_modules(model) if is_captured(module)}


# ------------------------------------------------------------------------------------------------- the capture


class Capture:
    """What a rewritten ``module`` has for ``forward``. Copies and pickles of the module get their own.

    path: of the module, in the model that was rewritten, which is ``root`` while it exists.
    others: paths of sites of that model that are rewritten in another way.
    given: a ``forward`` that the module, and not its class, had before.
    seen: paths of the sites in graphs that have run, in calls of ``module`` and of what is inside.
    watch: what has the errors of its sites sampled, in a model where this one is at ``prefix``; stays behind in a copy.
    """

    __name__ = "forward"

    def __init__(
        self,
        module: nn.Module,
        path: str,
        policy: Policy,
        root: Callable[[], nn.Module | None] | None = None,
        others: frozenset[str] = frozenset(),
    ) -> None:
        self.module, self.path, self.policy, self.root, self.others = module, path, policy, root, others
        self.given: Callable[..., Any] | None = module.__dict__.get("forward")
        self._start()
        module.__dict__["forward"] = self

    def _start(self) -> None:
        self.watch: Watch | None = None
        self.prefix = ""
        self._warned = False
        self._not_replayed: set[str] = set()
        self.seen: set[str] = set()
        # Dynamo counts recompilations by code object, and keeps what it knows of one for ever
        call = (
            _spare.pop()
            if _spare
            else FunctionType(_captured_call_impl.__code__.replace(), _captured_call_impl.__globals__)
        )
        # Dynamo keeps these where garbage collection does not look
        part, strict = weakref.ref(self), self.policy.strict

        def before() -> None:
            if (capture := part()) is not None:
                capture._part()

        self._compiled = Compiled(
            call,
            _backend,
            raises=lambda error: strict and isinstance(error, ValueError),
            before=before,
        )
        self.close = weakref.finalize(self, _close, self._compiled, call)
        self.close.atexit = False

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """For ``inspect.signature``."""
        return MethodType(type(self.module).forward, self.module) if self.given is None else self.given

    @property
    def __code__(self) -> CodeType:
        """For torch.export, which reads it before it calls the module."""
        return self.__wrapped__.__code__

    @property  # type: ignore[misc]
    def __class__(self) -> type[Capture]:
        """torch.fx asks this of all that a module holds, and then traces the method of the module's class."""
        frame = sys._getframe(1)
        if frame.f_code.co_name == "collect_tensor_attrs" and frame.f_locals.get("prefix_atoms") == []:
            raise RuntimeError(cannot_trace(type(self.module).__name__, "torch.fx"))
        return Capture

    @property
    def _torchscript_modifier(self) -> None:
        """The first that torch.jit asks of what it compiles."""
        raise RuntimeError(cannot_trace(type(self.module).__name__, "torch.jit"))

    def __getstate__(self) -> dict[str, Any]:
        kept = {"module": self.module, "path": self.path, "policy": self.policy, "given": self.given}
        return {**kept, "root": None, "others": self.others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_exporting() and not torch.compiler.is_dynamo_compiling():
            return self._export(args, kwargs)
        if torch.compiler.is_compiling():
            ours = _is_ours(type(self.module).__name__)
            return _captured_call_impl(self.module, *args, **kwargs) if ours else self._run(args, kwargs)
        caller = _module_of(sys._getframe(1))
        if caller is not None and caller is not self.module:
            return self._run_copy(caller, args, kwargs)
        return self._run(args, kwargs)

    @untraced
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.module.__dict__.get(_CAPTURE) is not self:  # restored, and called by who kept it
            return self.__wrapped__(*args, **kwargs)
        refuse_tracers(self.module)
        call = _in_progress.get() or _Progress()
        before = call.graphs
        token, inner = _in_progress.set(call), _running.set(self)
        why = cannot_capture()
        try:
            run = self._compiled if why is None else self._run_exactly
            result, failures = run(self.module, *args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if self.policy.strict and isinstance(error.inner_exception, ValueError):
                raise error.inner_exception from None
            raise
        finally:
            _in_progress.reset(token)
            _running.reset(inner)
        if call.graphs == before:
            call.graphs += 1  # it is said once
            self._say(
                _NOT_CAPTURED + (why or "; ".join([_CAUSES, *(f"{_place(f.code)}: {f.reason}" for f in failures[-1:])]))
            )
        elif lost := {_place(f.code): f.reason for f in failures if f.attention}:
            for place, reason in lost.items():
                self._say(f"Dynamo did not capture {place}, so it ran as it was: {reason}", place.rpartition(" ")[2])
        elif self.policy.strict and _in_progress.get() is None:
            self._require_sites(call.paths)
        return result

    @untraced
    def _export(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call as a part of a program that torch.export makes."""
        if is_inside():
            return _captured_call_impl(self.module, *args, **kwargs)
        result, reports = trace_rewritten(self.module, self.path, self.policy, _captured_call_impl, args, kwargs)
        if (sites := recording()) is not None:
            sites.extend(reports)
        if not reports:
            self._say("no attention was found in what torch.export traced of it")
        if self.policy.strict:
            self._require_sites({report.module for report in reports})
        return result

    def _require_sites(self, paths: set[str]) -> None:
        """Judge by the paths of the sites in all graphs of a call: it has some. The call of a whole model shows whether
        names in the policy have none."""
        if not paths:
            raise Unmet(f"strict=True: no attention was found in the graphs of {type(self.module).__name__}")
        root = None if self.root is None else self.root()
        whole = self if root is None or not is_captured(root) else root.__dict__[_CAPTURE]
        whole.seen |= paths
        if self.module is root:
            require_matches(self.seen | self.others, self.policy)

    def _run_exactly(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, list[Failure]]:
        return _captured_call_impl(module, *args, **kwargs), []

    def _run_copy(self, copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a shallow copy of the module, which still has this one for ``forward``."""
        release(copy)
        if getattr(copy, "_is_replica", False):
            self._say("nn.DataParallel copies modules for every call; DistributedDataParallel does not")
        return copy.forward(*args, **kwargs)

    def _part(self) -> None:
        """Nothing that is captured with this module may run the ``forward`` of another that it was copied from."""
        for module in self.module.modules():
            if _CAPTURE in module.__dict__ and module.__dict__[_CAPTURE].module is not module:
                release(module)

    def _say(self, reason: str, source: str = "") -> None:
        if self.policy.strict:
            raise ValueError(f"strict=True: {self.path or '(root)'}: {reason}")
        if (sites := recording()) is not None:
            sites.append(SiteReport(self.path, source, NOT_CAPTURED, "", "exact", "refused", reason))
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self.path or type(self.module).__name__}: {reason}", RuntimeWarning, stacklevel=7)

    def _rewrite(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """A callable that runs the rewritten graph."""
        graphs, place = self.policy.cuda_graphs, Place.of_graph(self.module, self.path)
        why = why_not(gm, inputs, self.module.training) if graphs else None
        planned = plan_graph(gm, inputs, self.policy, place, graphs and why is None)
        planned.pin(told=True)

        def finish(gm: GraphModule) -> Callable[..., Any]:
            replayed = self._replayed(gm, inputs, why) if graphs else None  # first: what runs as it is calls Python
            return _recorded(gm, planned.reports(), self._watch(gm, planned.sites), replayed)

        def before(gm: GraphModule) -> Callable[..., Any]:
            return _recorded(gm, planned.reports(otherwise=Plan("exact", "refused", _CHANGED)))

        return planned.rewritten(finish, before)

    def _replayed(self, gm: GraphModule, inputs: list[Any], why: str | None) -> Replayed:
        """What runs a rewritten graph as CUDA graphs. It holds no module, as Dynamo keeps it."""
        owner = weakref.ref(self)

        def is_watched() -> bool:
            capture = owner()
            return capture is None or capture.watch is not None

        def say(why: str) -> None:
            if (capture := owner()) is not None and why not in capture._not_replayed:
                capture._not_replayed.add(why)
                name = capture.path or type(capture.module).__name__
                words = f"{name}: cuda_graphs=True, but calls run without CUDA graphs: {why}"
                warnings.warn(words, RuntimeWarning, stacklevel=2)

        return Replayed(gm, inputs, why, lambda *args: gm.forward(*args), is_watched, say)

    def _watch(self, gm: GraphModule, sites: Iterable[tuple[AttentionSite, Plan]]) -> dict[int, GraphSite]:
        """Let the ops of a graph be sampled while the model is watched; gives how each site is, by layer key."""
        owner, inside = weakref.ref(self), dict(named_modules(self.module, self.path))
        of = {site.layer: (site, plan) for site, plan in sites}
        found: dict[int, GraphSite] = {}

        def wrap(op: Op, layer: int) -> Callable[..., Any]:
            site, plan = of[layer]
            found[layer] = GraphSite(owner, weakref.ref(inside.get(site.module, self.module)), site, plan)
            return found[layer].of_op(op)

        wrap_ops(gm, wrap)
        return found


def _captured_call_impl(self: Any, *args: Any, **kwargs: Any) -> Any:
    given = self._express_compile_capture.given
    result = type(self).forward(self, *args, **kwargs) if given is None else given(*args, **kwargs)
    return (self, result)[1]  # place.py looks who is called, so the frame has to keep it


def _backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """One for all modules, so that graphs without sites serve all that share their code."""
    return _running.get()._rewrite(gm, inputs)


_spare: list[FunctionType] = []


def _close(compiled: Compiled, call: FunctionType) -> None:
    def close() -> None:
        compiled.close()
        _spare.append(call)

    close_when_idle(close)


@torch.compiler.assume_constant_result
def _is_ours(name: str) -> bool:
    refuse_strict_export(name)
    return is_converting()


# Where Dynamo traces a call it is inlined. Where Python makes the call, after a graph break, Dynamo must not start a
# graph with it: the part that is called would be taken for the whole.
skip_code(Capture.__call__.__code__)

_CALL_IMPL = nn.Module._call_impl.__code__
_CALLERS = {id(_CALL_IMPL), id(nn.Module._slow_forward.__code__)}
_CALLERS |= {id(code) for code in _CALL_IMPL.co_consts if isinstance(code, CodeType)}


def _module_of(frame: FrameType) -> nn.Module | None:
    """The module whose call is about to call its ``forward``; None where something else calls it."""
    return frame.f_locals.get("self") if id(frame.f_code) in _CALLERS else None


skip_code(_module_of.__code__)


def _place(code: CodeType) -> str:
    return f"{code.co_name} {code.co_filename}:{code.co_firstlineno}"


def _recorded(
    gm: GraphModule,
    reports: Sequence[SiteReport],
    follows: Mapping[int, GraphSite] = MappingProxyType({}),
    replayed: Replayed | None = None,
) -> Callable[..., Any]:
    _run_checkpoints(gm)
    forward: Callable[..., Any] = replayed or gm.forward
    names = [(report, follows.get(report.layer)) for report in reports]

    def run(*args: Any) -> Any:
        if (call := _in_progress.get()) is not None:
            call.graphs += 1
            call.paths.update(report.module for report in reports)
        result = forward(*args)  # in which a site that is watched may fall back
        if (sites := recording()) is not None:
            sites.extend(report if follow is None else follow.now(report) for report, follow in names)
        return result

    return run


def _run_checkpoints(gm: GraphModule) -> None:
    """Activation checkpoints of a graph are marks for a compiler; make them what they are in eager code."""
    marker = torch.ops.higher_order.tag_activation_checkpoint
    for part in [part for part in gm.modules() if isinstance(part, GraphModule)]:
        marks = part.graph.find_nodes(op="call_function", target=marker)
        for node in marks:
            node.target = _checkpoint
        if marks:
            part.recompile()


def _checkpoint(body: GraphModule, *args: Any, **kwargs: Any) -> Any:
    context = body.meta.get("_checkpoint_context_fn")
    kwargs = kwargs if context is None else {**kwargs, "context_fn": context}
    return checkpoint(body.forward, *args, **{**kwargs, "use_reentrant": False})
