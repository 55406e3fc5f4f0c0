"""transformers' attention function under our name: in eager code, and for decoding steps in compiled graphs.

Both prove, plan and run a call by :func:`_prove_and_run`. They differ in what they may know: eager code has numbers for
sizes and may record, watch and refuse; a decoding step in a graph may have symbolic sizes, and its plan holds for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _active_collector

from ...core.call import Call, Op
from ...core.method import METHODS
from ...core.plan import Plan
from ...core.shards import SEEDS, may_share_heads, seed_of, shard_of
from ...core.sites import recording
from ...core.spec import AttentionSpec, HeadShard, Mask
from ...kernels.launch import constant
from ...planning.choose import Question, answer, require
from ..tracers import cannot_trace, is_exporting, refuse_strict_export, tracer, untraced
from ..watched import sampled
from .layers import layer_of
from .masks import NAME, ProvenMask, make_mask
from .proof import EXTRAS, Given, Proof, is_proven, prove
from .sites import NEEDS_EAGER, Site, held, site_of, traced

Result = tuple[torch.Tensor, torch.Tensor | None]
Run = Callable[[Op, Call], Any]
"""Runs an op."""

_OF_STEP = ("scaling", "dropout", "sliding_window", "position_ids")  # what a decoding step in a graph goes by
_WEIGHTS = {
    True: "the call asks for attention weights (output_attentions=True): the model's own eager attention runs",
    False: "the call asks for attention weights (output_attentions=True), which the model's own attention does not "
    "give either: only attn_implementation='eager' does",
}


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *dropout: float,
    **arguments: Any,
) -> Result:
    """What transformers calls: ``[B, H, L, D]`` in, ``[B, Lq, H, Dv]`` out."""
    if dropout:  # kvpress' patch hands it on by place
        (arguments["dropout"],) = dropout
    given = Given(module, query, key, value, attention_mask, arguments)
    if not torch.compiler.is_compiling():
        known = site_of(module)
        if known is not None and known.left_exact and _form(known, given) in known.left_exact:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **arguments)
    if is_exporting():
        return _traced(given) if torch.compiler.is_dynamo_compiling() else _exported(given)
    if torch.compiler.is_compiling() and query.shape[2] == 1 and layer_of(key) is None and not _has_parts(module):
        return _step(given)
    return _run_eagerly(given)


def _site(given: Given) -> Site:
    site = site_of(given.module)
    if site is None:
        raise RuntimeError(
            f"{type(given.module).__name__} was sent to express_compile's attention but was never rewritten: it was "
            "added to a rewritten model, or its configuration was copied from one; call rewrite_attention on this model"
        )
    return site


def _prove_and_run(site: Site, given: Given, decide: Callable[[AttentionSpec], tuple[Plan, Run]]) -> Result:
    """A call as it is proven, decided and run: ``decide`` gives its plan, and what runs an op of ours."""
    proof = prove(site, given)
    spec = proof.spec(given)
    plan, run = decide(spec)
    if plan.verdict != "rewritten":
        return _exact_step(given, proof, spec) or _exact(site, given)
    key, value = proof.seen(given)
    seed = _seed_of_step(_seed(site.plans.policy.seed, given.query), spec, given.arguments)
    seed, options = seed_of(seed, spec.shard), METHODS[plan.method].part(plan.params, spec.shard)
    sinks = given.arguments["s_aux"] if spec.sinks else None
    call = Call(given.query, key, value, proof.padding, seed, spec.scale, site.layer, sinks=sinks, options=options)
    out, _ = run(METHODS[plan.method].op, call)
    return out.transpose(1, 2).contiguous(), None


# ---- in eager code -------------------------------------------------------------------------------------------------


@untraced
def _run_eagerly(given: Given) -> Result:
    if tracer() is not None:
        return _traced(given)
    if (layer := layer_of(given.key)) is not None:
        if _has_parts(given.module):
            raise RuntimeError("a part of a sequence (shard_sequence) cannot be held in a cache; use_cache=False")
        out = layer.attend(given, wants_weights(given))
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    site, module = _site(given), given.module
    H, (_, H_kv, _, D) = given.query.shape[1], given.key.shape
    site.shard = shard_of(module, H, H_kv, D)
    if site.shard is not None:
        given = given._replace(shard=site.shard)
    return _run_planned(site, given) if site.spread is None else site.spread(Part(site, given))


def _run_planned(site: Site, given: Given) -> Result:
    shadow = None if given.module.training else site.shadow

    def decide(spec: AttentionSpec) -> tuple[Plan, Run]:
        if wants_weights(given):
            plan = Plan("exact", "refused", _WEIGHTS[site.given == "eager"])
        else:
            plan = site.plans(site.path, spec, given.gradient)
        plan = plan if shadow is None else shadow.follow(plan)
        site.report(plan, spec)
        require([(site.path, plan)], site.plans.policy)
        return plan, lambda op, call: sampled(shadow, plan, spec, op, call)

    return _prove_and_run(site, given, decide)


@dataclass(frozen=True)
class Part:
    """A call that has a part of its sequence, for :attr:`Site.spread`."""

    site: Site
    given: Given

    @cached_property
    def proof(self) -> Proof:
        """What is proven about it, as if the part were all."""
        return prove(self.site, self.given)

    @property
    def wants_weights(self) -> bool:
        """Whether somebody wants its attention weights."""
        return wants_weights(self.given)

    @property
    def seed(self) -> torch.Tensor:
        """The seed for its heads."""
        return seed_of(_seed(self.site.plans.policy.seed, self.given.query), self.given.shard)

    def run(self, inputs: Sequence[torch.Tensor], shard: HeadShard) -> Result:
        """The call with query, key and value of all tokens for some heads, as it is planned: plain causal, or without a
        mask, as the part is."""
        query, key, value = inputs
        module, causal, n = self.given.module, self.proof.mask.causal, key.shape[2]
        device = {"device": query.device, "config": module.config}
        mask = make_mask(query.shape[0], n, n, **device) if causal else None
        arguments = {**self.given.arguments, "is_causal": causal, "position_ids": None}
        return _run_planned(self.site, Given(module, query, key, value, mask, arguments, shard))


def _has_parts(module: Any) -> bool:
    site = site_of(module)
    return site is not None and site.spread is not None


# ---- in compiled graphs --------------------------------------------------------------------------------------------


def _step(given: Given) -> Result:
    """A decoding step that Dynamo traces: generate() compiles those over a StaticCache by itself."""
    site, module, arguments = site_of(given.module), given.module, given.arguments
    assert site is not None
    if (
        any(arguments.get(name) is not None for name in (*EXTRAS, *NEEDS_EAGER))
        or wants_weights(given)
        or isinstance(arguments.get("scaling"), torch.Tensor)
        or site.shadow is not None
        or site.exact == "eager"
    ):
        return _exact(site, given)
    facts = given.causal, getattr(module, "num_key_value_groups", 1), module.training
    named = [arguments.get(name) for name in _OF_STEP]
    return _step_in_graph(site.token, given.query, given.key, given.value, given.mask, facts, *named), None


@torch.compiler.allow_in_graph
def _step_in_graph(
    token: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    facts: tuple[bool, int, bool],
    *named: Any,
) -> torch.Tensor:
    """One call in Dynamo's graph; what it stands for is planned and written when AOTAutograd looks into it.

    ``facts`` of the module: whether it is causal, its query heads per key head, and whether it is in training mode;
    ``named``: its arguments of the names ``_OF_STEP``. Then sizes may be symbolic, so a plan holds for all of them, as
    in a graph that the backend rewrites.
    """
    site, (causal, groups, training) = traced(token), facts
    arguments = {name: x for name, x in zip(_OF_STEP, named, strict=True) if x is not None}
    config = SimpleNamespace(_attn_implementation_internal=NAME)  # to one query, eager attention and sdpa are the same
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=causal, training=training, config=config)
    given = Given(module, query, key, value, mask, {"is_causal": causal, **arguments}, site.shard)

    def decide(spec: AttentionSpec) -> tuple[Plan, Run]:
        question = Question(module=site.path, spec=spec, gradient=given.gradient, graphs=True)
        return answer(question, site.plans.policy), lambda op, call: call.run(op)

    return _prove_and_run(site, given, decide)[0]


# ---- in exported and traced programs -------------------------------------------------------------------------------


@untraced
def _exported(given: Given) -> Result:
    """A call in a program that torch.export makes; sizes may be symbols, and then the plan holds for all of them."""
    site = _site(given)
    if layer_of(given.key) is not None:
        raise RuntimeError(f"{site.path}: an ExpressCache cannot become a part of an exported program; use_cache=False")
    if site.spread is not None:
        raise RuntimeError(
            f"{site.path}: a part of a sequence (shard_sequence) cannot become a part of an exported program"
        )

    def decide(spec: AttentionSpec) -> tuple[Plan, Run]:
        plan = answer(Question(module=site.path, spec=spec, gradient=given.gradient), site.plans.policy)
        if wants_weights(given):
            plan = Plan("exact", "refused", _WEIGHTS[site.given == "eager"])
        site.report(plan, spec)
        require([(site.path, plan)], site.plans.policy)
        return plan, lambda op, call: call.run(op)

    return _prove_and_run(site, given, decide)


def _traced(given: Given) -> Result:
    """A call that is traced into a program that keeps what is exact by its policy, and cannot keep the rest."""
    site, name = site_of(given.module), type(given.module).__name__
    if site is None or site.spread is not None or site.methods != ("exact",):
        refuse_strict_export(name)
        raise RuntimeError(cannot_trace(name, tracer() or "torch.jit"))
    return _exact(site, given)


# ---- exactly -------------------------------------------------------------------------------------------------------


def _exact_step(given: Given, proof: Proof, spec: AttentionSpec) -> Result | None:
    """A step of decoding by our own kernel, which needs no dense mask and no copies of heads, and leaves alone what
    is not filled; None where that is not known to be the same, or the call wants more than the result."""
    tensors, op = (given.query, given.key, given.value), METHODS["exact"].step(spec)
    if (
        op is None
        or (given.mask is None and not given.query.is_cuda)  # PyTorch reads all there is, and nothing else
        or (given.eager and spec.Lq > 1 and spec.mask.padding)  # eager attention gives padded queries a mean
        or given.gradient is not None
        or wants_weights(given)
        or _is_transformed()
        or any(is_traceable_wrapper_subclass(x) for x in tensors)
    ):
        return None
    key, value = proof.seen(given)
    out = op(given.query, key, value, proof.padding, spec.scale)
    return out.transpose(1, 2).contiguous(), None


def _exact(site: Site, given: Given) -> Result:
    """transformers' own attention, with exactly the arguments it would have had; in place of eager attention sdpa, with
    arguments that say the same to it."""
    module, query, key, value, mask, arguments, _ = given
    flag = given.eager and is_proven(mask) and mask.proven == Mask(causal=True)
    if isinstance(mask, ProvenMask):
        mask = mask.exact()
    weights = site.given == "eager" and site.eager is not None and wants_weights(given)
    if site.exact == "sdpa" and not weights and all(arguments.get(name) is None for name in NEEDS_EAGER):
        if given.eager:  # sdpa has faster kernels where no mask but a flag says what is hidden
            mask = None if flag else _additive(query, key, mask, False)
            arguments = {**arguments, "is_causal": flag}
        if not torch.compiler.is_compiling() and (form := _form(site, given)) is not None:
            site.leave_exact(form)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **arguments)
    # sdpa has no soft-cap and no sinks: some versions raise, others silently leave them out
    if site.eager is None:
        raise RuntimeError(f"{site.path!r}: {type(module).__module__} has no eager_attention_forward to fall back to")
    if site.exact == "sdpa" or mask is not None:
        mask = _additive(query, key, mask, given.causal)
    return site.eager(module, query, key, value, mask, **arguments)


def _is_transformed() -> bool:
    """Whether a transformation of torch.func, or forward-mode differentiation, is at work."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _form(site: Site, given: Given) -> tuple[Any, ...] | None:
    """All that decides about a call without a mask, without gradients and with plain arguments: where such calls were
    left exact by sdpa, nothing is proven again. None for other calls, for steps of decoding, which have another length
    each time, and where somebody looks.

    Short calls of a model, which are mostly left exact, wait for the host.
    """
    module, (query, key, value), arguments = given.module, given[1:4], given.arguments
    if (
        given.mask is not None
        or site.shadow is not None
        or site.spread is not None
        or site.shard is not None
        or query.shape[2] == 1
        or not type(query) is type(key) is type(value) is torch.Tensor
        or module.training
        or torch.is_grad_enabled()
        or tracer() is not None
        or recording() is not None
        or layer_of(key) is not None
        or given.eager
        or wants_weights(given)
        or may_share_heads(module)
        or _is_transformed()
    ):
        return None
    others = tuple([item for item in arguments.items() if item[0] != "position_ids"])
    if not all(x is None or type(x) in (bool, int, float, str) for _, x in others):
        return None
    return query.shape, key.shape, value.shape, key.stride(), query.dtype, query.device, given.causal, others


