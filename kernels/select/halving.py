"""Halving: of each pair of neighbouring rows keep one, so that the kept rows stand for all of them.

Rows ``x = (k, v)`` of one bucket are compared with the attention kernel of Thinformer and Express,
``kappa(x, x') = exp(scale * <k, k'>) * (<v, v'> + v_max**2)``, ``v_max = max |v|`` over the bucket
(*Low-Rank Thinning*, arXiv 2502.12063; *Express Language Modeling*, arXiv 2606.10944). With
``f_i = kappa(x_2i, .) - kappa(x_2i+1, .)`` and ``D[i, j] = <f_i, f_j>`` a walk over the pairs keeps

    alpha_i = - sum_{j<i} sign_j D[j, i],    sign_j = +1 if pair j kept its first row, -1 if its second,

and keeps the second row of pair i with probability ``clip((1 - alpha_i / a_i) / 2, 0, 1)`` where
``a_i = gain * sqrt(D[i, i]) * max_{j<=i} sqrt(D[j, j])``. A rule is little more than its ``gain``:

* ``kernel``: kernel halving KH(delta), ``gain = 1/2 + log(2 * rows / delta)``;
* ``balanced``: ``gain = 0``, the sign that shrinks ``|alpha_i|``, on centred keys and a flattened kernel;
* ``uniform``: ``gain = inf``, a fair coin per pair.

A pair with ``a_i = 0`` because its rows are alike, or with ``alpha_i = 0`` (the first one always), is a fair
coin. Every rule is odd in the signs drawn so far, hence keeps every row with probability exactly 1/2.

The centre of the keys, ``v_max`` and the shift inside ``exp`` come from the bucket alone: nothing looks ahead.
Error law: see ``express``. Supports any head sizes, float16, bfloat16, float32 (and float64 in the reference).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch._higher_order_ops.while_loop import while_loop_op
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from express_compile.core.options import Kind
from express_compile.core.plain import number

from ..launch import Random


@dataclass(frozen=True)
class HalvingRule:
    """One halving rule.

    gain(rows, delta): the factor of the thresholds ``a_i`` for a bucket of ``rows`` rows and failure
        probability ``delta``; 0 is greedy, infinity a fair coin.
    centre: subtract the mean key of the bucket first (softmax does not see it, the kernel does).
    flatten: factor of the exponent inside the kernel; below 1 the rule sees farther neighbours.
    """

    name: str
    gain: Callable[[int, float], float]
    centre: bool = False
    flatten: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < number("flatten", self.flatten, int, float) < math.inf:
            raise ValueError(f"flatten={self.flatten!r}: must be above 0 and finite")


RULES: dict[str, HalvingRule] = {}


def register_rule(rule: HalvingRule) -> HalvingRule:
    """Make ``rule`` available as ``Policy(halving=rule.name)``. Raises ``ValueError`` if the name is taken."""
    if RULES.get(rule.name, rule) is not rule:
        raise ValueError(f"halving rule {rule.name!r} is registered already; choose another name")
    RULES[rule.name] = rule
    return rule


def get_rule(name: str, flatten: float = 0.0) -> HalvingRule:
    """The registered rule, with another ``flatten`` unless that is 0.

    Raises ``ValueError`` that lists the rules for an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"halving={name!r}: allowed are {', '.join(RULES)}")
    return RULES[name] if flatten == 0 else replace(RULES[name], flatten=flatten)


