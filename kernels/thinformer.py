"""Thinformer: attention without a causal mask over a coreset of ``s`` of the keys.

    out_i = sum_{j in C} exp(scale <q_i, k_j>) v_j / sum_{j in C} exp(scale <q_i, k_j>)

C is what KH-Compress leaves of the keys: all of them are halved again and again in buckets that double, until ``s``
are left, all of equal weight (*Low-Rank Thinning*, arXiv 2502.12063). A sequence whose length L is not ``s`` times a
power of two is stretched to the next such length n' first: place i holds token ``floor((i + u) L / n')`` with one
uniform u per sequence and head, so that every token is expected equally often and none is dropped systematically.
(The paper keeps every (L / 4**p)-th token instead.) Sequences of at most ``s`` tokens get exact attention.

Error law (the paper's, for keys of low rank): falls like ``1 / s`` up to logarithms, that of a uniform sample like
``1 / sqrt(s)``. Of a policy, ``budget``, ``halving``, ``seed`` and ``min_length`` count; there are no sinks, no window
and no protected rows.

Supports self and cross attention, grouped queries, Dv != D, any length, key padding on any side (a padded key is
never selected; a sequence without any real key gives 0, as SDPA does). Refuses causal masks, windows, biases and
dropout. On the CPU in float16, bfloat16, float32 and float64; there is no CUDA path yet.
"""

from __future__ import annotations

import functools
import math

import torch

from express_compile.method import Method, register
from express_compile.spec import AttentionSpec, Policy, Refusal, floor_power_of_two

from ._op import attention_fake, check_qkv, define_op
from ._triton import philox_uniform
from .express import gather_rows, halve_all_reference, real_first, sequence_counter
from .halving import HalvingRule, get_rule
from .schedule import STRETCH, Schedule, budget_options, compress_schedule, rows_of, stage
from .segments_backward import accumulate_rows


