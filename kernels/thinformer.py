"""Thinformer: attention without a causal mask over a coreset of ``s`` of the keys.

    out_i = sum_{j in C} exp(scale <q_i, k_j>) v_j / sum_{j in C} exp(scale <q_i, k_j>)

C is what KH-Compress leaves of the keys: all of them are halved again and again in buckets that double, until ``s``
are left, all of equal weight (*Low-Rank Thinning*, arXiv 2502.12063). A sequence whose length L is not ``s`` times a
power of two is stretched to the next such length n' first: place i holds token ``floor((i + u) L / n')`` with one
uniform u per head, so that every token is expected equally often and none is dropped systematically.
(The paper keeps every (L / 4**p)-th token instead.) Sequences of at most ``s`` tokens get exact attention.

Error law (the paper's, for keys of low rank): falls like ``1 / s`` up to logarithms, that of a uniform sample like
``1 / sqrt(s)``. Measured on keys of rank 2 with bounded scores: ``s**-0.9``. On the keys of real models it falls no
faster than that of a uniform sample and is 1 to 10% below it (examples/bench/results/thinformer-error.png).

Of a policy, ``budget``, ``halving``, ``seed`` and ``min_length`` count; there are no sinks, no window and no
protected rows.

Supports self and cross attention, grouped queries, Dv != D, any length, key padding on any side (a padded key is
never selected nor counted; a sequence without any real key gives 0, as SDPA does), float16, bfloat16, float32 (float64
in the reference). Refuses causal masks, windows, biases and dropout.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch

from express_compile.core import cost as c
from express_compile.core.call import Call
from express_compile.core.method import Method, Refusal, register
from express_compile.core.options import BUDGET, NUMBER, Kind, Options, option
from express_compile.core.plain import number
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, floor_power_of_two, known_equal

from .attend import hopper
from .attend.segments import Sources, dense_table, segment_attention
from .attend.segments_backward import accumulate_rows, segment_gradients
from .exact import exact_attention
from .express import MIN_QUERIES, gather_rows, halve_all_reference
from .launch import Random, draw_uniform, jit, launch, philox_uniform, require_triton, tl
from .op import define_attention, no_kernel
from .padding import real_first
from .select.halving import RULE, Decider, get_rule
from .select.schedule import STRETCH, Schedule, budget_options, compress_schedule, rows_of, stage
from .select.thinning import describe_launches, thin

MAX_G = 30  # 2**30 sqrt(n) rows are all keys of any sequence


def make_schedule(Lk: int, s: int) -> Schedule:
    """The halvings of ``Lk > s`` keys, stretched to ``s`` times a power of two."""
    return compress_schedule(s << (-(-Lk // s) - 1).bit_length(), s)


def pieces(rows: Callable[[int], int], longest: int) -> list[tuple[int, int, int]]:
    """What becomes of sequences of up to ``longest`` tokens: of those of ``first`` to ``last`` tokens ``s`` are kept,
    or all for 0, as a list of ``(first, last, s)``.

    ``rows(L)`` of L tokens are kept, all if that is as many. From one power of two to the next it must not fall.
    """

    def kept(L: int) -> int:
        return s if (s := rows(L)) < L else 0

    found: list[tuple[int, int, int]] = []
    for k in range(longest.bit_length()):
        first, stop = 1 << k, min(2 << k, longest + 1)
        while first < stop:
            s = kept(first)
            after = first + bisect.bisect_right(range(first, stop), s, key=kept)
            start = found.pop()[0] if found and found[-1][2] == s else first
            found.append((start, after - 1, s))
            first = after
    return found


def stretch_reference(
    order: torch.Tensor | None, length: torch.Tensor, n: int, s: int, H: int, seed: torch.Tensor, layer: int
) -> torch.Tensor:
    """The token at every place of a stream of ``n`` rows: int64 ``[B, H, n]``, ``n`` a power of two.

    ``length`` int64 ``[B]`` counts the real tokens, ``order`` int64 ``[B, Lk]`` lists them first (None: 0, 1, ..).
    In integers, so that a kernel computes the same: ``floor((i + u) L / n)`` with u a multiple of ``2**-24``. A
    sequence for which ``n >> j`` rows would do, the next ``s`` times a power of two, has every row of those
    ``2**j`` times in a row: then j halvings leave what it would have begun with, had it been alone.
    """
    device, bits = length.device, n.bit_length() - 1
    place = torch.arange(n, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    u = philox_uniform(seed, layer, zero, 0, stage(0, STRETCH), torch.arange(H, device=device))
    u = (u.double() * 2**24).long()[:, None]
    length = length[:, None, None]
    fewer = n >> torch.arange(1, bits + 1, device=device)
    shift = (fewer >= length.clamp(min=s)).sum(-1, keepdim=True)
    own_bits = bits - shift
    product = (place >> shift) * length
    rank = (product >> own_bits) + ((((product & ((n >> shift) - 1)) << 24) + u * length) >> (24 + own_bits))
    rank = torch.minimum(rank, (length - 1).clamp(min=0))
    return rank if order is None else order[:, None].expand(-1, H, -1).gather(2, rank)


@jit(general="random sizes")
def _stretch_kernel(p_index, p_order, p_length, random, stage, sizes, BLOCK: tl.constexpr):
    """:func:`stretch_reference` into the entries of ``p_index`` behind the first A."""
    H, Lk, n, s, bits, A = sizes
    i_seq = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_seq // H, i_seq % H
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_u = draw_uniform(tl.load(random.seed), random.layer, o_n * 0, 0, stage, i_h.to(tl.int32))
    length, shift, last = Lk.to(tl.int64), 0, n - 1
    if p_length is not None:
        length = tl.load(p_length + i_b)
        b_fewer = n.to(tl.int64) >> (tl.arange(0, 64) + 1)
        shift = tl.sum((b_fewer >= tl.maximum(length, s)).to(tl.int32), 0)
        last, bits = (n >> shift) - 1, bits - shift
    b_product = (o_n >> shift).to(tl.int64) * length
    b_rest = ((b_product & last) << 24) + (b_u * 16777216.0).to(tl.int64) * length
    b_rank = (b_product >> bits) + (b_rest >> (24 + bits))
    b_rank = tl.minimum(b_rank, tl.maximum(length - 1, 0))
    if p_order is not None:
        b_rank = tl.load(p_order + i_b * Lk + b_rank, mask=o_n < n, other=0)
    tl.store(p_index + i_seq * (A + n) + A + o_n, b_rank.to(tl.int32), mask=o_n < n)


_Padded: TypeAlias = tuple[torch.Tensor, torch.Tensor] | None
_Three: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _thin_reference(
    key: torch.Tensor, value: torch.Tensor, padded: _Padded, schedule: Schedule, decider: Decider
) -> _Three:
    """The tokens that are kept, their keys and their values; ``padded`` is None, or ``order`` and ``length``."""
    (B, H, Lk), n, (order, length) = key.shape[:3], schedule.tokens, padded or (None, None)
    length = torch.full((B,), Lk, device=key.device) if length is None else length
    arena = torch.empty(B, H, schedule.size, dtype=torch.int64, device=key.device)
    seed, layer, _ = decider.random
    arena[:, :, :n] = stretch_reference(order, length, n, schedule.s, H, seed, layer)
    halve_all_reference(arena, key, value, schedule, decider)
    index = arena[:, :, -schedule.s :]
    return index, gather_rows(key, index), gather_rows(value, index)


def _thin_triton(
    key: torch.Tensor, value: torch.Tensor, padded: _Padded, schedule: Schedule, decider: Decider
) -> _Three:
    """:func:`_thin_reference` with the kernels."""
    require_triton()
    (B, H, Lk), n, s, (order, length) = key.shape[:3], schedule.tokens, schedule.s, padded or (None, None)
    A, stretched = schedule.size - n, order is not None or Lk != n
    index = torch.empty(B, H, A + n * stretched, dtype=torch.int32, device=key.device)
    if stretched:
        launch(_stretch_kernel, (-(-n // 1024), B * H),
            index, order, length, decider.random, stage(0, STRETCH), (H, Lk, n, s, n.bit_length() - 1, A),
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    keys, values = thin(key, value, index, schedule, 0, decider)
    return index.narrow(2, A - s, s), keys.narrow(2, A - s, s), values.narrow(2, A - s, s)


def select(
    key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor | None, s: int | Callable[[int], int],
    decider: Decider,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The coreset: which tokens it holds, int ``[B, H_kv, R]``, their keys ``[B, H_kv, R, D]`` and values
    ``[B, H_kv, R, Dv]``, and how many of its rows count, int64 ``[B]`` (None: all of them).

    ``key`` ``[B, H_kv, Lk, D]``, ``value`` ``[B, H_kv, Lk, Dv]``, ``padding`` bool ``[B, Lk]`` or None; ``s`` the rows
    to keep, or a function of the number of real tokens (as for :func:`pieces`). ``R`` is the most that a sequence
    keeps. Rows that do not count are 0. With the kernels on CUDA and the references elsewhere, which draw the same
    numbers. A sequence of a padded batch keeps what it would alone.
    """
    B, H, Lk = key.shape[:3]
    device = key.device
    thin_all = _thin_triton if key.is_cuda else _thin_reference
    rows = s if callable(s) else lambda L: s
    if padding is None:
        if Lk > rows(Lk):
            return *thin_all(key, value, None, make_schedule(Lk, rows(Lk)), decider), None
        return torch.arange(Lk, device=device).expand(B, H, Lk), key, value, None
    order, length = real_first(padding), padding.sum(1)
    found = pieces(rows, Lk)
    R, counts = max(kept or last for _, last, kept in found), length
    index = order[:, None, :R].expand(B, H, R)
    for first, last, kept in found:  # the device cannot be asked which of them are there
        if kept:
            here = (length >= first) & (length <= last)
            thinned, *_ = thin_all(key, value, (order, length), make_schedule(last, kept), decider)
            thinned = torch.nn.functional.pad(thinned, (0, R - kept))
            index, counts = torch.where(here[:, None, None], thinned, index), torch.where(here, kept, counts)
    behind = (torch.arange(R, device=device) >= counts[:, None])[:, None, :, None]
    keys, values = (gather_rows(x, index).masked_fill(behind, 0) for x in (key, value))
    return index, keys, values, counts


