"""Halving: of each pair of neighbouring rows keep one, so that the kept rows stand for all of them.

Rows ``x = (k, v)`` of one bucket are compared with the attention kernel of Thinformer and Express,
``kappa(x, x') = exp(scale * <k, k'>) * (<v, v'> + v_max**2)``, ``v_max = max |v|`` over the bucket
(*Low-Rank Thinning*, arXiv 2502.12063; *Express Language Modeling*, arXiv 2606.10944). With
``f_i = kappa(x_2i, .) - kappa(x_2i+1, .)`` and ``D[i, j] = <f_i, f_j>`` a walk over the pairs keeps

    alpha_i = - sum_{j<i} sign_j D[j, i],    sign_j = +1 if pair j kept its first row, -1 if its second,

and keeps the second row of pair i with probability ``clip((1 - alpha_i / a_i) / 2, 0, 1)`` where
``a_i = gain * sqrt(D[i, i]) * max_{j<=i} sqrt(D[j, j])``. A rule is little more than its ``gain``:

* ``kernel``: kernel halving KH(delta), ``gain = 1/2 + log(2 * rows / delta)``;
* ``balanced``: ``gain = 0``, the sign that shrinks ``|alpha_i|``, on centred keys and a flattened kernel;
* ``uniform``: ``gain = inf``, a fair coin per pair.

A pair with ``a_i = 0`` because its rows are alike, or with ``alpha_i = 0`` (the first one always), is a fair
coin. Every rule is odd in the signs drawn so far, hence keeps every row with probability exactly 1/2.

The centre of the keys, ``v_max`` and the shift inside ``exp`` come from the bucket alone: nothing looks ahead.
Error law: see ``express``. Supports any head sizes, float16, bfloat16, float32 (and float64 in the reference).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._triton import draw_uniform, jit, next_power_of_two, require_triton, tl
from .schedule import Halving


@dataclass(frozen=True)
class HalvingRule:
    """One halving rule.

    gain(rows, delta): the factor of the thresholds ``a_i`` for a bucket of ``rows`` rows and failure
        probability ``delta``; 0 is greedy, infinity a fair coin.
    centre: subtract the mean key of the bucket first (softmax does not see it, the kernel does).
    flatten: factor of the exponent inside the kernel; below 1 the rule sees farther neighbours.
    """

    name: str
    gain: Callable[[int, float], float]
    centre: bool = False
    flatten: float = 1.0

    def __post_init__(self) -> None:
        if not self.flatten > 0:
            raise ValueError(f"flatten={self.flatten!r}: must be above 0")


RULES: dict[str, HalvingRule] = {}


def register_rule(rule: HalvingRule) -> HalvingRule:
    """Make ``rule`` available as ``Policy(halving=rule.name)``. Raises ``ValueError`` if the name is taken."""
    if RULES.get(rule.name, rule) is not rule:
        raise ValueError(f"halving rule {rule.name!r} is registered already; choose another name")
    RULES[rule.name] = rule
    return rule


def get_rule(name: str) -> HalvingRule:
    """The registered rule; raises ``ValueError`` that lists the rules for an unknown name."""
    if name not in RULES:
        raise ValueError(f"halving={name!r}: allowed are {', '.join(RULES)}")
    return RULES[name]


register_rule(HalvingRule("kernel", lambda rows, delta: 0.5 + math.log(2.0 * rows / delta)))
register_rule(HalvingRule("balanced", lambda rows, delta: 0.0, centre=True, flatten=0.25))
register_rule(HalvingRule("uniform", lambda rows, delta: math.inf))


def halving_matrix(
    key: torch.Tensor, value: torch.Tensor, scale: float, centre: bool = False, flatten: float = 1.0
) -> torch.Tensor:
    """``D[..., i, j] = <f_i, f_j>`` up to one positive factor per bucket (the rules are scale-free).

    ``key`` ``[..., 2m, D]`` and ``value`` ``[..., 2m, Dv]`` give ``[..., m, m]``; computed in float32, in
    float64 for float64 inputs.
    """
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    k, v = key.to(dtype), value.to(dtype)
    if centre:
        k = k - k.mean(-2, keepdim=True)
    gram = (k @ k.mT) * (scale * flatten)
    shift = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]  # the largest entry is on the diagonal
    v_max = v.abs().amax((-2, -1), keepdim=True)
    kappa = torch.exp(gram - shift) * (v @ v.mT + v_max * v_max)
    rows = kappa[..., 0::2, :] - kappa[..., 1::2, :]
    return rows[..., 0::2] - rows[..., 1::2]


def keep_second_probability(alpha: torch.Tensor, product: torch.Tensor, gain: float) -> torch.Tensor:
    """Probability of keeping the second row, from ``alpha_i`` and ``product = b_i * max_{j<=i} b_j``."""
    ratio = torch.where(product > 0, alpha / (gain * product), torch.zeros_like(alpha))
    return torch.where(alpha == 0, 0.5, (0.5 - 0.5 * ratio).clamp(0.0, 1.0))


def walk(
    matrix: torch.Tensor, draws: torch.Tensor, gain: float, decisions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The walk over the pairs: ``matrix`` ``[..., m, m]``, ``draws`` ``[..., m]`` uniform in [0, 1).

    Returns ``(second, alpha, product)``, each ``[..., m]``: which pairs keep their second row, and what each
    decision was based on. With ``decisions`` the walk follows those instead, so that decisions made elsewhere
    can be judged one by one: ``second`` is then what this walk would have decided after the same past.
    """
    b = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    product = b * b.cummax(-1).values
    alpha = torch.zeros_like(b)
    second = torch.empty_like(b, dtype=torch.bool)
    for i in range(b.shape[-1]):
        keep = draws[..., i] < keep_second_probability(alpha[..., i], product[..., i], gain)
        second[..., i] = keep
        followed = keep if decisions is None else decisions[..., i]
        sign = 1.0 - 2.0 * followed.to(alpha.dtype)
        # alpha_i itself is final once pair i is decided: only later pairs still change
        alpha[..., i + 1 :] -= sign[..., None] * matrix[..., i, i + 1 :]
    return second, alpha, product


