"""Sparse Transformer attention: causal, over a local and a far part of about sqrt(n) keys each (arXiv 1904.10509).

    out_i = sum_{j in S_i} exp(scale <q_i, k_j>) v_j / sum_{j in S_i} exp(scale <q_i, k_j>)

With stride l the positions j <= i of the two parts are

    strided    local: j > i - l                     far: (i - j) mod l = 0
    fixed      local: floor(j / l) = floor(i / l)   far: l - c (g + 1) <= j mod l < l - c g

where c is ``summary``, and g < v (``groups``) is the head's own group of summary columns: g = h mod v. In two steps,
a local one and a far one, every position is reached from every later one. How a layer combines the parts:

    merged         S_i is their union, one softmax
    per_head       even heads take the local part, odd heads the far one (and the groups in turn)
    interleaved    layers of even depth take the local part, others the far one
    local, far     that part alone: what a layer of ``interleaved`` has

A query without any key gives 0, as SDPA does: the far part of ``fixed`` has none for the first l - c queries. Merged,
sequences up to l are exact attention.

This is no approximation of a pretrained model's attention but another function, for models that are trained with it:
it runs only where a policy names it. It draws nothing. O(n sqrt(n)) work, memory O(n D); deterministic gradients, for
which probabilities are computed again.

Supports causal self-attention, continuing a cache and decoding included, grouped queries, Dv != D, any length, key
padding on any side (positions count real tokens), float16, bfloat16, float32 (float64 on a CPU). Refuses masks that
are not causal, windows, biases and dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from express_compile.core import cost as c
from express_compile.core.call import Call
from express_compile.core.method import Method, Refusal, register
from express_compile.core.options import Kind, Options, one_of, option
from express_compile.core.plain import number
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Site, floor_power_of_two, known_equal

from .attend.patterns import sparse_backward_triton, sparse_forward_triton
from .exact import exact_attention
from .op import at_the_end, define_attention, no_kernel
from .padding import Packing, real_first

KINDS = ("strided", "fixed")
PARTS = ("merged", "local", "far", "per_head")
COMBINES = (*PARTS, "interleaved")


@dataclass(frozen=True)
class Pattern:
    """Which positions see each other. kind: ``"strided"`` or ``"fixed"``; stride: l; summary: c; groups: v; parts: one
    of :data:`PARTS`, what the heads take.

    Raises ``ValueError`` or ``TypeError`` that names the field, its value and what is allowed.
    """

    kind: str
    stride: int
    summary: int = 32
    groups: int = 1
    parts: str = "merged"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"pattern={self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.parts not in PARTS:
            raise ValueError(f"parts={self.parts!r}: must be one of {', '.join(PARTS)}")
        for name in ("stride", "summary", "groups"):
            value = getattr(self, name)
            if number(name, value, int) < 1:
                raise ValueError(f"{name}={value!r}: must be an integer, 1 or more")
        if self.kind == "fixed" and self.summary * self.groups > self.stride:
            raise ValueError(
                f"summary={self.summary}, groups={self.groups}: {self.summary * self.groups} columns in all; must be "
                f"at most stride={self.stride}"
            )

    @property
    def takes(self) -> list[tuple[str, int, int, int]]:
        """Which heads take what: ``(part, group, h, step)``, for the heads h, h + step, h + 2 step, .. each."""
        first, step = (1, 2) if self.parts == "per_head" else (0, 1)
        v = self.groups if self.kind == "fixed" else 1
        part = "far" if self.parts == "per_head" else self.parts
        local = [("local", 0, 0, step)] if self.parts in ("local", "per_head") else []
        return local + [(part, g, first + g * step, step * v) for g in range(v) if part != "local"]

    def local(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether position ``i`` has ``j`` in its local part; the two broadcast."""
        near = j > i - self.stride if self.kind == "strided" else j // self.stride == i // self.stride
        return near & (j <= i)

    def far(self, i: torch.Tensor, j: torch.Tensor, group: int = 0) -> torch.Tensor:
        """Whether position ``i`` has ``j`` in its far part."""
        if self.kind == "strided":
            return ((i - j) % self.stride == 0) & (j <= i)
        first = self.stride - self.summary * (group + 1)
        return (j % self.stride >= first) & (j % self.stride < first + self.summary) & (j <= i)

    def mask(self, H: int, Lq: int, Lk: int) -> torch.Tensor:
        """The definition of correct: bool ``[H, Lq, Lk]`` of the last ``Lq`` of ``Lk`` positions as queries."""
        i, j = torch.arange(Lk - Lq, Lk)[:, None], torch.arange(Lk)
        seen = torch.zeros(H, Lq, Lk, dtype=torch.bool)
        for part, group, first, step in self.takes:
            if part != "far":
                seen[first::step] |= self.local(i, j)
            if part != "local":
                seen[first::step] |= self.far(i, j, group)
        return seen


