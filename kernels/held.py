"""The rows that a cache holds of a growing sequence, at fixed addresses: what attends to them, and what adds to them.

The static form of :class:`~.express_state.ExpressState`, which says what is held: at every length the same rows with
the same weights, for the same random numbers. Heads with equal rows share one :class:`HeldRows`, a tensor whose rows
are places of sinks, of a ring of recent tokens, of protected tokens, of the coreset and of a subsampling group that is
not complete. An empty place has the log-weight ``-inf``. What is where follows from two numbers per sequence: its
tokens, and how many of them have left the ring. Heads that see everything, or blocks that queries select, hold all
tokens, and they alone grow. Selecting heads also hold the means of their keys in eights; a short step attends to the
pages of :mod:`.select.pages` that its queries choose by them.

Tokens of a short step stay in the ring until the next one begins (:meth:`Held.settle`), so that it can be undone
(:meth:`Held.drop`) as if it had never been. Rows that left the recent tokens and still stand for themselves alone wait
in the ring as well, up to ``CONTEST - 1`` of them, so that most steps move nothing.

What has to be thinned at some length is known ``recent`` tokens before: :meth:`Held.look_ahead` decides it early, each
part of a layer in a step of its own (``turn``) and behind what that step launches, so that the host works while the
device does, and when it is due the rows only change places. Where groups of few tokens leave a row each, many of them
are decided at once, up to :data:`.due.LINES`. So no step is late, and the rows are the same at every
length. Rows move in plain PyTorch, on any device; the halvings of a level are one launch on CUDA. There a single token
of every sequence attends and is held by :mod:`.attend.places`, in one launch, which a CUDA graph can hold
(:meth:`Held.launch_step`), and what is due then is one launch before it (:mod:`.due`), so that the host has hardly
anything to do; other short steps attend by :mod:`.attend.decode`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attend.decode import decode_attention, device_of, fits, queries_at_once
from .attend.places import Table, attend_places, make_table, shares
from .attend.segments import COMPACTED
from .due import COLUMNS, LINES, do_what_is_due, line
from .express import Express, gather_rows, make_layout, select_rows
from .express_state import Kept, join
from .heads import Group, PerHead, groups
from .launch import Random, philox_uniform
from .prepared import without_autocast
from .select.contest import CONTEST, contest, distinctiveness
from .select.halving import Decider, halve_reference
from .select.pages import PAGE, SUB, Listing, Tokens, choose_pages, listed, step_pages, update_means
from .select.schedule import CLOSE_FIRST, CLOSE_SECOND, SUBSAMPLE, Halving, Round, round_of, stage
from .select.thinning import draws_triton, halve

STEP = 32  # tokens of a step that can be undone
_GROW = 256  # rows, the least that heads which hold everything grow by
_PIECE = 128  # queries that attend at once where a head holds everything
_WAITING = 16  # places for an unfinished subsampling group at first
_AHEAD = 128  # steps over which the layers of a model, and their parts, spread what is due in the same one
_PART = 32  # so many of them lie between the parts of a layer
_COPIED = 32 << 20  # bytes, which a GPU copies in less time than the host takes to launch what picks a row of a group
_LATER = 1 << 30
_WARM: set[tuple[Any, ...]] = set()
_LN2 = math.log(2.0)


def _in_place(method: Callable[..., Any]) -> Callable[..., Any]:
    """Without gradients and autocast, and with tensors that can be written to whether or not somebody is in inference
    mode."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), without_autocast():
            return method(*args, **kwargs)

    return run


def _by_kernels(x: torch.Tensor) -> bool:
    """Whether steps of one token run by kernels."""
    return x.is_cuda


@dataclass
class Ahead:
    """What is decided already for the time when ``until`` tokens have left the ring: which places will have changed,
    int32 ``[R]`` and the largest, what they hold then and its log-weights, and the other state of some sequences.
    ``end``: how many tokens there are with the new one in the step that does it by itself; 0: none does."""

    until: int
    at: torch.Tensor
    most: int
    rows: Kept
    log_weight: torch.Tensor
    others: dict[str, torch.Tensor]
    end: int = 0