def _name(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: must be the name of a halving rule")
    return value


RULE = Kind("a halving rule", "str", _name)
"""Which rules there are is checked when one is looked for: more may have been registered by then."""

register_rule(HalvingRule("kernel", lambda rows, delta: 0.5 + math.log(2.0 * rows / delta)))
register_rule(HalvingRule("balanced", lambda rows, delta: 0.0, centre=True, flatten=0.25))
register_rule(HalvingRule("uniform", lambda rows, delta: math.inf))


def shortened(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the 11 significant bits of TF32 (ties away from 0), any other dtype as it is.

    Rows are compared with this many bits and kept with all they have.
    """
    if x.dtype != torch.float32:
        return x
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


class Decider(NamedTuple):
    """How all buckets are halved: by which rule, at which scale of products of keys, and with which random numbers."""

    rule: HalvingRule
    scale: float
    random: Random


def halving_matrix(
    key: torch.Tensor, value: torch.Tensor, scale: float, centre: bool = False, flatten: float = 1.0
) -> torch.Tensor:
    """``D[..., i, j] = <f_i, f_j>`` up to one positive factor per bucket (the rules are scale-free).

    ``key`` ``[..., 2m, D]`` and ``value`` ``[..., 2m, Dv]`` give ``[..., m, m]``; computed in float32 from
    :func:`shortened` rows, in float64 for float64 inputs.
    """
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    k, v = shortened(key).to(dtype), shortened(value).to(dtype)
    if centre:
        k = k - k.mean(-2, keepdim=True)
    gram = (k @ k.mT) * (scale * flatten)
    shift = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]  # the largest entry is on the diagonal
    v_max = v.abs().amax((-2, -1), keepdim=True)
    kappa = torch.exp(gram - shift) * (v @ v.mT + v_max * v_max)
    rows = kappa[..., 0::2, :] - kappa[..., 1::2, :]
    return rows[..., 0::2] - rows[..., 1::2]


def keep_second_probability(alpha: torch.Tensor, product: torch.Tensor, gain: float) -> torch.Tensor:
    """Probability of keeping the second row, from ``alpha_i`` and ``product = b_i * max_{j<=i} b_j``."""
    ratio = torch.where(product > 0, alpha / (gain * product), torch.zeros_like(alpha))
    return torch.where(alpha == 0, 0.5, (0.5 - 0.5 * ratio).clamp(0.0, 1.0))


def walk(
    matrix: torch.Tensor, draws: torch.Tensor, gain: float, decisions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The walk over the pairs: ``matrix`` ``[..., m, m]``, ``draws`` ``[..., m]`` uniform in [0, 1).

    Returns ``(second, alpha, product)``, each ``[..., m]``: which pairs keep their second row, and what each
    decision was based on. With ``decisions`` the walk follows those instead, so that decisions made elsewhere
    can be judged one by one: ``second`` is then what this walk would have decided after the same past.
    """
    b = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    product = b * b.cummax(-1).values
    alpha = torch.zeros_like(b)
    if decisions is None and get_proxy_mode() is not None:
        return _walk_in_program(matrix.triu(1), draws.expand_as(b), product, gain)
    second = torch.empty_like(b, dtype=torch.bool)
    for i in range(b.shape[-1]):
        keep = draws[..., i] < keep_second_probability(alpha[..., i], product[..., i], gain)
        second[..., i] = keep
        followed = keep if decisions is None else decisions[..., i]
        sign = 1.0 - 2.0 * followed.to(alpha.dtype)
        # alpha_i itself is final once pair i is decided: only later pairs still change
        alpha[..., i + 1 :] -= sign[..., None] * matrix[..., i, i + 1 :]
    return second, alpha, product


def _walk_in_program(
    after: torch.Tensor, draws: torch.Tensor, product: torch.Tensor, gain: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`walk` as one operation of a program that is traced; ``after`` is the matrix above its diagonal."""
    pairs = product.shape[-1]

    def goes_on(i: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return i < pairs

    def step(
        i: torch.Tensor, second: torch.Tensor, alpha: torch.Tensor, after: torch.Tensor, draws: torch.Tensor,
        product: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        at = i.reshape(1)
        keep = draws.index_select(-1, at) < keep_second_probability(
            alpha.index_select(-1, at), product.index_select(-1, at), gain
        )
        sign = 1.0 - 2.0 * keep.to(alpha.dtype)
        here = torch.arange(pairs, device=alpha.device) == i
        return i + 1, torch.where(here, keep, second), alpha - sign * after.index_select(-2, at).squeeze(-2)

    start = torch.zeros((), dtype=torch.int64, device=product.device)
    carried: Any = (start, torch.zeros_like(product, dtype=torch.bool), torch.zeros_like(product))
    _, second, alpha = while_loop_op(goes_on, step, carried, (after, draws.contiguous(), product))
    return second, alpha, product


def halve_reference(
    key: torch.Tensor, value: torch.Tensor, draws: torch.Tensor, rule: HalvingRule, delta: float, scale: float
) -> torch.Tensor:
    """Which row of each pair is kept: ``[..., m]`` bool, True for the second one. The definition of correct.

    ``key`` ``[..., 2m, D]`` and ``value`` ``[..., 2m, Dv]`` are the rows of a bucket in order, ``draws``
    ``[..., m]`` are uniform numbers (which may be broadcast), ``delta`` is the failure probability of this halving.
    """
    gain = rule.gain(key.shape[-2], delta)
    if math.isinf(gain):
        return (draws < 0.5).expand(*key.shape[:-2], draws.shape[-1])
    return walk(halving_matrix(key, value, scale, rule.centre, rule.flatten), draws, gain)[0]