# ---------------------------------------------------------------------------------------------------------------
# In PyTorch: tiles of queries and keys that see each other, O(n sqrt(n)) as well


_TILE = 1 << 24  # scores that are held at a time


def _tiles(
    pattern: Pattern, part: str, group: int, first: int, Lk: int, position: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Positions of queries ``[b, g, x]`` and keys ``[b, g, y]`` and which of them see each other, ``[b, g, x, y]``.

    Queries are the positions ``first .. Lk - 1``, or ``position`` ``[b]``, one for each sequence.
    """
    stride, device = pattern.stride, None if position is None else position.device
    within = torch.arange(stride, device=device)
    if position is None:
        blocks = torch.arange(first // stride, -(-Lk // stride))
        queries, start = blocks[None, :, None] * stride + within, blocks[None, :, None] * stride
    else:
        queries = position[:, None, None]
        start = queries // stride * stride
    if part != "far":
        keys = start + within if pattern.kind == "fixed" else start - stride + torch.arange(2 * stride, device=device)
        yield queries, keys, pattern.local(queries[..., None], keys[..., None, :])
    if part == "local":
        return
    if pattern.kind == "strided":  # queries of one residue in a tile
        every = torch.arange(-(-Lk // stride), device=device) * stride
        if position is None:
            residue = ((first + torch.arange(min(stride, Lk - first))) % stride)[None, :, None]
            queries = residue + every[first // stride :]
        else:
            residue = queries % stride
        keys = residue + every
    else:
        columns = stride - pattern.summary * (group + 1) + torch.arange(pattern.summary, device=device)
        blocks = torch.arange(-(-Lk // stride), device=device)[:, None] * stride
        keys = (blocks + columns).flatten().expand(*start.shape[:2], -1)
    seen = pattern.far(queries[..., None], keys[..., None, :], group)
    if part == "merged":
        seen &= ~pattern.local(queries[..., None], keys[..., None, :])
    yield queries, keys, seen


class _Dense:
    """The tiles of one call, and the tensors as they see them, in float32 (float64 for float64 inputs).

    ``order`` and ``length``: the rows of the real tokens of a padded batch, int64 ``[B, Lk]``, and their numbers, for
    a single query, which is the last of them.
    """

    def __init__(self, query, key, value, pattern: Pattern, scale: float, order=None, length=None) -> None:
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.query, self.key, self.value = query, key, value
        self.pattern, self.scale, self.order, self.length = pattern, scale, order, length
        self.Lq, self.Lk = query.shape[2], key.shape[2]

    def heads(self, first: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of some query heads and of their KV heads."""
        H, H_kv = self.query.shape[1], self.key.shape[1]
        own = torch.arange(H, device=self.query.device)[first::step]
        return own, own // (H // H_kv)

    def tiles(self, part: str, group: int) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """Rows of queries ``[m]`` and of keys ``[b, g, y]``, which queries of the tile ``[g, x]`` those are, and who
        sees whom ``[b, g, x, y]``. A single query of a padded batch is all of its tile: a slice and None.
        """
        device, first = self.query.device, self.Lk - self.Lq
        position = None if self.length is None else self.length - 1
        for queries, keys, seen in _tiles(self.pattern, part, group, first, self.Lk, position):
            size = self.query.shape[0] * self.query.shape[1] * seen.shape[2] * seen.shape[3]
            for at in range(0, queries.shape[1], step := max(1, _TILE // size)):
                q, k, s = (x[:, at : at + step].to(device) for x in (queries, keys, seen))
                s = s & ((k >= 0) & (k < self.Lk))[:, :, None]
                rows = k.clamp(0, self.Lk - 1)
                if position is None:
                    here = (q[0] >= first) & (q[0] < self.Lk)
                    yield (q[0] - first)[here], rows, here, s
                else:
                    rows = torch.minimum(rows, position[:, None, None].clamp(min=0))
                    yield slice(None), self.order.gather(1, rows.flatten(1)).view(rows.shape), None, s

    def queries(self, x: torch.Tensor, rows: Any, here: torch.Tensor | None) -> torch.Tensor:
        """The rows of ``x`` ``[B, h, Lq, ..]`` as a tile ``[B, h, g, x, ..]``, 0 where there is none."""
        if here is None:
            return x[:, :, None]
        tile = x.new_zeros(*x.shape[:2], *here.shape, *x.shape[3:])
        tile[:, :, here] = x[:, :, rows]
        return tile

    def keys(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The rows of ``x`` ``[B, h, Lk, D]`` as a tile ``[B, h, g, y, D]``."""
        index = rows.expand(x.shape[0], -1, -1).flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index).unflatten(2, rows.shape[1:])

    def scores(self, q, k, rows, keys, here, seen) -> torch.Tensor:
        scores = (self.queries(q, rows, here) * self.scale) @ self.keys(k, keys).mT
        return scores.masked_fill_(~seen[:, None], -math.inf)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.query.new_zeros(*self.query.shape[:3], self.value.shape[-1], dtype=self.dtype)
        lse = out.new_full(out.shape[:3], -math.inf)
        lowest = torch.finfo(self.dtype).min
        for part, group, first, step in self.pattern.takes:
            own, kv = self.heads(first, step)
            q, k, v = (x.to(self.dtype) for x in (self.query[:, own], self.key[:, kv], self.value[:, kv]))
            o, total = out[:, own], lse[:, own]
            for rows, keys, here, seen in self.tiles(part, group):
                scores = self.scores(q, k, rows, keys, here, seen)
                mass = scores.logsumexp(-1)
                result = torch.exp(scores - mass.clamp(min=lowest)[..., None]) @ self.keys(v, keys)
                there = 0 if here is None else here
                mass, before = mass[:, :, there], total[:, :, rows]
                after = torch.logaddexp(mass, before)
                shares = (torch.exp(x - after.clamp(min=lowest))[..., None] for x in (before, mass))
                o[:, :, rows] = o[:, :, rows] * next(shares) + result[:, :, there] * next(shares)
                total[:, :, rows] = after
            out[:, own], lse[:, own] = o, total
        return out.to(self.query.dtype), lse

    def backward(self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of query, key and value, in the dtype of the sums."""
        grads = [torch.zeros(x.shape, dtype=self.dtype, device=x.device) for x in (self.query, self.key, self.value)]
        lse = lse.masked_fill(lse.isneginf(), math.inf)  # queries without any key have probabilities of 0
        for part, group, first, step in self.pattern.takes:
            own, kv = self.heads(first, step)
            q, k, v = (x.to(self.dtype) for x in (self.query[:, own], self.key[:, kv], self.value[:, kv]))
            do, o, total = grad[:, own].to(self.dtype), out[:, own].to(self.dtype), lse[:, own]
            delta = (do * o).sum(-1)
            d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
            for rows, keys, here, seen in self.tiles(part, group):
                scores = self.scores(q, k, rows, keys, here, seen)
                probability = torch.exp(scores - self.queries(total, rows, here)[..., None])
                d_out = self.queries(do, rows, here)
                d_scores = d_out @ self.keys(v, keys).mT - self.queries(delta, rows, here)[..., None]
                d_scores = d_scores * probability * self.scale
                d_q[:, :, rows] += (d_scores @ self.keys(k, keys))[:, :, 0 if here is None else here]
                parts = d_scores.mT @ self.queries(q, rows, here), probability.mT @ d_out
                for target, part_of in zip((d_k, d_v), parts, strict=True):
                    index = keys.expand(q.shape[0], -1, -1).flatten(1)[:, None, :, None]
                    part_of = part_of.flatten(2, 3)
                    target.scatter_add_(2, index.expand(part_of.shape), part_of)
            grads[0][:, own] = d_q
            for target, part_of in zip(grads[1:], (d_k, d_v), strict=True):
                target.index_add_(1, kv, part_of)
        return tuple(grads)


def dense_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` ``[B, H, Lq, Dv]`` and ``lse`` ``[B, H, Lq]``, on any device, as :meth:`Pattern.mask` defines it.

    ``query`` ``[B, H, Lq, D]``, ``key`` ``[B, H_kv, Lk, D]``, ``value`` ``[B, H_kv, Lk, Dv]``; queries are the last
    positions. Computed in float32 (float64 for float64 inputs), as is ``lse``.
    """
    return _Dense(query, key, value, pattern, scale).forward()


def dense_backward(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, pattern: Pattern, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of query, key and value in float32 (float64 for float64 inputs)."""
    return _Dense(query, key, value, pattern, scale).backward(grad, out, lse)


# ---------------------------------------------------------------------------------------------------------------
# Op


def default_stride(n: int) -> int:
    """The power of two nearest sqrt(n), by their ratio."""
    return floor_power_of_two(math.isqrt(2 * n))


def pattern_of(pattern: str, stride: int, summary: int, groups: int, parts: str, Lk: int) -> Pattern:
    """The pattern that the op's options mean for ``Lk`` keys; a stride of 0 is :func:`default_stride`, whose blocks may
    have fewer columns than ``summary`` asks for. One block where attention is exact."""
    if not stride:
        stride = default_stride(Lk)
        groups = min(groups, stride)
        summary = min(summary, stride // groups)
    whole = parts in ("merged", "local") and stride >= Lk
    return Pattern("fixed", Lk, 1, 1, "local") if whole else Pattern(pattern, stride, summary, groups, parts)


def _attend(query, key, value, pattern: Pattern, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    if pattern.parts == "local" and pattern.kind == "fixed" and pattern.stride >= key.shape[2]:
        return exact_attention(query, key, value, scale)
    return (sparse_forward_triton if query.is_cuda else dense_forward)(query, key, value, pattern, scale)


def _body(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    query, padding, scale = call.query, call.padding, call.scale
    pattern, tensors = pattern_of(**call.options, Lk=call.Lk), (query, call.key, call.value)
    if padding is None:
        return _attend(*tensors, pattern, scale)
    if call.Lq == 1:
        return _Dense(*tensors, pattern, scale, real_first(padding), padding.sum(1)).forward()
    pad = Packing(padding)
    query, key, value = map(pad.pack, tensors)
    out, lse = _attend(query, key, value, pattern, scale)
    return pad.unpack(out, call.Lq), pad.unpack(lse[..., None], call.Lq, -math.inf)[..., 0]


def _backward_body(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    pattern, tensors = pattern_of(**call.options, Lk=call.Lk), (call.query, call.key, call.value)
    padding, scale = call.padding, call.scale
    run: Callable[..., tuple[torch.Tensor, ...]] = sparse_backward_triton if grad.is_cuda else dense_backward
    if padding is None:
        grads = run(grad, out, lse, *tensors, pattern, scale)
    elif call.Lq == 1:
        grads = _Dense(*tensors, pattern, scale, real_first(padding), padding.sum(1)).backward(grad, out, lse)
    else:
        pad = Packing(padding)
        grad, out, lse, *packed = (pad.pack(x) for x in (grad, out, lse[..., None], *tensors))
        grads = run(grad, out, lse[..., 0], *packed, pattern, scale)
        grads = tuple(pad.unpack(g, x.shape[2]) for g, x in zip(grads, tensors, strict=True))
    return tuple(g.to(x.dtype) for g, x in zip(grads, tensors, strict=True))


def _stride(name: str, value: Any) -> int | None:
    if value is not None and number(name, value, int, others=("None",)) < 1:
        raise ValueError(f"{name}={value!r}: must be 1 or more, or None for about the root of the number of keys")
    return None if value is None else int(value)


def _positive(name: str, value: Any) -> int:
    if number(name, value, int) < 1:
        raise ValueError(f"{name}={value!r}: must be an integer, 1 or more")
    return int(value)


COUNT = Kind("an integer, 1 or more", "int", _positive)


@dataclass(frozen=True)
class Sparse(Options):
    """Which keys a query of the Sparse Transformer sees."""

    pattern: str = option("fixed", "whether the far part is made of summary columns or of a stride", one_of(*KINDS))
    stride: int | None = option(
        None, "l; None is the power of two nearest the root of the number of keys",
        Kind("an integer, 1 or more, or None", "int", _stride), pack=lambda stride: {"stride": stride or 0},
    )  # fmt: skip
    summary: int = option(32, "c, columns of a block that later blocks see (fixed)", COUNT)
    groups: int = option(1, "v, groups of heads with summary columns of their own (fixed)", COUNT)
    combine: str = option(
        "merged", "how a layer has both parts", one_of(*COMBINES), schema="str parts", pack=lambda how: {"parts": how}
    )

    def check(self) -> None:
        Pattern(self.pattern, self.stride or 1 << 60, self.summary, self.groups)

    @classmethod
    def by_layer(cls, given: Mapping[str, Any]) -> bool:
        return given.get("combine") == "interleaved"


OP, BACKWARD = define_attention("sparse", Sparse, _body, _backward_body, min_length=False)


# ---------------------------------------------------------------------------------------------------------------
# Method


def _refuse(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    params = _params(Site(spec), policy)  # a bad value is reported whatever is refused
    mask, reason = spec.mask, None
    if mask.unknown is not None:
        reason = f"its mask is not proven: {mask.unknown}"
    elif mask.segments:
        reason = "it keeps packed sequences apart; sparse would let them see each other"
    elif mask.window is not None:
        reason = f"it has a window of {mask.reach}; sparse has a local part of its own"
    elif not mask.causal:
        reason = "it is not causal; both parts of sparse lie before the query"
    elif not at_the_end(spec):
        reason = f"its causal mask has offset {mask.offset}; needed is Lk - Lq, the last query sees every key"
    elif spec.dropout_p > 0:
        reason = f"it drops attention weights (dropout_p={spec.dropout_p}); call model.eval() or set it to 0"
    elif not params["stride"] and mask.padding:
        reason = "stride=None follows the number of keys, here that of a padded batch; give a stride, such as 128"
    elif not params["stride"] and not known_equal(spec.Lq, spec.Lk):
        reason = "stride=None follows the number of keys, which grows with the cache; give a stride, such as 128"
    elif params["parts"] == "per_head" and known_equal(spec.H, 1):
        reason = "combine='per_head' gives the two parts to different heads, and it has one head"
    else:
        reason = no_kernel(spec)
    return None if reason is None else Refusal("sparse", reason)


def _params(site: Site, policy: Policy) -> dict[str, Any]:
    own: Sparse = policy.of("sparse")
    parts = ("local", "far")[site.depth % 2] if own.combine == "interleaved" else own.combine
    return {**own.pack(), "parts": parts}


def _cost(spec: AttentionSpec, params: Mapping[str, Any]) -> c.Cost:
    """Attention over the keys of either part, as many for every query as it sees on average of Lk positions. (Tiles on
    a GPU compute more: those that a query of the tile sees.)"""
    n, strided = c.Lk, params["pattern"] == "strided"
    stride = sympy.Integer(params["stride"]) if params["stride"] else 2 ** c.floor_log2(sympy.sqrt(2 * n))
    local = sympy.Min(stride, n) if strided else sympy.Min(stride, n) / 2
    summary = 1 if strided else sympy.Min(params["summary"], sympy.floor(stride / params["groups"]))
    rows = {"local": local, "far": summary * n / (2 * stride)}
    rows |= {"merged": rows["local"] + rows["far"], "per_head": (rows["local"] + rows["far"]) / 2}
    cost = c.dense_cost(c.Lq * rows[params["parts"]])
    if params["parts"] in ("merged", "local"):
        cost = cost.unless(n <= stride, c.dense_cost(c.visible_pairs(spec)))
    return cost


METHOD = register(
    Method(
        name="sparse",
        summary="causal attention over a local and a strided or fixed part of the keys, for models trained with it",
        supports="causal self-attention (also continuing a cache, and decoding), GQA, Dv != D, key padding, any length",
        refuses="non-causal masks, windows, packed sequences, biases, dropout",
        refuse=_refuse,
        options=Sparse,
        params=_params,
        cost=_cost,
        cycle=lambda params: (
            (params["groups"] if params["pattern"] == "fixed" else 1) * (2 if params["parts"] == "per_head" else 1)
        ),
        changes="it changes the function: each query sees only the keys of the pattern, which the model must be "
        "trained with",
    )
)