def wants_weights(given: Given) -> bool:
    """Whether somebody wants the attention weights of a call: by argument, by configuration, or by collecting what
    modules return."""
    if given.arguments.get("output_attentions") or held(given.module.config, "_output_attentions"):
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


# ---- random numbers ------------------------------------------------------------------------------------------------


def _seed_of_step(seed: torch.Tensor, spec: AttentionSpec, arguments: dict[str, Any]) -> torch.Tensor:
    """A cache that evicts has as many keys at every step: there the position of the last token counts, where the model
    passes it on."""
    window, positions = arguments.get("sliding_window"), arguments.get("position_ids")
    if spec.Lq != 1 or spec.mask.window is not None or not window or window > spec.Lk or positions is None:
        return seed
    return (seed + positions.flatten()[-1]) & SEEDS


def _seed(seed: int | None, query: torch.Tensor) -> torch.Tensor:
    if seed is None:
        return torch.randint(0, 2**31 - 1, (), dtype=torch.int64, device=query.device)
    if type(query) is not torch.Tensor:  # such as a fake tensor, which mixes with no others
        return torch.full((), seed, dtype=torch.int64, device=query.device)
    return _fixed_seed(seed, query.device)


@lru_cache(maxsize=64)
def _fixed_seed(seed: int, device: torch.device) -> torch.Tensor:
    return constant(np.array(seed, np.int64), device)
