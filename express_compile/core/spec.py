"""What an attention site computes: sizes, mask and scale, proven, and which site of a model it is.

A leaf: imports torch and the standard library only, so that every room may import it.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv


def floor_power_of_two(x: int) -> int:
    """Largest power of two that is not above ``x``; 0 for ``x < 1``."""
    return 1 << (x.bit_length() - 1) if x >= 1 else 0


def default_scale(D: int) -> float:
    """``1 / sqrt(D)``, the scale of attention that names none; heads without features have no scores to scale."""
    return 1.0 / math.sqrt(D) if D else 1.0


@dataclass(frozen=True)
class Mask:
    """What is *proven* about the keys a query may see: the conjunction of the fields that are set.

    Query ``i`` may see key ``j`` iff every condition holds:

    * ``causal``: ``j <= i + offset`` (``offset`` is an int or a symbolic expression; ``Lk - Lq`` is the
      bottom-right alignment of a prefill that continues a cache, 0 the top-left one of ``is_causal=True``),
    * ``window``: ``i + offset - j < window``, and without ``causal`` also ``j - i - offset < window``: on either side,
    * ``segments``: ``segment[b, i] == segment[b, j]`` for some integers ``[B, L]``: packed sequences that do not see
      each other (which integers is not said: no method reads them),
    * ``padding``: ``padding[b, j]`` for a boolean tensor ``[B, Lk]`` that travels beside the spec.

    ``unknown`` is the reason why nothing could be proven; then no other field means anything and the
    site must stay exact. ``nearest`` is the mask nearest to it that would be proven, in words, if there is one.
    """

    causal: bool = False
    offset: Any = 0
    window: int | None = None
    padding: bool = False
    unknown: str | None = None
    segments: bool = False
    nearest: str | None = None

    @property
    def reach(self) -> str:
        """How far the window goes, in words."""
        assert self.window is not None
        return f"{self.window} tokens" if self.causal else f"{self.window - 1} tokens on either side"

    def __str__(self) -> str:
        if self.unknown is not None:
            return f"unknown ({self.unknown})"
        parts = []
        if self.causal:
            parts.append("causal" if self.offset == 0 else f"causal, offset {self.offset}")
        if self.window is not None:
            parts.append(f"window {self.window}" if self.causal else f"window of {self.reach}")
        if self.segments:
            parts.append("packed segments")
        if self.padding:
            parts.append("key padding")
        return ", ".join(parts) or "none"


class HeadShard(NamedTuple):
    """KV heads ``first`` to ``first + heads - 1`` of the ``of`` of a layer, with all their query heads."""

    first: int
    heads: int
    of: int


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention site computes: ``softmax(cap(scale * q k^T) + mask) v``.

    Sizes are ints or ``torch.SymInt`` (dynamic shapes); layout is ``[B, H, L, D]`` as in
    ``scaled_dot_product_attention``. ``H_kv`` divides ``H`` (grouped-query attention).
    ``device`` is a device type (``"cpu"``, ``"cuda"``). ``softcap`` is c of ``cap(s) = c * tanh(s / c)``, or None where
    scores are not capped. ``sinks``: a logit per query head joins the softmax, with a value of zero. ``feature_major``:
    the keys are known to lie feature by feature (:func:`feature_major`). ``shard``: which heads of the layer this
    process computes, where that is not all.
    """

    B: Any
    H: Any
    H_kv: Any
    Lq: Any
    Lk: Any
    D: Any
    Dv: Any
    dtype: torch.dtype
    device: str
    scale: float
    mask: Mask = Mask()
    dropout_p: float = 0.0
    softcap: float | None = None
    sinks: bool = False
    feature_major: bool = False
    shard: HeadShard | None = None

    @property
    def whole(self) -> AttentionSpec:
        """The same with all heads of the layer, for which plans are made."""
        if self.shard is None:
            return self
        ranks = self.shard.of // self.H_kv
        return replace(self, H=self.H * ranks, H_kv=self.shard.of, shard=None)

    @property
    def forms(self) -> dict[str, str]:
        """What is done to the scores besides the mask, in words: of ``"softcap"`` and ``"sinks"`` what the site has."""
        capped = {} if self.softcap is None else {"softcap": f"a logit soft-cap of {self.softcap:g}"}
        return {**capped, **({"sinks": "attention sinks"} if self.sinks else {})}


@dataclass(frozen=True)
class Site:
    """Where a method is asked to run: what the site computes, and which one of the model it is.

    path, index: its module path relative to the root, and its place among the sites of that module.
    """

    spec: AttentionSpec | None = None
    path: str = ""
    index: int = 0

    def entry(self, table: Mapping[str, Any], default: Any) -> Any:
        """What a table by module paths has for it; it speaks of the first site of a module."""
        return table.get(self.path, default) if self.index == 0 else default

    @property
    def depth(self) -> int:
        """Its place among the layers, by its name alone, so that it is the same however a model is traced.

        The sum of the numbers in its path (7 for ``model.layers.7.self_attn``) and its place in its module: along any
        list of layers, also of stages of blocks, and over the calls of one module, it counts up by one.
        """
        parts = self.path.split(".")
        numbers = [part for part in parts if part.isdigit()] or re.findall(r"\d+", self.path)
        return sum(map(int, numbers)) + self.index


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes (ints, ``SymInt`` or sympy expressions) are equal for every input; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    difference = _expression(a) - _expression(b)
    if isinstance(difference, sympy.Expr):
        difference = difference.replace(FloorDiv, _quotient).expand()
    return bool(difference == 0)


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """``a // b``, as what is left where ``b`` is a factor of ``a``: torch leaves ``s * s // s`` as it is."""
    exact = sympy.cancel(a / b)
    return exact if sympy.denom(exact) == 1 else FloorDiv(a, b)


def feature_major(key: torch.Tensor) -> bool:
    """Whether ``key`` ``[B, H_kv, Lk, D]`` lies feature by feature, as a view of ``[B, H_kv, D, Lk]``; no guard."""
    return known_equal(key.stride(2), 1) and not known_equal(key.stride(3), 1)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def layer_key(path: str, index: int = 0) -> int:
    """Philox key of a site: 31 bits from its module path and its place among the sites of that module.

    The path is relative to the compiled or rewritten root, so that eager and compiled models draw the same
    random numbers.
    """
    return zlib.crc32(f"{path}#{index}".encode()) & 0x7FFFFFFF
