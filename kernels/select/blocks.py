"""Selected rows: each block of queries chooses the blocks of 64 keys that its first queries attend to most.

A query sees the ``sinks``, the *tail* (from ``recent`` tokens before its block on, up to itself), and ``blocks`` blocks
of 64 tokens of the middle between the two, the same ones for a whole block of queries and for all query heads of one KV
head, or for each as many of the first, in one order, as it may have (:mod:`..heads`). Blocks of keys lie side by side
from the first token behind the sinks; one that reaches into the tail is no candidate, and the tail begins where the
last candidate ends, so that every token is sink, candidate or tail. Exact while there are no more candidates than
``blocks``.

The score of a block of keys is the attention mass that ``samples`` whole queries give it (softmax over all that they
see), summed over the query heads of the group. These queries are the block's first one and the ones ``stride`` apart
before it, never later ones: the choice must not tell a query what comes after it. On SmolLM2 at 8,192 tokens 16 blocks
catch .80 of the mass between sinks and tail so (4 samples .81, which is less than a block more brings; an oracle .82;
chosen by means of 8 keys .51): ``examples/bench/results/blocks.csv``. As many blocks for every query head by its own
mass are hardly better: errors of outputs are typically 2% larger there, and 4% smaller on SmolLM2 and on Qwen at 4,096
(a block more: 10, 11 and 13% smaller). One query tells little of a head's next ones, and what heads of a group differ
in is how many blocks they need: with half of the blocks shared out among them errors are 11, 25 and 48% smaller.
(FlashPrefill, arXiv 2603.06199, and XAttention, arXiv 2503.16428, also choose blocks of keys by blocks of queries.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from express_compile.core.call import Call

from ..launch import FLOAT32_DOT, head_of, jit, launch, next_power_of_two, require_triton, tl
from ..op import check_call
from . import hopper
from .queries import InBlocks, check_block

KEYS = 64  # keys per block
NONE = -1  # in place of a block where there are fewer candidates than blocks


@dataclass(frozen=True)
class BlockConfig(InBlocks):
    """How many rows a query sees, and who chooses them.

    blocks: blocks of 64 keys. sinks, recent: tokens that are seen in any case. samples: queries per query head that
    choose for a block of ``block`` queries, its first one and those ``stride``, ``2 stride``, ... before.
    Raises ``ValueError``.
    """

    blocks: int
    sinks: int = 32
    recent: int = 256
    samples: int = 1
    stride: int = 4
    block: int = 128

    def __post_init__(self) -> None:
        for name, least in (("blocks", 1), ("sinks", 0), ("recent", 0), ("samples", 1), ("stride", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {least} or more")
        check_block("block", self.block)


@dataclass(frozen=True, eq=False)
class QueryBlocks:
    """The blocks of a prefill: query i belongs to block ``(i + shift) // block``.

    int64 ``[blocks of queries]`` each: ``begin``, the position of the first query, 0 or more; ``candidates``, the
    number of blocks of keys to choose from; ``tail``, the first token that is seen anyway.
    """

    config: BlockConfig
    q_offset: int
    shift: int
    begin: np.ndarray
    candidates: np.ndarray
    tail: np.ndarray

    def rows_seen(self, queries: int) -> np.ndarray:
        """Rows that each of the first ``queries`` queries attends to, itself included: int64 ``[queries]``."""
        i = np.arange(queries)
        block, position = (i + self.shift) // self.config.block, i + self.q_offset
        chosen = KEYS * np.minimum(self.candidates, self.config.blocks)
        return np.where(self.candidates > 0, self.config.sinks + chosen - self.tail, 0)[block] + position + 1


@functools.lru_cache(maxsize=64)
def query_blocks(config: BlockConfig, Lq: int, Lk: int) -> QueryBlocks:
    """The blocks of the last ``Lq`` of ``Lk`` tokens. Raises ``ValueError`` for ``Lq > Lk``."""
    shift, begin = config.blocks_of(Lq, Lk)
    candidates = np.maximum(0, begin - config.sinks - config.recent) // KEYS
    tail = np.where(candidates > 0, config.sinks + KEYS * candidates, 0)
    return QueryBlocks(config, Lk - Lq, shift, begin, candidates, tail)


# ---------------------------------------------------------------------------------------------------------------
# Reference


def block_mass(
    query: torch.Tensor, key: torch.Tensor, config: BlockConfig, scale: float, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention mass that the sampled queries give to every candidate: ``[B, H_kv, blocks of queries, candidates]``.

    Arguments as :func:`select_blocks_reference`. float32 (float64 for float64 inputs), from 0 to ``samples * H / H_kv``
    in sum; 0 for a block that is no candidate, or whose mass is NaN.
    """
    B, H, Lq, _ = query.shape
    H_kv, layout = key.shape[1], query_blocks(config, Lq, key.shape[2])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    first = torch.full((B,), layout.q_offset, device=query.device) if start is None else start
    back = config.stride * torch.arange(config.samples, device=query.device)
    mass = torch.zeros(B, H_kv, len(layout.begin), int(layout.candidates[-1]), dtype=dtype, device=query.device)
    for i, (begin, count) in enumerate(zip(layout.begin.tolist(), layout.candidates.tolist(), strict=True)):
        if not count:
            continue
        end = begin + config.block  # keys behind the last one are hidden: what rounding gives depends on sizes
        keys = pad(key[:, :, :end], (0, 0, 0, max(0, end - key.shape[2]))).to(dtype)
        position = first.clamp(begin, end - 1)[:, None] - back  # [B, samples]
        row = (position - layout.q_offset).clamp(0, Lq - 1)
        chooser = query.gather(2, row[:, None, :, None].expand(-1, H, -1, query.shape[3])).to(dtype)
        scores = (chooser * scale).unflatten(1, (H_kv, H // H_kv)).flatten(2, 3) @ keys.mT
        hidden = torch.arange(end, device=query.device) > position.repeat(1, H // H_kv)[:, :, None]
        weights = scores.masked_fill(hidden[:, None], -math.inf).softmax(-1)
        middle = weights[..., config.sinks : config.sinks + KEYS * count].unflatten(-1, (count, KEYS)).sum(-1)
        asked = (position >= first[:, None]).repeat(1, H // H_kv)[:, None, :, None]
        mass[:, :, i, :count] = middle.where(asked, 0).sum(2).nan_to_num(0)
    return mass


def choose(mass: torch.Tensor, candidates: torch.Tensor, blocks: int) -> torch.Tensor:
    """The ``blocks`` best of the first ``candidates`` of ``mass`` ``[..., C]``: int32 ``[..., blocks]``, ascending.

    Of equal masses the earlier block is the better one; where there are fewer, ``NONE`` follows.
    """
    C = mass.shape[-1]
    mass = mass.masked_fill(torch.arange(C, device=mass.device) >= candidates[..., None], -1)
    best = mass.sort(dim=-1, descending=True, stable=True).indices[..., :blocks]
    best = pad(best.where(best < candidates[..., None], C), (0, max(0, blocks - C)), value=C).sort(-1).values
    return best.where(best < C, NONE).to(torch.int32)


@torch.no_grad()
def select_blocks_reference(
    query: torch.Tensor, key: torch.Tensor, config: BlockConfig, scale: float, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Which blocks of keys each block of queries chooses, the definition of correct: int32
    ``[B, H_kv, blocks of queries, config.blocks]``, ascending, ``NONE`` behind. Block j is the tokens from
    ``sinks + 64 j`` on.

    ``query`` ``[B, H, Lq, D]``, ``key`` ``[B, H_kv, Lk, D]``; query i is token ``Lk - Lq + i``, see
    :func:`query_blocks`. A query before the first one has no say, so a prefill in chunks chooses what one in a single
    piece does if chunks begin where blocks begin and, for ``samples`` above 1, if the ``stride * (samples - 1)``
    queries before a chunk are given again with it. ``start`` int64 ``[B]`` is the position of each sequence's first
    query, ``Lk - Lq`` or more: where sequences are packed to the front (:class:`..padding.Packing`), queries before
    it are none.

    Raises ``ValueError`` or ``TypeError`` for tensors that do not fit together.
    """
    _check(query, key, start)
    mass = block_mass(query, key, config, scale, start)
    candidates = torch.from_numpy(query_blocks(config, query.shape[2], key.shape[2]).candidates).to(mass.device)
    return choose(mass, candidates, config.blocks)


def rows_visible(chosen: torch.Tensor, config: BlockConfig, Lq: int, Lk: int) -> torch.Tensor:
    """Which tokens each query sees if its block chose ``chosen``: bool ``[B, H_kv, Lq, Lk]``. For references."""
    layout, device = query_blocks(config, Lq, Lk), chosen.device
    C = int(layout.candidates[-1])
    held = torch.zeros(*chosen.shape[:3], C + 1, dtype=torch.bool, device=device)
    held.scatter_(3, chosen.long().where(chosen != NONE, C), True)
    token, position = torch.arange(Lk, device=device), torch.arange(Lk - Lq, Lk, device=device)
    block = (torch.arange(Lq, device=device) + layout.shift) // config.block
    middle = ((token - config.sinks) // KEYS).clamp(0, C)
    middle = middle.where(token >= config.sinks, C)
    tail = torch.from_numpy(layout.tail).to(device)[block]
    seen = held[:, :, block][..., middle] | (token < config.sinks) | (token >= tail[:, None])
    return seen & (token <= position[:, None])


# ---------------------------------------------------------------------------------------------------------------
# Kernels. Columns are blocks of keys, those of the sinks too. The first kernel is a product of all queries that choose
# with all keys before them, of which a column's log-sum-exp stays; columns need nothing of each other. Those of the
# queries that choose together lie side by side: [.., blocks of queries, columns, queries], which is how the second
# kernel reads them. It adds up the mass and finds that of the last one chosen: positive floats are ordered as integers
# are.


@jit
def _choosers(i_chooser, begin, start, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Positions of queries that choose: ``SAMPLES`` for each block, of which block 0 begins at ``begin``."""
    begin += i_chooser // SAMPLES * BLOCK
    position = tl.minimum(tl.maximum(tl.maximum(begin, start), 0), begin + BLOCK - 1)
    return position - i_chooser % SAMPLES * STRIDE


@jit(general="H_kv Lq Lk q_offset begin line rows columns")
def _score_kernel(
    p_lse, p_q, p_k, p_start, p_heads, H_kv, Lq, Lk, q_offset, begin, line, rows, columns, scale_log2,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    GROUP: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each column for each row, a query that chooses. One program per (COLUMNS columns, BM rows, KV
    head)."""
    PER: tl.constexpr = GROUP * SAMPLES
    i_part, i_tile, i_seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_kv = i_seq // H_kv, head_of(p_heads, i_seq % H_kv)
    o_m, o_n, o_d = i_tile * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    start = q_offset
    if p_start is not None:
        start = tl.load(p_start + i_b).to(tl.int32)
    b_position = _choosers(o_m // GROUP, begin, start, SAMPLES, STRIDE, BLOCK)
    m_m = (o_m < rows) & (b_position >= start)
    b_position = tl.where(m_m, b_position, -1)
    o_row = tl.minimum(tl.maximum(b_position - q_offset, 0), Lq - 1).to(tl.int64)
    p_q += i_b * stride_qb + i_kv * GROUP * stride_qh + (o_m % GROUP).to(tl.int64)[:, None] * stride_qh
    b_q = tl.load(
        p_q + o_row[:, None] * stride_qn + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0
    )  # [BM, BD]
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_lse += i_seq * rows * columns + o_m // PER * columns * PER + o_m % PER
    last = tl.max(b_position)
    least = tl.min(tl.where(o_m < rows, b_position, last))
    for c in range(i_part * COLUMNS, tl.minimum(tl.minimum((i_part + 1) * COLUMNS, columns), (last - line) // BN + 1)):
        token = line + c * BN
        o_token = tl.minimum(tl.maximum(token + o_n, 0), Lk - 1).to(tl.int64)
        p_tile = p_k + o_token[:, None] * stride_kn + o_d[None, :]
        b_k = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0) if D < BD else tl.load(p_tile)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT)  # [BM, BN]
        if (token < 0) | (token + BN - 1 > least):
            m_s = (token + o_n >= 0)[None, :] & ((token + o_n)[None, :] <= b_position[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_top = tl.maximum(tl.max(b_s, 1), -1e30) * scale_log2  # not -inf: a hidden column would give inf - inf
        b_lse = b_top + tl.log2(tl.sum(tl.exp2(b_s * scale_log2 - b_top[:, None]), 1))
        tl.store(p_lse + c * PER, b_lse, mask=m_m)


@jit
def first_of(b_rank, least, wanted):
    """1 for the entries of more than rank ``least``, and for the first ones of this rank up to ``wanted`` in all; 0 for
    others."""
    b_better, b_equal = (b_rank > least).to(tl.int32), (b_rank == least).to(tl.int32)
    left = wanted - tl.sum(b_better)
    return b_better + b_equal * (tl.cumsum(b_equal, 0) <= left).to(tl.int32)


@jit
def _reached(b_rank, count, wanted):
    """A rank that ``wanted`` of the ``count`` entries with one of 0 or more reach, and no more of them if that can be;
    the least one where there are fewer."""
    least = tl.min(tl.where(b_rank >= 0, b_rank, 0x7FFFFFFF))
    most = tl.where(count > wanted, tl.max(b_rank), least)
    while least < most:
        middle = most - (most - least) // 2
        reach = tl.sum((b_rank >= middle).to(tl.int32))
        most = tl.where(reach > wanted, most, tl.where(reach == wanted, middle, middle - 1))
        least = tl.where(reach >= wanted, middle, least)
    return least


class Choosers(NamedTuple):
    """KV heads that choose, each in its own way: int32 ``[H]`` their numbers, and int32 ``[choices]`` how many blocks,
    and how many tokens before a block of queries are no candidates, the sinks and the recent ones."""

    heads: torch.Tensor
    blocks: torch.Tensor
    held: torch.Tensor


@jit(general="H_kv scored q_offset begin line sinks held columns blocks stride_chosen")
def _choose_kernel(
    p_chosen, p_lse, p_start, choosers, p_of, H_kv, scored, q_offset, begin, line, sinks, held, columns, blocks,
    stride_chosen,
    GROUP: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BB: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program per (block of queries, KV head), for BR queries at a time; ``held`` tokens before the block are sinks
    and tail, and ``blocks`` places are filled for each, or as many as ``choosers`` say. Where a KV head has several
    choices, ``p_of`` says whose each is of the ``scored`` ones."""
    PER: tl.constexpr = GROUP * SAMPLES
    i_block, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_c, o_b = tl.arange(0, BC), tl.arange(0, BB)
    start = q_offset
    if p_start is not None:
        start = tl.load(p_start + i_seq // H_kv).to(tl.int32)
    i_lse = i_seq
    if p_of is not None:
        i_lse = i_seq // H_kv * scored + tl.load(p_of + i_seq % H_kv)
    p_lse += (i_lse * tl.num_programs(0) + i_block) * columns * PER
    some = tl.minimum((begin + (i_block + 1) * BLOCK - 1 - line) // BN + 1, columns)  # no query sees more
    b_mass = tl.zeros([BC], tl.float32)
    for r in range(0, PER, BR):
        o_r = r + tl.arange(0, BR)
        b_position = _choosers(i_block * SAMPLES + o_r // GROUP, begin, start, SAMPLES, STRIDE, BLOCK)
        b_seen = tl.where((o_r < PER) & (b_position >= start), (b_position - line) // BN + 1, 0)
        m_x = (o_c < some)[:, None]  # the same for all queries, so that they are read at once
        if PER % BR:
            m_x = m_x & (o_r < PER)[None, :]
        b_x = tl.load(p_lse + o_c[:, None] * PER + o_r[None, :], mask=m_x, other=float("-inf"))
        b_x = tl.where(o_c[:, None] < b_seen[None, :], b_x, float("-inf"))
        b_p = tl.exp2(b_x - tl.maximum(tl.max(b_x, 0), -1e30)[None, :])
        b_sum = tl.sum(b_p, 0)
        b_mass += tl.sum(b_p / tl.where(b_sum == 0, 1.0, b_sum)[None, :], 1)  # NaN stays NaN

    wanted = blocks
    if choosers is not None:
        wanted, held = tl.load(choosers.blocks + i_seq % H_kv), tl.load(choosers.held + i_seq % H_kv)
    count = tl.maximum(begin + i_block * BLOCK - held, 0) // BN
    first = (sinks - line) // BN
    b_bits = tl.where(b_mass == b_mass, b_mass, 0.0).to(tl.int32, bitcast=True)
    b_bits = tl.where((o_c >= first) & (o_c < first + count), b_bits, -1)
    b_taken = first_of(b_bits, _reached(b_bits, count, wanted), wanted)
    p_chosen += i_seq * stride_chosen + i_block * blocks
    tl.store(p_chosen + tl.cumsum(b_taken, 0) - 1, o_c - first, mask=b_taken > 0)
    tl.store(p_chosen + o_b, tl.full([BB], -1, tl.int32), mask=(o_b >= tl.minimum(count, wanted)) & (o_b < blocks))


_WORKSPACE = 1 << 28  # bytes; longer prefills are chosen in parts


def _parts(total: int, step: int, bytes_of: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """The first of ``total`` blocks of queries, and how many: as many times ``step`` as fit into the workspace, or
    fewer than one step. ``bytes_of(n)``: what each of some blocks takes up to the n-th."""
    first = 0
    while first < total:
        blocks = step
        while first + blocks < total and (blocks + step) * bytes_of(min(first + blocks + step, total)) <= _WORKSPACE:
            blocks += step
        blocks = min(blocks, total - first, max(1, _WORKSPACE // bytes_of(min(first + blocks, total))))
        yield first, blocks
        first += blocks


@torch.no_grad()
def select_blocks_triton(
    query: torch.Tensor, key: torch.Tensor, config: BlockConfig, scale: float, start: torch.Tensor | None = None,
    choosers: Choosers | None = None, of: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """:func:`select_blocks_reference` as Triton kernels; same arguments and results, up to masses that rounding makes
    change places. Reads nothing back from the device.

    ``choosers``: the KV heads that choose, with ``config.blocks`` at most and recent tokens of their own; None for all.
    The result is ``[B, choices, ..]`` then, ``NONE`` behind what was chosen. ``of`` int32 ``[choices]``: the place of
    the KV head of each among ``choosers.heads``; None where each has one, in order.

    Work: ``samples / block`` of the scores of exact attention. Memory: at most 256 MiB, or what one block of queries
    needs. Raises ``TypeError`` for dtypes other than float16, bfloat16 and float32.
    """
    require_triton()
    _check(query, key, start)
    if query.dtype == torch.float64:
        raise TypeError(f"query: dtype {query.dtype}; the kernel takes float16, bfloat16 or float32")
    if scale <= 0:  # the kernel takes the maximum before it scales
        query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    (B, H, Lq, D), (H_kv, Lk) = query.shape, key.shape[1:3]
    layout, start = query_blocks(config, Lq, Lk), None if start is None else start.contiguous()
    total, group = len(layout.begin), H // H_kv
    own = None if choosers is None else choosers.heads
    H_kv = H_kv if own is None else len(own)
    choices = H_kv if choosers is None else len(choosers.blocks)
    scored = None if of is None else H_kv  # None is no argument of the kernel
    chosen = torch.empty(B, choices, total, config.blocks, dtype=torch.int32, device=query.device)
    if not 0 < B * H_kv * D:
        return chosen.fill_(NONE) if chosen.numel() else chosen
    line = config.sinks - KEYS * -(-config.sinks // KEYS)  # where the columns begin
    per_block, specialised = config.samples * group, hopper.takes(query, key)
    small, BD = query.element_size() == 2, max(16, next_power_of_two(D))
    BM = min(128 if small else 64, max(16, next_power_of_two(total * per_block)))
    sizes = dict(GROUP=group, SAMPLES=config.samples, STRIDE=config.stride, BLOCK=config.block)
    scale_log2 = scale * math.log2(math.e)

    def columns_of(blocks: int) -> int:
        """The columns that queries of the first blocks see. These are the first ones, unless sequences start later."""
        begin = layout.q_offset - layout.shift + (blocks - 1) * config.block
        last = max(begin, layout.q_offset) if start is None else min(Lk, begin + config.block) - 1
        return (last - line) // KEYS + 1

    step = max(1, hopper.ROWS.value // per_block)
    for first, blocks in _parts(total, step, lambda n: 4 * B * H_kv * per_block * columns_of(n)):
        begin, columns = layout.q_offset - layout.shift + first * config.block, columns_of(first + blocks)
        rows = blocks * per_block
        lse = torch.empty(B * H_kv * columns * rows, dtype=torch.float32, device=query.device)
        if specialised:
            of_part = hopper.ScoreSizes(H_kv, B * H_kv, Lq, layout.q_offset, begin, line, rows, columns)
            hopper.score(lse, query, key, start, own, scale_log2, of_part, hopper.ScoreShape(D, **sizes))
        else:
            launch(_score_kernel, (-(-columns // _COLUMNS), -(-rows // BM), B * H_kv),
                lse, query, key, start, own, H_kv, Lq, Lk, layout.q_offset, begin, line, rows, columns, scale_log2,
                *query.stride()[:3], *key.stride()[:3], D=D, BD=BD, BM=BM, COLUMNS=_COLUMNS, **sizes, BN=KEYS,
                num_warps=4, num_stages=3 if small and BD <= 128 else 2,
            )  # fmt: skip
        BC = max(32, next_power_of_two(columns))
        launch(_choose_kernel, (blocks, B * choices),
            chosen[:, :, first:], lse, start, choosers, of, choices, scored, layout.q_offset, begin, line, config.sinks,
            config.sinks + config.recent, columns, config.blocks, total * config.blocks, **sizes, BN=KEYS, BC=BC,
            BB=max(BC, next_power_of_two(config.blocks)), BR=min(next_power_of_two(per_block), 4),
            num_warps=max(1, min(32, BC // _PER_WARP)),
        )  # fmt: skip
    return chosen


_PER_WARP = 512  # columns; 256 take a third longer from n = 131,072 on
_COLUMNS = 16  # of one program; on an H200 4% faster than 8 at n = 32,768 and at 131,072


def select_blocks(
    query: torch.Tensor, key: torch.Tensor, config: BlockConfig, scale: float, start: torch.Tensor | None = None
) -> torch.Tensor:
    """The choice with the kernels on CUDA and the reference elsewhere; see :func:`select_blocks_reference`."""
    run = select_blocks_triton if query.is_cuda else select_blocks_reference
    return run(query, key, config, scale, start)


def _check(query: torch.Tensor, key: torch.Tensor, start: torch.Tensor | None) -> None:
    check_call(Call(query, key, key, None, None, None, None))
    if 0 in (query.shape[1], query.shape[2]):
        raise ValueError(f"query: shape {tuple(query.shape)}; heads and length must be 1 or more")
    if start is not None and (start.shape != query.shape[:1] or start.dtype != torch.int64):
        raise ValueError(f"start: {start.dtype} of shape {tuple(start.shape)}; must be int64 [{query.shape[0]}]")
