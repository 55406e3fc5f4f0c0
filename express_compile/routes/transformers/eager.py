"""Rewriting of models that run eagerly, without ``torch.compile``.

:func:`rewrite_attention` takes the better of two routes for each part of a model; :func:`restore_attention` undoes it.

transformers lets a model choose its attention by name. For such models the name ``"express_compile"`` (an attention
function *and* a mask function) is registered, and the attention modules of one model instance are pointed to it; or to
``"express_compile_eager"``, where the model ran eager attention, for that and sdpa may compute different things. What
is proven about a mask travels with the mask itself (:class:`ProvenMask`), so models, threads and generate() calls
cannot mix up each other's facts; a mask that arrives as anything else is a dense tensor. Of that only one thing is
proven, by its shape: that it is a key padding, the same row for all queries. Of models that have eager attention only
because sdpa knows no soft-caps and no sinks, the additive mask of a single query is read. Everything else runs exactly.

Modules that write attention themselves are captured by Dynamo: ``capture.py``.
"""

from __future__ import annotations

import math
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ...core import call as calls
from ...core.method import METHODS
from ...core.plan import Plan
from ...core.policy import Policy
from ...core.spec import AttentionSpec, Mask, default_scale, feature_major, layer_key
from ...report.explain import SiteReport, recorder
from .. import capture
from ..module_code import calls_interface, can_import_transformers, depends_on_name, passes
from ..tracers import cannot_trace, is_exporting
from .masks import NAME, NAMES, ProvenMask, make_mask, untraced

if TYPE_CHECKING:
    from ...quality.watch import Shadow

Model = TypeVar("Model", bound=nn.Module)

_SITE = "_express_compile_site"
_ORIGINALS = "_express_compile_originals"
_MAX_PLANS = 1024

# Arguments that change what attention computes and that the ops do not take. transformers' sdpa function ignores
# some of them, which is one more reason not to rewrite such a site.
_EXTRAS = {
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "cache": "a paged cache",
    "indices": "sparse indices",
    "cu_seq_lens_q": "packed sequences",
}
_NEEDS_EAGER = ("softcap", "s_aux", "sinks")
# and those that a decoding step in a compiled graph goes by
_OF_STEP = ("scaling", "dropout", "sliding_window", "position_ids")


_WEIGHTS = {
    True: "the call asks for attention weights (output_attentions=True): the model's own eager attention runs",
    False: "the call asks for attention weights (output_attentions=True), which the model's own attention does not "
    "give either: only attn_implementation='eager' does",
}


# --------------------------------------------------------------------------------------------- public functions


def rewrite_attention(model: Model, policy: Policy | None = None, **options: Any) -> Model:
    """Let the attention sites of a model run sub-quadratic attention, in place; returns ``model``.

    model: any ``nn.Module``. Modules that choose their attention through transformers' AttentionInterface get another
        one. Modules that write it themselves have their graphs captured by Dynamo at the first call, and rewritten as
        by ``torch.compile(model, backend="express")``, but nothing is compiled. Only this instance changes: it gets its
        own copy of its configuration until :func:`restore_attention`. Rewriting a rewritten model replaces the policy.
    policy: a :class:`Policy`; or give its fields as keyword arguments (``budget=512``, ``methods=["express"]``, ...).

    A call whose mask, shape or arguments a method does not support runs the model's own exact attention, and so does
    one that Dynamo does not capture, with a ``RuntimeWarning``; :func:`record_sites` shows each decision. With
    ``strict=True`` such a call raises ``ValueError`` instead (which includes every one-token decoding step of
    ``generate()``, but not those that are compiled). ``torch.compile`` on top, as ``generate()`` does it for decoding
    over a static cache, keeps single queries in its graph; modules with more of them it leaves to Python, and raises
    there with ``fullgraph=True``.

    Raises ``TypeError`` or ``ValueError`` for a bad policy, an unknown option or an unknown method, and
    ``ValueError`` when the model has no attention that could be rewritten, or is a part of one that is rewritten, and
    with ``strict=True`` when something in ``modules`` matches no site, as far as sites are known before the first call.
    """
    _require_module(model)
    from ...planning.choose import require_matches

    policy = _checked_policy(policy, options)
    sites = _find_sites(model)
    captured = capture.find_modules(model, [module for module, _ in sites.values()])
    if not sites and not captured:
        raise ValueError(_no_attention(model))
    if not captured:
        require_matches(sites, policy)
    if _is_changed(model):
        restore_attention(model)
    plans = _Plans(policy)
    for path, (module, exact) in sites.items():
        decodes = any(METHODS[name].decodes for name in plans.methods(path))
        eager = calls_interface(type(module)).__globals__.get("eager_attention_forward")
        given = _given(module.config)
        setattr(module, _SITE, _Site(path, layer_key(path), exact, given, eager, plans, decodes))
        module.register_forward_pre_hook(_check_in_force)
    if sites:
        _register_interface()
        _point_configs(model, sites)
    capture.install(model, captured, policy)
    return model


