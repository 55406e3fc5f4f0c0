"""Rewriting of modules that run eagerly, by capturing their graphs: ``torch.compile`` without a compiler.

Every module that holds attention in its own code gets a :class:`Capture` as what ``nn.Module.compile`` would set. The
outermost one that is called has Dynamo capture the whole call; its graphs are matched, planned and rewritten as by
``torch.compile(backend="express")`` and then run as they are, so nothing is compiled. Inner ones count only where a
part is called by itself, as ``generate()`` calls the encoder of T5. What Dynamo does not capture runs as it was, and
is reported and warned about.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from .attention_mask import untraced
from .calls import Op, call, exact_options, wrap_ops
from .method import METHODS
from .module_code import writes_attention
from .report import SiteReport, recorder
from .spec import Plan, Policy, Unmet, known_equal

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from .passes.site import AttentionSite
    from .shadow import Shadow, Watch

_CAPTURE = "_express_compile_capture"

_CHANGED = "the buffer that holds its mask changed after it was looked at"
_NOT_CAPTURED = (
    "Dynamo captured no graph of this call, so it ran as it was: compilation is disabled (TORCHDYNAMO_DISABLE, "
    "torch.compiler.set_stance), the code cannot be captured, or it was captured too often "
    "(torch._dynamo.config.recompile_limit; torch.compiler.reset() starts anew)"
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
    for path, module in model.named_modules():
        inside = set(module.modules())
        is_called = type(module).forward is not nn.Module.forward
        if is_called and inside & holders and not inside & others:
            found[path] = module
    return found


def install(model: nn.Module, modules: dict[str, nn.Module], policy: Policy) -> None:
    """Let ``modules`` of ``model`` run with rewritten attention; random numbers are keyed by paths in ``model``."""
    for path, module in modules.items():
        module.__dict__[_CAPTURE] = Capture(module, path, policy, weakref.ref(model))


def remove(model: nn.Module) -> None:
    """Undo :func:`install` in ``model``; raises ``ValueError`` for a part of a larger model that stays rewritten."""
    inside = set(model.modules())
    captures = [module.__dict__[_CAPTURE] for module in inside if _CAPTURE in module.__dict__]
    for capture in captures:
        root = None if capture.root is None else capture.root()
        if root is not None and root not in inside and any(map(is_captured, root.modules())):
            raise ValueError(
                f"model={type(model).__name__}: is a part of a rewritten {type(root).__name__}, whose graphs hold its "
                "attention, too; restore or rewrite the whole model"
            )
    for capture in captures:
        capture.uninstall()


def is_captured(module: nn.Module) -> bool:
    """Whether a call of this module is captured; not so for a shallow copy, or if ``module.compile()`` came later."""
    capture = module.__dict__.get(_CAPTURE)
    return capture is not None and capture.module is module and module._compiled_call_impl is capture


def policy_of(module: nn.Module) -> Policy:
    """The policy of a module that is captured."""
    return module.__dict__[_CAPTURE].policy


def captures_of(model: nn.Module) -> dict[str, Capture]:
    """Module path -> what its calls run, for each module of ``model`` that is captured."""
    return {path: module.__dict__[_CAPTURE] for path, module in model.named_modules() if is_captured(module)}


# ------------------------------------------------------------------------------------------------- the capture


class Capture:
    """What a call of ``module`` runs instead of ``module._call_impl``. Copies and pickles of the module get their own.

    path: of the module, in the model that was rewritten, which is ``root`` while it exists.
    seen: paths of the sites in graphs that have run, in calls of ``module`` and of what is inside.
    watch: what has the errors of its sites sampled, in a model where this one is at ``prefix``; stays behind in a copy.
    """

    def __init__(
        self, module: nn.Module, path: str, policy: Policy, root: Callable[[], nn.Module | None] | None
    ) -> None:
        self.module, self.path, self.policy, self.root = module, path, policy, root
        self._hook = module.register_forward_pre_hook(_check_tracing).id if _may_have_hooks(module) else None
        self._install()

    def _install(self) -> None:
        self.watch: Watch | None = None
        self.prefix = ""
        self._warned = False
        self.seen: set[str] = set()
        call = FunctionType(_call.__code__.replace(), _call.__globals__)  # Dynamo counts recompilations by code object
        self._captured = torch.compile(call, backend=_backend)
        self.module.__dict__["_compiled_call_impl"] = self

    def uninstall(self) -> None:
        """Make the module what it was."""
        if is_captured(self.module):
            del self.module.__dict__["_compiled_call_impl"]
        self.module.__dict__.pop(_CAPTURE, None)
        self.module._forward_pre_hooks.pop(self._hook, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "path": self.path, "policy": self.policy, "root": None, "_hook": self._hook}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._install()  # nn.Module leaves out what it runs instead of forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _is_ours():
            return self.module._call_impl(*args, **kwargs)
        return self._run(args, kwargs)

    @untraced
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_exporting():
            raise RuntimeError(_cannot_export(self.module))
        call = _in_progress.get() or _Progress()
        before = call.graphs
        token, inner = _in_progress.set(call), _running.set(self)
        try:
            with _whole_graphs():
                result = self._captured(self.module, *args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, ValueError):
                raise error.inner_exception from None
            raise
        finally:
            _in_progress.reset(token)
            _running.reset(inner)
        if call.graphs == before:
            call.graphs += 1  # it is said once
            self._say_not_captured()
        elif self.policy.strict and _in_progress.get() is None:
            self._require_sites(call.paths)
        return result

    def _require_sites(self, paths: set[str]) -> None:
        """Judge by the paths of the sites in all graphs of a call: it has some. The call of a whole model shows whether
        names in the policy have none."""
        from .eager import rewritten_sites
        from .passes.plan import require_matches

        if not paths:
            raise Unmet(f"strict=True: no attention was found in the graphs of {type(self.module).__name__}")
        root = None if self.root is None else self.root()
        whole = self if root is None or not is_captured(root) else root.__dict__[_CAPTURE]
        whole.seen |= paths
        if self.module is root:
            require_matches(self.seen | rewritten_sites(root).keys(), self.policy)

    def _say_not_captured(self) -> None:
        if self.policy.strict:
            raise ValueError(f"strict=True: {self.path or '(root)'}: {_NOT_CAPTURED}")
        if (sites := recorder.get()) is not None:
            sites.append(SiteReport(self.path, "", "not captured", "", "exact", "refused", _NOT_CAPTURED))
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self.path or type(self.module).__name__}: {_NOT_CAPTURED}", RuntimeWarning, stacklevel=6)

    def _rewrite(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """A callable that runs the rewritten graph."""
        from .backend import rewrite_planned
        from .passes.buffers import Buffers
        from .passes.match import find_sites
        from .passes.place import Place
        from .passes.plan import plan_sites

        place = Place.of_graph(self.module, self.path)
        buffers = Buffers(gm, inputs)
        planned = plan_sites(find_sites(gm, buffers, place), self.policy)
        if planned:
            place.pin()
        unchanged = rewrite_planned(gm, planned, self.policy, buffers)
        shadows = self._watch(gm, planned)
        run = _recorded(gm, [SiteReport.of(site, plan) for site, plan in planned], shadows)
        if unchanged is None:
            return run
        exact = Plan("exact", "refused", _CHANGED)
        before = [SiteReport.of(site, exact if plan.verdict == "rewritten" else plan) for site, plan in planned]
        return buffers.guard(run, _recorded(unchanged, before))

    def _watch(self, gm: GraphModule, planned: Iterable[tuple[AttentionSite, Plan]]) -> dict[int, _Follow]:
        """Let the ops of a graph be sampled while the model is watched; gives how each site is, by layer key."""
        owner, inside = weakref.ref(self), dict(self.module.named_modules(prefix=self.path))
        of = {site.layer: (site, plan) for site, plan in planned}
        found: dict[int, _Follow] = {}

        def wrap(op: Op, layer: int) -> Callable[..., Any]:
            site, plan = of[layer]
            found[layer] = _Follow(owner, weakref.ref(inside.get(site.module, self.module)), site, plan)
            return found[layer].of_op(op)

        wrap_ops(gm, wrap)
        return found


class _Follow:
    """A rewritten site of a graph. It may be watched unless its method, its offset or its op forbid it."""

    def __init__(
        self,
        owner: Callable[[], Capture | None],
        module: Callable[[], nn.Module | None],
        site: AttentionSite,
        plan: Plan,
    ) -> None:
        # Dynamo keeps graphs where garbage collection does not look: none may hold its module
        self.owner, self.module, self.plan, self.spec = owner, module, plan, site.spec
        self.path, self.number = site.module, f"#{site.index}" if site.index else ""
        mask = site.spec.mask
        self.aligned = mask.causal and known_equal(mask.offset, site.spec.Lk - site.spec.Lq)
        is_known = not mask.causal or self.aligned or isinstance(mask.offset, int)
        can_be_exact = "min_length" in plan.params
        self.is_watchable = is_known and can_be_exact and METHODS[plan.method].approximates is not None

    def shadow(self) -> Shadow | None:
        """What samples this site now; None where nothing does, also in training mode."""
        owner, module = self.owner(), self.module()
        watch = owner.watch if self.is_watchable and owner is not None else None
        if watch is None or (module is not None and module.training):
            return None
        return watch.shadow(".".join(filter(None, (owner.prefix, self.path))) + self.number)

    def of_op(self, op: Op) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            shadow = self.shadow()
            if shadow is None:
                return call(op, *args, **options)
            query, key, value, padding = args[:4]
            if shadow.follow(self.plan).verdict != "rewritten":
                return call(op, *args, **exact_options(args, options))
            result = call(op, *args, **options)
            Lk, mask = key.shape[2], self.spec.mask
            mask = replace(mask, offset=Lk - query.shape[2]) if self.aligned else mask
            shadow.sample(self.plan, replace(self.spec, Lk=Lk, mask=mask), query, key, value, padding, result[0])
            return result

        return run

    def now(self, report: SiteReport) -> SiteReport:
        """The report of the site as it is now."""
        shadow = self.shadow()
        plan = self.plan if shadow is None else shadow.in_force(self.plan)
        if plan is self.plan:
            return report
        saved = replace(report.saved, method="exact", verdict="exact", params={}, facts={}, options={})
        changes = {"method": "exact", "verdict": "exact", "reason": plan.reason, "params": {}, "predicted_ms": {}}
        return replace(report, rejected=(), saved=saved, **changes)


def _whole_graphs() -> AbstractContextManager[Any]:
    """Inside DDP, Dynamo would cut graphs into buckets; run eagerly, communication overlaps without that."""
    if not torch.distributed.is_available() or nn.parallel.DistributedDataParallel._get_active_ddp_module() is None:
        return nullcontext()
    return torch._dynamo.config.patch(optimize_ddp=False)


def _backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The backend of all captures: what Dynamo has compiled for one layer, the next one finds, if it holds no site."""
    return _running.get()._rewrite(gm, inputs)


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._call_impl(*args, **kwargs)