def halve_reference(
    key: torch.Tensor, value: torch.Tensor, draws: torch.Tensor, rule: HalvingRule, delta: float, scale: float
) -> torch.Tensor:
    """Which row of each pair is kept: ``[..., m]`` bool, True for the second one. The definition of correct.

    ``key`` ``[..., 2m, D]`` and ``value`` ``[..., 2m, Dv]`` are the rows of a bucket in order, ``draws``
    ``[..., m]`` are uniform numbers, ``delta`` is the failure probability of this halving.
    """
    gain = rule.gain(key.shape[-2], delta)
    if math.isinf(gain):
        return draws < 0.5
    return walk(halving_matrix(key, value, scale, rule.centre, rule.flatten), draws, gain)[0]


# ---------------------------------------------------------------------------------------------------------------
# Kernels. A bucket is walked in tiles of BR rows, one program per tile: what the tiles before it decided enters
# through g(x) = sum_r sigma_r kappa(x_r, x), so that only the tile on the diagonal is walked. Programs of one
# bucket run side by side; each computes its kernel values while it waits for the signs of the tile before.


@jit
def _max(a, b):
    return tl.maximum(a, b)


@jit
def _load_rows(p_x, p_index, o_r, m_r, stride, D: tl.constexpr, BD: tl.constexpr):
    i_row = tl.load(p_index + o_r, mask=m_r, other=0).to(tl.int64)  # [BR]
    o_d = tl.arange(0, BD)
    return tl.load(p_x + i_row[:, None] * stride + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@jit
def _kappa(b_k, b_v, b_bias, b_k2, b_v2, b_bias2, scale, shift, v_max, PRECISION: tl.constexpr):
    # centring is a rank-one correction of the scores, so that the product runs on the rows as they are
    b_s = tl.dot(b_k, tl.trans(b_k2), input_precision=PRECISION) - b_bias[:, None] - b_bias2[None, :]
    b_w = tl.dot(b_v, tl.trans(b_v2), input_precision=PRECISION) + v_max * v_max
    return tl.exp(b_s * scale - shift) * b_w  # [BR, BR]


@jit
def _coin_kernel(
    p_arena, p_jobs, p_seed, layer, arena_rows, H, BP: tl.constexpr,
):  # fmt: skip
    """A fair coin per pair: one program per (bucket, sequence)."""
    i_seq = tl.program_id(1).to(tl.int64)
    p_job = p_jobs + tl.program_id(0) * 5
    source, target, rows = tl.load(p_job), tl.load(p_job + 1), tl.load(p_job + 2)
    stage, bucket = tl.load(p_job + 3), tl.load(p_job + 4)
    seed, sequence = tl.load(p_seed), ((i_seq // H) * 65536 + i_seq % H).to(tl.int32)
    p_arena += i_seq * arena_rows
    for pair in range(0, rows // 2, BP):
        o_p = pair + tl.arange(0, BP)
        b_u = draw_uniform(seed, layer, o_p, bucket, stage, sequence)
        b_row = tl.load(p_arena + source + 2 * o_p + (b_u < 0.5).to(tl.int32), mask=o_p < rows // 2, other=0)
        tl.store(p_arena + target + o_p, b_row, mask=o_p < rows // 2)


@jit
def _statistics_kernel(
    p_arena, p_bias, p_statistics, p_k, p_v, p_jobs, scale, arena_rows, H,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    CENTRE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Centring term of every row, and the shift and v_max of the bucket: one program per (bucket, sequence)."""
    i_job, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source, rows = tl.load(p_jobs + i_job * 5), tl.load(p_jobs + i_job * 5 + 2)
    p_k += (i_seq // H) * stride_kb + (i_seq % H) * stride_kh
    p_v += (i_seq // H) * stride_vb + (i_seq % H) * stride_vh
    p_in = p_arena + i_seq * arena_rows + source
    o_r = tl.arange(0, BR)
    b_centre = tl.zeros([BD], tl.float32)
    b_v_max = tl.zeros([BR], tl.float32)
    for r in range(0, rows, BR):
        m_r = r + o_r < rows
        b_centre += tl.sum(_load_rows(p_k, p_in, r + o_r, m_r, stride_kn, D, BD).to(tl.float32), 0)
        b_v = _load_rows(p_v, p_in, r + o_r, m_r, stride_vn, DV, BDV).to(tl.float32)
        b_v_max = tl.maximum(b_v_max, tl.max(tl.abs(b_v), 1))
    b_centre = b_centre / rows if CENTRE else b_centre * 0.0
    half = 0.5 * tl.sum(b_centre * b_centre)
    b_norm = tl.full([BR], float("-inf"), tl.float32)
    for r in range(0, rows, BR):
        m_r = r + o_r < rows
        b_k = _load_rows(p_k, p_in, r + o_r, m_r, stride_kn, D, BD).to(tl.float32)
        b_bias = tl.sum(b_k * b_centre[None, :], 1) - half
        b_norm = tl.maximum(b_norm, tl.where(m_r, tl.sum(b_k * b_k, 1) - 2.0 * b_bias, float("-inf")))
        tl.store(p_bias + i_seq * arena_rows + source + r + o_r, b_bias, mask=m_r)
    p_statistics += (i_seq * tl.num_programs(0) + i_job) * 2
    tl.store(p_statistics, tl.max(b_norm) * scale)
    tl.store(p_statistics + 1, tl.max(b_v_max))


@jit
def _walk_kernel(
    p_arena, p_sign, p_bias, p_tile, p_top, p_statistics, p_done, p_ticket, p_k, p_v, p_jobs, p_gain, p_tiles, p_seed,
    layer, scale, arena_rows, jobs, sequences, H,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """One tile of pairs of one bucket of one sequence.

    Tiles are numbered in the order in which programs start (a ticket), first tiles of all buckets first: a
    program only ever waits for one that started before it, so that the wait always ends.
    """
    BR: tl.constexpr = 2 * BP
    ticket = tl.atomic_add(p_ticket, 1)
    i_tile, i_seq = ticket // sequences, (ticket % sequences).to(tl.int64)
    i_job, i_block = tl.load(p_tiles + i_tile * 2), tl.load(p_tiles + i_tile * 2 + 1)
    p_job = p_jobs + i_job * 5
    source, target, rows = tl.load(p_job), tl.load(p_job + 1), tl.load(p_job + 2)
    stage, bucket, gain = tl.load(p_job + 3), tl.load(p_job + 4), tl.load(p_gain + i_job)
    seed, sequence = tl.load(p_seed), ((i_seq // H) * 65536 + i_seq % H).to(tl.int32)
    p_k += (i_seq // H) * stride_kb + (i_seq % H) * stride_kh
    p_v += (i_seq // H) * stride_vb + (i_seq % H) * stride_vh
    p_in = p_arena + i_seq * arena_rows + source
    p_out = p_arena + i_seq * arena_rows + target
    p_sign += i_seq * arena_rows + target
    p_bias += i_seq * arena_rows + source
    p_top += i_seq * jobs + i_job
    p_done += i_seq * jobs + i_job
    p_tile += ticket.to(tl.int64) * BP * BP
    shift = tl.load(p_statistics + (i_seq * jobs + i_job) * 2)
    v_max = tl.load(p_statistics + (i_seq * jobs + i_job) * 2 + 1)

    o_p, o_r = tl.arange(0, BP), tl.arange(0, BR)
    r = i_block * BR
    m_r, m_p = r + o_r < rows, r // 2 + o_p < rows // 2
    alternating = (1 - 2 * (o_r % 2)).to(tl.float32)  # [BR] + for the first row of a pair, - for the second
    b_k = _load_rows(p_k, p_in, r + o_r, m_r, stride_kn, D, BD)
    b_v = _load_rows(p_v, p_in, r + o_r, m_r, stride_vn, DV, BDV)
    b_bias = tl.load(p_bias + r + o_r, mask=m_r, other=0.0)
    b_kappa = _kappa(b_k, b_v, b_bias, b_k, b_v, b_bias, scale, shift, v_max, PRECISION)
    b_kappa = tl.where(m_r[:, None] & m_r[None, :], b_kappa * alternating[:, None] * alternating[None, :], 0.0)
    b_d = tl.sum(tl.sum(tl.reshape(b_kappa, [BP, 2, BP, 2]), 3), 1)  # [BP, BP]
    tl.store(p_tile + o_p[:, None] * BP + o_p[None, :], tl.where(o_p[:, None] < o_p[None, :], b_d, 0.0))
    b_b = tl.sqrt(tl.maximum(tl.sum(tl.where(o_p[:, None] == o_p[None, :], b_d, 0.0), 1), 0.0))
    b_largest = tl.associative_scan(b_b, 0, _max)
    b_u = draw_uniform(seed, layer, r // 2 + o_p, bucket, stage, sequence)

    b_g = tl.zeros([BR], tl.float32)
    done = 0
    for j in range(0, i_block):
        o_j = j * BR + o_r
        b_k2 = _load_rows(p_k, p_in, o_j, o_r < BR, stride_kn, D, BD)
        b_v2 = _load_rows(p_v, p_in, o_j, o_r < BR, stride_vn, DV, BDV)
        b_kappa = _kappa(b_k2, b_v2, tl.load(p_bias + o_j), b_k, b_v, b_bias, scale, shift, v_max, PRECISION)
        while done <= j:
            done = tl.atomic_add(p_done, 0, sem="acquire")
        # past L1, which may hold what was there before the other program wrote
        b_sigma = tl.load(p_sign + o_j // 2, cache_modifier=".cg") * alternating
        b_g += tl.sum(b_kappa * b_sigma[:, None], 0)
    b_alpha = -tl.sum(tl.reshape(b_g * alternating, [BP, 2]), 1)  # [BP]
    top = 0.0
    if i_block > 0:
        top = tl.load(p_top, cache_modifier=".cg")  # largest b of all earlier tiles
    b_product = b_b * tl.maximum(b_largest, top)
    # u < 1/2 (1 - alpha / a) as a threshold on alpha; a tie (alpha = 0) and a_i = 0 become fair coins
    b_threshold = (1.0 - 2.0 * b_u) * tl.maximum(gain * b_product, 1e-37)
    b_threshold = tl.where(b_product > 0, b_threshold, tl.where(b_u < 0.5, float("inf"), float("-inf")))
    tl.debug_barrier()
    for i in tl.static_range(BP):
        b_row = tl.load(p_tile + i * BP + o_p)  # row i of D, zero up to column i
        b_now = tl.where(b_alpha < b_threshold, -1.0, 1.0)
        b_alpha -= tl.gather(b_now, tl.full([BP], i, tl.int32), 0) * b_row
    b_sign = tl.where(b_alpha < b_threshold, -1.0, 1.0)
    tl.store(p_sign + r // 2 + o_p, b_sign, mask=m_p)
    tl.store(p_top, tl.maximum(top, tl.max(b_b)))
    tl.debug_barrier()
    tl.atomic_add(p_done, 1, sem="release")
    b_row = tl.load(p_in + r + 2 * o_p + (b_sign < 0).to(tl.int32), mask=m_p, other=0)
    tl.store(p_out + r // 2 + o_p, b_row, mask=m_p)


# ---------------------------------------------------------------------------------------------------------------
# Launcher

_PAIRS = 32  # pairs walked per tile


@functools.lru_cache(maxsize=1024)
def _job_table(launch: tuple, gain: Callable, pairs: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Buckets (source, target, rows, stage, bucket) and their gains, and tiles (job, place in its bucket)."""
    jobs, gains, tiles = [], [], []
    for job in launch:
        for i in range(job.buckets):
            tiles += [(block, len(jobs)) for block in range(-(-job.rows // (2 * pairs)))]
            jobs.append((job.source + i * job.rows, job.target + i * job.rows // 2, job.rows, job.stage, job.first + i))
            gains.append(gain(job.rows, job.delta))
    order = [(job, block) for block, job in sorted(tiles)]
    tensors = (torch.tensor(table, dtype=torch.int32, device=device) for table in (jobs, order))
    return *tensors, torch.tensor(gains, dtype=torch.float32, device=device)


def halve(
    arena: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    launches: tuple[tuple[Halving, ...], ...],
    rule: HalvingRule,
    scale: float,
    seed: torch.Tensor,
    layer: int,
) -> None:
    """Halvings in place on ``arena`` int32 ``[B, H_kv, A]``, launch after launch.

    ``key`` ``[B, H_kv, L, D]`` and ``value`` ``[B, H_kv, L, Dv]`` are the tokens that the arena's entries
    index; ``seed`` is a 0-dim int64 tensor on their device. Draws the same numbers as the reference.
    """
    require_triton()
    if not launches:
        return
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    (B, H, _, D), Dv, device = key.shape, value.shape[-1], key.device
    BD, BDV = (max(16, next_power_of_two(x)) for x in (D, Dv))
    # two tiles of keys and two of values are in shared memory at once
    most = _PAIRS if (BD + BDV) * key.element_size() <= 1024 else _PAIRS // 2
    rows = [max(job.rows for job in launch) for launch in launches]
    pairs = [max(8, min(most, next_power_of_two(r // 2))) for r in rows]
    tables = [_job_table(launch, rule.gain, p, device) for launch, p in zip(launches, pairs, strict=True)]
    sequences, arena_rows = B * H, arena.shape[2]
    if math.isinf(rule.gain(rows[0], launches[0][0].delta)):
        for (jobs, _, _), p in zip(tables, pairs, strict=True):
            _coin_kernel[(len(jobs), sequences)](arena, jobs, seed, layer, arena_rows, H, BP=p, num_warps=1)
        return
    scratch = functools.partial(torch.empty, dtype=torch.float32, device=device)
    most_jobs = max(len(jobs) for jobs, _, _ in tables) * sequences
    sign, bias, statistics, top = scratch(arena.shape), scratch(arena.shape), scratch(2 * most_jobs), scratch(most_jobs)
    tile = scratch(max(len(tiles) * p * p for (_, tiles, _), p in zip(tables, pairs, strict=True)) * sequences)
    # per launch, the ticket and how many tiles of each bucket are done; whole 16 bytes, or Triton compiles anew
    sections = [4 + (len(jobs) * sequences + 3) // 4 * 4 for jobs, _, _ in tables]
    counters = torch.zeros(sum(sections), dtype=torch.int32, device=device).split(sections)
    strides = (*key.stride()[:3], *value.stride()[:3])
    sizes = dict(D=D, DV=Dv, BD=BD, BDV=BDV)
    flat = scale * rule.flatten
    for (jobs, tiles, gains), counter, p, r in zip(tables, counters, pairs, rows, strict=True):
        _statistics_kernel[(len(jobs), sequences)](
            arena, bias, statistics, key, value, jobs, flat, arena_rows, H, *strides,
            CENTRE=rule.centre, **sizes, BR=min(64, next_power_of_two(r)), num_warps=4,
        )  # fmt: skip
        _walk_kernel[(len(tiles) * sequences,)](
            arena, sign, bias, tile, top, statistics, counter[4:], counter, key, value, jobs, gains, tiles, seed,
            layer, flat, arena_rows, len(jobs), sequences, H, *strides,
            PRECISION="ieee" if key.dtype == torch.float32 else "tf32", **sizes, BP=p, num_warps=4,
        )  # fmt: skip
