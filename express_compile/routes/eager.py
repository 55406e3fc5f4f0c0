"""Rewriting of models that run eagerly, without ``torch.compile``.

:func:`rewrite_attention` takes the better of two routes for each part of a model; :func:`restore_attention` undoes it.
Modules that choose their attention by name in transformers are given another name (``transformers/``); modules that
write attention themselves are captured by Dynamo (``capture.py``).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from torch import nn
from torch._dynamo import OptimizedModule

from ..core.plain import shown
from ..core.policy import Policy
from ..planning.choose import check_policy, require_matches
from ..planning.choose import unmatched as unmatched_in
from . import capture

Model = TypeVar("Model", bound=nn.Module)


def rewrite_attention(model: Model, policy: Policy | None = None, **options: Any) -> Model:
    """Let the attention sites of a model run sub-quadratic attention, in place; returns ``model``.

    model: any ``nn.Module``; in what ``torch.compile`` returned, the module that it was given, by whose paths sites are
        named. Modules that choose their attention through transformers' AttentionInterface get another one. Modules
        that write it themselves have their graphs captured by Dynamo at the first call, and rewritten as by
        ``torch.compile(model, backend="express")``, but nothing is compiled. Only this instance changes: it gets its
        own copy of its configuration until :func:`restore_attention`. Rewriting a rewritten model replaces the policy.
    policy: a :class:`Policy`; or give its fields as keyword arguments (``budget=512``, ``methods=["express"]``, ...).

    A call whose mask, shape or arguments a method does not support runs the model's own exact attention, and so does
    one that Dynamo does not capture, with a ``RuntimeWarning``; :func:`record_sites` shows each decision. With
    ``strict=True`` such a call raises ``ValueError`` instead (which includes every one-token decoding step of
    ``generate()``, but not those that are compiled). ``torch.compile`` on top, as ``generate()`` does it for decoding
    over a static cache, keeps single queries in its graph; modules with more of them it leaves to Python, and raises
    there with ``fullgraph=True``.

    Raises ``TypeError`` or ``ValueError`` for a bad policy, an unknown option or an unknown method, and
    ``ValueError`` when the model has no attention that could be rewritten, or is a part of one that is rewritten, with
    ``cuda_graphs=True`` when none of its modules are captured, and
    with ``strict=True`` when something in ``modules`` matches no site, as far as sites are known before the first call.
    """
    _require_module(model)
    policy, whole = _checked_policy(policy, options), uncompiled(model)
    route = _transformers()
    sites = {} if route is None else route.find_sites(whole)
    captured = capture.find_modules(whole, [module for module, _ in sites.values()])
    if policy.cuda_graphs and sites and not captured:
        raise ValueError(_no_graphs(whole))
    if not sites and not captured:
        raise ValueError(_no_attention(whole))
    if not captured:
        require_matches(sites, policy)
    if _is_changed(whole):
        restore_attention(whole)
    if route is not None and sites:
        route.install(whole, sites, policy)
    capture.install(whole, captured, policy, others=sites)
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
    if (route := _transformers()) is not None:
        route.remove(model)
    return model


def is_rewritten(model: nn.Module) -> bool:
    """Whether :func:`rewrite_attention` is in force in ``model`` or a part of it. ``TypeError`` if it is no module.

    It is not any more where transformers was told to run another attention: ``set_attn_implementation("sdpa")``.
    """
    return bool(rewritten_sites(model)) or any(map(capture.is_captured, model.modules()))


def rewritten_sites(model: nn.Module) -> Mapping[str, Any]:
    """Module path -> the ``Site`` of a rewritten attention module of transformers, for each of them in ``model``.

    Raises ``TypeError`` if that is no module.
    """
    _require_module(model)
    route = _transformers()
    return {} if route is None else route.rewritten_sites(uncompiled(model))


def unmatched(model: nn.Module, seen: Iterable[str] = ()) -> tuple[str, ...]:
    """What the policy of a rewritten model says about modules of which none has a site.

    seen: paths of sites in graphs that were captured, which are known once they ran.
    """
    route = _transformers()
    found = [] if route is None else [(site.plans.policy, [site.path]) for site in route.installed(model)]
    found += [(part.policy, list(seen)) for part in capture.captures_of(model).values()]
    paths: dict[int, tuple[Policy, list[str]]] = {}  # parts of a model may be rewritten each by itself
    for policy, own in found:
        paths.setdefault(id(policy), (policy, []))[1].extend(own)
    return tuple(words for policy, own in paths.values() for words in unmatched_in(own, policy))


def uncompiled(model: Any) -> Any:
    """The module that ``torch.compile`` was given, whose paths are those of policies and plans."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def _transformers() -> ModuleType | None:
    """The route of transformers' models; None as long as no model of theirs can be in this process."""
    if sys.modules.get("transformers.modeling_utils") is None:
        return None
    # an optional package: all in there imports it
    from . import transformers

    return transformers


def _is_changed(model: nn.Module) -> bool:
    """Whether there is anything to restore in ``model``."""
    _require_module(model)
    route = _transformers()
    return bool(capture.installed(model)) or (route is not None and route.is_changed(model))


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={shown(model)}: must be a torch.nn.Module")


def _checked_policy(policy: Policy | None, options: dict[str, Any]) -> Policy:
    if policy is None:
        policy = Policy.from_options(options)
    elif not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r}: must be a Policy; give single options by name, e.g. budget=512")
    elif options:
        raise TypeError(f"policy and {', '.join(sorted(options))} were both given: put the options into the policy")
    check_policy(policy)
    return policy


def _no_graphs(model: nn.Module) -> str:
    return (
        f"cuda_graphs=True: {type(model).__name__} chooses its attention through transformers' AttentionInterface, so "
        "there is no graph of it to replay; allowed are torch.compile(model, backend='express', options="
        "{'cuda_graphs': True}), torch.cuda.make_graphed_callables of the rewritten model, or "
        "ExpressCache(model, graphs=True) for decoding"
    )


def _no_attention(model: nn.Module) -> str:
    is_there = importlib.util.find_spec("transformers") is not None
    installed = "" if is_there else " (not installed: pip install 'express-compile[transformers]')"
    return (
        f"model={type(model).__name__}: no attention found. Looked for modules that choose their attention by "
        f"transformers' AttentionInterface{installed}, and modules whose code calls scaled_dot_product_attention or "
        "holds a softmax and matrix products, whatever their names are; torch.compile(model, backend='express') looks "
        "at what a model computes instead of at its code"
    )