def restore_attention(model: Model) -> Model:
    """Undo :func:`rewrite_attention`, in place; returns ``model``, whose outputs are bitwise those of before.

    The configuration objects of before come back too, with whatever was changed in the copies since (another
    vocabulary, another attention by ``set_attn_implementation``).
    Raises ``ValueError`` when the model is not rewritten, or is a part of a larger one that was rewritten as a whole.
    """
    if not _is_changed(model):
        raise ValueError(f"model={type(model).__name__}: is not rewritten, so there is nothing to restore")
    capture.remove(model)
    pointed = {module: module.__dict__.pop(_ORIGINALS) for module in model.modules() if _ORIGINALS in module.__dict__}
    for copies in {id(configs.copies): configs.copies for configs in pointed.values()}.values():
        for copied in copies:
            copied.bring_back()
    for module, configs in pointed.items():
        configs.restore(module)
    for module in model.modules():
        if module.__dict__.pop(_SITE, None) is not None:
            hooks = module._forward_pre_hooks
            for number in [number for number, hook in hooks.items() if hook is _check_in_force]:
                del hooks[number]
    return model


def is_rewritten(model: nn.Module) -> bool:
    """Whether :func:`rewrite_attention` is in force in ``model`` or a part of it. ``TypeError`` if it is no module.

    It is not any more where transformers was told to run another attention: ``set_attn_implementation("sdpa")``.
    """
    _require_module(model)
    return any(_is_in_force(module) or capture.is_captured(module) for module in model.modules())


def _is_changed(model: nn.Module) -> bool:
    """Whether there is anything to restore in ``model``."""
    _require_module(model)
    return bool(capture.installed(model)) or any(_SITE in module.__dict__ for module in model.modules())


def _is_in_force(module: nn.Module) -> bool:
    return _SITE in module.__dict__ and module.config._attn_implementation in NAMES.values()


def _given(config: Any) -> str:
    """The name of the attention that a configuration asks for, without us: before it was, or would be, rewritten."""
    name = config._attn_implementation
    return next((given for given, ours in NAMES.items() if ours == name), name)


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: must be a torch.nn.Module")


def unmatched(model: nn.Module, seen: Iterable[str] = ()) -> tuple[str, ...]:
    """What the policy of a rewritten model says about modules of which none has a site.

    seen: paths of sites in graphs that were captured, which are known once they ran.
    """
    from ...planning import choose as plan

    found: dict[int, tuple[Policy, list[str]]] = {}  # parts of a model may be rewritten each by itself
    for module in model.modules():
        if _SITE in module.__dict__:
            site = module.__dict__[_SITE]
            found.setdefault(id(site.plans.policy), (site.plans.policy, []))[1].append(site.path)
        elif capture.is_captured(module):
            policy = capture.policy_of(module)
            found.setdefault(id(policy), (policy, []))[1].extend(seen)
    return tuple(words for policy, paths in found.values() for words in plan.unmatched(paths, policy))