@functools.lru_cache(maxsize=64)
def make_schedule(Lk: int, s: int) -> Schedule:
    """The halvings of ``Lk > s`` keys, stretched to ``s`` times a power of two."""
    return compress_schedule(s << (-(-Lk // s) - 1).bit_length(), s)


def select(
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    s: int,
    rule: HalvingRule,
    scale: float,
    seed: torch.Tensor,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The coreset: token index ``[B, H_kv, R]``, and which of its rows are hidden, bool ``[B, R]`` or None.

    ``key`` ``[B, H_kv, Lk, D]``, ``value`` ``[B, H_kv, Lk, Dv]``, ``padding`` bool ``[B, Lk]`` or None; ``R`` is
    ``min(s, Lk)``.
    """
    B, H, Lk = key.shape[:3]
    device, rows = key.device, min(s, Lk)
    place = torch.arange(rows, device=device)
    if padding is None:
        order = torch.arange(Lk, device=device).expand(B, Lk)
        length = torch.full((B,), Lk, device=device)
        hidden = None
    else:
        order = real_first(padding)
        length = padding.sum(1)
        hidden = (length <= rows)[:, None] & (place >= length[:, None])
    whole = order[:, None, :rows].expand(B, H, rows)
    if Lk <= s:
        return whole, hidden
    schedule = make_schedule(Lk, s)
    n = schedule.tokens
    u = philox_uniform(seed, layer, torch.zeros((), device=device, dtype=torch.int64), 0, stage(0, STRETCH),
                       sequence_counter(B, H, device))  # fmt: skip
    rank = (torch.arange(n, device=device).double() + u.double()[..., None]) * length[:, None, None] / n
    rank = torch.minimum(rank.long(), (length[:, None, None] - 1).clamp(min=0))
    arena = torch.empty(B, H, schedule.size, dtype=torch.int64, device=device)
    arena[:, :, :n] = order[:, None].expand(B, H, Lk).gather(2, rank)
    halve_all_reference(arena, key, value, schedule, rule, scale, seed, layer)
    return torch.where((length <= rows)[:, None, None], whole, arena[:, :, -s:]), hidden


def _dense(query, key, value, hidden, scale) -> tuple[torch.Tensor, ...]:
    """Queries ``[B, H_kv, g, Lq, D]``, keys and values ``[B, H_kv, 1, R, .]``, weights and log-sum-exp."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = query.unflatten(1, (key.shape[1], -1)).to(dtype), key.to(dtype)[:, :, None], value.to(dtype)[:, :, None]
    if hidden is not None:
        k, v = (x.masked_fill(hidden[:, None, None, :, None], 0) for x in (k, v))
    scores = (q * scale) @ k.mT
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None, None], -math.inf)
    lse = scores.logsumexp(-1)
    return q, k, v, (scores - lse.clamp(min=torch.finfo(dtype).min)[..., None]).exp(), lse


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of ``query`` ``[B, H, Lq, D]`` over the rows of ``key`` ``[B, H_kv, R, D]`` and ``value`` that
    are not ``hidden`` (bool ``[B, R]``): ``out`` ``[B, H, Lq, Dv]``, ``lse`` ``[B, H, Lq]`` in float32 (or float64).

    Where every row is hidden ``out`` is 0 and ``lse`` minus infinity. Hidden rows may hold anything, NaN too.
    """
    _, _, v, weights, lse = _dense(query, key, value, hidden, scale)
    return (weights @ v).flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``attend`` for query, key and value, in float32 (float64 for float64 inputs)."""
    q, k, v, weights, _ = _dense(query, key, value, hidden, scale)
    grad = grad.unflatten(1, (key.shape[1], -1)).to(q)
    d_weights = grad @ v.mT
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
    return (d_scores @ k).flatten(1, 2), (d_scores.mT @ q).sum(2), (weights.mT @ grad).sum(2)


# ---------------------------------------------------------------------------------------------------------------
# Op


def _resolve(s, fraction, g, halving, flatten, min_length, Lk) -> tuple[int, HalvingRule]:
    """Rows of the coreset of ``Lk`` keys, and the rule; all keys for fewer than ``min_length``."""
    s = max(4, floor_power_of_two(int(2**g * math.sqrt(Lk))) if g >= 0 else rows_of(s, fraction, Lk))
    return max(s, Lk) if Lk < min_length else s, get_rule(halving, flatten)


def _select(query, key, value, padding, seed, scale, layer, options):
    check_qkv(query, key, value, padding, causal=False)
    s, rule = _resolve(**options, Lk=key.shape[2])
    return select(key, value, padding, s, rule, scale, seed, layer)


def _body(query, key, value, padding, seed, scale, layer, **options):
    index, hidden = _select(query, key, value, padding, seed, scale, layer, options)
    out, lse = attend(query, gather_rows(key, index), gather_rows(value, index), hidden, scale)
    return out.contiguous(), lse.contiguous()


def _backward_body(grad, query, key, value, padding, seed, scale, layer, **options):
    index, hidden = _select(query, key, value, padding, seed, scale, layer, options)
    rows = gather_rows(key, index), gather_rows(value, index)
    d_query, *parts = attend_backward(grad, query, *rows, hidden, scale)
    grads = [d_query.to(query.dtype)]
    for x, part in zip((key, value), parts, strict=True):
        target = part.new_zeros(x.shape)
        accumulate_rows(target, index, part)
        grads.append(target.to(x.dtype))
    return tuple(g.contiguous() for g in grads)


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    *tensors, scale, layer = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale, ctx.layer, ctx.options = scale, layer, keyword_only_inputs
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    grads = BACKWARD(grad, *ctx.saved_tensors, ctx.scale, ctx.layer, **ctx.options)
    return *grads, None, None, None, None


_PARAMETERS = (
    "Tensor? padding, Tensor seed, float scale, int layer, *, int s, float fraction, int g, str halving, "
    "float flatten, int min_length"
)
OP = define_op(
    "thinformer",
    f"(Tensor query, Tensor key, Tensor value, {_PARAMETERS}) -> (Tensor, Tensor)",
    _body,
    attention_fake,
    _autograd,
    _setup_context,
)
BACKWARD = define_op(
    "thinformer_backward",
    f"(Tensor grad, Tensor query, Tensor key, Tensor value, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
    _backward_body,
    lambda grad, query, key, value, *args, **options: tuple(x.new_empty(x.shape) for x in (query, key, value)),
)


# ---------------------------------------------------------------------------------------------------------------
# Method


def _refuse(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    mask, reason = spec.mask, None
    if mask.unknown is not None:
        reason = f"its mask is not proven: {mask.unknown}"
    elif mask.causal:
        reason = "it is causal; Thinformer would let queries see what comes after them"
    elif mask.window is not None:
        reason = f"it has a window of {mask.window} tokens"
    elif spec.dropout_p > 0:
        reason = f"it drops attention weights (dropout_p={spec.dropout_p}); call model.eval()"
    elif spec.device != "cpu":
        reason = f"there is no path for device {spec.device} yet"
    return None if reason is None else Refusal("thinformer", reason)


def _params(spec: AttentionSpec | None, policy: Policy) -> dict:
    own = METHOD.own_options(policy)
    if not isinstance(own["g"], int) or own["g"] < -1:
        raise ValueError(
            f"g={own['g']!r}: must be an integer, 0 or more (2**g * sqrt(n) rows), or -1 to use the budget"
        )
    params = {
        **budget_options(policy),
        "g": own["g"],
        "halving": policy.halving,
        "flatten": own["flatten"],
        "min_length": policy.min_length or 0,
    }
    _resolve(**params, Lk=1 << 20)
    return params


METHOD = register(
    Method(
        name="thinformer",
        summary="attention without a causal mask over s of the keys, thinned by halving",
        supports="self and cross attention, GQA, Dv != D, key padding, any length, on the CPU",
        refuses="causal masks, sliding windows, biases, dropout, CUDA (not built yet)",
        refuse=_refuse,
        params=_params,
        options={"g": -1, "flatten": 0.0},
    )
)
