"""Key padding: what a sequence gives must not depend on how it is padded, nor on its neighbours.

On the CPU, where references define what is right, sequences of a padded batch are computed without their padding, those
of equal lengths together. Kernels cannot ask the device for lengths: they take batches as they are, with the real
tokens of each sequence in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from express_compile.core.call import Call


def real_first(padding: torch.Tensor) -> torch.Tensor:
    """The positions of the real tokens of ``padding`` ``[B, L]``, in order, then the others: int64 ``[B, L]``."""
    return (~padding).to(torch.int8).argsort(dim=1, stable=True)


class Packing:
    """Moves the real tokens of each sequence to its front, in order, and results back to where they belong.

    Rows behind the real ones are zero. Queries are placed at their token's position, so that every sequence of
    the batch starts at 0 whatever its padding. ``length`` int64 ``[B]`` counts the real tokens.
    """

    def __init__(self, padding: torch.Tensor) -> None:
        self.real = padding
        self.length = padding.sum(1)
        self.order = real_first(padding)
        self.rank = self.order.argsort(1)
        self.front = torch.arange(padding.shape[1], device=padding.device) < self.length[:, None]

    def start(self, Lq: int) -> torch.Tensor:
        """Where the first real one of the last ``Lq`` tokens of each sequence comes to lie: int64 ``[B]``."""
        return self.real[:, : self.real.shape[1] - Lq].sum(1)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(x, (0, 0, self.real.shape[1] - x.shape[2], 0))
        x = x.gather(2, self.order[:, None, :, None].expand(x.shape))
        return x.masked_fill(~self.front[:, None, :, None], 0)

    def unpack(self, x: torch.Tensor, length: int, fill: float = 0.0) -> torch.Tensor:
        """``[B, H, Lk, .]`` back to the last ``length`` positions, ``fill`` where the token is padding."""
        x = x.gather(2, self.rank[:, None, :, None].expand(x.shape))
        return x.masked_fill(~self.real[:, None, :, None], fill)[:, :, x.shape[2] - length :].contiguous()


@dataclass(frozen=True)
class Places:
    """Where some sequences of a batch have their rows: ``batch`` int64 ``[G]``, ``rows`` int64 ``[G, n]``."""

    batch: torch.Tensor
    rows: torch.Tensor

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, L, .]`` at these places: ``[G, H, n, .]``."""
        return x[self.batch[:, None], :, self.rows].transpose(1, 2).contiguous()

    def put(self, target: torch.Tensor, x: torch.Tensor) -> None:
        """``x`` ``[G, H, n, .]`` into ``target`` ``[B, H, L, .]`` at these places."""
        target[self.batch[:, None], :, self.rows] = x.transpose(1, 2)


def _equal_lengths(padding: torch.Tensor, Lq: int, own: bool) -> Iterator[tuple[Places, Places]]:
    """Queries and keys of all sequences that have as many real ones of both; none for those without.

    ``own``: the queries are the last ``Lq`` tokens; otherwise all of them are real. A single query is the last real
    token: over a static cache, whose last places are still empty, its own place is one before them.
    """
    own = own and Lq > 1
    keys = padding.sum(1)
    queries = padding[:, padding.shape[1] - Lq :].sum(1) if own else torch.full_like(keys, Lq)
    sizes = torch.stack([queries, keys], 1)
    for m, n in sizes.unique(dim=0).tolist():
        if not m or not n:
            continue
        batch = (sizes == torch.tensor([m, n])).all(1).nonzero()[:, 0]
        rows = padding[batch].nonzero()[:, 1].view(-1, n)
        asking = rows[:, n - m :] - (padding.shape[1] - Lq) if own else torch.arange(Lq).expand(len(batch), Lq)
        yield Places(batch, asking), Places(batch, rows)


def _alone(call: Call, queries: Places, keys: Places) -> Call:
    query, key, value = queries.take(call.query), keys.take(call.key), keys.take(call.value)
    return replace(call, query=query, key=key, value=value, padding=None)


def each_alone(run: Callable[[Call], Any], own: bool) -> Callable[[Call], tuple[torch.Tensor, torch.Tensor]]:
    """``run(call)``, which gives ``(out, lse)``, for every sequence without its padding.

    Where there is no query or no key, ``out`` is 0 and ``lse`` minus infinity.
    """

    def padded(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        query = call.query
        out = query.new_zeros(*query.shape[:3], call.value.shape[-1])
        lse = query.new_full((*query.shape[:3], 1), -math.inf, dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys in _equal_lengths(call.padding, call.Lq, own):
            own_out, own_lse = run(_alone(call, queries, keys))
            queries.put(out, own_out)
            queries.put(lse, own_lse[..., None])
        return out, lse[..., 0]

    return padded


def each_alone_backward(run: Callable[..., Any], own: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The same for ``run(call, grad, out, lse)``, which gives three gradients."""

    def padded(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grads = tuple(x.new_zeros(x.shape) for x in (call.query, call.key, call.value))
        for queries, keys in _equal_lengths(call.padding, call.Lq, own):
            results = queries.take(grad), queries.take(out), queries.take(lse[..., None])[..., 0]
            parts = run(_alone(call, queries, keys), *results)
            for target, part, places in zip(grads, parts, (queries, keys, keys), strict=True):
                places.put(target, part)
        return grads

    return padded