@contextmanager
def record_sites() -> Iterator[list[SiteReport]]:
    """While active, each attention call of a rewritten model in this thread appends one ``SiteReport`` to the list.

    A captured graph appends those of all its sites when it is run.

    >>> with record_sites() as sites:
    ...     model(input_ids)
    >>> print(sites[0].module, sites[0].verdict, sites[0].reason)
    """
    sites: list[SiteReport] = []
    token = recorder.set(sites)
    try:
        yield sites
    finally:
        recorder.reset(token)


# ------------------------------------------------------------------------------------------------------ policy


def _checked_policy(policy: Policy | None, options: dict[str, Any]) -> Policy:
    if policy is None:
        policy = Policy.from_options(options)
    elif not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r}: must be a Policy; give single options by name, e.g. budget=512")
    elif options:
        raise TypeError(f"policy and {', '.join(sorted(options))} were both given: put the options into the policy")
    from ...planning.choose import check_policy

    check_policy(policy)
    return policy


class _Plans:
    """The policy of one rewriting and its decisions so far, shared by the sites of that rewriting."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.said = False
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def __call__(self, path: str, spec: AttentionSpec, gradient: str | None) -> Plan:
        whose = path if self.policy.plan is not None or self._by_layer(path) else self.policy.globs(path)
        key = (whose, spec, gradient)
        plan = self._plans.get(key)
        if plan is None:
            from ...planning.choose import Question, answer

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
        from ...planning.choose import DEFAULT_METHODS

        if self.policy.plan is not None:
            return tuple(dict.fromkeys(entry.method for entry in self.policy.plan.at(path))) or ("exact",)
        return self.policy.at(path).methods or DEFAULT_METHODS


_TRACED: weakref.WeakValueDictionary[str, _Site] = weakref.WeakValueDictionary()


@dataclass
class _Site:
    """What an attention module needs to know; lives on the module, so copies of the model are independent.

    exact: the name of transformers' own attention that computes what is not rewritten, "sdpa" or "eager".
    given: the name of the attention that the model ran before.
    eager: transformers' attention that is written out, where the model's file has it.
    decodes: whether one of the methods may take a single query.
    shadow: what samples its error while the model is watched; stays behind when the site is copied.
    token: what a compiled graph knows it by; copies have their own.
    """

    path: str
    layer: int
    exact: str
    given: str
    eager: Callable[..., Any] | None = field(repr=False)
    plans: _Plans = field(repr=False)
    decodes: bool
    shadow: Shadow | None = field(default=None, repr=False)
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        self.token = uuid.uuid4().hex
        _TRACED[self.token] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shadow": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()
        _register_interface()  # a rewritten model may be unpickled in a process that never rewrote one


def rewritten_sites(model: nn.Module) -> dict[str, _Site]:
    """Module path -> what a rewritten attention module knows, for each of them in ``model``.

    Raises ``TypeError`` if that is no module.
    """
    _require_module(model)
    return {path: module.__dict__[_SITE] for path, module in model.named_modules() if _is_in_force(module)}


# --------------------------------------------------------------------------------------------- finding the sites


def _find_sites(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Module path -> (attention module, name of its exact attention), of all that another name may be given.

    The others keep theirs and are captured: those that take another branch under another name, or whose model does
    (Gemma 4 looks whether "sdpa" gave it a mask), and those of models with eager attention only, of which nothing is
    known. Such a model has to say that its attention is all in the arguments, by running flash attention as well, and
    to need eager attention for a soft-cap or sinks.
    """
    if not can_import_transformers():
        return {}
    sites: dict[str, tuple[nn.Module, str]] = {}
    for path, module, owner in _with_owners(model):
        function = calls_interface(type(module))
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if function is None or implementation is None or not _uses_standard_sdpa(function):
            continue
        exact = "sdpa" if owner is None or owner._supports_sdpa else "eager"
        if depends_on_name(type(module), exact) or (owner is not None and depends_on_name(type(owner), exact)):
            continue
        if exact == "eager":
            before = implementation if _ORIGINALS not in module.__dict__ else "eager"
            if not owner._supports_flash_attn or before != "eager" or not passes(function, _NEEDS_EAGER):
                continue
        sites[path] = (module, exact)
    return sites