# ---------------------------------------------------------------------------------------------------------------
# Op


def _g(name: str, value: Any) -> int:
    if not -1 <= number(name, value, int) <= MAX_G:
        raise ValueError(
            f"{name}={value!r}: must be an integer, 0 or more (2**g * sqrt(n) rows) up to {MAX_G}, or -1 for the budget"
        )
    return int(value)


@dataclass(frozen=True)
class Thinformer(Options):
    """What decides the coreset of Thinformer besides the data."""

    budget: Any = option(
        512, "keys that are kept, rounded down to a power of two", BUDGET,
        schema="int s, float fraction, int[] table=[]", pack=budget_options, shared="budget",
    )  # fmt: skip
    g: int = option(-1, "keep 2**g sqrt(n) keys in place of the budget; -1 for the budget", Kind("-1 to 30", "int", _g))
    halving: str = option("balanced", "name of a registered halving rule", RULE, shared="halving")
    flatten: float = option(
        0.0, "factor of the exponent in the kernel of the halving rule; 0 is the rule's own", NUMBER
    )

    def check(self) -> None:
        get_rule(self.halving, self.flatten)


def rows_kept(
    Lk: int, *, s: int, fraction: float, g: int, min_length: int, table: Sequence[int] = (), **rule: Any
) -> int:
    """Rows of the coreset of ``Lk`` keys for the options of the op; all keys for fewer than ``min_length``."""
    s = max(4, floor_power_of_two(int(2**g * math.sqrt(Lk))) if g >= 0 else rows_of(s, fraction, Lk, table))
    return max(s, Lk) if Lk < min_length else s


