"""Point the attention modules of one model to our attention, and back: by copies of its configurations.

The configurations that a module had are kept in the module itself, under ``_ORIGINALS``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...core.plan import Plan
from ...core.policy import Policy
from ...core.spec import layer_key
from ..module_code import calls_interface, depends_on_name
from .masks import NAME, NAMES, PAGED
from .sites import SITE, Plans, Site, is_in_force, name_before, site_of, with_owners

_ORIGINALS = "_express_compile_originals"


def install(model: nn.Module, sites: dict[str, tuple[Any, str]], policy: Policy) -> None:
    """Give every attention module of ``sites``, as :func:`~.sites.find_sites` found them, our attention."""
    plans = Plans(policy)
    for path, (module, exact) in sites.items():
        function = calls_interface(type(module))
        assert function is not None, "what is found calls it"
        site = Site(
            path,
            layer_key(path),
            exact,
            name_before(module.config),
            eager=function.__globals__.get("eager_attention_forward"),
            source=f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}",
            plans=plans,
            methods=plans.methods(path),
        )
        module.__dict__[SITE] = site
        module.register_forward_pre_hook(_check_in_force)
    _point_configs(model, sites)


def is_changed(model: nn.Module) -> bool:
    """Whether there is anything to undo: sites, or, where another model shared them and was restored, configurations
    alone."""
    return any(SITE in module.__dict__ or _ORIGINALS in module.__dict__ for module in model.modules())


def remove(model: nn.Module) -> None:
    """Undo :func:`install`; changes that were made in the copies since are made in the configurations of before."""
    pointed = {module: module.__dict__.pop(_ORIGINALS) for module in model.modules() if _ORIGINALS in module.__dict__}
    for copies in {id(configs.copies): configs.copies for configs in pointed.values()}.values():
        for copied in copies:
            copied.bring_back()
    for module, configs in pointed.items():
        configs.restore(module)
    for module in model.modules():
        if module.__dict__.pop(SITE, None) is not None:
            hooks = module._forward_pre_hooks
            for number in [number for number, hook in hooks.items() if hook is _check_in_force]:
                del hooks[number]


@contextmanager
def renamed(model: nn.Module, name: str) -> Iterator[None]:
    """While active, the configurations of a rewritten model name this attention instead of ours."""
    pointed = [module.__dict__[_ORIGINALS] for module in model.modules() if _ORIGINALS in module.__dict__]
    copies = {id(copied.copy): copied.copy for configs in pointed for copied in configs.copies}.values()
    before = [(config, config._attn_implementation) for config in copies]
    before = [(config, given) for config, given in before if given in NAMES.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, given in before:
            if config._attn_implementation == name:
                config._attn_implementation_internal = given


def _point_configs(model: nn.Module, sites: dict[str, tuple[nn.Module, str]]) -> None:
    """Give the model copies of its configurations that name our attention; keep the originals on each module."""
    memo: dict[int, Any] = {}  # one for all, so that shared configurations stay shared
    changes: list[tuple[nn.Module, dict[str, Any]]] = []
    for path, module, owner in with_owners(model):
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
            original._attn_implementation_internal = name_before(original)  # it may be copied from a rewritten model
            if copied._attn_implementation is not None:
                copied._attn_implementation_internal = NAMES.get(name_before(original), NAME)
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
            if value != PAGED and (name not in self.before or not _is_equal(value, self.before[name])):
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


def let_ask_for_weights() -> None:
    """Let configurations ask for attention weights under our name as under the one before.

    transformers allows ``output_attentions`` under the name "eager" only, when it is set and when a configuration is
    saved, and has no place to say so of other names. Nothing changes for configurations that are not ours.
    """
    known = vars(PreTrainedConfig)["output_attentions"]

    def set_output_attentions(self: Any, value: bool | None) -> None:
        if self._attn_implementation in NAMES.values():
            _check_weights(self, value)
            self._output_attentions = value
        else:
            known.fset(self, value)

    PreTrainedConfig.output_attentions = known.setter(set_output_attentions)  # type: ignore[method-assign]
    check = vars(PreTrainedConfig).get("validate_output_attentions")
    if check is None:
        return

    @wraps(check)
    def validate_output_attentions(self: Any) -> None:
        if self._attn_implementation in NAMES.values():
            _check_weights(self, self.output_attentions)
        else:
            check(self)

    PreTrainedConfig.validate_output_attentions = validate_output_attentions  # type: ignore[method-assign]
    classes = [PreTrainedConfig]
    for cls in classes:  # each has made a list of its checks when it was made
        classes += cls.__subclasses__()
        checks = vars(cls).get("__class_validators__", [])
        checks[:] = [validate_output_attentions if x is check else x for x in checks]


def _check_weights(config: Any, value: bool | None) -> None:
    """``ValueError`` where a rewritten model is asked for weights that its own attention does not give."""
    if value and (given := name_before(config)) != "eager":
        raise ValueError(
            f"output_attentions={value!r}: the model ran {given!r} attention before rewrite_attention, which gives no "
            "weights; only attn_implementation='eager' does: restore_attention(model), "
            "model.set_attn_implementation('eager'), and rewrite it again"
        )


def _state(config: Any) -> dict[str, Any]:
    """What a configuration holds, without configurations inside."""
    return {name: deepcopy(x) for name, x in config.__dict__.items() if not isinstance(x, PreTrainedConfig)}


def _is_equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # tensors and arrays
        return False


def _check_in_force(module: Any, args: tuple[Any, ...]) -> None:
    """Say that a rewritten module is told to run other attention; a hook, for our attention is not called then."""
    if torch.compiler.is_compiling() or is_in_force(module):
        return
    site = site_of(module)
    if site is None:
        return
    name = module.config._attn_implementation
    reason = (
        f"after rewrite_attention the attention of the model was set to {name!r}, which runs instead; "
        f"rewrite_attention(model, ...) or set_attn_implementation({NAMES.get(site.given, NAME)!r}) rewrites it again"
    )
    if site.plans.policy.strict:
        raise ValueError(f"strict=True: {site.path or '(root)'}: {reason}")
    site.report(Plan("exact", "refused", reason))
    if not site.plans.said:
        site.plans.said = True
        warnings.warn(f"{site.path or type(module).__name__}: {reason}", RuntimeWarning, stacklevel=5)