def _no_attention(model: nn.Module) -> str:
    installed = "" if can_import_transformers() else " (not installed: pip install 'express-compile[transformers]')"
    return (
        f"model={type(model).__name__}: no attention found. Looked for modules that choose their attention by "
        f"transformers' AttentionInterface{installed}, and modules whose code calls scaled_dot_product_attention or "
        "holds a softmax and matrix products, whatever their names are; torch.compile(model, backend='express') looks "
        "at what a model computes instead of at its code"
    )


def _with_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module with its path and the innermost transformers model around it (or None)."""
    from transformers import PreTrainedModel

    owners: dict[str, Any] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0] if path else None
        owners[path] = module if isinstance(module, PreTrainedModel) else owners.get(parent)
        yield path, module, owners[path]


def _uses_standard_sdpa(function: Callable[..., Any]) -> bool:
    """False for a model file that brings its own "sdpa", of which we know nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    interface = function.__globals__.get("ALL_ATTENTION_FUNCTIONS")
    return interface is not None and interface.get("sdpa") is ALL_ATTENTION_FUNCTIONS["sdpa"]


def _point_configs(model: nn.Module, sites: dict[str, tuple[nn.Module, str]]) -> None:
    """Give the model copies of its configurations that name our attention; keep the originals on each module."""
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}  # one for all, so that shared configurations stay shared
    changes: list[tuple[nn.Module, dict[str, Any]]] = []
    for path, module, owner in _with_owners(model):
        supports_sdpa = owner is None or owner._supports_sdpa
        # Where the model only runs "eager", the masks must stay eager masks: change nothing but the sites.
        # Attention that is no site, and code that branches on the name, must go on reading the old name.
        if path not in sites and (
            not supports_sdpa or calls_interface(type(module)) or depends_on_name(type(module), "sdpa")
        ):
            continue
        originals = {name: value for name, value in module.__dict__.items() if isinstance(value, PreTrainedConfig)}
        if originals:
            changes.append((module, originals))
            for original in originals.values():
                deepcopy(original, memo)
    copies = []
    for original in memo.pop(id(memo), []):  # where deepcopy keeps what it copied
        if isinstance(original, PreTrainedConfig):
            copied = memo[id(original)]
            original._attn_implementation_internal = _given(original)  # it may be copied from a rewritten model
            if copied._attn_implementation is not None:
                copied._attn_implementation_internal = NAMES.get(_given(original), NAME)
            copies.append(_Copied(original, copied, _state(copied)))
    for module, originals in changes:
        for name, original in originals.items():
            setattr(module, name, memo[id(original)])
        module.__dict__[_ORIGINALS] = _Pointed(originals, copies)


@dataclass
class _Copied:
    """A configuration, our copy of it, and what was in the copy at first."""

    original: Any
    copy: Any
    before: dict[str, Any]

    def bring_back(self) -> None:
        """Make the changes of the copy in the original, too."""
        now = _state(self.copy)
        for name in self.before.keys() - now.keys():
            self.original.__dict__.pop(name, None)
        for name, value in now.items():
            if name not in self.before or not _is_equal(value, self.before[name]):
                self.original.__dict__[name] = value


@dataclass
class _Pointed:
    """The configurations that a module had, by attribute, and all that were copied with them."""

    originals: dict[str, Any]
    copies: list[_Copied]

    def restore(self, module: nn.Module) -> None:
        """Give a module its own configurations back, but for one that somebody replaced since."""
        ours = {id(copied.original): copied.copy for copied in self.copies}
        for name, original in self.originals.items():
            if getattr(module, name, None) is ours[id(original)]:
                setattr(module, name, original)


def _state(config: Any) -> dict[str, Any]:
    """What a configuration holds, without configurations inside."""
    from transformers import PreTrainedConfig

    return {name: deepcopy(x) for name, x in config.__dict__.items() if not isinstance(x, PreTrainedConfig)}