def _select(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    options = call.options
    rule, rows = get_rule(options["halving"], options["flatten"]), functools.partial(rows_kept, **options)
    decider = Decider(rule, call.scale, Random(call.seed, call.layer))
    return select(call.key, call.value, call.padding, rows, decider)


COPIED_UP_TO = 1024  # rows


def _as_it_lies(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> bool:
    """Whether segment attention is faster than cuDNN's, whose output lies as queries do and has to be copied where
    heads are not apart: on an H200, 32 heads of 128 wide, 4,096 queries and 256 rows 62 us for 86, 32,768 queries 435
    for 601, with 1,024 rows 1,137 for 1,280; where they are apart 444 for 276."""
    return k.shape[2] <= COPIED_UP_TO and not query.is_contiguous() and hopper.takes(query, k, v, block)


def _body(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    query, (_, k, v, lengths) = call.query, _select(call)
    table = dense_table(call.Lq, k.shape[2])
    if lengths is None and query.is_cuda and not _as_it_lies(query, k, v, table.block):
        return exact_attention(query, k, v, call.scale, causal=False)
    return segment_attention(query, Sources.compacted(k, v, lengths), table, call.scale)


def _backward_body(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients with the selection held fixed; it is made again, so that training stores nothing for it."""
    query, (index, k, v, lengths) = call.query, _select(call)
    if lengths is not None:  # queries without any key have probabilities of 0 everywhere
        lse = lse.masked_fill(lse.isneginf(), math.inf)
    table, sources = dense_table(call.Lq, k.shape[2]), Sources.compacted(k, v)
    d_query, _, _, *parts = segment_gradients(grad, query, sources, out, lse, table, call.scale)
    grads = [d_query.to(query.dtype)]
    for x, part in zip((call.key, call.value), parts, strict=True):
        if lengths is not None:
            behind = torch.arange(part.shape[2], device=part.device) >= lengths[:, None]
            part.masked_fill_(behind[:, None, :, None], 0)
        target = part.new_zeros(x.shape)
        accumulate_rows(target, index, part)
        grads.append(target.to(x.dtype))
    return tuple(g.contiguous() for g in grads)


OP, BACKWARD = define_attention("thinformer", Thinformer, _body, _backward_body, causal=False)


# ---------------------------------------------------------------------------------------------------------------
# Method


def _refuse(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    mask, reason = spec.mask, None
    if mask.unknown is not None:
        reason = f"its mask is not proven: {mask.unknown}"
    elif mask.segments:
        reason = "it keeps packed sequences apart; Thinformer would let them see each other"
    elif mask.window is not None:
        reason = f"it has a window of {mask.reach}"
    elif mask.causal:
        reason = "it is causal; Thinformer would let queries see what comes after them"
    elif spec.dropout_p > 0:
        reason = f"it drops attention weights (dropout_p={spec.dropout_p}); call model.eval()"
    elif isinstance(spec.Lq, int) and spec.Lq < MIN_QUERIES and not known_equal(spec.Lq, spec.Lk):
        reason = f"{spec.Lq} quer{'y' if spec.Lq == 1 else 'ies'}: to choose keys costs more than to attend to all"
    else:
        reason = no_kernel(spec)
    return None if reason is None else Refusal("thinformer", reason)


def _cost(spec: AttentionSpec, params: Mapping[str, Any]) -> c.Cost:
    """Halving of all keys, and attention over s of them: exact. Without padding, which costs a sort of the keys more.

    To halve R rows takes the entries D[j, i] of their pairs j <= i, four products each: ``R (R + 2) / 2``. Round i
    halves buckets of ``4 s 2**i / Q`` rows, at least 2, and ``s Q / 2**i`` rows in all. (On a GPU tiles are full:
    ``R (R + 64) / 2``.)
    """
    s, Lk = c.s, c.Lk
    rounds = c.floor_log2(sympy.ceiling(Lk / s) - 1) + 1
    Q = 2**rounds
    pairs_only = sympy.Max(0, rounds - 1 - c.floor_log2(s))  # rounds of buckets that would have less than 2 rows
    more = 2 * s * Q * (1 - sympy.Rational(1, 2) ** pairs_only) - 2 * s**2 * pairs_only
    coin = math.isinf(get_rule(params["halving"], params["flatten"]).gain(2, 0.5))
    entries = 0 if coin else 2 * s**2 * rounds + 2 * s * (Q - 1) + more
    attention = c.dense_cost(c.Lq * s, s)
    width = c.B * c.H_kv * (c.D + c.Dv)
    stretch = sympy.Piecewise((0, sympy.Eq(Lk, s * Q)), (1, True))
    thinned = replace(
        attention,
        flops=attention.flops + 2 * width * entries,
        bytes=attention.bytes + c.itemsize * width * 3 * s * (Q - 1),  # every round reads its rows and writes half
        steps=sympy.Integer(0) if coin else 2 * s * (1 - 2**pairs_only / Q) + pairs_only,
        launches=2 + (0 if coin else describe_launches(4 * s / Q)) + stretch,
        entries=sympy.sympify(c.B * c.H_kv * entries),
    )
    return thinned.unless((Lk <= s) | (Lk < params["min_length"]), c.dense_cost(c.visible_pairs(spec)))


METHOD = register(
    Method(
        name="thinformer",
        summary="attention without a causal mask over s of the keys, thinned by halving",
        supports="self and cross attention, GQA, Dv != D, key padding, any length",
        refuses="causal masks, windows, packed sequences, biases, dropout",
        refuse=_refuse,
        cost=_cost,
        options=Thinformer,
        rows=lambda params, Lk: rows_kept(Lk, **params),
        approximates=lambda params, Lk: Lk > rows_kept(Lk, **params),
    )
)
