"""The streaming form of Express: a state of O(s) rows that tokens are added to and queries attend to.

A direct transcript of Alg. 1-5 of *Express Language Modeling* (arXiv 2606.10944), with two changes: the newest
token always stands for itself alone, and a subsampling group enters when it is complete (until then its rows
are held exactly). For the same seed it holds, at every length, the rows that the prefill form of ``express``
uses. Plain PyTorch, any device, float64 included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .express import Express, gather_rows
from .launch import philox_uniform
from .select.contest import CONTEST, contest, distinctiveness
from .select.halving import halve_reference
from .select.schedule import CLOSE_FIRST, CLOSE_SECOND, SUBSAMPLE, Round, stage


@dataclass(frozen=True)
class Kept:
    """Rows of every sequence and KV head: token index ``[B, H_kv, R]``, keys and values ``[B, H_kv, R, .]``."""

    index: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def __getitem__(self, rows: slice) -> Kept:
        return Kept(*(x[:, :, rows] for x in self.parts()))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.index, self.key, self.value

    @property
    def count(self) -> int:
        return self.index.shape[2]

    def pick(self, at: torch.Tensor) -> Kept:
        """The rows at ``at`` ``[B, H_kv, R']``."""
        return Kept(self.index.gather(2, at), gather_rows(self.key, at), gather_rows(self.value, at))


def join(*rows: Kept) -> Kept:
    """The rows of all of them, in order."""
    if len(rows) == 1:
        return rows[0]
    return Kept(*(torch.cat(parts, 2) for parts in zip(*(r.parts() for r in rows), strict=True)))


class ExpressState:
    """The rows of Express after the tokens seen so far.

    ``config`` decides which rows are kept, ``scale`` is the attention scale, ``seed`` (0-dim int64) and
    ``layer`` name the random stream, and ``heads`` int64 ``[H_kv]`` the numbers that the KV heads have in it, where
    they are not all heads of a layer in order. The first tokens decide the batch, H_kv and the head sizes.
    """

    def __init__(
        self,
        config: Express,
        scale: float,
        seed: torch.Tensor,
        layer: int = 0,
        heads: torch.Tensor | None = None,
    ) -> None:
        self.config, self.scale, self.seed, self.layer, self.heads = config, scale, seed, layer, heads
        self.length = 0  # tokens seen
        self.streamed = 0  # tokens that entered the thinning stream
        self.dropped = 0  # tokens that no row stands for, where there is no such stream
        self._rows: dict[str, Kept] = {}
        self._buckets: list[Kept] = []  # S_0 .. of the round
        self._halved: list[int] = []  # how often each of them was halved in this round
        self._scores, self._key_sum = torch.empty(0), torch.empty(0)  # of the shapes that the first tokens have

    # -- adding tokens ------------------------------------------------------------------------------------------

    def update(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add tokens: ``key`` ``[B, H_kv, n, D]``, ``value`` ``[B, H_kv, n, Dv]``, the same B, H_kv and head
        sizes at every call (``ValueError`` otherwise)."""
        self._check("key", key)
        self._check("value", value)
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(f"value: shape {tuple(value.shape)}; must begin like key's, {tuple(key.shape[:3])}")
        B, H, n, _ = key.shape
        index = torch.arange(self.length, self.length + n, device=key.device).expand(B, H, n)
        rows = Kept(index, key, value)
        if not self._rows:
            empty = rows[:0]
            self._rows = {name: empty for name in ("sinks", "window", "places", "waiting", "E")}
            dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
            self._key_sum = torch.zeros(B, H, key.shape[-1], dtype=dtype, device=key.device)
            self._scores = torch.zeros(B, H, 0, dtype=dtype, device=key.device)
        self.length += n
        room = min(n, self.config.sinks - self._rows["sinks"].count)
        if room > 0:
            self._append("sinks", rows[:room])
            self._key_sum = self._key_sum + rows[:room].key.to(self._key_sum).sum(2)
            rows = rows[room:]
        self._append("window", rows)
        self._leave_window()

    def _leave_window(self) -> None:
        leaving = self._rows["window"].count - self.config.recent
        step = CONTEST if self.config.protected else max(leaving, 0)
        while leaving >= max(step, 1):
            rows, self._rows["window"] = self._rows["window"][:step], self._rows["window"][step:]
            leaving -= step
            self._stream(self._compete(rows) if self.config.protected else rows)

    def _compete(self, rows: Kept) -> Kept:
        """One contest for the protected places; returns the rows that lost."""
        self._key_sum = self._key_sum + rows.key.to(self._key_sum).sum(2)
        scores = distinctiveness(rows.key, self._key_sum, int(rows.index[0, 0, -1]) + 1)
        pool = join(self._rows["places"], rows)
        places, self._scores, losers = contest(
            self._rows["places"].index, self._scores, rows.index, scores, self.config.protected
        )
        # both are in position order, as the pool is
        self._rows["places"] = pool.pick(torch.searchsorted(pool.index.contiguous(), places.contiguous()))
        return pool.pick(torch.searchsorted(pool.index.contiguous(), losers.contiguous()))

    def _stream(self, rows: Kept) -> None:
        if self.config.forgets:
            self.dropped += rows.count
            return
        while rows.count:
            round_ = self._round
            if round_.r == 0:
                take = min(rows.count, 4 * round_.s - self.streamed)
                self._append("E", rows[:take])
            else:
                # a group, or as many rows as fit before the next bucket is full
                if round_.q == 0:
                    free = round_.block * 4 - self.streamed if round_.group == 1 else round_.group
                else:
                    free = (round_.capacity(0) - self._buckets[0].count) * round_.group
                take = min(rows.count, free - self._rows["waiting"].count)
                self._append("waiting", rows[:take])
                self._admit(round_)
            rows = rows[take:]
            self.streamed += take
            if self.streamed == 4 * round_.block:
                self._close(round_)

    @property
    def _round(self) -> Round:
        r = 0
        while 4 ** (r + 1) * self.config.s <= self.streamed:
            r += 1
        return Round(r, self.config.s, self.config.M)

    def _admit(self, round_: Round) -> None:
        groups = self._rows["waiting"].count // round_.group
        taken = groups * round_.group
        if not groups:
            return
        rows, self._rows["waiting"] = self._rows["waiting"][:taken], self._rows["waiting"][taken:]
        if round_.group > 1:
            B, H = rows.index.shape[:2]
            device = rows.key.device
            # groups are numbered from the start of the round
            done = self._rows_before_group(round_) // round_.group
            draw = torch.arange(done, done + groups, device=device)
            u = philox_uniform(self.seed, self.layer, draw, 0, stage(round_.r, SUBSAMPLE), self._heads(rows))
            at = torch.arange(groups, device=device) * round_.group + (u * round_.group).long()
            rows = rows.pick(at.expand(B, H, groups))
        if round_.q == 0:
            self._append("E", rows)
            return
        self._buckets[0] = join(self._buckets[0], rows)
        for level in range(round_.q):
            if self._buckets[level].count < round_.capacity(level):
                return
            full, self._buckets[level] = self._buckets[level], self._buckets[level][:0]
            kept = self._halve(full, round_, level, self._halved[level], round_.level_delta(level))
            self._halved[level] += 1
            if level == round_.q - 1:
                self._append("E", kept)
            else:
                self._buckets[level + 1] = join(self._buckets[level + 1], kept)

    def _rows_before_group(self, round_: Round) -> int:
        """Tokens of this round whose groups were complete before the rows that are waiting now."""
        return (self.streamed - round_.block) // round_.group * round_.group

    def _close(self, round_: Round) -> None:
        E, delta = self._rows["E"], round_.delta() / 2
        E = self._halve(E, round_, CLOSE_FIRST, 0, delta)
        self._rows["E"] = self._halve(E, round_, CLOSE_SECOND, 0, delta)
        following = Round(round_.r + 1, round_.s, round_.M)
        self._buckets = [E[:0] for _ in range(following.q)]
        self._halved = [0] * following.q

    def _halve(self, rows: Kept, round_: Round, level: int, bucket: int, delta: float) -> Kept:
        pairs = torch.arange(rows.count // 2, device=rows.key.device)
        draws = philox_uniform(self.seed, self.layer, pairs, bucket, stage(round_.r, level), self._heads(rows))
        second = halve_reference(rows.key, rows.value, draws, self.config.rule, delta, self.scale)
        return rows.pick(2 * pairs + second.long())

    def _heads(self, rows: Kept) -> torch.Tensor:
        heads = torch.arange(rows.index.shape[1], device=rows.key.device) if self.heads is None else self.heads
        return heads[:, None]

    def _append(self, name: str, rows: Kept) -> None:
        self._rows[name] = join(self._rows[name], rows)

    # -- reading ------------------------------------------------------------------------------------------------

    def coreset(self) -> tuple[Kept, torch.Tensor]:
        """Every row held, and the tokens each one stands for: float64 ``[R]``; they sum to ``length - dropped``."""
        if not self._rows:
            raise ValueError("the state is empty: call update() first")
        round_ = self._round
        parts = [(self._rows[name], 1.0) for name in ("sinks", "places", "window", "waiting")]
        parts.append((self._rows["E"], 4.0**round_.r))
        parts += [(bucket, float(round_.group * 2**level)) for level, bucket in enumerate(self._buckets)]
        weights = [torch.full((rows.count,), weight, dtype=torch.float64) for rows, weight in parts]
        return join(*(rows for rows, _ in parts)), torch.cat(weights)

    @property
    def thinned(self) -> int:
        """Kept held by the thinning stream, fewer than 6 s (rows of an unfinished subsampling group excluded)."""
        return self._rows["E"].count + sum(bucket.count for bucket in self._buckets) if self._rows else 0

    def attend(
        self, query: torch.Tensor, key: torch.Tensor | None = None, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of ``query`` ``[B, H, n, D]`` over the state: ``[B, H, n, Dv]``.

        ``key`` and ``value`` ``[B, H_kv, n, .]``, if given, are the tokens of the queries themselves, which are
        not in the state yet: each query sees them causally, itself included, with weight 1.
        """
        if query.dim() != 4:
            raise ValueError(f"query: shape {tuple(query.shape)}; must be [batch, heads, length, head size]")
        n = query.shape[2]
        if (key is None) != (value is None) or (key is not None and key.shape[2] != n):
            raise ValueError("key, value: give both, one row per query, or none")
        own = 0 if key is None else n
        keys, values, weights = [], [], []
        if self._rows:
            rows, weight = self.coreset()
            keys, values, weights = [rows.key], [rows.value], [weight]
        elif not own:
            raise ValueError("the state is empty: call update() first")
        if key is not None and value is not None:
            keys, values = [*keys, key], [*values, value]
            weights = [*weights, torch.ones(n, dtype=torch.float64)]
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        k, v = torch.cat(keys, 2).to(dtype), torch.cat(values, 2).to(dtype)
        q = query.unflatten(1, (k.shape[1], -1)).to(dtype)
        bias = torch.cat(weights).log().to(q.device, dtype)
        scores = (q @ k.mT[:, :, None]) * self.scale + bias
        if own:
            hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            scores[..., -n:] = scores[..., -n:].masked_fill(hidden, -math.inf)
        return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2).to(query.dtype)

    def extend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Continue a prefill: attend and update block by block; ``[B, H, n, Dv]``.

        The same as the prefill form if every piece but the last ends where a block of queries does.
        """
        block, n = self.config.block, query.shape[2]
        stops = tuple(range(block - self.config.in_block(self.length), n, block))
        out = []
        for q, k, v in zip(*(x.tensor_split(stops, 2) for x in (query, key, value)), strict=True):
            out.append(self.attend(q, k, v))
            self.update(k, v)
        return torch.cat(out, 2)

    def _check(self, name: str, x: torch.Tensor) -> None:
        if x.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(x.shape)}; must be [batch, KV heads, length, head size]")
        held = self._rows.get("sinks")
        if held is not None:
            like = getattr(held, name)
            if x.shape[:2] != like.shape[:2] or x.shape[3] != like.shape[3]:
                raise ValueError(
                    f"{name}: shape {tuple(x.shape)}; this state holds [{like.shape[0]}, {like.shape[1]}, *, "
                    f"{like.shape[3]}]"
                )