def _recorded(
    gm: GraphModule, reports: Sequence[SiteReport], follows: Mapping[int, _Follow] = MappingProxyType({})
) -> Callable[..., Any]:
    _run_checkpoints(gm)
    names = [(report, follows.get(report.layer)) for report in reports]

    def run(*args: Any) -> Any:
        if (call := _in_progress.get()) is not None:
            call.graphs += 1
            call.paths.update(report.module for report in reports)
        result = gm.forward(*args)  # in which a site that is watched may fall back
        if (sites := recorder.get()) is not None:
            sites.extend(report if follow is None else follow.now(report) for report, follow in names)
        return result

    return run


def _run_checkpoints(gm: GraphModule) -> None:
    """Activation checkpoints of a graph are marks for a compiler; make them what they are in eager code."""
    marker = torch.ops.higher_order.tag_activation_checkpoint
    for part in [part for part in gm.modules() if isinstance(part, torch.fx.GraphModule)]:
        marks = part.graph.find_nodes(op="call_function", target=marker)
        for node in marks:
            node.target = _checkpoint
        if marks:
            part.recompile()


def _checkpoint(body: GraphModule, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    context = body.meta.get("_checkpoint_context_fn")
    kwargs = kwargs if context is None else {**kwargs, "context_fn": context}
    return checkpoint(body.forward, *args, **{**kwargs, "use_reentrant": False})


# ------------------------------------------------------------------------------------- another compiler on top


def _may_have_hooks(module: nn.Module) -> bool:
    """False where a hook would cost the fused kernel."""
    return not isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention))


def _check_tracing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook, because other tracers do not look at what a module runs instead of ``forward``, but do run its hooks."""
    if torch.compiler.is_exporting():
        raise RuntimeError(_cannot_export(module))
    if torch.compiler.is_compiling() and not _is_ours():
        _break_graph()


def _cannot_export(module: nn.Module) -> str:
    return f"{type(module).__name__}: torch.export would lose the rewriting; call restore_attention(model) before it"


@torch.compiler.assume_constant_result
def _is_ours() -> bool:
    return _in_progress.get() is not None


@untraced
def _break_graph() -> None:
    """Send the module back to Python, which runs its :class:`Capture`."""


# Where Dynamo traces a call these are inlined. Where Python makes the call, after a graph break, Dynamo must not start
# a graph with them: the part that is called would be taken for the whole.
for _function in (Capture.__call__, _check_tracing):
    skip_code(_function.__code__)
