"""Express: causal attention over a coreset of O(s) rows that is thinned as the sequence grows.

    out_i = sum_j w_j exp(scale <q_i, k_j>) v_j / sum_j w_j exp(scale <q_i, k_j>)

over four parts: the first ``sinks`` tokens and the last ``recent`` tokens exactly (w = 1), ``protected``
distinctive rows exactly, and of everything else fewer than ``6 s`` rows kept by repeated halving, each standing
for ``w`` tokens. Paper: *Express Language Modeling*, arXiv 2606.10944; here with weight 1 for the newest tokens,
and a subsampling group enters when it is complete.

Error law (bounded inputs, R = max norm): ``|out - exact|_inf = O(exp(2 R^2 / sqrt(D)) *
sqrt(log(D n) log s log(s log n)) / sqrt(2**M s) * max_j |v_j|)``. Exact while
``n <= 4 s + sinks + recent + protected``.
Every token is kept with probability 1 / w, so sums over the kept rows are unbiased.

Supports causal self-attention aligned bottom-right (continuing a longer key/value sequence), grouped queries,
Dv != D, any length, key padding on any side, float16, bfloat16, float32 (float64 in the reference). Refuses
non-causal masks, windows, biases, dropout, and single-token decoding from a full cache (it would thin the
cache again at every step).

Prefill form: queries come in blocks of ``block``; a block sees the coreset as it stood ``recent`` tokens before
its start, and every later token exactly. :class:`express_compile.kernels.express_state.ExpressState` is the
streaming form of the same rows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import sympy
import torch

from express_compile.core import cost as c
from express_compile.core.call import Call
from express_compile.core.method import Method, Refusal, register
from express_compile.core.options import NUMBER, ROWS, WHOLE, Kind, Options, budget, option
from express_compile.core.policy import Policy
from express_compile.core.rows import Rows
from express_compile.core.spec import AttentionSpec, Site, floor_power_of_two, known_equal

from .attend.segments import (
    COMPACTED,
    TOKENS,
    Outputs,
    SegmentTable,
    Sources,
    causal_table,
    segment_attention,
    segment_attention_reference,
    spanned_outputs,
)
from .attend.segments_backward import accumulate_rows, segment_gradients
from .exact import exact_attention
from .launch import Random, philox_uniform
from .op import at_the_end, define_attention, define_packed, no_kernel
from .padding import Packing
from .select.contest import CONTEST, compete_into, compete_reference
from .select.halving import RULE, Decider, HalvingRule, get_rule, halve_reference
from .select.queries import InBlocks, check_block
from .select.schedule import Halving, Schedule, admitted, check_budget, make_schedule
from .select.thinning import describe_launches, thin_into, zeros_for
from .spans import Spans

_Gradients: TypeAlias = tuple[torch.Tensor, ...]


def default_inflation(s: int) -> int:
    """``M = h - 2`` for ``s = 2**h``, the paper's choice for prefill."""
    return max(0, s.bit_length() - 3)


def budget_grows(given: Any) -> str:
    """Why a budget that follows the number of keys has no meaning here."""
    what = f"the fraction {given} of the keys" if isinstance(given, float) else "a table of rows"
    what = "a function of the number of keys" if callable(given) else what
    return (
        f"its budget is {what}, so that how long the text becomes would decide what its first tokens see; give a "
        "number of rows, such as budget=512"
    )


BLOCK = Kind("16, 32, 64 or 128", "int", check_block)


