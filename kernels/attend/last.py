"""The last queries of every sequence of a call, which attend to all tokens: of a prompt, those that its answer needs.

Few rows are chosen for what most queries need, and blocks of keys by the first query of a block of queries. What a
question at the end of a long text asks for is often not among them. A few queries at the end read the keys and values
once, as a step of decoding does (:mod:`.decode`), whatever the length before them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from express_compile.core.call import Call

from .decode import Rows, decode_reference, decode_triton, fits

_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class _End:
    """The last ``n`` queries of each sequence of a call.

    Without padding that is all. Otherwise ``tokens`` int64 ``[B]`` counts places up to the last of the queries,
    ``place`` int64 ``[B, n]`` says where they are among the queries of the call, all different, and ``real`` bool
    ``[B, n]`` which of them there are.
    """

    call: Call
    n: int
    tokens: torch.Tensor | None = None
    place: torch.Tensor | None = None
    real: torch.Tensor | None = None

    @classmethod
    def of(cls, call: Call, n: int) -> _End:
        n = min(n, call.Lq)
        if call.padding is None:
            return cls(call, n)
        numbers = torch.arange(1, call.Lk + 1, device=call.padding.device)
        tokens = (call.padding * numbers).amax(1)
        before = call.Lk - call.Lq
        place = tokens[:, None] - before - n + torch.arange(n, device=tokens.device)
        real = (place >= 0) & call.padding.gather(1, (place + before).clamp(0, call.Lk - 1))
        return cls(call, n, tokens, place % call.Lq, real)

    @property
    def slice(self) -> slice:
        return slice(self.call.Lq - self.n, self.call.Lq)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, Lq, .]`` at these queries: ``[B, H, n, .]``."""
        return x[:, :, self.slice] if self.place is None else x.gather(2, self._index(x))

    def put(self, x: torch.Tensor, target: torch.Tensor) -> None:
        """``x`` ``[B, H, n, .]`` into ``target`` ``[B, H, Lq, .]`` at those of these queries that there are."""
        if self.place is None or self.real is None:
            target[:, :, self.slice] = x
        else:
            target.scatter_(2, self._index(target), torch.where(self.real[:, None, :, None], x, self.take(target)))

    def _index(self, x: torch.Tensor) -> torch.Tensor:
        assert self.place is not None
        return self.place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])

    def seen(self) -> torch.Tensor:
        """Which tokens the queries see: bool ``[B or 1, 1, n, Lk]``."""
        call, device = self.call, self.call.key.device
        place = torch.arange(call.Lq, device=device)[None, self.slice] if self.place is None else self.place
        seen = torch.arange(call.Lk, device=device) <= (place + (call.Lk - call.Lq))[..., None]
        if call.padding is not None and self.real is not None:
            seen = seen & call.padding[:, None] & self.real[..., None]
        return seen[:, None]


def attend_last(call: Call, n: int, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Exact attention of the last ``n`` queries of every sequence into ``outputs``, out ``[B, H, Lq, Dv]`` and
    log-sum-exp ``[B, H, Lq]``; other queries and padding keep what they have."""
    out, lse = outputs
    end, group = _End.of(call, n), call.query.shape[1] // call.key.shape[1]
    is_fast = call.query.is_cuda and fits(call.key, call.value, group)
    attention = decode_triton if is_fast else decode_reference
    rows = Rows(end.tokens, call.padding)
    found, found_lse = attention(end.take(call.query), call.key, call.value, call.scale, rows)
    end.put(found, out)
    end.put(found_lse[..., None], lse[..., None])


def last_gradients(
    call: Call, n: int, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, _Gradients]:
    """The gradient of the output without that of these queries, and what they add to the gradients of query, key and
    value, in float32 (float64 for float64) and of their shapes."""
    end, H_kv = _End.of(call, n), call.key.shape[1]
    kind = torch.promote_types(grad.dtype, torch.float32)

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return end.take(x).unflatten(1, (H_kv, -1)).to(kind)  # [B, H_kv, G, n, .]

    key, value = (x[:, :, None].to(kind) for x in (call.key, call.value))
    if call.padding is not None:  # which may hold anything
        key, value = (x.masked_fill(~call.padding[:, None, None, :, None], 0) for x in (key, value))
    d_out, query = grouped(grad), grouped(call.query)
    seen = end.seen()[:, :, None]
    weights = ((query @ key.mT) * call.scale - grouped(lse[..., None])).masked_fill(~seen, -torch.inf).exp()
    d_scores = weights * (d_out @ value.mT - (d_out * grouped(out)).sum(-1, keepdim=True)) * call.scale
    d_query = torch.zeros(call.query.shape, dtype=kind, device=grad.device)
    end.put((d_scores @ key).flatten(1, 2), d_query)
    rest = grad.clone()
    end.put(torch.zeros_like(end.take(grad)), rest)
    d_key, d_value = ((x.mT @ y).sum(2) for x, y in ((d_scores, query), (weights, d_out)))
    return rest, (d_query, d_key, d_value)
