"""Which attention modules of a model may be given another attention, and what each one knows once it was.

That is a :class:`Site`, kept in the module itself under ``SITE`` so that copies of a model are independent, and under
its token for graphs that a compiler made, which hold no module.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...core.method import METHODS
from ...core.plan import Plan
from ...core.policy import Policy
from ...core.sites import SiteReport, recording
from ...core.spec import AttentionSpec, HeadShard
from ...passes.place import named_modules
from ...planning.choose import Question, answer, methods_of
from ..module_code import calls_interface, depends_on_name, passes
from ..watched import Shadow
from .masks import NAMES, PAGED

NEEDS_EAGER = ("softcap", "s_aux", "sinks")  # arguments that only eager attention knows
SITE = "_express_compile_site"
_OURS = (*NAMES.values(), PAGED)
_MAX_PLANS = 1024


# ---- finding them --------------------------------------------------------------------------------------------------


def find_sites(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Module path -> (attention module, name of its exact attention), of all that another name may be given.

    The others keep theirs and are captured: those that take another branch under another name, or whose model does
    (Gemma 4 looks whether "sdpa" gave it a mask), and those of models with eager attention only, of which nothing is
    known. Such a model has to say that its attention is all in the arguments, by running flash attention as well, and
    to need eager attention for a soft-cap or sinks.
    """
    sites: dict[str, tuple[nn.Module, str]] = {}
    for path, module, owner in with_owners(model):
        function = calls_interface(type(module))
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if function is None or implementation is None or not _uses_standard_sdpa(function):
            continue
        exact = "sdpa" if owner is None or owner._supports_sdpa else "eager"
        if depends_on_name(type(module), exact) or (owner is not None and depends_on_name(type(owner), exact)):
            continue
        if exact == "eager":
            before = "eager" if SITE in module.__dict__ else implementation
            if not owner._supports_flash_attn or before != "eager" or not passes(function, NEEDS_EAGER):
                continue
        sites[path] = (module, exact)
    return sites


def with_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module with its path and the innermost transformers model around it (or None)."""
    owners: dict[str, Any] = {}
    for path, module in named_modules(model):
        around = owners.get(path.rpartition(".")[0]) if path else None
        owners[path] = module if isinstance(module, PreTrainedModel) else around
        yield path, module, owners[path]


def _uses_standard_sdpa(function: Callable[..., Any]) -> bool:
    """False for a model file that brings its own "sdpa", of which we know nothing."""
    interface = function.__globals__.get("ALL_ATTENTION_FUNCTIONS")
    return interface is not None and interface.get("sdpa") is ALL_ATTENTION_FUNCTIONS["sdpa"]


# ---- what they know ------------------------------------------------------------------------------------------------


class Plans:
    """The policy of one rewriting and its decisions so far, shared by the sites of that rewriting."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.said = False
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._shared: dict[str, Any] = {}  # what the plans of a site are known by

    def __call__(self, path: str, spec: AttentionSpec, gradient: str | None) -> Plan:
        if path not in self._shared:
            alone = self.policy.plan is not None or self._by_layer(path)
            self._shared[path] = path if alone else self.policy.globs(path)
        key = (self._shared[path], spec, gradient)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:  # a long generate() asks about a new length at every step
                self._plans.clear()
            question = Question(module=path, spec=spec, gradient=gradient)
            plan = self._plans[key] = answer(question, self.policy)
        return plan

    def _by_layer(self, path: str) -> bool:
        local = self.policy.at(path)
        return any(METHODS[name].options.by_layer(local.given(name)) for name in self.methods(path))

    def methods(self, path: str) -> tuple[str, ...]:
        """The methods that calls of a site may have."""
        return methods_of(self.policy, path)


@dataclass
class Site:
    """What an attention module needs to know.

    exact: the name of transformers' own attention that computes what is not rewritten, "sdpa" or "eager".
    given: the name of the attention that the model ran before.
    eager: transformers' attention that is written out, where the model's file has it.
    source: ``file:line`` of the method that looks its attention up.
    methods: those that its calls may have.
    shadow: what samples its error while the model is watched; stays behind when the site is copied.
    spread: what takes its calls where a process has a part of the tokens; see engines/distributed.py.
    shard: which heads of the layer it had at its last eager call, if not all; decoding steps in graphs go by it.
    token: what a compiled graph knows it by; copies have their own.
    left_exact: the forms of calls that were.
    """

    path: str
    layer: int
    exact: str
    given: str
    eager: Callable[..., Any] | None = field(repr=False)
    source: str
    plans: Plans = field(repr=False)
    methods: tuple[str, ...]
    shadow: Shadow | None = field(default=None, repr=False)
    spread: Callable[[Any], Any] | None = field(default=None, repr=False)
    shard: HeadShard | None = field(default=None, repr=False)
    token: str = field(default="", repr=False)
    left_exact: set[tuple[Any, ...]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.token = uuid.uuid4().hex
        _TRACED[self.token] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shadow": None, "left_exact": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def leave_exact(self, form: tuple[Any, ...]) -> None:
        """Remember a form of calls that are left exact."""
        if len(self.left_exact) >= _MAX_PLANS:
            self.left_exact.clear()
        self.left_exact.add(form)

    def report(self, plan: Plan, spec: AttentionSpec | None = None) -> None:
        """Put what becomes of a call where this thread records it."""
        if (sites := recording()) is not None:
            sites.append(SiteReport.from_plan(self.path, self.source, "transformers", plan, spec=spec))


_TRACED: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()


def traced(token: str) -> Site:
    """The site that a compiled graph knows by this token."""
    return _TRACED[token]


def site_of(module: Any) -> Site | None:
    """That of a module; None where it has none."""
    return module.__dict__.get(SITE)


def installed(model: nn.Module) -> list[Site]:
    """The sites of the modules in ``model``, whether they are in force or not."""
    return [module.__dict__[SITE] for module in model.modules() if SITE in module.__dict__]


def is_in_force(module: Any) -> bool:
    """Whether a module has a site, and its configuration still names our attention."""
    return SITE in module.__dict__ and held(module.config, "_attn_implementation_internal") in _OURS


def held(config: Any, name: str) -> Any:
    """What a configuration holds under a name, None if nothing: every call asks, and transformers answers for each
    attribute in Python."""
    if torch.compiler.is_compiling():
        return getattr(config, name, None)
    return object.__getattribute__(config, "__dict__").get(name)


def name_before(config: Any) -> str:
    """The name of the attention that a configuration asks for, without us: before it was, or would be, rewritten."""
    name = config._attn_implementation
    return next((given for given, ours in NAMES.items() if ours == name), name)


def rewritten_sites(model: nn.Module) -> dict[str, Site]:
    """Module path -> site, for each that is in force in ``model``."""
    return {path: module.__dict__[SITE] for path, module in named_modules(model) if is_in_force(module)}
