"""Where the tokens of every sequence of a batch lie, so that kernels read a padded or packed batch where it is.

Kernels count the tokens of a sequence from 0 and find token i at a *place* along the axis of tokens. In a padded batch
the places of a sequence are listed in order, wherever its padding is; in a packed one, which holds the tokens of all
sequences one behind the other, they follow each other from the first one on. Either way nothing is moved, and the
device is not asked for a length: what lies behind the end of a sequence is skipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .launch import jit, tl


class Spans(NamedTuple):
    """``start``, ``length`` and ``begin`` int32 ``[B]``: token i of sequence b, of ``length[b]``, is at place
    ``order[start[b] + i]``, or at ``start[b] + i`` without ``order``, which is int32 and flat. Tokens from ``begin[b]``
    on are queries too, at places ``lead`` lower: queries have only the last of the places of keys."""

    order: Any
    lead: Any
    start: Any
    length: Any
    begin: Any

    @classmethod
    def of_padding(cls, padding: torch.Tensor, Lq: int) -> Spans:
        """Those of ``padding`` bool ``[B, Lk]``, True for a token, where the last ``Lq`` places are queries."""
        B, Lk = padding.shape
        count = padding.cumsum(1, dtype=torch.int32)
        order = count.new_zeros(B, Lk + 1)  # column 0 takes the padding
        places = torch.arange(Lk, dtype=torch.int32, device=padding.device)
        order.scatter_(1, (count * padding).long(), places.expand(B, Lk))
        start = torch.arange(1, B * (Lk + 1), Lk + 1, dtype=torch.int32, device=padding.device)
        length = count[:, -1].contiguous()
        begin = count[:, Lk - Lq - 1].contiguous() if Lq < Lk else torch.zeros_like(length)
        return cls(order, Lk - Lq, start, length, begin)

    @classmethod
    def of_packed(cls, cu_seqlens: torch.Tensor) -> Spans:
        """Those of packed sequences, from where each one starts, and the end: int32 ``[B + 1]``."""
        start = cu_seqlens[:-1].contiguous()
        return cls(None, 0, start, cu_seqlens.diff(), torch.zeros_like(start))

    def only(self, chosen: torch.Tensor) -> Spans:
        """The same without the tokens of sequences that are not ``chosen``, bool ``[B]``."""
        return self._replace(length=self.length * chosen)

    def first(self) -> torch.Tensor:
        """The place of token 0 of every sequence, int32 ``[B]``; of one without tokens, some place."""
        return self.start if self.order is None else self.order.flatten()[self.start.long()]

    def places(self, b: int) -> torch.Tensor:
        """Of all tokens of sequence b, int64 ``[length[b]]``; reads its length back."""
        start, length = int(self.start[b]), int(self.length[b])
        at = torch.arange(start, start + length, device=self.start.device)
        return at if self.order is None else self.order.flatten()[at].long()

    def largest(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The largest size of an entry among the tokens of every sequence, ``[B, H]``, over all of ``tensors``
        ``[B, H, L, .]``."""
        norms = torch.stack([torch.linalg.vector_norm(x, float("inf"), 3) for x in tensors]).amax(0)  # [B, H, L]
        B, H, L = norms.shape
        if self.order is None:
            place = torch.arange(L, device=norms.device)
            own = (place >= self.start[:, None]) & (place < (self.start + self.length)[:, None])
            return torch.stack([torch.where(own[b], norms[b], 0.0).amax(1) for b in range(B)])
        token = torch.arange(self.order.shape[1] - 1, device=norms.device)
        at = norms.gather(2, self.order[:, None, 1:].long().expand(B, H, -1))
        return torch.where(token < self.length[:, None, None], at, 0.0).amax(2)


@jit
def numbers_of(spans, i_b):
    """Start, length and begin of one sequence; a function cannot return an ``order`` that is None beside them."""
    return tl.load(spans.start + i_b), tl.load(spans.length + i_b), tl.load(spans.begin + i_b)


@jit
def place_of(span, o_row, m_row):
    """Where the tokens ``o_row`` of a sequence are, whose numbers ``span`` has; any place where ``m_row`` is false."""
    o_place = span.start + o_row
    if span.order is not None:
        o_place = tl.load(span.order + o_place, mask=m_row, other=0)
    return o_place
