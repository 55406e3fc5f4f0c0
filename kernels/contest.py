"""Protected rows: the most distinctive rows outside the window compete for places that are held exactly.

Thinning keeps one of every ``w`` rows, so it forgets what a single row says. A row that leaves the window gets a
score once and for all, minus the cosine similarity of its key to the running mean key of its head; rows arrive in
contests of ``CONTEST`` rows, the best ``protected`` of the places and the newcomers stay, and the losers go on to
be thinned, in position order. Query-blind and causal. (Not in the Express paper; KeyDiff, arXiv 2504.15364, scores
keys this way.)
"""

from __future__ import annotations

import torch

from ._triton import jit, next_power_of_two, require_triton, tl

CONTEST = 256  # rows that compete for the protected places at a time


def distinctiveness(key: torch.Tensor, key_sum: torch.Tensor, count: int) -> torch.Tensor:
    """Scores ``[B, H, C]`` of rows that leave the window: minus the cosine similarity to the running mean key.

    ``key`` ``[B, H, C, D]``, ``key_sum`` ``[B, H, D]`` the sum of the ``count`` keys that left so far.
    """
    return -torch.cosine_similarity(key.to(key_sum), (key_sum / count)[:, :, None], dim=-1)


def contest(
    places: torch.Tensor, place_scores: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor, protected: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One contest for the protected places: the best ``protected`` of places and rows stay, by score.

    ``places`` and ``rows`` hold token indices ``[B, H, .]`` in position order, with their scores. Returns the
    new places, their scores, and the losers in position order.
    """
    index, score = torch.cat([places, rows], 2), torch.cat([place_scores, scores], 2)
    if index.shape[2] <= protected:
        return index, score, index[:, :, :0]
    best = score.topk(protected, dim=2).indices
    wins = torch.zeros_like(score, dtype=torch.bool).scatter_(2, best, True)
    order = wins.to(torch.int8).argsort(dim=2, stable=True)  # losers, then winners, both in position order
    index, score = index.gather(2, order), score.gather(2, order)
    split = index.shape[2] - protected
    return index[:, :, split:], score[:, :, split:], index[:, :, :split]


def compete_reference(
    key: torch.Tensor, sinks: int, contests: int, protected: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All contests of a prefill: ``key`` ``[B, H, L, D]``, the rows from ``sinks`` on in position order.

    Returns the losers in the order in which they leave, int32 ``[B, H, max(0, contests * CONTEST - protected)]``,
    and the places after every contest, int32 ``[B, H, contests, protected]`` (0 where a place is still free).
    """
    B, H = key.shape[:2]
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    key_sum = key[:, :, :sinks].to(dtype).sum(2)
    places = torch.empty(B, H, 0, dtype=torch.int32, device=key.device)
    scores = torch.empty(B, H, 0, dtype=dtype, device=key.device)
    streamed = [places]
    history = torch.zeros(B, H, contests, protected, dtype=torch.int32, device=key.device)
    for i in range(contests):
        first = sinks + i * CONTEST
        rows = torch.arange(first, first + CONTEST, dtype=torch.int32, device=key.device).expand(B, H, CONTEST)
        keys = key[:, :, first : first + CONTEST]
        key_sum = key_sum + keys.to(dtype).sum(2)
        new_scores = distinctiveness(keys, key_sum, first + CONTEST)
        places, scores, losers = contest(places, scores, rows, new_scores, protected)
        streamed.append(losers)
        history[:, :, i, : places.shape[2]] = places
    return torch.cat(streamed, 2), history


# ---------------------------------------------------------------------------------------------------------------
# Kernels: scores of all contests at once, then one program per (sequence, KV head) that walks the contests


@jit
def _score_kernel(
    p_scores, p_k, p_mean, H, stride_b, stride_h, stride_n, sinks,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CONTEST_ROWS: tl.constexpr,
):  # fmt: skip
    i_tile, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_contest = i_tile * BN // CONTEST_ROWS
    contests = tl.num_programs(0) * BN // CONTEST_ROWS
    o_n, o_d = i_tile * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_d = o_d < D
    b_mean = tl.load(p_mean + (i_seq * contests + i_contest) * D + o_d, mask=m_d, other=0.0)
    p_k += (i_seq // H) * stride_b + (i_seq % H) * stride_h + (sinks + o_n).to(tl.int64)[:, None] * stride_n
    b_k = tl.load(p_k + o_d[None, :], mask=m_d[None, :], other=0.0).to(tl.float32)  # [BN, BD]
    norm = tl.maximum(tl.sqrt(tl.sum(b_mean * b_mean)), 1e-8)
    b_norm = tl.maximum(tl.sqrt(tl.sum(b_k * b_k, 1)), 1e-8)
    b_score = -tl.sum(b_k * b_mean[None, :], 1) / (b_norm * norm)
    tl.store(p_scores + i_seq * contests * CONTEST_ROWS + o_n, b_score)


@jit
def _contest_kernel(
    p_stream, p_places, p_scores, contests, protected, sinks, streamed,
    CONTEST_ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The first ``protected`` entries of the sorted array are the places; newcomers replace what lies behind."""
    i_seq = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, N)
    last: tl.constexpr = 0x7FFFFFFF
    b_x = tl.full([N], -0x7FFFFFFFFFFFFFFF, tl.int64)
    for i in range(contests):
        first = i * CONTEST_ROWS
        m_new = (o_n >= protected) & (o_n < protected + CONTEST_ROWS)
        o_row = first + o_n - protected
        b_score = tl.load(p_scores + i_seq * contests * CONTEST_ROWS + o_row, mask=m_new, other=0.0)
        b_bits = b_score.to(tl.int32, bitcast=True)
        b_bits = b_bits ^ ((b_bits >> 31) & last)  # integers in the order of the floats
        b_new = (b_bits.to(tl.int64) << 32) | (last - (sinks + o_row)).to(tl.int64)  # ties: the earlier row
        b_x = tl.sort(tl.where(o_n < protected, b_x, tl.where(m_new, b_new, -0x7FFFFFFFFFFFFFFF)), descending=True)
        b_index = last - (b_x & 0xFFFFFFFF).to(tl.int32)
        b_free = b_x == -0x7FFFFFFFFFFFFFFF
        p_place = p_places + (i_seq * contests + i) * protected
        tl.store(p_place + o_n, tl.where(b_free, 0, b_index), mask=o_n < protected)
        # the losers in position order; places that were never filled sort behind them
        b_loser = tl.sort(tl.where(b_free | (o_n < protected), last, b_index))
        before = tl.maximum(first - protected, 0)
        leaving = tl.maximum(first + CONTEST_ROWS - protected, 0) - before
        tl.store(p_stream + i_seq * streamed + before + o_n, b_loser, mask=o_n < leaving)


def compete(key: torch.Tensor, sinks: int, contests: int, protected: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`compete_reference` with kernels; the places of one contest come in the order of their scores."""
    require_triton()
    key = key if key.stride(-1) == 1 else key.contiguous()
    B, H, _, D = key.shape
    streamed = max(0, contests * CONTEST - protected)
    empty = key.new_empty
    stream, places = empty(B, H, streamed, dtype=torch.int32), empty(B, H, contests, protected, dtype=torch.int32)
    if contests:
        rows = key[:, :, sinks : sinks + contests * CONTEST].unflatten(2, (contests, CONTEST))
        sums = rows.sum(3, dtype=torch.float32).cumsum(2) + key[:, :, :sinks].sum(2, dtype=torch.float32)[:, :, None]
        count = torch.arange(1, contests + 1, device=key.device) * CONTEST + sinks
        mean = (sums / count[:, None]).contiguous()
        scores = empty(B, H, contests * CONTEST, dtype=torch.float32)
        _score_kernel[(contests * CONTEST // 64, B * H)](
            scores, key, mean, H, *key.stride()[:3], sinks,
            D=D, BD=max(16, next_power_of_two(D)), BN=64, CONTEST_ROWS=CONTEST,
        )  # fmt: skip
        _contest_kernel[(B * H,)](
            stream, places, scores, contests, protected, sinks, streamed,
            CONTEST_ROWS=CONTEST, N=next_power_of_two(protected + CONTEST), num_warps=4,
        )  # fmt: skip
    return stream, places