def _is_equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # tensors and arrays
        return False


def _check_in_force(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Say that a rewritten module is told to run other attention; a hook, for our attention is not called then."""
    if torch.compiler.is_compiling() or _is_in_force(module):
        return
    site = module.__dict__.get(_SITE)
    if site is None:
        return
    name = module.config._attn_implementation
    reason = (
        f"after rewrite_attention the attention of the model was set to {name!r}, which runs instead; "
        f"rewrite_attention(model, ...) or set_attn_implementation({NAMES.get(site.given, NAME)!r}) rewrites it again"
    )
    if site.plans.policy.strict:
        raise ValueError(f"strict=True: {site.path or '(root)'}: {reason}")
    _report(module, site, Plan("exact", "refused", reason))
    if not site.plans.said:
        site.plans.said = True
        warnings.warn(f"{site.path or type(module).__name__}: {reason}", RuntimeWarning, stacklevel=5)


# ------------------------------------------------------------------------------------------------- registration


def _register_interface() -> None:
    # Both or none: with the attention function alone transformers would hand every site mask=None.
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in NAMES.values():
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, make_mask)


def _prove(
    module: nn.Module,
    site: _Site,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    arguments: dict[str, Any],
) -> tuple[Mask, torch.Tensor | None, int]:
    """What is proven about the mask of a call, its padding ``[B, visible]``, and how many leading keys are visible."""
    B, H, Lq, D = query.shape
    H_kv, Lk = key.shape[1], key.shape[2]
    causal = _is_causal(module, Lq, arguments)
    window = arguments.get("sliding_window")
    unlike = _unlike_sdpa(site, query, arguments)
    if site.exact == "eager" and unlike is None:
        attention_mask = _read(attention_mask)
    given = [f"{what} ({name})" for name, what in _EXTRAS.items() if arguments.get(name) is not None]
    unknown = None
    if given:
        unknown = f"the attention takes {', '.join(given)}, which no method computes"
    elif unlike is not None:
        unknown = unlike
    elif key.shape[:3] != value.shape[:3] or key.shape[0] != B or key.shape[3] != D or H % H_kv != 0:
        unknown = f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    elif not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        unknown = "query, key and value differ in dtype or device"
    elif window is not None and window < Lk and not _has_window(attention_mask, window):
        unknown = f"local attention over {window} keys"
    elif _is_proven(attention_mask):
        if attention_mask.shape[2:] != (Lq, Lk) or attention_mask.shape[0] != B:
            unknown = f"the mask has shape {tuple(attention_mask.shape)} and does not fit {Lq} queries and {Lk} keys"
        else:
            return attention_mask.proven, attention_mask.padding, attention_mask.visible
    elif attention_mask is None:
        if not causal:
            return Mask(), None, Lk
        if Lq == 1:
            return Mask(causal=True, offset=Lk - 1), None, Lk
        return Mask(causal=True), None, min(Lk, Lq)  # sdpa's is_causal is aligned top-left
    elif (row := _key_padding(attention_mask, (B, H, Lq, Lk))) is not None and (Lq == 1 or not causal):
        return Mask(causal=causal, offset=Lk - 1 if causal else 0, padding=True), row, Lk
    else:
        kind = "a dense mask" if attention_mask.dtype == torch.bool else "an additive mask, such as a position bias,"
        built = f"{kind} that the model or the caller built"
        unknown = getattr(attention_mask, "_express_compile_reason", built)
    return Mask(unknown=unknown), None, Lk


def _is_eager(module: nn.Module) -> bool:
    """Whether a rewritten module has to compute what eager attention does, for which all is in the mask."""
    return module.config._attn_implementation == NAMES["eager"]


def _is_causal(module: nn.Module, queries: int, arguments: dict[str, Any]) -> bool:
    """Whether a call hides the future where its mask does not say so."""
    if queries > 1 and _is_eager(module):
        return False
    causal = arguments.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _unlike_sdpa(site: _Site, query: torch.Tensor, arguments: dict[str, Any]) -> str | None:
    """Why a call is not sdpa's attention, with a soft-cap and sinks as its arguments say; None where it is."""
    H, Lq = query.shape[1:3]
    softcap, sinks = arguments.get("softcap"), arguments.get("s_aux")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        return f"it has a logit soft-cap of {softcap!r}, which is no positive number"
    if sinks is not None and (sinks.shape != (H,) or not sinks.is_floating_point() or sinks.device != query.device):
        return f"its attention sinks are {sinks.dtype} of shape {tuple(sinks.shape)}, not a logit for each of {H} heads"
    if site.exact == "sdpa":
        return None
    only = "the model supports transformers' eager attention only"
    if softcap is None and sinks is None:
        return only
    return None if Lq == 1 else f"{only}, and the mask is that of {Lq} queries; those of one are read"


def _has_window(mask: torch.Tensor | None, window: int) -> bool:
    """Whether a mask says by itself what a window hides: it is proven, or it is all that hides keys from one query."""
    if _is_proven(mask):
        return mask.proven.window == window
    return mask is not None and mask.dim() == 4 and mask.shape[2] == 1


def _is_proven(mask: torch.Tensor | None) -> bool:
    return isinstance(mask, ProvenMask) and mask.is_proven


def _read(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The additive mask of one query in eager attention as a boolean one, or None where it hides nothing, if it has 0
    for some keys of every sequence and hides all others; any other mask as it is. Two bits are read back, once for all
    layers."""
    if mask is None or mask.dtype == torch.bool or mask.dim() != 4 or mask.shape[2] != 1:
        return mask
    version = None if mask.is_inference() else mask._version
    known = getattr(mask, "_express_compile_read", None)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return mask  # nothing can be read back
    shown = mask == 0
    proven = (shown | (mask <= torch.finfo(mask.dtype).min)).all() & shown.any(-1).all()
    proven, whole = torch.stack([proven, shown.all()]).tolist()
    mask._express_compile_read = version, None if whole else shown if proven else mask
    return mask._express_compile_read[1]


def _gradient(module: nn.Module, *inputs: torch.Tensor) -> str | None:
    """Why a call counts as part of a training run, for ``Policy.training``; None where it does not."""
    if module.training:
        return "its module is in training mode"
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return "its result needs a gradient" if needed else None


def _key_padding(mask: torch.Tensor, sizes: tuple[int, int, int, int]) -> torch.Tensor | None:
    """The row ``[B, Lk]`` of a boolean mask that, whatever its values are, is the same for all heads and queries."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[3] != sizes[3]:
        return None
    if any(size not in (1, whole) for size, whole in zip(mask.shape, sizes, strict=True)):
        return None
    if any(mask.shape[d] != 1 and mask.stride(d) != 0 for d in (1, 2)):
        return None
    return mask[:, 0, 0].expand(sizes[0], sizes[3])


# ---------------------------------------------------------------------------------------------------- attention


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function under our name: ``[B, H, L, D]`` in, ``[B, Lq, H, Dv]`` out."""
    if is_exporting():
        return _export(module, query, key, value, attention_mask, arguments)
    if torch.compiler.is_compiling() and query.shape[2] == 1:
        return _attend_compiled(module, query, key, value, attention_mask, arguments)
    return _attend(module, query, key, value, attention_mask, arguments)


def _export(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A call that is traced into a program: what is exact by its policy stays what it is, the rest cannot be kept."""
    site = module.__dict__[_SITE]
    if site.plans.methods(site.path) != ("exact",):
        _refuse_export(module)
    return _exact(module, site, query, key, value, attention_mask, arguments)


@untraced
def _refuse_export(module: nn.Module) -> None:
    raise RuntimeError(cannot_trace(type(module).__name__, "torch.export"))


def _attend_compiled(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A decoding step that Dynamo traces: generate() compiles those over a StaticCache by itself."""
    site = module.__dict__[_SITE]
    given = any(arguments.get(name) is not None for name in (*_EXTRAS, *_NEEDS_EAGER))
    if (
        given
        or wants_weights(module, arguments)
        or isinstance(arguments.get("scaling"), torch.Tensor)
        or not site.decodes
        or site.shadow is not None
        or site.exact == "eager"
    ):
        return _exact(module, site, query, key, value, attention_mask, arguments)
    facts = _is_causal(module, 1, arguments), getattr(module, "num_key_value_groups", 1), module.training
    given = [arguments.get(name) for name in _OF_STEP]
    return _step_in_graph(site.token, query, key, value, attention_mask, *facts, *given), None


@torch.compiler.allow_in_graph
def _step_in_graph(
    token: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    causal: bool,
    groups: int,
    training: bool,
    *given: Any,
) -> torch.Tensor:
    """One call in Dynamo's graph; what it stands for is planned and written when AOTAutograd looks into it.

    ``causal``, ``groups`` and ``training`` are those of the module, ``given`` its arguments of the names ``_OF_STEP``.
    Then sizes may be symbolic, so a plan holds for all of them, as in a graph that the backend rewrites.
    """
    site = _TRACED[token]
    named = zip(_OF_STEP, given, strict=True)
    arguments = {"is_causal": causal, **{name: x for name, x in named if x is not None}}
    config = SimpleNamespace(_attn_implementation=NAME)  # to one query, eager attention and sdpa are the same
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=causal, training=training, config=config)
    mask, padding, _ = _prove(module, site, query, key, value, attention_mask, arguments)
    spec = _spec(query, key, value, key.shape[2], mask, arguments)
    from ...planning.choose import Question, answer

    question = Question(module=site.path, spec=spec, gradient=_gradient(module, query, key, value), graphs=True)
    plan = answer(question, site.plans.policy)
    if plan.verdict != "rewritten":
        return _exact(module, site, query, key, value, attention_mask, arguments)[0]
    given = site.plans.policy.seed
    drawn = _seed(None, query) if given is None else torch.full((), given, dtype=torch.int64, device=query.device)
    seed = _seed_of_step(drawn, spec, arguments)
    given = calls.Call(query, key, value, padding, seed, spec.scale, site.layer, options=plan.params)
    out, _ = given.run(METHODS[plan.method].op)
    return out.transpose(1, 2).contiguous()


@untraced
def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if torch.jit.is_tracing() or get_proxy_mode() is not None:
        return _export(module, query, key, value, attention_mask, arguments)
    site = module.__dict__.get(_SITE)
    if site is None:
        raise RuntimeError(
            f"{type(module).__name__} was sent to express_compile's attention but was never rewritten: it was added to "
            "a rewritten model, or its configuration was copied from one; call rewrite_attention on this model"
        )
    mask, padding, visible = _prove(module, site, query, key, value, attention_mask, arguments)
    spec = _spec(query, key, value, visible, mask, arguments)
    if wants_weights(module, arguments):
        plan = Plan("exact", "refused", _WEIGHTS[site.given == "eager"])
    else:
        plan = site.plans(site.path, spec, _gradient(module, query, key, value))
    shadow = None if module.training else site.shadow
    if shadow is not None:
        plan = shadow.follow(plan)
    _report(module, site, plan, spec)
    if site.plans.policy.strict:
        from ...planning.choose import require

        require([(site.path, plan)], site.plans.policy)
    if plan.verdict != "rewritten":
        return _exact(module, site, query, key, value, attention_mask, arguments)
    seed = _seed_of_step(_seed(site.plans.policy.seed, query), spec, arguments)
    key, value = key[:, :, :visible], value[:, :, :visible]
    sinks = arguments["s_aux"] if spec.sinks else None
    given = calls.Call(query, key, value, padding, seed, spec.scale, site.layer, sinks=sinks, options=plan.params)
    out, _ = calls.call(METHODS[plan.method].op, given)
    if shadow is not None:
        shadow.sample(plan, spec, given, out)
    return out.transpose(1, 2).contiguous(), None


def _spec(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: int, mask: Mask, arguments: dict[str, Any]
) -> AttentionSpec:
    scale = arguments.get("scaling")
    return AttentionSpec(
        B=query.shape[0],
        H=query.shape[1],
        H_kv=key.shape[1],
        Lq=query.shape[2],
        Lk=visible,
        D=query.shape[3],
        Dv=value.shape[3],
        dtype=query.dtype,
        device=query.device.type,
        scale=float(default_scale(query.shape[3]) if scale is None else scale),
        mask=mask,
        dropout_p=float(arguments.get("dropout") or 0.0),
        softcap=arguments.get("softcap"),
        sinks=arguments.get("s_aux") is not None,
        feature_major=feature_major(key),
    )


def _exact(
    module: nn.Module,
    site: _Site,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' own attention, with exactly the arguments it would have had; in place of eager attention sdpa, with
    arguments that say the same to it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = _is_eager(module)
    flag = eager and _is_proven(attention_mask) and attention_mask.proven == Mask(causal=True)
    if isinstance(attention_mask, ProvenMask):
        attention_mask = attention_mask.exact()
    weights = site.given == "eager" and site.eager is not None and wants_weights(module, arguments)
    if site.exact == "sdpa" and not weights and all(arguments.get(name) is None for name in _NEEDS_EAGER):
        if eager:  # sdpa has faster kernels where no mask but a flag says what is hidden
            attention_mask = None if flag else _additive(query, key, attention_mask, False)
            arguments = {**arguments, "is_causal": flag}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **arguments)
    # sdpa has no soft-cap and no sinks: some versions raise, others silently leave them out
    if site.eager is None:
        raise RuntimeError(f"{site.path!r}: {type(module).__module__} has no eager_attention_forward to fall back to")
    if site.exact == "sdpa" or attention_mask is not None:
        attention_mask = _additive(query, key, attention_mask, _is_causal(module, query.shape[2], arguments))
    return site.eager(module, query, key, value, attention_mask, **arguments)


def wants_weights(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether somebody wants the attention weights of a call: by argument, by configuration, or by collecting what
    modules return."""
    from transformers.utils.output_capturing import _active_collector

    if arguments.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return True
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _additive(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, causal: bool
) -> torch.Tensor | None:
    """The additive mask of eager attention that means what ``attention_mask`` means to sdpa."""
    Lq, Lk = query.shape[2], key.shape[2]
    if attention_mask is None:
        if not causal or Lq == 1:
            return None
        attention_mask = torch.ones(Lq, Lk, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask.dtype != torch.bool:
        return attention_mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(attention_mask, zero, torch.finfo(query.dtype).min)


def _seed_of_step(seed: torch.Tensor, spec: AttentionSpec, arguments: dict[str, Any]) -> torch.Tensor:
    """A cache that evicts has as many keys at every step: there the position of the last token counts, where the model
    passes it on."""
    window, positions = arguments.get("sliding_window"), arguments.get("position_ids")
    if spec.Lq != 1 or spec.mask.window is not None or not window or window > spec.Lk or positions is None:
        return seed
    return seed + positions.flatten()[-1]


def _seed(seed: int | None, query: torch.Tensor) -> torch.Tensor:
    if seed is None:
        return torch.randint(0, 2**31 - 1, (), dtype=torch.int64, device=query.device)
    if type(query) is not torch.Tensor:  # such as a fake tensor, which mixes with no others
        return torch.full((), seed, dtype=torch.int64, device=query.device)
    return _fixed_seed(seed, query.device)


@lru_cache(maxsize=64)
def _fixed_seed(seed: int, device: torch.device) -> torch.Tensor:
    from ...kernels.launch import constant

    return constant(np.array(seed, np.int64), device)


def _report(module: nn.Module, site: _Site, plan: Plan, spec: AttentionSpec | None = None) -> None:
    sites = recorder.get()
    if sites is None:
        return
    function = calls_interface(type(module))
    source = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}" if function is not None else ""
    sites.append(SiteReport.from_plan(site.path, source, "transformers", plan, spec=spec))