@dataclass(frozen=True)
class Express(Options, InBlocks):
    """What decides the rows of Express besides the data."""

    budget: int = option(
        512, "rows s of the coreset, rounded down to a power of two; fewer than 6 s are held",
        Kind("rows", "int", functools.partial(budget, least=2)),
        schema="int s", pack=lambda rows: {"s": floor_power_of_two(rows)}, shared="budget",
    )  # fmt: skip
    sinks: int = option(32, "the first tokens, which are always held exactly", ROWS, shared="sinks")
    recent: int = option(256, "the last tokens, which are always held exactly", ROWS, shared="window")
    protected: int = option(
        256, "places for the most distinctive rows, which are held exactly wherever they are; without them thinning "
        "forgets single facts", ROWS, shared="protected",
    )  # fmt: skip
    halving: str = option("balanced", "name of a registered halving rule", RULE, shared="halving")
    inflation: int | None = option(
        None, "M of the paper; None is h - 2 for s = 2**h", WHOLE,
        pack=lambda M: {"inflation": -1 if M is None else M}, shared="inflation",
    )  # fmt: skip
    flatten: float = option(
        0.0, "factor of the exponent in the kernel of the halving rule; 0 is the rule's own", NUMBER
    )
    block: int = option(128, "queries that see the same coreset", BLOCK)

    def check(self) -> None:
        if not isinstance(self.budget, int):
            raise ValueError(f"budget={self.budget!r}: {budget_grows(self.budget)}")
        check_budget(self.s, self.M)
        get_rule(self.halving, self.flatten)

    @functools.cached_property
    def s(self) -> int:
        """The budget as a power of two."""
        return floor_power_of_two(self.budget)

    @functools.cached_property
    def M(self) -> int:
        """The inflation, whichever way it is given."""
        return default_inflation(self.s) if self.inflation is None else self.inflation

    @functools.cached_property
    def rule(self) -> HalvingRule:
        """The halving rule."""
        return get_rule(self.halving, self.flatten)

    def contests(self, tokens: int) -> int:
        """Contests for the protected places held once ``tokens`` tokens have left sinks and tail."""
        return tokens // CONTEST if self.protected else 0

    def streamed(self, tokens: int) -> int:
        """Tokens in the thinning stream once ``tokens`` tokens have left sinks and tail."""
        return tokens if not self.protected else max(0, CONTEST * self.contests(tokens) - self.protected)

    @property
    def forgets(self) -> bool:
        """Whether tokens that left sinks, tail and places are dropped, not thinned."""
        return False

    @property
    def exact_up_to(self) -> int:
        """Sequences of at most this many tokens get exact attention."""
        return 4 * self.s + self.sinks + self.recent + self.protected


class Unthinned(Express):
    """Express without its coreset: sinks, recent and protected rows alone."""

    forgets = True

    def streamed(self, tokens: int) -> int:
        return 0

    @property
    def exact_up_to(self) -> int:
        return self.sinks + self.recent + self.protected


# ---------------------------------------------------------------------------------------------------------------
# The layout: shapes only, built once per (config, Lq, Lk)


@dataclass(frozen=True, eq=False)
class Layout:
    """What a prefill of ``Lq`` queries over ``Lk`` tokens does, as integers.

    The compacted rows are those that the schedule writes, ``copied`` in number, and with protected rows, behind
    them, the ``schedule.tokens`` rows of the stream and ``protected`` places per contest.
    """

    config: Express
    schedule: Schedule
    contests: int
    copied: int  # compacted rows that are copied to lie side by side; the others are read through their index
    size: int  # compacted rows in all
    tokens: int  # Lk
    table: SegmentTable


@functools.lru_cache(maxsize=64)
def make_layout(config: Express, Lq: int, Lk: int) -> Layout:
    """The layout of the last ``Lq`` of ``Lk`` tokens as queries. Raises ``ValueError`` for ``Lq > Lk``."""
    config = replace(config, protected=min(config.protected, Lk))  # memory has a place for each of them
    shift, begin = config.blocks_of(Lq, Lk)
    left = np.maximum(0, begin - config.sinks - config.recent)
    streamed = np.array([config.streamed(int(t)) for t in left], dtype=np.int64)
    complete = np.array([admitted(int(t), config.s, config.M) for t in streamed], dtype=np.int64)
    schedule = make_schedule(int(streamed[-1]), config.s, config.M)
    contests = config.contests(int(left[-1]))
    copied = schedule.size - schedule.tokens

    offset, length, log2_weight = schedule.segments(complete)
    in_stream = offset < schedule.tokens
    if config.protected:
        size = copied + schedule.tokens + contests * config.protected
        source = np.full_like(offset, COMPACTED)
        offset = np.where(in_stream, offset + copied, offset - schedule.tokens)
        held = np.array([config.contests(int(t)) for t in left], dtype=np.int64)
        places = np.minimum(config.protected, CONTEST * held)
        waiting = streamed - complete  # streamed, but their subsampling group is not complete
        tail = np.minimum(config.sinks, begin) + CONTEST * held
        extra = [
            (COMPACTED, copied + schedule.tokens + (held - 1) * config.protected, places),
            (COMPACTED, copied + complete, waiting),
        ]
    else:
        size = copied
        source = np.where(in_stream, TOKENS, COMPACTED)
        offset = np.where(in_stream, offset + config.sinks, offset - schedule.tokens)
        tail = np.minimum(config.sinks, begin) + (left if config.forgets else complete)
        extra = []
    zero = np.zeros_like(begin)
    columns = [(zero, zero, np.minimum(config.sinks, begin), zero)]
    columns += [(np.full_like(begin, kind), first, rows, zero) for kind, first, rows in extra]
    columns += [(source[:, i], offset[:, i], length[:, i], log2_weight[:, i]) for i in range(offset.shape[1])]
    segments = np.stack([np.stack(column[:3], -1) for column in columns], 1)
    weights = np.stack([column[3] for column in columns], 1) * math.log(2.0)
    # rows before the first thinning are all tokens in order: one tail says it shorter
    whole = (segments[:, :, 0] * segments[:, :, 2] == 0).all(1) & (segments[:, :, 2].sum(1) == tail)
    segments[whole], tail[whole] = 0, 0
    segments[segments[:, :, 2] == 0] = 0
    table = SegmentTable(config.block, Lk - Lq, segments, weights, tail, shift)
    return Layout(config, schedule, contests, copied, size, Lk, table)


