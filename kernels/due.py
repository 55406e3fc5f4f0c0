"""What is due in a cache with a new token: rows that were decided before its time change places, all in one launch.

Every part of a layer has lines for each sequence, in memory that does not move: how many tokens there are with the new
one when it is due, which places change, and where what they will hold is. The launch comes before that of a step in
which anything of the layer is due, and only then: to find that nothing is took a tenth of the time of the attention.
Sequences for which nothing is due it leaves as they are; repeated at the same length, it writes the same again.

The reference is :meth:`.held.HeldRows.catch_up`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence

import torch

from .attend.places import KEY as TO_KEY
from .attend.places import LISTED as TO_LISTED
from .attend.places import PAGES as TO_PAGES
from .attend.places import TOKEN as TO_TOKEN
from .attend.places import VALUE as TO_VALUE
from .attend.places import WEIGHT as TO_WEIGHT
from .attend.places import Table, _line
from .launch import Widths, constexpr, jit, launch, load_rows, require_triton, tl

# columns of a line: tokens of the sequence when it is due, with the new one (-1: nothing is); how many places change,
# and addresses of their numbers; of what the first head holds there then: tokens, keys, values, log-weights; how many
# pages there are, and addresses of the list of the first head and of its length
END, ROWS, AT, TOKEN, KEY, VALUE, WEIGHT, PAGES, LIST, LISTED, COLUMNS = (constexpr(i) for i in range(11))
LINES = 16  # of a sequence, a power of two
_CHUNKS = 8  # programs of a head

_Shape = namedtuple("_Shape", "H D DV BD BDV BN LINES")


def line(
    end: int, at: torch.Tensor, first: int, rows: Sequence[torch.Tensor], pages: Sequence[torch.Tensor]
) -> list[int]:
    """The numbers of a line. ``at`` int32 ``[R]``; tokens, keys, values and log-weights ``[B, G, R, ..]`` and the pages
    and how many are listed ``[B, G, ..]`` are those of sequence ``first`` of these; all contiguous."""
    addresses = [x.data_ptr() + first * x.stride(0) * x.element_size() for x in (*rows, *pages)]
    return [end, len(at), at.data_ptr(), *addresses[:4], pages[0].shape[2], *addresses[4:]]


@jit
def _due_kernel(like, table, heads, end, SHAPE: tl.constexpr):
    """``heads`` int64 ``[heads, 3]``: numbers in the layer and in the part, and where the lines of the part are."""
    BN: tl.constexpr = SHAPE.BN
    i_chunk, i_b = tl.program_id(0), tl.program_id(2)
    p_head = heads + tl.program_id(1) * 3
    p_due = tl.load(p_head + 2).to(tl.pointer_type(tl.int64)) + i_b * (SHAPE.LINES * COLUMNS)
    o_line = tl.arange(0, SHAPE.LINES)
    own = tl.max(tl.where(tl.load(p_due + o_line * COLUMNS + END) == tl.load(end + i_b), o_line, -1), 0)
    if own >= 0:
        p_due += own * COLUMNS
        g, p_line = tl.load(p_head + 1), _line(table, i_b, tl.load(p_head), SHAPE)
        rows = tl.load(p_due + ROWS)
        p_at = tl.load(p_due + AT).to(tl.pointer_type(tl.int32))
        p_token = tl.load(p_due + TOKEN).to(tl.pointer_type(tl.int32)) + g * rows
        p_weight = tl.load(p_due + WEIGHT).to(tl.pointer_type(tl.float32)) + g * rows
        p_k = tl.load(p_due + KEY).to(tl.pointer_type(like.dtype.element_ty)) + g * rows * SHAPE.D
        p_v = tl.load(p_due + VALUE).to(tl.pointer_type(like.dtype.element_ty)) + g * rows * SHAPE.DV
        to_token = tl.load(p_line + TO_TOKEN).to(tl.pointer_type(tl.int32))
        to_weight = tl.load(p_line + TO_WEIGHT).to(tl.pointer_type(tl.float32))
        to_k = tl.load(p_line + TO_KEY).to(tl.pointer_type(like.dtype.element_ty))
        to_v = tl.load(p_line + TO_VALUE).to(tl.pointer_type(like.dtype.element_ty))
        o_d, o_dv = tl.arange(0, SHAPE.BD), tl.arange(0, SHAPE.BDV)
        for i in range(i_chunk * BN, rows.to(tl.int32), tl.num_programs(0) * BN):
            o_n = i + tl.arange(0, BN)
            m_n = o_n < rows
            o_at = tl.load(p_at + o_n, mask=m_n, other=0)
            tl.store(to_token + o_at, tl.load(p_token + o_n, mask=m_n, other=0), mask=m_n)
            tl.store(to_weight + o_at, tl.load(p_weight + o_n, mask=m_n, other=0.0), mask=m_n)
            b_k = load_rows(p_k, SHAPE.D, o_n, m_n, SHAPE.D, SHAPE.BD)  # [BN, BD]
            b_v = load_rows(p_v, SHAPE.DV, o_n, m_n, SHAPE.DV, SHAPE.BDV)  # [BN, BDV]
            o_to = o_at.to(tl.int64)[:, None]
            tl.store(to_k + o_to * SHAPE.D + o_d[None, :], b_k, mask=m_n[:, None] & (o_d < SHAPE.D)[None, :])
            tl.store(to_v + o_to * SHAPE.DV + o_dv[None, :], b_v, mask=m_n[:, None] & (o_dv < SHAPE.DV)[None, :])
        if i_chunk == 0:
            pages = tl.load(p_due + PAGES)
            p_list = tl.load(p_due + LIST).to(tl.pointer_type(tl.int32)) + g * pages
            to_list = tl.load(p_line + TO_PAGES).to(tl.pointer_type(tl.int32))
            for i in range(0, pages.to(tl.int32), BN):
                o_n = i + tl.arange(0, BN)
                tl.store(to_list + o_n, tl.load(p_list + o_n, mask=o_n < pages, other=0), mask=o_n < pages)
            listed = tl.load(tl.load(p_due + LISTED).to(tl.pointer_type(tl.int32)) + g)
            tl.store(tl.load(p_line + TO_LISTED).to(tl.pointer_type(tl.int32)), listed)


def do_what_is_due(
    key: torch.Tensor, value: torch.Tensor, table: Table, heads: torch.Tensor, end: torch.Tensor
) -> None:
    """``heads``: those in which something can be due, as in the kernel. ``end`` int32 ``[B]`` counts the tokens with
    the new one. Of ``key`` and ``value``, which are like those that are held, only the width and the dtype count."""
    require_triton()
    if not len(heads):
        return
    launch(_due_kernel, (_CHUNKS, len(heads), len(end)),
        key, table.lines, heads, end, SHAPE=_Shape(table.done.shape[1], *Widths.of(key, value), 32, LINES),
        num_warps=4,
    )  # fmt: skip