class HeldRows:
    """The rows of the KV heads of a group. ``config`` None: they hold every token, token i at place i.

    key, value: ``[B, G, places, .]``. log_weight: float32 ``[B, G, places]``. token: int32 like it, which token of its
    sequence is there. means: ``[B, G, places / 8, D]`` where blocks are selected. left: for each sequence, the tokens
    that left the ring and are no sinks.
    """

    def __init__(
        self, group: Group, config: Express | None, key: torch.Tensor, value: torch.Tensor, random: Random,
        scale: float, turn: int = 0,
    ) -> None:  # fmt: skip
        self.group, self.config, self.scale = group, config, scale
        self.ahead: dict[tuple[int, int], list[Ahead]] = {}  # by sequences side by side; one or more, the next first
        self.done: dict[tuple[int, int], Ahead] = {}  # the last ones that steps did: these may be repeated
        self.due, self._due_at = torch.empty(0, 0, dtype=torch.int64), 0  # the lines of :mod:`.due`, and their address
        self.touched: list[tuple[int, int]] | None = None  # (first, count) of places that were written, if anyone asks
        self.turn = turn
        self.is_listed = False  # whether ``pages`` is up to date
        heads = group.on(key.device)
        if heads is None:  # int32 as those of a group: kernels are compiled once more for another dtype
            heads = torch.arange(key.shape[1], dtype=torch.int32, device=key.device)
        self.random = random._replace(heads=heads)
        B, G = key.shape[0], len(self.random.heads)
        self.left = [0] * B
        self.sinks = self.ring = self.places = self.coreset = self.waiting = 0
        self.scores = self.key_sum = torch.empty(B, G, 0, dtype=torch.float32, device=key.device)
        if config is not None:
            slack = 0 if self.drops else CONTEST - 1
            self.ring = config.sinks
            self.places = self.ring + config.recent + slack + STEP
            self.coreset = self.places + config.protected
            # E has places for 4 s rows, and 3 s while there are buckets, which lie behind those, the last one first
            rows = 0 if config.forgets else max(4 * config.s, 7 * config.s - (4 * config.s >> config.M))
            self.waiting = self.coreset + rows
            dtype = torch.promote_types(key.dtype, torch.float32)
            self.scores = torch.zeros(B, G, config.protected, dtype=dtype, device=key.device)
            self.key_sum = torch.zeros(B, G, key.shape[-1], dtype=dtype, device=key.device)
        places = self.waiting + (_WAITING if self.waiting > self.coreset else 0)
        self.key = key.new_zeros(B, G, places, key.shape[-1])
        self.value = value.new_zeros(B, G, places, value.shape[-1])
        self.token = torch.zeros(B, G, places, dtype=torch.int32, device=key.device)
        self.log_weight = torch.full((B, G, places), -math.inf, dtype=torch.float32, device=key.device)
        self.means = key.new_zeros(B, G, 0, key.shape[-1])
        self.pages = self.listed = torch.empty(0, dtype=torch.int32, device=key.device)

    @property
    def drops(self) -> bool:
        """Whether a token is gone as soon as it is no longer recent."""
        return self.config is not None and self.config.forgets and not self.config.protected

    TENSORS = ("key", "value", "token", "log_weight", "scores", "key_sum", "means")

    # -- places -------------------------------------------------------------------------------------------------

    def _read(self, b: slice, first: int, count: int) -> Kept:
        rows = slice(first, first + count)
        return Kept(self.token[b, :, rows], self.key[b, :, rows], self.value[b, :, rows])

    def _write(self, b: slice, first: int, rows: Kept, log_weight: float | torch.Tensor = 0.0) -> None:
        if not rows.count:
            return
        if first + rows.count > self.key.shape[2]:
            self._grow(first + rows.count)
        self._touch(first, rows.count)
        to = slice(first, first + rows.count)
        for mine, x in zip((self.token, self.key, self.value), rows.parts(), strict=True):
            mine[b, :, to] = x
        self.log_weight[b, :, to] = log_weight

    def _touch(self, first: int, count: int) -> None:
        self.is_listed = False
        if self.touched is not None and count:
            self.touched.append((first, count))

    def _free(self, b: slice, first: int, count: int) -> None:
        self._touch(first, count)
        self.log_weight[b, :, first : first + count] = -math.inf

    def _grow(self, places: int) -> None:
        """More places at the end: for all tokens, or for a longer subsampling group."""
        places += max(_GROW, places // 8) if self.config is None else 0
        sizes = dict.fromkeys(("key", "value", "token", "log_weight"), places)
        if self.group.rows.selected:
            sizes["means"] = -(-places // SUB)
        for name, size in sizes.items():
            old = getattr(self, name)
            new = old.new_full((*old.shape[:2], size, *old.shape[3:]), -math.inf if name == "log_weight" else 0)
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def _in_ring(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(place, token, count) of the runs of places that hold the tokens from ``first`` to ``stop``."""
        while first < stop:
            at = (first - self.ring) % (self.places - self.ring)
            count = min(stop - first, self.places - self.ring - at)
            yield self.ring + at, first, count
            first += count

    # -- adding tokens ------------------------------------------------------------------------------------------

    def leaves(self, length: int, left: int) -> int:
        """How many tokens have left the ring of a sequence of ``length``, of which ``left`` have already."""
        if self.config is None:
            return 0
        out = max(0, length - self.config.sinks - self.config.recent)
        if self.config.protected:
            return max(left, out - out % CONTEST)
        stays = not self.drops and out - left < self._most_waiting and out < self._next(left)
        return max(left, left if stays else out)

    def _round(self, streamed: int) -> Round:
        """The round that a stream of so many tokens is in."""
        assert self.config is not None
        s = self.config.s
        return Round(round_of(streamed, s), s, self.config.M)

    def _next(self, left: int) -> int:
        """How many tokens have left when, after ``left`` of them, something else than a row by itself is held next."""
        config = self.config
        if config is None or self.drops:
            return _LATER
        if config.protected:
            return left + CONTEST
        round_ = self._round(left)
        every = round_.group if round_.group > 1 else round_.capacity(0) if round_.r else 4 * config.s
        return left - left % every + every

    @property
    def _most_waiting(self) -> int:
        """Rows that may wait in the ring; each layer and part moves its own in another step."""
        return CONTEST - self.turn % _AHEAD

    def _until(self, left: int) -> int:
        """How many tokens have left when anything is held otherwise than after ``left`` of them."""
        until = self._next(left)
        return until if self.config is None or self.config.protected else min(until, left + self._most_waiting)

    def _lead(self, between: int) -> int:
        """How many steps before its time it is decided what is due ``between`` tokens after what was due before: each
        layer and part in another step, as far as there are so many."""
        assert self.config is not None
        return min(self.config.recent, 1 + self.turn % min(_AHEAD, max(1, self.config.recent), between))

    def _is_worth_it(self, until: int) -> bool:
        """Whether what is due when ``until`` tokens have left is more than to pick one of a group, or the copy of all
        rows that it takes to decide it early is small."""
        config = self.config
        assert config is not None
        if config.protected or self.key.nbytes + self.value.nbytes <= _COPIED:
            return True
        round_ = self._round(until - 1)
        return until % (round_.capacity(0) * round_.group) == 0

    def rest(self, b: slice, length: int) -> int:
        """For how many steps of one token :meth:`advance` has nothing to do before them, beside the tokens that
        :attr:`drops` means, and no memory is too short."""
        if self.config is None:
            return self.key.shape[2] - length - 1
        if self.drops:
            return _LATER
        queue = self.ahead.get((b.start, b.stop))
        left = queue[-1].until if queue and self._is_handed(queue[-1]) else self.left[b.start]
        return self._until(left) + self.config.sinks + self.config.recent - length

    def idle(self, b: slice, length: int) -> int:
        """For how many steps of one token nothing is due in them, and nothing is to be decided behind them."""
        if self.config is None or self.drops:
            return _LATER
        if queue := self.ahead.get((b.start, b.stop)):
            return queue[0].end - 1 - length if self._is_handed(queue[0]) else _LATER
        left, until = self.left[b.start], self._until(self.left[b.start])
        if not self._is_worth_it(until):
            return _LATER
        return until + self.config.sinks + self.config.recent - 1 - self._lead(until - left) - length

    def look_ahead(self, b: slice, length: int) -> None:
        """Decide what is due soon. It follows from tokens that are in the ring by then."""
        config, key = self.config, (b.start, b.stop)
        if config is None or self.drops or key in self.ahead:
            return
        left, until = self.left[b.start], self._until(self.left[b.start])
        steps = until + config.sinks + config.recent - length
        if steps > self._lead(until - left) or not self._is_worth_it(until):
            return
        fork = copy.copy(self)
        for name in self.TENSORS:
            setattr(fork, name, getattr(self, name)[b].clone())
        fork.left, every = self.left[b], slice(0, b.stop - b.start)
        queue: list[Ahead] = []
        for stop, several in self._runs(left, until, length):
            queue += self._decided(fork, every, left, stop, several)
            left = stop
        self.ahead[key] = queue
        fits = max(x.most for x in queue) < self.key.shape[2] and self.pages.shape[1:] == fork.pages.shape[1:]
        if self._has_lines and fits:
            lines = torch.full((every.stop, LINES, int(COLUMNS)), -1, dtype=torch.int64)
            for n, x in enumerate(queue):
                x.end = x.until + config.sinks + config.recent + 1
                parts = (*x.rows.parts(), x.log_weight), (x.others["pages"], x.others["listed"])
                lines[:, n] = torch.tensor([line(x.end, x.at, i, *parts) for i in range(every.stop)])
            self.due[b].copy_(lines, non_blocking=True)

    def _runs(self, left: int, until: int, length: int) -> Iterator[tuple[int, int]]:
        """What is decided at once after ``left`` tokens have left, next when ``until`` have: how many have behind each
        run of events, and how many events it has, of one subsampling group each where there are several.

        One group of few tokens after another would take the host more time than the device. So as many are decided as
        there are lines, up to one that is another in each layer and part: they take turns.
        """
        config = self.config
        assert config is not None
        round_ = self._round(left)
        group = round_.group
        if config.protected or group == 1 or until % group or not self._has_lines:
            yield until, 1
            return
        turn = (self.turn + self.turn // _PART) % LINES
        fills = round_.capacity(0) * group if round_.q else 4 * round_.block  # tokens that fill a bucket
        stop = min(length - config.sinks, 4 * round_.block)  # what is held by now, of this round
        several, waits = 0, left % group > 0  # a part of the first group waits elsewhere
        while True:  # one of so many as there are lines has its turn
            if waits or until % fills == 0:
                if several:
                    yield until - group, several
                several, waits = 0, False
                yield until, 1
            else:
                several += 1
            if until // group % LINES == turn or until + group > stop:
                break
            until += group
        if several:
            yield until, several

    def _decided(self, fork: HeldRows, every: slice, left: int, until: int, several: int) -> list[Ahead]:
        """What changes in a run of ``several`` events, until so many tokens have left, which ``fork`` does."""
        fork.touched, fork.pages = [], self.pages.new_empty(0)  # each has a list of its own
        ring = list(self._in_ring(self.ring + left, self.ring + until))
        fork._leave(every, left, join(*(fork._read(every, at, n) for at, _, n in ring)))
        written, size = list(fork.touched), (until - left) // several
        for place, _, count in ring:
            fork._free(every, place, count)
        freed = [place + i for place, _, count in ring for i in range(count)]
        if several == 1:
            each = [sorted({*freed, *(first + i for first, count in written for i in range(count))})]
        else:  # every group leaves one row
            ((to, _),) = written
            each = [[*freed[i * size : (i + 1) * size], to + i] for i in range(several)]
        at = torch.tensor(each, dtype=torch.int32).to(self.key.device, non_blocking=True)  # waits for no step
        names = ("token", "key", "value", "log_weight")
        rows = (getattr(fork, name).index_select(2, at.flatten()).unflatten(2, at.shape) for name in names)
        token, key, value, log_weight = (x.movedim(2, 0).contiguous() for x in rows)
        fork.list_pages()  # of a run also those that hold a row only behind a later event
        others = {name: getattr(fork, name) for name in ("scores", "key_sum", "pages", "listed")}
        return [
            Ahead(left + (i + 1) * size, at[i], max(each[i]), Kept(token[i], key[i], value[i]), log_weight[i], others)
            for i in range(several)
        ]

    def catch_up(self, b: slice, ahead: Ahead) -> None:
        """Hold what was decided ahead."""
        self.left[b] = [ahead.until] * (b.stop - b.start)
        if ahead.most >= self.key.shape[2]:
            self._grow(ahead.most + 1)
            self.is_listed = False
        names = ("token", "key", "value", "log_weight")
        for name, x in zip(names, (*ahead.rows.parts(), ahead.log_weight), strict=True):
            getattr(self, name)[b].index_copy_(2, ahead.at.long(), x)
        self.is_listed = self.is_listed and self.pages.shape[1:] == ahead.others["pages"].shape[1:]
        for name, x in ahead.others.items():
            if self.is_listed or name not in ("pages", "listed"):
                getattr(self, name)[b] = x

    def advance(self, b: slice, length: int, new: Kept) -> None:
        """Let tokens leave the ring that are no longer recent, once ``new`` ones follow ``length`` of them."""
        left = self.left[b.start]
        until = self.leaves(length + new.count, left)
        if until == left:
            return
        self.withdraw()
        queue = self.ahead.pop((b.start, b.stop), [])
        self.ahead = {key: x for key, x in self.ahead.items() if key[1] <= b.start or key[0] >= b.stop}
        if now := [x for x in queue if x.until <= until]:
            for ahead in now:
                self.catch_up(b, ahead)
            self.advance(b, length, new)
            return
        first, stop = self.ring + left, self.ring + until
        rows = []
        for place, _, count in self._in_ring(first, min(stop, length)):
            rows.append(self._read(b, place, count))
        if stop > length:
            rows.append(new[max(first - length, 0) : stop - length])
        self._leave(b, left, join(*rows))
        for place, _, count in self._in_ring(first, min(stop, length)):
            self._free(b, place, count)
        self.left[b] = [until] * (b.stop - b.start)

    # -- what steps do by themselves ----------------------------------------------------------------------------

    @property
    def _has_lines(self) -> bool:
        """Whether steps read the lines of this cache; those of a copy are no longer its own."""
        return self.due.shape[0] == len(self.left) and self.due.data_ptr() == self._due_at

    def _is_handed(self, ahead: Ahead) -> bool:
        return ahead.end > 0 and self._has_lines

    def line_up(self) -> None:
        """Have lines that steps can read, where anything can be due."""
        is_apart = self.config is None or self.drops or not _by_kernels(self.key)
        if is_apart or (self._has_lines and self.due.device == self.key.device):
            return
        self.due = torch.full((len(self.left), LINES, int(COLUMNS)), -1, dtype=torch.int64, device=self.key.device)
        self._due_at = self.due.data_ptr()
        self._take_back()

    def _take_back(self) -> None:
        """Know that no step does what is decided."""
        self.done.clear()
        for x in itertools.chain(*self.ahead.values()):
            x.end = 0

    def does(self, b: slice, length: int) -> bool:
        """Whether the step behind ``length`` tokens does what is due by itself."""
        queue = self.ahead.get((b.start, b.stop))
        return queue is not None and queue[0].end == length + 1 and self._has_lines

    def count_done(self, lengths: list[int]) -> bool:
        """Know that a step behind so many tokens does what is due, and say whether anything is."""
        is_done = False
        for (first, stop), queue in list(self.ahead.items()):
            if (ahead := queue[0]).end == lengths[first] + 1 and self._has_lines:
                self.left[first:stop] = [ahead.until] * (stop - first)
                if self.config is not None and self.config.protected:
                    self.scores[first:stop], self.key_sum[first:stop] = ahead.others["scores"], ahead.others["key_sum"]
                self.done[first, stop], is_done = queue.pop(0), True
                if not queue:
                    del self.ahead[first, stop]
        return is_done

    def withdraw(self, lengths: list[int] | None = None) -> None:
        """Let steps do nothing of what is decided. ``lengths``: what one behind so many tokens may have done is."""
        if lengths is not None:
            self.count_done(lengths)
            for (first, stop), ahead in self.done.items():
                if ahead.end == lengths[first] + 1 and self._has_lines:
                    self.catch_up(slice(first, stop), ahead)
        if self.done or any(x.end for x in itertools.chain(*self.ahead.values())):
            self.due.fill_(-1)
            self._take_back()

    # -- adding tokens as they are --------------------------------------------------------------------------------

    def append(self, b: slice, length: int, new: Kept, settle: bool) -> None:
        """Hold ``new`` tokens behind ``length`` of them; those that leave the ring, too, or let them wait for that."""
        if self.config is None:
            self._write(b, length, new)
            if self.group.rows.selected:
                self._update_means(b, length, length + new.count)
            return
        sinks = min(max(self.ring - length, 0), new.count)
        if sinks:
            self._write(b, length, new[:sinks])
        if settle:
            self.advance(b, length, new)
        first = max(length + sinks, self.ring + self.left[b.start])
        for place, token, count in self._in_ring(first, length + new.count):
            self._write(b, place, new[token - length : token - length + count])

    def _update_means(self, b: slice, since: int, end: int) -> None:
        """The means of the eights that hold the tokens from ``since`` to ``end``."""
        first, place = since // SUB, since // SUB * SUB
        key, means = self.key[b, :, place:end], self.means[b, :, first : -(-end // SUB)]
        update_means(means, key, *self._span(b, end - place))

    def list_pages(self) -> None:
        """Which pages of places hold rows, or may by the next tokens: ``pages`` int32 ``[B, G, .]``, and in front of it
        ``listed`` int32 ``[B, G]`` of them. Those that queries select are written by :meth:`Held.launch_step`."""
        B, G, places = self.log_weight.shape
        rows, new = self.group.rows, self.pages.new_empty
        if rows.selected:
            count = listed(rows.selected, rows.sinks, max(1, rows.recent))
            if self.pages.shape != (B, G, count):
                self.pages, self.listed = new(B, G, count), new(B, G).fill_(count)
        elif self.config is not None and not self.is_listed:
            live = torch.nn.functional.pad(self.log_weight > -math.inf, (0, -places % PAGE)).unflatten(2, (-1, PAGE))
            live = live.any(3)
            live[:, :, : -(-self.places // PAGE)] = True
            order = live.to(torch.int8).argsort(dim=2, descending=True, stable=True).to(torch.int32)
            if self.pages.shape == order.shape:
                self.pages.copy_(order)
                self.listed.copy_(live.sum(2))
            else:
                self.pages, self.listed = order, live.sum(2).to(torch.int32)
        self.is_listed = True

    def _span(self, b: slice, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first token of every sequence, and the one behind the last."""
        end = torch.full((b.stop - b.start,), tokens, dtype=torch.int32, device=self.key.device)
        return torch.zeros_like(end), end

    def _leave(self, b: slice, left: int, rows: Kept) -> None:
        config = self.config
        assert config is not None
        if not config.protected:
            self._stream(b, left, rows)
            return
        for i in range(0, rows.count, CONTEST):
            losers = self._compete(b, left + i, rows[i : i + CONTEST])
            self._stream(b, config.streamed(left + i), losers)

    def thin_prompt(self, b: slice, new: Kept, key: torch.Tensor, value: torch.Tensor) -> None:
        """Let the first tokens leave all at once, as a prefill thins them, up to where a block of queries starts;
        ``key`` and ``value`` are those of all heads."""
        config = self.config
        if config is None or self.drops:
            return
        begin = new.count - config.in_block(new.count)
        left = self.leaves(begin, 0)
        if left <= config.protected if config.forgets else config.streamed(left) < 4 * config.s:
            return
        layout = make_layout(config, 1, begin + 1)
        random = self.random._replace(heads=self.group.on(key.device))
        index = select_rows(key[:, :, :begin], value[:, :, :begin], layout, self.scale, random)[1]
        segments, log_weight = layout.table.segments[0], layout.table.log_weight[0]
        round_ = self._round(config.streamed(left))
        places = [self.places, self.waiting] if config.protected else []
        places += [self.coreset, *(self._bucket(round_, level) for level in range(round_.q))]
        for to, (source, first, count), weight in zip(places, segments[1:], log_weight[1:], strict=False):
            at = index[:, :, first : first + count] if source == COMPACTED else new.index[:, :, first : first + count]
            if config.protected and to == self.places:  # which the kernel has by score, and contests take by position
                at = at.sort(-1).values
            self._write(b, to, new.pick(at.long()), float(weight))
        if config.protected:
            self._score_places(b, new, left)
        else:  # a subsampling group that is not complete is where the tail of the table begins
            self._write(b, self.waiting, new[int(layout.table.tail[0]) : config.sinks + left])
        self.left[b] = [left] * (b.stop - b.start)

    def _score_places(self, b: slice, new: Kept, left: int) -> None:
        """The scores of the protected tokens, each by the mean of the keys up to its contest."""
        config = self.config
        assert config is not None
        keys = new.key[:, :, config.sinks : config.sinks + left].to(self.key_sum).unflatten(2, (-1, CONTEST)).sum(3)
        keys[:, :, 0] += new.key[:, :, : config.sinks].to(self.key_sum).sum(2)
        sums = keys.cumsum(2)
        self.key_sum[b] = sums[:, :, -1]
        places = self._read(b, self.places, config.protected)
        contests = (places.index.long() - config.sinks) // CONTEST
        counts = config.sinks + (contests + 1) * CONTEST
        means = gather_rows(sums, contests) / counts[..., None]
        self.scores[b] = -torch.cosine_similarity(places.key.to(sums), means, dim=-1)

    def _compete(self, b: slice, left: int, rows: Kept) -> Kept:
        """One contest for the protected places; returns the rows that lost."""
        config = self.config
        assert config is not None
        before = self.key_sum[b] if left else self._read(b, 0, config.sinks).key.to(self.key_sum).sum(2)
        self.key_sum[b] = before + rows.key.to(self.key_sum).sum(2)
        held = min(config.protected, left)
        scores = distinctiveness(rows.key, self.key_sum[b], config.sinks + left + CONTEST)
        old = self._read(b, self.places, held)
        index, scores, losers = contest(old.index, self.scores[b, :, :held], rows.index, scores, config.protected)
        pool = join(old, rows)
        lost = pool.pick(torch.searchsorted(pool.index, losers.contiguous()))
        self._write(b, self.places, pool.pick(torch.searchsorted(pool.index, index.contiguous())))
        self.scores[b, :, : index.shape[2]] = scores
        return lost

    def _stream(self, b: slice, streamed: int, rows: Kept) -> None:
        config = self.config
        assert config is not None
        if config.forgets:
            return
        while rows.count:
            round_ = self._round(streamed)
            room = round_.block - streamed % round_.block if round_.q else 4 * round_.block - streamed
            take = min(rows.count, room)
            self._admit(b, round_, streamed, rows[:take])
            rows, streamed = rows[take:], streamed + take
            if streamed == 4 * round_.block:
                self._close(b, round_)

    def _admit(self, b: slice, round_: Round, streamed: int, rows: Kept) -> None:
        """Rows of one block of a round; all buckets of a level that they fill are halved at once."""
        group = round_.group
        waiting, before = streamed % group, streamed // group
        if group > 1:
            done = (waiting + rows.count) // group * group - waiting  # those that complete a group
            if done <= 0:
                self._write(b, self.waiting + waiting, rows)
                return
            whole, rest = rows[:done], rows[done:]
            if waiting:
                whole = join(self._read(b, self.waiting, waiting), whole)
            rows = self._pick(round_, before - round_.block // group, whole)
            if waiting:
                self._free(b, self.waiting, waiting)
            self._write(b, self.waiting, rest)
        if not round_.q:  # round 0, or buckets that M leaves out
            self._write(b, self.coreset + before, rows, 2 * round_.r * _LN2)
            return
        blocks, entered = streamed // round_.block, streamed % round_.block // group
        for level in range(round_.q):
            capacity, place = round_.capacity(level), self._bucket(round_, level)
            held = entered % capacity
            buckets, weight = (held + rows.count) // capacity, (2 * round_.r - round_.q + level) * _LN2
            if not buckets:
                self._write(b, place + held, rows, weight)
                return
            number, taken = ((blocks - 1) * round_.level_rows(level) + entered) // capacity, buckets * capacity - held
            full, rest = rows[:taken], rows[taken:]
            if held:
                full = join(self._read(b, place, held), full)
            rows = self._halve(full, round_, level, number, round_.level_delta(level), buckets)
            self._free(b, place, capacity)
            self._write(b, place, rest, weight)
            entered = (entered - held) // 2
        self._write(b, self.coreset + blocks * round_.s, rows, 2 * round_.r * _LN2)

    def warm_up(self) -> None:
        """Compile what decides the rows of the steps that follow, and have its tables: a kernel that is first needed in
        the middle of a text takes seconds there."""
        config, (_, G, _, D), Dv = self.config, self.key.shape, self.value.shape[3]
        if config is None or self.drops or not _by_kernels(self.key):
            return
        round_ = self._round(config.streamed(self.left[0]))
        kind = config, round_, self.key.dtype, self.key.device, D, Dv
        if kind in _WARM:
            return
        _WARM.add(kind)
        other = HeldRows(self.group, config, self.key[:1], self.value[:1], self.random, self.scale)
        index = config.sinks + torch.arange(
            (config.protected // CONTEST + 2) * CONTEST, dtype=torch.int32, device=self.key.device
        )
        rows = Kept(
            index.expand(1, G, -1), *(x.new_zeros(1, G, len(index), x.shape[3]) for x in (self.key, self.value))
        )
        if config.protected:  # contests until some rows lose
            other._leave(slice(0, 1), 0, rows)
        other.list_pages()
        if config.forgets:
            return
        closing = [(CLOSE_FIRST, 4 * config.s, 1), (CLOSE_SECOND, 2 * config.s, 1)]
        for level, capacity, most in [*((i, round_.capacity(i), CONTEST >> i) for i in range(round_.q)), *closing]:
            for buckets in range(1, max(1, most // round_.group // capacity) + 1):  # of a contest several at once
                count = -(-buckets * capacity // rows.count)
                other._halve(join(*[rows] * count)[: buckets * capacity], round_, level, 0, 0.5, buckets)
        if round_.group > 1:
            other._pick(round_, 0, rows[: round_.group])

    def _bucket(self, round_: Round, level: int) -> int:
        return self.coreset + 7 * round_.s - (4 * round_.s >> (round_.q - 1 - level))

    def _pick(self, round_: Round, first: int, rows: Kept) -> Kept:
        """One row of every subsampling group; ``first`` of them were complete before in this round."""
        seed, layer, heads = self.random
        group, device = round_.group, rows.key.device
        number = torch.arange(rows.count // group, device=device)
        if rows.key.is_cuda:
            u = draws_triton(self.random, first, len(number), stage(round_.r, SUBSAMPLE))
        else:
            u = philox_uniform(seed, layer, first + number, 0, stage(round_.r, SUBSAMPLE), heads[:, None])
        at = number * group + (u * group).long()
        return rows.pick(at.expand(*rows.index.shape[:2], -1))

    def _close(self, b: slice, round_: Round) -> None:
        rows = self._read(b, self.coreset, 4 * round_.s)
        for level in (CLOSE_FIRST, CLOSE_SECOND):
            rows = self._halve(rows, round_, level, 0, round_.delta() / 2)
        self._free(b, self.coreset, 4 * round_.s)
        self._write(b, self.coreset, rows, 2 * (round_.r + 1) * _LN2)

    def _halve(self, rows: Kept, round_: Round, level: int, number: int, delta: float, buckets: int = 1) -> Kept:
        """``buckets`` of rows, one behind the other, the first of them with this ``number``."""
        config, (seed, layer, heads), count = self.config, self.random, rows.count // buckets
        assert config is not None
        if rows.key.is_cuda and rows.key.dtype != torch.float64 and config.rule.gain(count, delta) < math.inf:
            job = Halving(0, 0, count, buckets, stage(round_.r, level), number, delta)
            return rows.pick(halve(rows.key, rows.value, job, Decider(config.rule, self.scale, self.random)).long())
        pairs, bucket = (torch.arange(n, device=rows.key.device) for n in (count // 2, buckets))
        bucket = bucket[:, None]
        draws = philox_uniform(seed, layer, pairs, number + bucket, stage(round_.r, level), heads[:, None, None])
        key, value = (x.unflatten(2, (buckets, count)) for x in (rows.key, rows.value))
        second = halve_reference(key, value, draws, config.rule, delta, self.scale)
        return rows.pick((count * bucket + 2 * pairs + second.long()).flatten(2))

    # -- attending ----------------------------------------------------------------------------------------------

    def attend(self, b: slice, query: torch.Tensor, own: Kept) -> torch.Tensor:
        """Attention of ``query`` ``[B', H', n, D]`` to what is held and, causally, to their ``own`` tokens."""
        key, value, log_weight = self.key[b], self.value[b], self.log_weight[b]
        if own.count:
            key, value = torch.cat([key, own.key], 2), torch.cat([value, own.value], 2)
            log_weight = torch.nn.functional.pad(log_weight, (0, own.count))
        return decode_attention(query, key, value, self.scale, log_weight=log_weight)[0]

    def _extend_all(self, b: slice, length: int, query: torch.Tensor, new: Kept) -> torch.Tensor:
        """:meth:`extend` where every token is held; the queries of a short step select, others see all tokens."""
        is_selecting = self.group.rows.selected and new.count <= STEP
        at_once, outs = _PIECE, []
        if is_selecting:
            at_once = max(1, queries_at_once(query.shape[1] // self.key.shape[1]))
        for first in range(0, new.count, at_once):
            piece, q = new[first : first + at_once], query[:, :, first : first + at_once]
            self.append(b, length, piece, settle=True)
            length += piece.count
            pages = self._pages(b, length, q) if is_selecting else None
            key, value = self.key[b, :, :length], self.value[b, :, :length]
            outs.append(decode_attention(q, key, value, self.scale, pages=pages)[0])
        return torch.cat(outs, 2)

    def _pages(self, b: slice, length: int, query: torch.Tensor) -> torch.Tensor | None:
        """The pages that the last of ``length`` tokens select, all together: int32 ``[B', G, .]``; None for all."""
        rows = self.group.rows
        recent = max(1, rows.recent) + query.shape[2] - 1  # every query sees its own recent tokens
        if -(-length // PAGE) <= listed(rows.selected, rows.sinks, recent):
            return None
        means = self.means[b, :, : -(-length // SUB)]
        span = self._span(b, length)
        return choose_pages(query, means, self.scale, span, rows.selected, rows.sinks, recent)

    def extend(self, b: slice, length: int, query: torch.Tensor, new: Kept) -> torch.Tensor:
        """Attend with and append new tokens: those of a short step as they are, of others block by block."""
        n, config = new.count, self.config
        if config is None:
            return self._extend_all(b, length, query, new)
        if n == 1:
            self.append(b, length, new, settle=False)
            return self.attend(b, query, new[:0])
        outs, first = [], 0
        while first < n:
            block = n if n <= STEP else config.block - config.in_block(length + first)
            piece = new[first : first + block]
            outs.append(self.attend(b, query[:, :, first : first + block], piece))
            self.append(b, length + first, piece, settle=n > STEP)
            first += piece.count
        return torch.cat(outs, 2)


Real = Sequence[tuple[bool, ...]] | None
"""Which of some columns are tokens and no padding, of every sequence; None: all of them."""


class Held:
    """The rows that all KV heads of a layer hold.

    ``own`` says which, ``key`` ``[B, H_kv, ., D]`` and ``value`` ``[B, H_kv, ., Dv]`` are like the tokens that come,
    ``random`` is the seed (0-dim int64) and the key of the layer. length: the tokens of each sequence, without padding.
    """

    @_in_place
    def __init__(
        self, own: PerHead, key: torch.Tensor, value: torch.Tensor, random: Random, scale: float, turn: int = 0
    ) -> None:
        self.length = [0] * key.shape[0]
        self.parts: list[HeldRows] = []
        self._table: tuple[Any, Table, object, torch.Tensor] | None = None
        self._end: torch.Tensor | None = None
        for i, group in enumerate(groups(own.rows, key.shape[1])):
            config = own.config(group.rows)
            streaming = config if isinstance(config, Express) else None  # selected blocks are chosen among all tokens
            self.parts.append(HeldRows(group, streaming, key, value, random, scale, turn + i * _PART))

    def _spans(self, columns: int, real: Real) -> Iterator[tuple[slice, int, torch.Tensor | None, int]]:
        """Sequences side by side that are treated alike: which, their length, the columns that are tokens, how many."""
        lefts = zip(*(part.left for part in self.parts), strict=True)
        none = [None] * len(self.length)
        alike: list[Any] = list(zip(self.length, lefts, none if real is None else real, strict=True))
        first = 0
        for (length, _, own), members in itertools.groupby(alike):
            b = slice(first, first + len(list(members)))
            first = b.stop
            if own is None or all(own):
                yield b, length, None, columns
            elif any(own):
                at = torch.tensor([i for i, is_token in enumerate(own) if is_token], device=self.parts[0].key.device)
                yield b, length, at, len(at)

    def _count(self, columns: int, real: Real) -> None:
        counts = [columns] * len(self.length) if real is None else [sum(own) for own in real]
        self.length = [length + count for length, count in zip(self.length, counts, strict=True)]

    @staticmethod
    def _tokens(part: HeldRows, length: int, key: torch.Tensor, value: torch.Tensor) -> Kept:
        H_kv, n = key.shape[1:3]
        k, v = part.group.take(key, H_kv), part.group.take(value, H_kv)
        index = torch.arange(length, length + n, dtype=torch.int32, device=key.device)
        return Kept(index.expand(*k.shape[:2], n), k, v)

    @_in_place
    def settle(self, single: bool = False) -> None:
        """Let the tokens leave that are no longer recent, and look ahead. What came before cannot be undone any more.
        ``single``: :meth:`step` follows, which drops a token by itself where only one is due, does what was handed to
        it, and then looks ahead."""
        for part in () if single else self.parts:
            part.withdraw()
        for b, length, _, _ in list(self._spans(0, None)):
            for part in self.parts:
                left = part.left[b.start]
                is_left = part.leaves(length, left) <= left + 1 if part.drops else part.does(b, length)
                if not (single and is_left):
                    part.advance(b, length, part._read(b, 0, 0))
        if not single:
            self.look_ahead()

    @_in_place
    def look_ahead(self, new: int = 0) -> None:
        """Decide what is due soon, with so many ``new`` tokens that are held and not counted."""
        if new:
            self._count_done()
        for b, length, _, _ in list(self._spans(0, None)):
            for part in self.parts:
                part.look_ahead(b, length + new)

    def rest(self) -> int:
        """For how many steps of one token :meth:`settle` and :meth:`prepare_step` have nothing to do."""
        return min(part.rest(b, length) for b, length, _, _ in self._spans(0, None) for part in self.parts)

    def idle(self) -> int:
        """For how many steps of one token :meth:`launch_due` and :meth:`look_ahead` behind them do nothing."""
        return min(part.idle(b, length) for b, length, _, _ in self._spans(0, None) for part in self.parts)

    @_in_place
    def fill(self, key: torch.Tensor, value: torch.Tensor, real: Real = None) -> None:
        """Add tokens and settle; ``key`` ``[B, H_kv, n, D]``, ``value`` ``[B, H_kv, n, Dv]``."""
        for b, length, at, _ in list(self._spans(key.shape[2], real)):
            k, v = (x[b] if at is None else x[b].index_select(2, at) for x in (key, value))
            for part in self.parts:
                new = self._tokens(part, length, k, v)
                if not length:
                    part.thin_prompt(b, new, k, v)
                part.append(b, length, new, settle=True)
        self._count(key.shape[2], real)
        for part in self.parts:
            part.warm_up()

    @_in_place
    def extend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, real: Real = None) -> torch.Tensor:
        """Attention of new tokens ``query`` ``[B, H, n, D]`` to what is held, settled, and causally to themselves:
        ``[B, H, n, Dv]``, 0 for padding. Then they are held, too; not settled if there are at most ``STEP``."""
        out = self._attend(query, key, value, real)
        self._count(query.shape[2], real)
        return out

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, real: Real) -> torch.Tensor:
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        heads = out.unflatten(1, (key.shape[1], -1))
        for b, length, at, count in list(self._spans(query.shape[2], real)):
            q, k, v = (x[b] if at is None else x[b].index_select(2, at) for x in (query, key, value))
            for part in self.parts:
                own = part.extend(b, length, part.group.take(q, key.shape[1]), self._tokens(part, length, k, v))
                own = own.unflatten(1, (-1, heads.shape[2]))
                if at is None and part.group.heads is None:
                    heads[b] = own
                    continue
                columns = torch.arange(count, device=out.device) if at is None else at
                heads[b, part.random.heads.long()[:, None], :, columns] = own.permute(1, 3, 0, 2, 4)
        return out

    # -- single tokens by kernels ---------------------------------------------------------------------------------

    def fits_step(self, group: int) -> bool:
        """Whether the kernels of :meth:`step` take what is held, for ``group`` query heads of a KV head."""
        return fits(self.parts[0].key, self.parts[0].value, group)

    @_in_place
    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """:meth:`extend` with one token of every sequence, after ``settle(single=True)``: by kernels that ask the
        device nothing."""
        self.prepare_step()
        out = self.launch_step(query, key, value)
        self.look_ahead(1)
        self.end_step()
        return out

    @_in_place
    def prepare_step(self, end: torch.Tensor | None = None) -> Any:
        """What :meth:`launch_step` needs to be told about one more token of every sequence. ``end`` int32 ``[B]``, if
        given, is where the caller writes how many tokens that makes. Returns another object once memory has moved."""
        for part in self.parts:
            if part.config is None and max(self.length) >= part.key.shape[2]:
                part._grow(max(self.length) + 1)
            part.list_pages()
            part.line_up()
        if end is None:
            if self._end is None or self._end.shape[0] != len(self.length):
                self._end = self.parts[0].token.new_empty(len(self.length))
            self.count_into(self._end)
        else:
            self._end = end
        names = ("key", "value", "log_weight", "token", "pages", "listed", "means", "due")
        tensors = (getattr(part, name) for part in self.parts for name in names)
        known = tuple((x.data_ptr(), x.shape) for x in tensors)
        if self._table is None or self._table[0] != known:
            self._table = known, self._make_table(), object(), self._heads_with_lines()
            if _by_kernels(self.parts[0].key):
                self._do_what_is_due(torch.zeros_like(self._end))  # nothing; later nothing is to be compiled
        return self._table[2]

    def count_into(self, end: torch.Tensor) -> None:
        """Write how many tokens every sequence has with one more into ``end`` int32 ``[B]``, and wait for nothing: CUDA
        has copied memory that is not pinned before the call returns, so that it may be freed."""
        end.copy_(torch.tensor([n + 1 for n in self.length], dtype=torch.int32), non_blocking=True)

    def _make_table(self) -> Table:
        B, H, device = len(self.length), sum(part.key.shape[1] for part in self.parts), self.parts[0].key.device
        lines, blocks = torch.zeros(B, H, 10, dtype=torch.int64), [0] * H
        for part in self.parts:
            heads, (_, G, places, D) = part.random.heads.tolist(), part.key.shape
            config, rows = part.config, part.group.rows
            at = torch.arange(B * G).view(B, G)
            lines[:, heads, 0] = part.key.data_ptr() + at * (places * D * part.key.element_size())
            lines[:, heads, 1] = part.value.data_ptr() + at * (places * part.value.shape[3] * part.value.element_size())
            lines[:, heads, 2] = part.log_weight.data_ptr() + at * (places * 4)
            lines[:, heads, 3] = part.token.data_ptr() + at * (places * 4)
            if part.pages.numel():
                lines[:, heads, 4] = part.pages.data_ptr() + at * (part.pages.shape[2] * 4)
                lines[:, heads, 5] = part.listed.data_ptr() + at * 4
            if config is None:
                lines[:, heads, 5] = -part.pages.shape[2] if rows.selected else -1
            lines[:, heads, 6] = places
            lines[:, heads, 7] = part.ring
            lines[:, heads, 8] = part.places - part.ring
            lines[:, heads, 9] = config.recent if config is not None and part.drops else -1
            held = max(self.length) if config is None else rows.sinks + rows.recent + rows.protected + 3 * rows.thinned
            read = part.pages.shape[2] * PAGE if rows.selected else held
            for head in heads:
                blocks[head] = -(-read // (2 * PAGE))
        return make_table(lines, shares(blocks, B, device_of(device)[0]), device)

    def _heads_with_lines(self) -> torch.Tensor:
        """Those in which a step may have something to do, as :func:`.due.do_what_is_due` takes them."""
        heads = [
            (head, i, part.due.data_ptr())
            for part in self.parts
            if part.due.numel()
            for i, head in enumerate(part.random.heads.tolist())
        ]
        return torch.tensor(heads, dtype=torch.int64, device=self.parts[0].key.device).view(-1, 3)

    @_in_place
    def launch_step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention ``[B, H, 1, Dv]`` of a new token of every sequence to what is held and itself, which is held then.
        Launches alone, and elsewhere than on a GPU the same in plain PyTorch: to repeat it changes nothing until
        :meth:`end_step`. :meth:`launch_due` comes with it, and before a replay."""
        self.launch_due()
        return (self.step_triton if _by_kernels(query) else self._step_reference)(query, key, value)

    def launch_due(self) -> None:
        """Let rows change places that are due with one more token, which :meth:`prepare_step` was told of: one launch,
        or none where nothing is due or that has been launched."""
        if self._count_done():
            assert self._end is not None, "prepare_step comes first"
            self._do_what_is_due(self._end)

    def _do_what_is_due(self, end: torch.Tensor) -> None:
        assert self._table is not None
        do_what_is_due(self.parts[0].key, self.parts[0].value, self._table[1], self._table[3], end)

    def _count_done(self) -> bool:
        """What a step does by itself, once there is one more token: how many are gone of heads that drop them, and what
        was decided before, if anything is due then."""
        is_due = False
        for part in self.parts:
            if part.drops:
                part.left = [part.leaves(n, left) for n, left in zip(self.length, part.left, strict=True)]
            elif part.ahead:
                is_due |= part.count_done(self.length)
        return is_due

    def _step_reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            for b, length, _, _ in self._spans(0, None):
                if part.config is not None and part.drops:
                    last = length - part.config.recent
                    for place, _, count in part._in_ring(max(part.ring, last - 1), last):
                        part._free(b, place, count)
        return self._attend(query, key, value, None)

    def step_triton(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """:meth:`launch_step` by the kernels."""
        assert self._table is not None and self._end is not None, "prepare_step comes first"
        table = self._table[1]
        for part in self.parts:
            if (rows := part.group.rows).selected:
                held, heads = Tokens(*(getattr(part, name) for name in Tokens._fields)), part.group.on(key.device)
                listing = Listing(rows.selected, rows.sinks, max(1, rows.recent), part.pages, table.done)
                step_pages(query, key, value, held, self._end, part.scale, listing, heads)
        holds = any(not part.group.rows.selected for part in self.parts)  # those that select hold it by then
        return attend_places(query, key, value, table, self._end, self.parts[0].scale, holds)

    def end_step(self) -> None:
        """Count the token that :meth:`launch_step` added to every sequence."""
        self._count_done()
        self.length = [n + 1 for n in self.length]

    # -- taking tokens back, other batches ------------------------------------------------------------------------

    @property
    def exact_tail(self) -> int:
        """How many of the last tokens every head holds as they are, at least, so that they can be dropped."""
        tails = [
            length - (part.ring + left if left else 0)
            for part in self.parts
            for length, left in zip(self.length, part.left, strict=True)
        ]
        return min(tails)

    @_in_place
    def drop(self, count: int, beyond: int = 0) -> None:
        """Forget the last ``count`` tokens, at most ``exact_tail``, and what may lie up to ``beyond`` places behind."""
        for part in self.parts:
            part.withdraw(None if count else self.length)
            part.ahead.clear()
        for i, length in enumerate(self.length):
            b = slice(i, i + 1)
            for part in self.parts:
                if part.config is None:
                    part._free(b, length - count, count + beyond)
                    continue
                first = max(length - count, 0)
                part._free(b, first, max(0, min(part.ring, length + beyond) - first))
                for place, _, n in part._in_ring(max(first, part.ring + part.left[i]), length + beyond):
                    part._free(b, place, n)
        self.length = [length - count for length in self.length]

    @_in_place
    def select(self, index: torch.Tensor) -> None:
        """The sequences at ``index`` int64 ``[B']``, in place where there are as many as before."""
        order = index.tolist()
        self.length = [self.length[i] for i in order]
        for part in self.parts:
            part.withdraw()
            part.left, part.is_listed = [part.left[i] for i in order], False
            part.ahead.clear()
            for name in HeldRows.TENSORS:
                old = getattr(part, name)
                new = old.index_select(0, index.to(old.device))
                if new.shape == old.shape:
                    old.copy_(new)
                else:
                    setattr(part, name, new)

    def to(self, device: torch.device | str) -> None:
        """Move all rows to another device."""
        for part in self.parts:
            part.withdraw()
            part.ahead.clear()
            part.is_listed = False
            for name in (*HeldRows.TENSORS, "pages", "listed"):
                setattr(part, name, getattr(part, name).to(device))
            part.random = Random(part.random.seed.to(device), part.random.layer, part.random.heads.to(device))

    # -- what there is --------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all places."""
        return sum(getattr(part, name).nbytes for part in self.parts for name in HeldRows.TENSORS)

    def rows(self) -> torch.Tensor:
        """How many rows are held: int64 ``[B, H_kv]``."""
        counts = torch.zeros(len(self.length), sum(len(part.random.heads) for part in self.parts), dtype=torch.int64)
        for part in self.parts:
            counts[:, part.random.heads.tolist()] = (part.log_weight > -math.inf).sum(2).cpu()
        return counts