# ---------------------------------------------------------------------------------------------------------------
# Reference


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, H, L, D]`` at ``index`` ``[B, H, ...]``: ``[B, H, ..., D]``."""
    flat = index.flatten(2).long()
    return x.gather(2, flat[..., None].expand(*flat.shape, x.shape[-1])).unflatten(2, index.shape[2:])


def of_heads(x: torch.Tensor, H_kv: int, heads: torch.Tensor | None) -> torch.Tensor:
    """The KV heads ``heads`` of ``x`` ``[B, H, ..]``, each with all its query heads; all without ``heads``."""
    if heads is None:
        return x
    return x.unflatten(1, (H_kv, x.shape[1] // H_kv)).index_select(1, heads).flatten(1, 2)


def _numbers(key: torch.Tensor, random: Random) -> torch.Tensor:
    """The numbers of the KV heads of ``key`` in the stream of random numbers."""
    return torch.arange(key.shape[1], device=key.device) if random.heads is None else random.heads


def _draws(jobs: list[Halving], random: Random, head: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The random numbers of every job, ``[H_kv, buckets, pairs]``, all drawn at once."""
    if not jobs:
        return ()
    each = [
        np.meshgrid(job.stage, range(job.first, job.first + job.buckets), range(job.rows // 2), indexing="ij")
        for job in jobs
    ]
    stage, bucket, pair = (
        torch.tensor(np.concatenate([counter.ravel() for counter in counters]), device=head.device)
        for counters in zip(*each, strict=True)
    )
    draws = philox_uniform(random.seed, random.layer, pair, bucket, stage, head[:, None])
    parts = draws.split([job.buckets * job.rows // 2 for job in jobs], -1)
    return tuple(part.unflatten(-1, (job.buckets, -1)) for part, job in zip(parts, jobs, strict=True))


def halve_all_reference(
    arena: torch.Tensor, key: torch.Tensor, value: torch.Tensor, schedule: Schedule, decider: Decider
) -> None:
    """All halvings of a schedule in place on ``arena`` ``[B, H_kv, schedule.size]``, which holds token indices."""
    rule, scale, random = decider
    jobs = list(itertools.chain(*schedule.launches))
    for job, draws in zip(jobs, _draws(jobs, random, _numbers(key, random)), strict=True):
        source = arena[:, :, job.source : job.source + job.rows * job.buckets].unflatten(2, (job.buckets, job.rows))
        rows = gather_rows(key, source), gather_rows(value, source)
        second = halve_reference(*rows, draws, rule, job.delta, scale)
        kept = torch.where(second, source[..., 1::2], source[..., 0::2])
        arena[:, :, job.target : job.target + job.rows // 2 * job.buckets] = kept.flatten(2)


def thin_reference(
    key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, seed: torch.Tensor, layer: int,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Which token every compacted row is: int32 ``[B, heads, layout.size]``. ``key`` ``[B, H_kv, Lk, D]``,
    ``value`` ``[B, H_kv, Lk, Dv]``. ``heads``: which of their heads, as in :class:`Random`."""
    key, value = (of_heads(x, x.shape[1], heads) for x in (key, value))
    B, H = key.shape[:2]
    schedule, config = layout.schedule, layout.config
    arena = torch.empty(B, H, schedule.size, dtype=torch.int32, device=key.device)
    behind = []
    if config.protected:
        stream, places = compete_reference(key, config.sinks, layout.contests, config.protected)
        arena[:, :, : schedule.tokens] = stream[:, :, : schedule.tokens]
        behind = [stream[:, :, : schedule.tokens], places.flatten(2)]
    else:
        first = config.sinks
        arena[:, :, : schedule.tokens] = torch.arange(first, first + schedule.tokens, device=key.device)
    random = Random(seed, layer, heads)
    head = _numbers(key, random)[:, None]
    for job in schedule.subsamples:
        rows = torch.arange(job.rows, device=key.device)
        draws = philox_uniform(seed, layer, rows, 0, job.stage, head)
        pick = job.source + rows * job.group + (draws * job.group).long()
        arena[:, :, job.target : job.target + job.rows] = arena.gather(2, pick.expand(B, *pick.shape))
    halve_all_reference(arena, key, value, schedule, Decider(config.rule, scale, random))
    return torch.cat([arena[:, :, schedule.tokens :], *behind], 2)


def thin_spans_reference(
    key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, random: Random, spans: Spans
) -> torch.Tensor:
    """:func:`thin_reference` of every sequence of ``spans``: the places of the rows of ``layout``, which is that of
    the longest one. Rows that a sequence does not have are some place of it."""
    places = [spans.places(b) for b in range(len(spans.length))]
    most = max(1, *map(len, places))
    at = torch.stack([torch.nn.functional.pad(x, (0, most - len(x)), value=int(x[0]) if len(x) else 0) for x in places])
    key, value = (gather_rows(x, at[:, None].expand(-1, x.shape[1], -1)) for x in (key, value))
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, layout.tokens - most)) for x in (key, value))
    index = thin_reference(key, value, layout, scale, *random).long()
    return at[:, None].expand(*index.shape[:2], -1).gather(2, index.clamp(max=most - 1)).to(torch.int32)


def thin_triton(
    key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, seed: torch.Tensor, layer: int,
    heads: torch.Tensor | None = None, spans: Spans | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """:func:`thin_reference`, or :func:`thin_spans_reference`, with the kernels: the index, and copies of the first
    ``layout.copied`` rows."""
    B, H = key.shape[0], key.shape[1] if heads is None else len(heads)
    index = torch.empty(B, H, layout.size, dtype=torch.int32, device=key.device)
    if spans is not None:
        index.copy_(spans.first()[:, None, None])
    kept = tuple(x.new_empty(B, H, layout.copied, x.shape[3]) for x in (key, value))
    select_into((index, *kept), key, value, layout, scale, Random(seed, layer, heads), spans)
    return index, *kept


def select_into(
    kept: tuple[torch.Tensor, ...], key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float,
    random: Random, spans: Spans | None = None,
) -> None:  # fmt: skip
    """What :func:`thin_triton` gives, into tensors of such shapes, contiguous."""
    config, contest, zeros = layout.config, (1, 0), None
    if config.protected:
        count = zeros_for(layout.schedule, config.rule, key, value, kept[0].shape[0] * kept[0].shape[1])
        places = layout.contests, config.protected
        zeros = compete_into(kept[0], key, config.sinks, *places, random.heads, spans, count)
        contest = (CONTEST, config.protected)
    decider = Decider(config.rule, scale, random)
    thin_into(kept, key, value, layout.schedule, config.sinks, decider, spans, contest, zeros=zeros)


def express_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: Express,
    scale: float,
    seed: torch.Tensor,
    layer: int = 0,
    heads: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Express attention in plain PyTorch on any device: the definition of correct.

    ``query`` ``[B, H, Lq, D]``, ``key`` ``[B, H_kv, Lk, D]``, ``value`` ``[B, H_kv, Lk, Dv]``; query i is token
    ``Lk - Lq + i``. ``seed`` is a 0-dim int64 tensor, ``heads`` as in :class:`Random`: the KV heads that ``query``
    and the result have, if not all. Returns ``(out, lse)`` as :func:`segment_attention_reference` does.
    Differentiable with the selection held fixed.
    """
    layout = make_layout(config, query.shape[2], key.shape[2])
    with torch.no_grad():
        index = thin_reference(key, value, layout, scale, seed, layer, heads)
    key, value = (of_heads(x, x.shape[1], heads) for x in (key, value))
    sources = Sources(key, value, gather_rows(key, index), gather_rows(value, index))
    return segment_attention_reference(query, sources, layout.table, scale)


# ---------------------------------------------------------------------------------------------------------------
# Launcher: the reference on the CPU, the kernels on CUDA


def select_rows(
    key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, random: Random, spans: Spans | None = None
) -> tuple[Sources, torch.Tensor]:
    """The rows that the table of ``layout`` speaks of, and which tokens (with ``spans``, which places) the compacted
    ones are: ``[B, heads, A]``, of the heads of ``random``."""
    own_key, own_value = (of_heads(x, x.shape[1], random.heads) for x in (key, value))
    if not key.is_cuda:
        if spans is None:
            index = thin_reference(key, value, layout, scale, *random)
        else:
            index = thin_spans_reference(key, value, layout, scale, random, spans)
        keys, values = (gather_rows(x, index) for x in (own_key, own_value))
        return Sources(own_key, own_value, keys, values, spans=spans), index
    index, keys, values = thin_triton(key, value, layout, scale, *random, spans)
    key, value = own_key, own_value
    return Sources(key, value, keys, values, index if layout.config.protected else None, spans=spans), index


def attend(call: Call, config: Express, heads: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Express of a call without padding, its options those of ``config``; exact attention by the fastest kernel where
    it is exact. ``heads`` as in :class:`Random`: the KV heads that the query has, if not all."""
    query, key, value = call.query, call.key, call.value
    if not key.is_cuda:
        return express_reference(query, key, value, config, call.scale, call.seed, call.layer, heads)
    if call.Lk <= config.exact_up_to:
        key, value = (of_heads(x, x.shape[1], heads) for x in (key, value))
        return exact_attention(query, key, value, call.scale)
    layout = make_layout(config, call.Lq, call.Lk)
    sources, _ = select_rows(key, value, layout, call.scale, Random(call.seed, call.layer, heads))
    return segment_attention(query, sources, layout.table, call.scale)


def gradients(
    query: torch.Tensor, sources: Sources, index: torch.Tensor, table: SegmentTable, scale: float, results: _Gradients
) -> _Gradients:
    """Of query, key and value for ``results``: the gradient of the output, the output and its log-sum-exp. The choice
    of the rows, ``index``, is held fixed."""
    d_query, d_key, d_value, *d_compacted = segment_gradients(
        results[0], query, sources.gathered(), *results[1:], table, scale
    )
    for target, part in zip((d_key, d_value), d_compacted, strict=True):
        accumulate_rows(target, index, part)
    return d_query, d_key, d_value


def backward(call: Call, config: Express, results: _Gradients, heads: torch.Tensor | None = None) -> _Gradients:
    """The gradients of :func:`attend`; the selection is made again, so that training stores nothing for it."""
    layout = make_layout(config, call.Lq, call.Lk)
    rows = select_rows(call.key, call.value, layout, call.scale, Random(call.seed, call.layer, heads))
    return gradients(call.query, *rows, layout.table, call.scale, results)


@functools.lru_cache(maxsize=256)
def _config(s: int, inflation: int, recent: int, **same: Any) -> Express:
    check_budget(s, 0)  # what an op is given is not rounded
    return Express(s, inflation=None if inflation < 0 else inflation, recent=recent, **same)


def config_at(Lk: int, min_length: int, recent: int, **others: Any) -> Express:
    """The options that those of the op mean for ``Lk`` keys; exact for fewer than ``min_length``."""
    return _config(recent=max(recent, Lk) if Lk < min_length else recent, **others)


def _whole_below(exact_up_to: int, min_length: int, Lk: int) -> int:
    """Sequences of a padded batch of ``Lk`` places that are exact for ``min_length`` alone have fewer tokens; or 0."""
    return min_length if exact_up_to + 1 < min_length <= Lk else 0


def packed(
    call: Call, exact_up_to: int, run: Callable[[Call, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``run(call, start)`` with the real tokens of every sequence in front, for a device that cannot be asked for
    lengths: all sequences as long as the longest may be. ``start`` int64 ``[B]`` is each one's first real query.

    What the first tokens give does not depend on those behind them, so only ``min_length`` has to be looked after:
    sequences with fewer tokens, which lie within the first places, get the answer of exact attention. Up to
    ``exact_up_to`` tokens they have it anyway.
    """
    if call.padding is None:
        return run(call, None)
    pad, whole = Packing(call.padding), _whole_below(exact_up_to, call.options["min_length"], call.Lk)
    query, key, value = map(pad.pack, (call.query, call.key, call.value))
    out, lse = run(replace(call, query=query, key=key, value=value, padding=None), pad.start(call.Lq))
    if whole:
        short = (pad.length < whole)[:, None, None]
        q, k, v = (x[:, :, : whole - 1] for x in (query, key, value))
        own_out, own_lse = exact_attention(q, k, v, call.scale)
        out[:, :, : whole - 1] = torch.where(short[..., None], own_out, out[:, :, : whole - 1])
        lse[:, :, : whole - 1] = torch.where(short, own_lse, lse[:, :, : whole - 1])
    return pad.unpack(out, call.Lq), pad.unpack(lse[..., None], call.Lq, -math.inf)[..., 0]


def packed_backward(
    call: Call,
    results: _Gradients,
    exact_up_to: int,
    run: Callable[[Call, _Gradients, torch.Tensor | None], _Gradients],
) -> _Gradients:
    """The same for gradients, in the dtypes of query, key and value; ``results`` as in :func:`gradients`."""
    inputs = (call.query, call.key, call.value)
    if call.padding is None:
        grads = run(call, results, None)
    else:
        pad, whole = Packing(call.padding), _whole_below(exact_up_to, call.options["min_length"], call.Lk)
        grad, out, lse = results
        grad, out, lse, *rows = (pad.pack(x) for x in (grad, out, lse[..., None], *inputs))
        query, key, value = rows
        own = replace(call, query=query, key=key, value=value, padding=None)
        grads = run(own, (grad, out, lse[..., 0]), pad.start(call.Lq))
        if whole:
            short = (pad.length < whole)[:, None, None, None]
            grad, out, lse, *first = (x[:, :, : whole - 1] for x in (grad, out, lse, *rows))
            (q, k, v), table = first, causal_table(whole - 1, whole - 1)
            exact = segment_gradients(grad, q, Sources.tokens(k, v), out, lse[..., 0], table, call.scale)
            for x, part in zip(grads, exact, strict=False):
                x.copy_(torch.where(short, torch.nn.functional.pad(part, (0, 0, 0, x.shape[2] - whole + 1)), x))
        grads = tuple(pad.unpack(g, x.shape[2]) for g, x in zip(grads, inputs, strict=True))
    return tuple(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _over(call: Call, spans: Spans, tokens: int) -> Iterator[tuple[Sources, torch.Tensor, SegmentTable]]:
    """What the sequences of ``spans``, of at most ``tokens`` tokens, attend to: the rows, the places of the compacted
    ones, and the table. Those that are exact for ``min_length`` alone come apart from the others; up to ``exact_up_to``
    tokens they are it anyway, as what the first tokens see does not depend on those behind them."""
    config = config_at(tokens, **call.options)
    whole, exact = _whole_below(config.exact_up_to, call.options["min_length"], tokens), 0
    if tokens > config.exact_up_to:
        own = spans.only(spans.length >= whole) if whole else spans
        layout = make_layout(config, tokens, tokens)
        yield *select_rows(call.key, call.value, layout, call.scale, Random(call.seed, call.layer), own), layout.table
        exact, spans = whole - 1, spans.only(spans.length < whole)
    else:
        exact = tokens
    if exact > 0:
        none = torch.empty(*call.key.shape[:2], 0, dtype=torch.int32, device=call.key.device)
        yield Sources.tokens(call.key, call.value, spans), none, causal_table(exact, exact)


def attend_over(call: Call, spans: Spans, tokens: int, into: Outputs) -> None:
    """Express of every sequence of ``spans``, each of at most ``tokens`` tokens and as if it were alone, ``into`` where
    its tokens are."""
    for sources, _, table in _over(call, spans, tokens):
        segment_attention(call.query, sources, table, call.scale, into)


def _express_body(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    if call.padding is None:
        return attend(call, config_at(call.Lk, **call.options))
    into = spanned_outputs(call.query, call.value)
    attend_over(call, Spans.of_padding(call.padding, call.Lq), call.Lk, into)
    return into


def _express_backward_body(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> _Gradients:
    if call.padding is None:
        grads = backward(call, config_at(call.Lk, **call.options), (grad, out, lse))
    else:
        over = _over(call, Spans.of_padding(call.padding, call.Lq), call.Lk)
        grads, *others = [gradients(call.query, *rows, call.scale, (grad, out, lse)) for rows in over]
        for target, part in itertools.chain(*(zip(grads, other, strict=True) for other in others)):
            target += part
    return tuple(g.to(x.dtype) for g, x in zip(grads, (call.query, call.key, call.value), strict=True))


OP, BACKWARD = define_attention("express", Express, _express_body, _express_backward_body)


VARLEN, _ = define_packed("express", OP, BACKWARD, attend_over)


# ---------------------------------------------------------------------------------------------------------------
# Method

MIN_QUERIES = 16  # below, a call that continues a cache counts as decoding


def prefill_only(spec: AttentionSpec, who: str) -> str | None:
    """Why a site is no causal prefill of plain tokens, for a method whose name is ``who``; None if it is one."""
    mask = spec.mask
    if mask.unknown is not None:
        return f"its mask is not proven: {mask.unknown}"
    if mask.segments:
        return f"it keeps packed sequences apart; {who} would let them see each other"
    if mask.window is not None:
        return f"it has a sliding window of {mask.reach}"
    if not mask.causal:
        return f"it is not causal; {who} thins what came before each query"
    if not at_the_end(spec):
        return f"its causal mask has offset {mask.offset}; needed is Lk - Lq, the last query sees every key"
    if spec.dropout_p > 0:
        return f"it drops attention weights (dropout_p={spec.dropout_p}); call model.eval()"
    if isinstance(spec.Lq, int) and spec.Lq < MIN_QUERIES and not known_equal(spec.Lq, spec.Lk):
        return f"decoding {spec.Lq} token(s) from a full cache would thin the whole cache again at every step"
    return no_kernel(spec)


def _refuse(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    rows = policy.given("express")["budget"]
    reason = prefill_only(spec, "Express") or (None if isinstance(rows, int) else budget_grows(rows))
    return None if reason is None else Refusal("express", reason)


def config_of(policy: Policy, n: int) -> Express:
    """The options that ``policy`` means for ``n`` keys. Raises ``ValueError`` as the op would."""
    return config_at(n, **METHOD.params(Site(), policy))


def rows_seen(policy: Policy, n: int) -> np.ndarray:
    """Rows that each query of a prefill of ``n`` tokens attends to, itself included: int64 ``[n]``."""
    return make_layout(config_of(policy, n), n, n).table.rows_seen(n)


def _over_rounds(
    tokens: sympy.Expr, W: sympy.Expr, of_round: Callable[..., sympy.Expr], of_level: Callable
) -> sympy.Expr:
    """``of_round(A, Q, y)`` plus ``of_level(R, tau, y)`` of every bucket, summed over the rounds that ``tokens`` reach.

    A round begins with token ``A = 4**r s`` and y tokens of it have come; ``Q = 2**q`` and ``W = 2**M``. A bucket
    holds R rows when it is halved, which is every tau tokens.
    """
    r, i = sympy.symbols("r i", integer=True, nonnegative=True)
    A, Q = 4**r * c.s, sympy.Min(4**r, W)
    y = sympy.Min(tokens - A, 3 * A)
    level = of_level(4 * c.s * 2**i / Q, A * 4 ** (i + 1) / Q**2, y)
    levels = sympy.Sum(level, (i, 0, c.floor_log2(Q) - 1))
    return sympy.Sum(of_round(A, Q, y) + levels, (r, 1, sympy.floor(c.floor_log2(tokens / c.s) / 2)))


def _steps_sum(y: sympy.Expr, step: sympy.Expr) -> sympy.Expr:
    """The sum of ``step * floor(x / step)`` over x = 0 .. y - 1."""
    k = sympy.floor(y / step)
    return step**2 * k * (k - 1) / 2 + k * step * (y - k * step)


def packing_cost() -> sympy.Expr:
    """Elements that :class:`Packing` reads and writes."""
    return c.B * c.Lk * (6 * (c.H * c.D + c.H_kv * (c.D + c.Dv)) + 4 * c.H * c.Dv)


def _cost(spec: AttentionSpec, params: Mapping[str, Any]) -> c.Cost:
    """Thinning and attention over the rows that every block of queries sees.

    Exact if a block of queries (with protected rows, a contest) divides 4 s, but for the scores of contests, a few
    operations per element of a key; up to 12% too little otherwise. With padding also the zeros of the result, and what
    :meth:`Spans.of_padding` launches.
    """
    s, Lk, width = c.s, c.Lk, c.B * c.H_kv * (c.D + c.Dv)
    sinks, recent, protected, block = (params[name] for name in ("sinks", "recent", "protected", "block"))
    W = sympy.Max(1, s / 4) if params["inflation"] < 0 else sympy.Min(2 ** params["inflation"], 2 * s)
    left = block * sympy.floor((Lk - 1 - sinks - recent) / block)
    stream = sympy.Max(0, CONTEST * sympy.floor(left / CONTEST) - protected) if protected else left
    rounds = sympy.floor(c.floor_log2(stream / s) / 2)
    coin = math.isinf(get_rule(params["halving"], params["flatten"]).gain(2, 0.5))

    # R rows are R (R + 2) / 2 entries (see thinformer); a closing halves 4 s rows and then 2 s;
    # a group of A / (s Q) > 1 tokens gives one picked row
    entries = 10 * s**2 + 6 * s
    entries = _over_rounds(stream, W, lambda A, Q, y: entries, lambda R, tau, y: sympy.floor(y / tau) * R * (R + 2) / 2)
    halved = _over_rounds(stream, W, lambda A, Q, y: 6 * s, lambda R, tau, y: sympy.floor(y / tau) * R)
    picked = _over_rounds(
        stream, W, lambda A, Q, y: sympy.Piecewise((0, A <= s * Q), (sympy.floor(y * s * Q / A), True)),
        lambda R, tau, y: sympy.Integer(0),
    )  # fmt: skip

    held = sinks + recent + protected
    # queries see the stream as it was when their block began, every ``block`` tokens, or after the last contest: every
    # CONTEST tokens, but ``late`` tokens behind multiples of that
    every, late = (CONTEST, -protected % CONTEST) if protected else (block, 0)

    def steps_seen(y: sympy.Expr, step: sympy.Expr) -> sympy.Expr:
        return _steps_sum(y, sympy.Max(step, every)) + y * step * sympy.floor(late / step)

    def of_round(A: sympy.Expr, Q: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        return (s + late) * y + y * (y - 1) / 2 + (s * Q / A - 1) * steps_seen(y, A / (s * Q))

    def seen(queries: sympy.Expr) -> sympy.Expr:
        """Rows that the first ``queries`` queries see: from round 1 on the s rows that closed a round, those that came
        since, and half of a bucket less for every halving."""
        first = sympy.Min(queries, held)
        x = queries - first
        x0 = sympy.Min(x, 4 * s + late)
        whole = first * (first + 1) / 2 + (held + 1) * x + x0 * (x0 - 1) / 2
        tokens = sympy.Max(x - late, 0)
        return whole + _over_rounds(tokens, W, of_round, lambda R, tau, y: -R / (2 * tau) * steps_seen(y, tau))

    attention = c.dense_cost(seen(Lk) - seen(Lk - c.Lq))
    # rows are read to be picked or halved; half of them, and all that are picked, are written and then attended to
    rows = halved + picked + 2 * (halved / 2 + picked)
    scored = 2 * c.B * c.H_kv * c.D * left if protected else 0  # the contest reads keys twice
    blank = c.B * c.H * c.Lq * c.Dv if spec.mask.padding else 0
    thinned = c.Cost(
        attention.flops + 2 * width * (0 if coin else entries),
        attention.bytes + c.itemsize * (width * rows + scored + blank),
        sympy.Integer(0) if coin else 3 * s * rounds,  # closing halvings; what else there is takes less time
        2 + (0 if coin else describe_launches(4 * s)) + 3 * bool(protected) + 12 * bool(spec.mask.padding),
        attention.scores,
        sympy.Integer(0) if coin else c.B * c.H_kv * entries,
    )
    exact = (Lk <= 4 * s + held) | (Lk < params["min_length"])
    return thinned.unless(exact, c.dense_cost(c.visible_pairs(spec)))


METHOD = register(
    Method(
        name="express",
        summary="causal attention over a coreset thinned by halving, O(s) rows per query",
        supports="causal self-attention (also continuing a cache), GQA, Dv != D, key padding, any length",
        refuses="non-causal masks, windows, packed sequences, biases, dropout, decoding from a full cache",
        refuse=_refuse,
        options=Express,
        sees=lambda own, site: Rows(own.sinks, own.recent, own.s, own.protected),
        cost=_cost,
        padding_cost=True,
        rows=lambda params, Lk: params["s"],
        approximates=lambda params, Lk: Lk > config_at(Lk, **params).exact_up_to,
    )
)
