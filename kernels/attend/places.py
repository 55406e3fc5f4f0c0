"""A step of decoding over the places of a cache whose KV heads hold different rows: one launch, in which every head
attends and holds the new token, whatever the plans are.

    out_i = sum_j w_j exp(scale <q_i, k_j>) v_j / sum_j w_j exp(scale <q_i, k_j>)

over the places j that hold a row (``log_weight`` finite). Where the rows of a head are, and which of its tokens goes
where, says a line of a table of addresses in memory that does not move, and how many tokens a sequence has stands on
the device as well: one CUDA graph serves a cache at every length. A head is read by pages of 64 places: by those on its
list, or all up to its last token. The programs of a head read its blocks in turn, and whichever is done last adds up in
order what they leave, which gives the same bits every time. The new token is not read from its place, as nothing orders
programs of a launch: one of them takes it from the inputs and stores it, and all leave the place out.

The reference is :meth:`..held.HeldRows.append` and :func:`.decode.decode_reference` over the same places.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..launch import (
    FLOAT32_DOT,
    Widths,
    constexpr,
    is_last,
    jit,
    launch,
    load_rows,
    next_power_of_two,
    require_triton,
    strided,
    tl,
)
from .decode import PAGE, Tiling, device_of, tiling

# columns of a line of the table: addresses of the first place of keys, values, log-weights and tokens, of the list of
# pages (0: none) and of its length (where all tokens are held and weigh the same a negative number, minus the length);
# places in all; sinks; places of the ring (0: token i is at place i); recent tokens of a head that drops all others
# (-1: it does not)
KEY, VALUE, WEIGHT, TOKEN, PAGES, LISTED, PLACES, SINKS, RING, RECENT, COLUMNS = (constexpr(i) for i in range(11))
# and behind that in the line of a program: its KV head, its number there, and how many there are
HEAD, NUMBER, SPLITS, PROGRAM = (constexpr(i) for i in range(10, 14))


_COMBINED = 8192  # values that are added up at once


class Table(NamedTuple):
    """The heads of a layer. lines: int64 ``[B * H_kv, COLUMNS]``. programs: int64 ``[B, P, PROGRAM]``, for every
    program the line of its head and what it does there, those of a head side by side. done: int32 ``[B, H_kv, 2]``, how
    many programs of a head have chosen and have attended, 0 before and after a launch. All on the device. align: what
    the addresses of keys and values are multiples of, in bytes, up to 16."""

    lines: torch.Tensor
    programs: torch.Tensor
    done: torch.Tensor
    align: int


def shares(blocks: Sequence[int], sequences: int, at_once: int) -> list[int]:
    """How many programs read each KV head of so many ``blocks``, where ``at_once`` programs run at a time on the device
    and all of them have about as much to do: in one wave, or in four where that leaves less than one for a head."""
    waves = 1 if 2 * len(blocks) * sequences <= at_once else 4
    each = max(1, -(-sum(blocks) * sequences // (waves * at_once)))
    return [max(1, -(-count // each)) for count in blocks]


def make_table(lines: torch.Tensor, counts: Sequence[int], device: torch.device) -> Table:
    """The table of these ``lines`` int64 ``[B, H_kv, COLUMNS]``, on the CPU, with so many programs for each head."""
    (B, H), own = lines.shape[:2], [(head, i, count) for head, count in enumerate(counts) for i in range(count)]
    which = torch.tensor(own)
    programs = torch.cat([lines[:, which[:, 0]], which.expand(B, *which.shape)], 2)
    bits = int(np.bitwise_or.reduce(lines[..., :2].numpy(), axis=None))
    done = torch.zeros(B, H, 2, dtype=torch.int32, device=device)
    return Table(lines.view(B * H, -1).to(device), programs.to(device), done, min(16, bits & -bits))


_Shape = namedtuple("_Shape", "H G D DV BD BDV BM BN PAGE ALIGN BG BS")
_Parts = namedtuple("_Parts", "most sum value out done")


@jit
def _line(table, i_b, i_h, SHAPE: tl.constexpr):
    return table + (i_b * SHAPE.H + i_h).to(tl.int64) * COLUMNS


@jit
def _place_of(token, sinks, ring):
    """Where a head holds a token."""
    return tl.where((ring == 0) | (token < sinks), token, sinks + (token - sinks) % tl.maximum(ring, 1))


@jit
def _places(p_line, token):
    """Where a head holds the last token, and the place of the one that it drops then, or -1."""
    sinks, ring = tl.load(p_line + SINKS).to(tl.int32), tl.load(p_line + RING).to(tl.int32)
    recent = tl.load(p_line + RECENT).to(tl.int32)
    old = token - recent - 1
    free = tl.where((recent >= 0) & (old >= sinks), _place_of(old, sinks, ring), -1)
    return _place_of(token, sinks, ring), free


@jit
def _split_kernel(q, k, v, table, end, parts, scale, SHAPE: tl.constexpr):
    """The last program of a head, which has the fewest blocks, adds the new token, if one is given, and stores it; no
    program reads its place, nor the one that is freed."""
    BM: tl.constexpr = SHAPE.BM
    BN: tl.constexpr = SHAPE.BN
    PAGE: tl.constexpr = SHAPE.PAGE
    BDV: tl.constexpr = SHAPE.BDV
    ALIGN: tl.constexpr = SHAPE.ALIGN
    i_p, i_b = tl.program_id(0), tl.program_id(1)
    i_part = i_b.to(tl.int64) * tl.num_programs(0) + i_p
    p_line = table + i_part * PROGRAM
    i_h, i_split = tl.load(p_line + HEAD).to(tl.int32), tl.load(p_line + NUMBER).to(tl.int32)
    splits = tl.load(p_line + SPLITS).to(tl.int32)
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    o_d, o_dv = tl.arange(0, SHAPE.BD), tl.arange(0, SHAPE.BDV)
    p_k = tl.multiple_of(tl.load(p_line + KEY).to(tl.pointer_type(q.p.dtype.element_ty)), ALIGN)
    p_v = tl.multiple_of(tl.load(p_line + VALUE).to(tl.pointer_type(q.p.dtype.element_ty)), ALIGN)
    p_weight = tl.load(p_line + WEIGHT).to(tl.pointer_type(tl.float32))
    pages, listed = tl.load(p_line + PAGES), tl.load(p_line + LISTED)
    is_listed, is_weighted = pages != 0, listed >= 0
    p_pages = pages.to(tl.pointer_type(tl.int32))
    tokens = tl.load(end + i_b)
    last = tl.minimum(tokens, tl.load(p_line + PLACES).to(tl.int32))
    p_listed, is_counted = listed.to(tl.pointer_type(tl.int32)), is_weighted & is_listed
    listed = tl.where(is_counted, tl.load(p_listed, mask=is_counted, other=0), -listed.to(tl.int32))
    listed = tl.where(is_listed, listed * PAGE, 0)
    rows = tl.where(is_listed, listed, last)
    weighted = tl.where(is_weighted, rows, 0)
    places = tl.where(is_counted, tl.load(p_line + PLACES).to(tl.int32), last)
    place, free = -1, -1
    if k.p is not None:
        place, free = _places(p_line, tokens - 1)
        m_d, m_dv = o_d < SHAPE.D, o_dv < SHAPE.DV
        b_own_k = tl.load(k.p + i_b.to(tl.int64) * k.b + i_h.to(tl.int64) * k.h + o_d, mask=m_d, other=0.0)
        b_own_v = tl.load(v.p + i_b.to(tl.int64) * v.b + i_h.to(tl.int64) * v.h + o_dv, mask=m_dv, other=0.0)
    m_m = o_m < SHAPE.G
    p_q = q.p + i_b.to(tl.int64) * q.b + (i_h * SHAPE.G + o_m).to(tl.int64)[:, None] * q.h + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < SHAPE.D)[None, :], other=0.0)  # [BM, BD]
    b_top, b_sum = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    for j in range(i_split, tl.cdiv(rows, BN), splits):
        o_row = j * BN + o_n
        b_page = tl.load(p_pages + o_row // PAGE, mask=o_row < listed, other=-1)
        o_place = tl.where(is_listed, tl.where(b_page < 0, places, b_page * PAGE + o_row % PAGE), o_row)
        m_n = (o_row < rows) & (o_place < places) & (o_place != place) & (o_place != free)
        b_weight = tl.load(p_weight + o_place, mask=m_n & (o_row < weighted), other=0.0)
        m_n = m_n & (b_weight > float("-inf"))
        b_k = load_rows(p_k, SHAPE.D, o_place, m_n, SHAPE.D, SHAPE.BD)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=FLOAT32_DOT) * scale
        b_s += tl.where(m_n, b_weight, 0.0)[None, :] * 1.4426950408889634
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_old = tl.exp2(b_top - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_v = load_rows(p_v, SHAPE.DV, o_place, m_n, SHAPE.DV, SHAPE.BDV)  # [BN, BDV]
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=FLOAT32_DOT)
        b_top = b_new
    if k.p is not None:
        if i_split == splits - 1:
            b_s = tl.sum(b_q.to(tl.float32) * b_own_k.to(tl.float32)[None, :], 1) * scale
            b_new = tl.maximum(b_top, b_s)
            b_old, b_own = tl.exp2(b_top - b_new), tl.exp2(b_s - b_new)
            b_sum = b_sum * b_old + b_own
            b_acc = b_acc * b_old[:, None] + b_own[:, None] * b_own_v.to(tl.float32)[None, :]
            b_top = b_new
            tl.store(p_k + tl.cast(place, tl.int64) * SHAPE.D + o_d, b_own_k, mask=m_d)
            tl.store(p_v + tl.cast(place, tl.int64) * SHAPE.DV + o_dv, b_own_v, mask=m_dv)
            tl.store(tl.load(p_line + TOKEN).to(tl.pointer_type(tl.int32)) + place, tokens - 1)
            tl.store(p_weight + place, 0.0)
            tl.store(p_weight + free, float("-inf"), mask=free >= 0)
    o_part = i_part * SHAPE.G
    tl.store(parts.most + o_part + o_m, b_top, mask=m_m)
    tl.store(parts.sum + o_part + o_m, b_sum, mask=m_m)
    m_out = m_m[:, None] & (o_dv < SHAPE.DV)[None, :]
    tl.store(parts.value + (o_part + o_m)[:, None] * SHAPE.DV + o_dv[None, :], b_acc, mask=m_out)
    i_head = i_b * SHAPE.H + i_h
    if is_last(parts.done + 2 * i_head + 1, splits):
        _combine(parts, i_part - i_split, splits, i_head, SHAPE)


@jit
def _combine(parts, first, splits, i_head, SHAPE: tl.constexpr):
    """The parts of all programs of a head, in order."""
    BG: tl.constexpr = SHAPE.BG
    BS: tl.constexpr = SHAPE.BS
    BDV: tl.constexpr = SHAPE.BDV
    o_g, o_dv = tl.arange(0, BG), tl.arange(0, BDV)
    b_top, b_total = tl.full([BG], -1e30, tl.float32), tl.zeros([BG], tl.float32)
    b_out = tl.zeros([BG, BDV], tl.float32)
    for s in range(0, splits, BS):
        for i in tl.static_range(BS):  # nothing is summed over threads, so all loads are on their way at once
            m_g = o_g < tl.where(s + i < splits, SHAPE.G, 0)
            m_value = m_g[:, None] & (o_dv < SHAPE.DV)[None, :]
            o_own = (first + s + i) * SHAPE.G + o_g
            b_most = tl.load(parts.most + o_own, mask=m_g, other=-1e30, cache_modifier=".cg")
            b_sum = tl.load(parts.sum + o_own, mask=m_g, other=0.0, cache_modifier=".cg")
            p_value = parts.value + o_own[:, None] * SHAPE.DV + o_dv[None, :]
            b_value = tl.load(p_value, mask=m_value, other=0.0, cache_modifier=".cg")
            b_new = tl.maximum(b_top, b_most)
            b_old, b_factor = tl.exp2(b_top - b_new), tl.exp2(b_most - b_new)
            b_out = b_out * b_old[:, None] + b_value * b_factor[:, None]
            b_total = b_total * b_old + b_sum * b_factor
            b_top = b_new
    b_out = b_out / tl.where(b_total == 0, 1.0, b_total)[:, None]
    p_out = parts.out + (i_head.to(tl.int64) * SHAPE.G + o_g)[:, None] * SHAPE.DV + o_dv[None, :]
    m_out = (o_g < SHAPE.G)[:, None] & (o_dv < SHAPE.DV)[None, :]
    tl.store(p_out, b_out.to(parts.out.dtype.element_ty), mask=m_out)


def _tiling(row_bytes: int, programs: int, device: torch.device) -> Tiling:
    """The tiling for so many programs. Which rows are read their weights say, so rows come late: where programs wait
    for one another, four with tiles of half the rows share a multiprocessor, and some read while others wait. All
    programs of :func:`shares` run at once then: with 128 registers for a thread, as device-code.csv says."""
    multiprocessors, shared = device_of(device)
    tiles = tiling(row_bytes, shared)
    is_crowded = tiles.programs == 1 and tiles.rows > PAGE and programs > multiprocessors
    return Tiling(PAGE, 4, 2, 4) if is_crowded else tiles


def _shape(query_heads: int, H: int, widths: Widths, align: int, rows: int) -> _Shape:
    G = query_heads // H
    BG = next_power_of_two(G)
    return _Shape(H, G, *widths, max(16, BG), rows, PAGE, align, BG, max(1, min(16, _COMBINED // (BG * widths.BDV))))


def attend_places(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: Table, end: torch.Tensor, scale: float,
    holds: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Attention of ``query`` ``[B, H, 1, D]`` to what the heads hold and to the last token of every sequence, which is
    held then: ``[B, H, 1, Dv]``. ``key`` ``[B, H_kv, 1, D]`` and ``value`` ``[B, H_kv, 1, Dv]`` are those of the token,
    which ``end`` int32 ``[B]`` counts as well. ``holds`` False: it is held already, nothing is written, and of ``key``
    and ``value`` only the shape and the dtype count."""
    require_triton()
    (B, H), programs, widths = query.shape[:2], table.programs.shape[1], Widths.alike(key, value)
    tiles = _tiling(max(widths.BD, widths.BDV) * key.element_size(), B * programs, key.device)
    shape = _shape(H, key.shape[1], widths, table.align, tiles.rows)
    out = query.new_empty(B, H, 1, shape.DV)
    count = B * programs * shape.G
    memory = torch.empty(count * (2 + shape.DV), dtype=torch.float32, device=query.device)
    most, total, weighted = memory.split([count, count, count * shape.DV])
    parts = _Parts(most, total, weighted, out, table.done)
    new = [strided(x if holds else None) for x in (key, value)]
    launch(_split_kernel, (programs, B),
        strided(query), *new, table.programs, end, parts, scale * 1.4426950408889634, SHAPE=shape,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
