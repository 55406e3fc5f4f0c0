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
# Kernel: one program per (bucket, sequence). The kernel matrix lives in tiles of BR rows; what earlier tiles
# decided enters through g(x) = sum_r sigma_r kappa(x_r, x), so that only the diagonal tile is walked.


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
def _halve_kernel(
    p_arena,
    p_sign,
    p_bias,
    p_tile,
    p_k,
    p_v,
    p_jobs,
    p_gain,
    p_seed,
    layer,
    scale,
    arena_rows,
    H,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    CENTRE: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BP: tl.constexpr,
):
    BR: tl.constexpr = 2 * BP
    i_job, i_seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_seq // H, i_seq % H
    source, target, rows = tl.load(p_jobs + i_job * 5), tl.load(p_jobs + i_job * 5 + 1), tl.load(p_jobs + i_job * 5 + 2)
    stage, bucket = tl.load(p_jobs + i_job * 5 + 3), tl.load(p_jobs + i_job * 5 + 4)
    seed, sequence = tl.load(p_seed), (i_b * 65536 + i_h).to(tl.int32)
    p_in = p_arena + i_seq * arena_rows + source
    p_out = p_arena + i_seq * arena_rows + target
    o_p, o_r = tl.arange(0, BP), tl.arange(0, BR)

    if UNIFORM:
        for pair in range(0, rows // 2, BP):
            m_p = pair + o_p < rows // 2
            b_u = draw_uniform(seed, layer, pair + o_p, bucket, stage, sequence)
            b_row = tl.load(p_in + 2 * (pair + o_p) + (b_u < 0.5).to(tl.int32), mask=m_p, other=0)
            tl.store(p_out + pair + o_p, b_row, mask=m_p)
        return

    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_sign += i_seq * arena_rows + target
    p_bias += i_seq * arena_rows + source
    p_tile += (i_seq * tl.num_programs(0) + i_job) * BP * BP
    gain = tl.load(p_gain + i_job)

    b_centre = tl.zeros([BD], tl.float32)
    b_v_max = tl.zeros([BR], tl.float32)
    for r in range(0, rows, BR):
        m_r = r + o_r < rows
        b_centre += tl.sum(_load_rows(p_k, p_in, r + o_r, m_r, stride_kn, D, BD).to(tl.float32), 0)
        b_v = _load_rows(p_v, p_in, r + o_r, m_r, stride_vn, DV, BDV).to(tl.float32)
        b_v_max = tl.maximum(b_v_max, tl.max(tl.abs(b_v), 1))
    b_centre = b_centre / rows if CENTRE else b_centre * 0.0
    half = 0.5 * tl.sum(b_centre * b_centre)
    v_max = tl.max(b_v_max)
    b_norm = tl.full([BR], float("-inf"), tl.float32)
    for r in range(0, rows, BR):
        m_r = r + o_r < rows
        b_k = _load_rows(p_k, p_in, r + o_r, m_r, stride_kn, D, BD).to(tl.float32)
        b_bias = tl.sum(b_k * b_centre[None, :], 1) - half
        b_norm = tl.maximum(b_norm, tl.where(m_r, tl.sum(b_k * b_k, 1) - 2.0 * b_bias, float("-inf")))
        tl.store(p_bias + r + o_r, b_bias, mask=m_r)
    shift = tl.max(b_norm) * scale
    tl.debug_barrier()

    alternating = (1 - 2 * (o_r % 2)).to(tl.float32)  # [BR] + for the first row of a pair, - for the second
    b_top = tl.zeros([BP], tl.float32)  # largest b of all earlier tiles
    for r in range(0, rows, BR):
        m_r = r + o_r < rows
        m_p = r // 2 + o_p < rows // 2
        b_k = _load_rows(p_k, p_in, r + o_r, m_r, stride_kn, D, BD)
        b_v = _load_rows(p_v, p_in, r + o_r, m_r, stride_vn, DV, BDV)
        b_bias = tl.load(p_bias + r + o_r, mask=m_r, other=0.0)
        b_g = tl.zeros([BR], tl.float32)
        for j in range(0, r, BR):
            b_k2 = _load_rows(p_k, p_in, j + o_r, o_r < BR, stride_kn, D, BD)
            b_v2 = _load_rows(p_v, p_in, j + o_r, o_r < BR, stride_vn, DV, BDV)
            b_bias2 = tl.load(p_bias + j + o_r)
            b_sigma = tl.load(p_sign + (j + o_r) // 2) * alternating
            b_kappa = _kappa(b_k2, b_v2, b_bias2, b_k, b_v, b_bias, scale, shift, v_max, PRECISION)
            b_g += tl.sum(b_kappa * b_sigma[:, None], 0)
        b_alpha = -tl.sum(tl.reshape(b_g * alternating, [BP, 2]), 1)  # [BP]

        b_kappa = _kappa(b_k, b_v, b_bias, b_k, b_v, b_bias, scale, shift, v_max, PRECISION)
        b_kappa = tl.where(m_r[:, None] & m_r[None, :], b_kappa * alternating[:, None] * alternating[None, :], 0.0)
        b_d = tl.sum(tl.sum(tl.reshape(b_kappa, [BP, 2, BP, 2]), 3), 1)  # [BP, BP]
        tl.store(p_tile + o_p[:, None] * BP + o_p[None, :], tl.where(o_p[:, None] < o_p[None, :], b_d, 0.0))
        b_b = tl.sqrt(tl.maximum(tl.sum(tl.where(o_p[:, None] == o_p[None, :], b_d, 0.0), 1), 0.0))
        b_product = b_b * tl.maximum(tl.associative_scan(b_b, 0, _max), b_top)
        b_top = tl.maximum(b_top, tl.max(b_b))
        b_u = draw_uniform(seed, layer, r // 2 + o_p, bucket, stage, sequence)
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
        b_row = tl.load(p_in + r + 2 * o_p + (b_sign < 0).to(tl.int32), mask=m_p, other=0)
        tl.store(p_out + r // 2 + o_p, b_row, mask=m_p)
        tl.debug_barrier()


# ---------------------------------------------------------------------------------------------------------------
# Launcher

_PAIRS = 32  # pairs walked per diagonal tile


@functools.lru_cache(maxsize=256)
def _job_table(launch: tuple, gain: Callable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    jobs, gains = [], []
    for job in launch:
        for i in range(job.buckets):
            jobs.append((job.source + i * job.rows, job.target + i * job.rows // 2, job.rows, job.stage, job.first + i))
            gains.append(gain(job.rows, job.delta))
    rows = max(job.rows for job in launch)
    return torch.tensor(jobs, dtype=torch.int32, device=device), torch.tensor(gains, device=device), rows


def halve(
    arena: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    launch: tuple,
    rule: HalvingRule,
    scale: float,
    seed: torch.Tensor,
    layer: int,
) -> None:
    """One launch of independent halvings (``schedule.Halving``) in place on ``arena`` int32 ``[B, H_kv, A]``.

    ``key`` ``[B, H_kv, L, D]`` and ``value`` ``[B, H_kv, L, Dv]`` are the tokens that the arena's entries
    index; ``seed`` is a 0-dim int64 tensor on their device. Draws the same numbers as the reference.
    """
    require_triton()
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    (B, H, _, D), Dv = key.shape, value.shape[-1]
    jobs, gains, rows = _job_table(launch, rule.gain, key.device)
    BD, BDV = (max(16, next_power_of_two(x)) for x in (D, Dv))
    # two tiles of keys and two of values are in shared memory at once
    most = _PAIRS if (BD + BDV) * key.element_size() <= 1024 else _PAIRS // 2
    pairs = max(8, min(most, next_power_of_two(rows // 2)))
    uniform = math.isinf(rule.gain(rows, launch[0].delta))
    scratch = functools.partial(torch.empty, dtype=torch.float32, device=key.device)
    sign = bias = tile = gains  # not touched by fair coins
    if not uniform:
        sign, bias, tile = scratch(arena.shape), scratch(arena.shape), scratch(B * H * len(jobs) * pairs * pairs)
    _halve_kernel[(len(jobs), B * H)](
        arena,
        sign,
        bias,
        tile,
        key,
        value,
        jobs,
        gains,
        seed,
        layer,
        scale * rule.flatten,
        arena.shape[2],
        H,
        *key.stride()[:3],
        *value.stride()[:3],
        CENTRE=rule.centre,
        UNIFORM=uniform,
        PRECISION="ieee" if key.dtype == torch.float32 else "tf32",
        D=D,
        DV=Dv,
        BD=BD,
        BDV=BDV,
        BP=pairs,
        num_warps=4,
    )
