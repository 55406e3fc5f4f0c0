"""SANTA: decoding that reads all keys but only a random sample of the value rows, without bias.

    out_i = sum_j c_ij v_j / S,    E[c_ij] = S p_ij,    p_i = softmax(scale <q_i, k_.> + mask)

A soft-cap makes a score s ``cap tanh(s / cap)`` before the mask. A sink, a learned logit per query head, is one more
key with a value of zero: ``p_ij = exp(s_ij) / (sum_k exp(s_ik) + exp(sink))`` add up to less than 1.

Paper: *SANTA*, arXiv 2605.01910. ``c_ij`` counts the thresholds that fall on row j when the rows are laid end to end,
row j taking ``x_j = S p_ij``: with the prefix ``X_j = x_1 + .. + x_j``, ``N(x) = floor(x) + [frac(x) > U_floor(x)]``
and ``c_j = N(X_j) - N(X_{j-1})``. Stratum m holds one threshold, ``m + U_m``:

* ``sys``: one U for all strata; ``strat``: one per stratum; ``sys-r``: a new one every r strata, e.g. ``sys-16``;
* ``iid``: S independent thresholds anywhere, the baseline without strata.

``shared``: all query heads and queries of a KV head share their rows (a Horvitz-Thompson estimator). Row j advances
the comb by ``x_j = mean_i S p_ij`` and weighs ``c_j p_ij / x_j``; where ``x_j >= 1`` it is always read and weighs
``p_ij``. Heads that are alike read a row with probability ``min(1, S p_j)``. (The root of the mean square in place of
the mean has a little less variance, but its sum over a tile does not follow from the sums of the heads, which is all
that a kernel has before it draws.)

Error law: ``E|out - exact|^2`` is ``tr(Sigma) / S`` for ``iid`` (``Sigma`` the covariance of a value row under p),
never more for ``strat``, and between ``1 / S`` and ``1 / S^1.3`` for all combs in practice. ``sys`` has a worst case,
values of period n / S under flat attention: S times ``iid``; ``sys-r`` caps it at r times. :func:`variance` is exact.

Fixed point: expected counts are integers in units of ``2**-F``, prefixes are integer sums, and U is uniform on the
same grid. Sums of integers do not depend on their order, so counts telescope and are the same bits for any tiling of
the same integers; ``E[c_j]`` is ``x_j`` *exactly*. F leaves room for all prefixes in int32. Without ``shared``, ``x_j``
is rounded to nearest, the last visible row takes what is missing to ``S 2**F``, and the sampled probabilities are
these integers divided by ``S 2**F``, within ``2**-(F+1) / S`` of the softmax. With ``shared``, ``x_j`` is rounded to
nearest, but not to 0 (every visible row can be drawn), and the weight divides by the rounded one: unbiased for the
softmax itself.

Random numbers: Philox with the key (seed, layer) and a counter of stratum, head and *step*, the number of real keys up
to the query's own, also those before its window: what a sequence draws depends on nothing beside it in the batch. So a
constant seed draws anew at every decoding step, also in a CUDA graph over a static cache, where the number of keys is
counted in ``padding`` or given in ``lengths``. Where it stays the same from call to call (cross attention, a cache that
evicts), the caller advances ``seed`` itself.

Supports 1 to 16 queries, causal and aligned bottom-right (a single query may also have no mask), grouped queries,
Dv != D, key padding, per-sequence lengths, windows (of places in the cache, padded ones too), a soft-cap, sinks; a
query that sees no key gives 0. Keys and values before a window are not read. At most as many real keys in reach as
draws: exact. On CUDA exact too, at run time, where that was measured to be as fast for the batch as it is
(:func:`loses`), unless ``min_length`` is given.
``budget`` is S, draws per query head, a float a fraction of the real keys in reach, a table rows by their number; the
option ``draws`` sets it per head and per layer. A head reads at most S distinct rows; shared, about S serve all heads
of a KV head that are alike. Refuses prefill, biases, dropout, and gradients when they are asked for; on CUDA
``shared=False``, which is there to be compared with.
``bernoulli`` (Section 4 of the paper; :mod:`.bernoulli`) also rounds the query at random, to so many levels: unbiased
scores, but a *biased* softmax. It saves reading only where keys lie feature by feature; on CUDA others are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import sympy
import torch

from express_compile.core import cost as c
from express_compile.core.call import Call
from express_compile.core.method import Method, Refusal, register
from express_compile.core.options import BUDGET, Kind, Options, option, rows_at
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Site, feature_major, known_equal

from .attend.bernoulli import check_levels, own_numbers, round_query
from .attend.sampled import CHUNK, DRAW_PROGRAMS, MAX_ROWS, grid_bits, santa_triton, strata_per_offset
from .exact import cudnn_takes, exact_attention
from .launch import philox_uniform
from .op import attention_fake, define_op, no_kernel, of_any_size
from .padding import Places

MAX_QUERIES = 16
_NEEDS_FEATURES = (
    "needs keys that lie feature by feature on CUDA, as a view of [B, H_kv, D, n]; others are read in full, and "
    "rounding the query would save nothing"
)
MAX_DRAWS = 1 << 16
MIN_KEY_BYTES = 32 << 20  # on CUDA, for 8 query rows per KV head at most: see loses()
_THRESHOLDS, _LOW_BITS = 1 << 30, (1 << 30) + 1  # bucket words of the random counter

# ---------------------------------------------------------------------------------------------------------------
# Sampling on the grid


def fraction_bits(draws: torch.Tensor) -> torch.Tensor:
    """F: bits behind the point of an expected count, so that prefixes up to ``draws`` fit an int32; int64."""
    return torch.tensor([grid_bits(S) for S in draws.flatten().tolist()], device=draws.device).view(draws.shape)


@dataclass(frozen=True)
class Comb:
    """The rows of a KV head laid end to end. The groups ``[g, Lq]`` are ``[1, 1]`` where rows are shared.

    prefix: ``X_j`` in units of ``2**-bits``, int64 ``[B, H_kv, g, Lq, n]``.
    weight: what one hit of row j counts, float64 ``[B, H_kv, g, Lq, n]`` (never ``[1, 1]``).
    always: rows that are read once whatever is drawn, bool like ``prefix``.
    draws: S of every query head, int64 ``[B, H_kv, g, 1]``, B also 1.
    bits: F of every comb, int64 like ``draws``.
    strata: upper bound of the strata that the prefixes reach.
    """

    prefix: torch.Tensor
    weight: torch.Tensor
    always: torch.Tensor
    draws: torch.Tensor
    bits: torch.Tensor
    strata: int

    @property
    def expected(self) -> torch.Tensor:
        """``x_j``, the expected draws of every row: float64 like ``prefix``."""
        x = self.prefix.double()
        return x.diff(dim=-1, prepend=torch.zeros_like(x[..., :1])) / 2.0 ** self.bits[..., None]


def make_comb(p: torch.Tensor, draws: torch.Tensor, shared: bool) -> Comb:
    """The comb of the probabilities ``p``, float64 ``[B, H_kv, g, Lq, n]``; ``draws`` int64 ``[H]`` or ``[B, H]``."""
    H_kv, g, Lq, n = p.shape[1:]
    S = draws.view(-1, H_kv, g, 1)
    if shared:
        most = S.amax(2, keepdim=True)
        bits = fraction_bits(most)
        one = (1 << bits)[..., None]
        x = (S[..., None] * p).mean((2, 3), keepdim=True) * one
        x = torch.maximum((x + 0.5).floor(), x > 0).long()
        always = x >= one
        weight = torch.where(always, p, torch.where(x > 0, p * one / x, 0.0))
        strata = int(most.max()) + (n >> int(bits.min())) + 1
        return Comb(x.cumsum(-1), weight, always, S, bits, strata)
    bits = fraction_bits(S)
    total = (S << bits)[..., None]
    prefix = torch.minimum((p * total).round().long().cumsum(-1), total)
    place = torch.arange(n, device=p.device)
    last = torch.where(p > 0, place, -1).amax(-1, keepdim=True)
    prefix = torch.where((place >= last) & (last >= 0), total, prefix)
    weight = (1 / S.double())[..., None].expand(p.shape)
    return Comb(prefix, weight, torch.zeros_like(prefix, dtype=torch.bool), S, bits, int(S.max()))


def draw_thresholds(
    comb: Comb, sampler: str, seed: torch.Tensor, layer: int, step: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    """Offsets U of the strata, int64 ``[B, H_kv, g, Lq, m]`` in units of ``2**-comb.bits``; for ``"iid"`` the sorted
    thresholds themselves.

    ``step`` int64 ``[B, Lq]``; ``head`` int64 ``[H_kv, g]``; ``Lq`` and ``g`` are 1 for shared rows.
    """
    per = strata_per_offset(sampler)

    def draw(count: int, bucket: int) -> torch.Tensor:
        place = torch.arange(count, device=step.device)
        u = philox_uniform(seed, layer, place, bucket, step[:, None, None, :, None], head[..., None, None])
        return (u * 2.0**24).long()

    if sampler != "iid":
        return draw(comb.strata // per + 1 if per else 1, _THRESHOLDS) >> (24 - comb.bits[..., None])
    count = int(comb.draws.max())
    fine = (draw(count, _THRESHOLDS) << 23) | (draw(count, _LOW_BITS) >> 1)  # 47 bits; times S they fit an int64
    thresholds = (fine * comb.draws[..., None]) >> (47 - comb.bits[..., None])
    unused = torch.arange(count, device=step.device) >= comb.draws[..., None]
    return thresholds.masked_fill(unused, torch.iinfo(torch.int64).max).sort(-1).values


def hits(comb: Comb, sampler: str, thresholds: torch.Tensor) -> torch.Tensor:
    """How often every row is drawn: int64, shaped like ``comb.prefix``."""
    X, bits, per = comb.prefix, comb.bits[..., None], strata_per_offset(sampler)
    if sampler == "iid":
        below = torch.searchsorted(thresholds.contiguous(), X.contiguous())
    else:
        stratum = X >> bits
        index = stratum // per if per else torch.zeros_like(stratum)
        below = stratum + (X - (stratum << bits) > thresholds.expand(*X.shape[:-1], -1).gather(-1, index))
    return torch.where(comb.always, 1, below.diff(dim=-1, prepend=torch.zeros_like(below[..., :1])))


# ---------------------------------------------------------------------------------------------------------------
# Reference


def visible_keys(
    B: int,
    Lq: int,
    Lk: int,
    padding: torch.Tensor | None,
    lengths: torch.Tensor | None,
    device: torch.device,
    window: int = 0,
) -> torch.Tensor:
    """Which keys every query sees, bool ``[B, Lq, Lk]``: those up to its own, of which query ``Lq - 1`` is key
    ``Lk - 1``, or ``lengths[b] - 1``; without the padded ones; of the rest those at the last ``window`` places, all for
    0."""
    place, query = torch.arange(Lk, device=device), torch.arange(Lq, device=device)
    end = torch.full((B,), Lk, device=device) if lengths is None else lengths
    end = end[:, None, None] - Lq + 1 + query[:, None]
    visible = place < end
    if window:
        visible &= place >= end - window
    return visible if padding is None else visible & padding[:, None]


def probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``p`` float64 ``[B, H_kv, g, Lq, Lk]``, 0 where not ``visible``, and ``lse`` ``[B, H, Lq]``, the logarithm of the
    softmax's denominator, in float32 (float64 for float64 inputs). Keys that nobody sees may hold anything, NaN too.

    With ``sinks`` ``[H]``, logits in any float dtype, ``p`` is ``[.., Lk + 1]``: the probability of the sink is the
    last, and ``lse`` counts it. ``softcap`` 0 leaves scores as they are.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    k = key.to(dtype).masked_fill(~visible.any(1)[:, None, :, None], 0)
    H_kv, Lq = key.shape[1], query.shape[2]
    rows = query.unflatten(1, (H_kv, -1)).flatten(2, 3).to(dtype) * scale
    scores = (rows @ k.mT).unflatten(2, (-1, Lq))
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    if sinks is not None:
        column = sinks.to(dtype).view(1, H_kv, -1, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, column], -1)
    lse = scores.logsumexp(-1)
    unseeing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.double().softmax(-1).masked_fill(unseeing, 0.0), lse.flatten(1, 2)


def sample_weights(
    p: torch.Tensor,
    draws: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    layer: int,
    sampler: str,
    shared: bool,
) -> torch.Tensor:
    """The weights of the value rows, float64 ``[B, H_kv, g, Lq, n]`` like ``p``; of expectation ``p``, mostly 0.

    ``draws`` int64 ``[H]`` or ``[B, H]``; ``step`` int64 ``[B, Lq]``.
    """
    H_kv, g = p.shape[1:3]
    broken = p.isnan().any(-1, keepdim=True)  # draws nothing, and stays what it is
    comb = make_comb(p.masked_fill(broken, 0.0), draws, shared)
    step, g = (step[:, -1:], 1) if shared else (step, g)
    head = own_numbers(torch.arange(H_kv * g, device=p.device), g, seed).view(H_kv, g)
    thresholds = draw_thresholds(comb, sampler, seed, layer, step, head)
    return (hits(comb, sampler, thresholds) * comb.weight).masked_fill(broken, math.nan)


def santa_reference(call: Call, draws: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """SANTA in plain PyTorch on any device: the definition of correct.

    ``draws`` int64 ``[H]`` or ``[B, H]``, S of every query head, 0 in all heads of a sequence that is to be exact, or
    None for exact attention. Of the options of ``call`` count ``sampler`` ("sys") and ``shared`` (True), ``bernoulli``
    levels of the query's random rounding (0 for none), ``window`` places, its own and those before, at which a query
    sees keys (0 for all), and ``softcap`` of the scores (0 for none). Returns ``out`` ``[B, H, Lq, Dv]`` and ``lse``
    ``[B, H, Lq]`` in float32 (or float64): the logarithm of the softmax's denominator, so of all visible keys, read or
    not, and of the sink. Sequences are computed from the keys that their queries see, those with equally many together,
    so that nothing but these can matter.
    """
    query, options, (B, H, Lq, _) = call.query, call.options, call.query.shape
    places = B, Lq, call.Lk, call.padding, call.lengths, query.device
    visible, step = visible_keys(*places, options.get("window", 0)), visible_keys(*places).sum(-1)
    seen = visible.any(1)
    seen[:, 0] |= ~seen.any(1)  # of a sequence that sees nothing a key that it does not see
    drawn = torch.zeros(H, dtype=torch.int64) if draws is None else draws
    drawn = drawn.to(query.device).expand(B, H)
    sizes = torch.stack([seen.sum(1), drawn[:, 0].sign()], 1)
    out = query.new_empty(B, H, Lq, call.value.shape[-1])
    lse = query.new_empty(B, H, Lq, dtype=torch.promote_types(query.dtype, torch.float32))
    sampler, shared = options.get("sampler", "sys"), options.get("shared", True)
    for n, samples in sizes.unique(dim=0).tolist():
        batch = (sizes == torch.tensor([n, samples], device=sizes.device)).all(1).nonzero()[:, 0]
        rows = Places(batch, seen[batch].nonzero()[:, 1].view(-1, n))
        q, k, v, mask = query[batch], rows.take(call.key), rows.take(call.value), rows.take(visible[..., None])[..., 0]
        if options.get("bernoulli", 0) and (samples or draws is None):
            group = H // call.key.shape[1]
            q = round_query(q, options["bernoulli"], call.seed, call.layer, step[batch], group)
        weights, lse[batch] = probabilities(q, k, mask, call.scale, options.get("softcap", 0.0), call.sinks)
        if samples:
            weights = sample_weights(weights, drawn[batch], step[batch], call.seed, call.layer, sampler, shared)
        v = v.to(lse.dtype).masked_fill(~mask.any(1)[:, None, :, None], 0)
        weights = weights[..., :n].flatten(2, 3).to(v.dtype)
        out[batch] = (weights @ v).unflatten(2, (-1, Lq)).flatten(1, 2).to(out.dtype)
    return out, lse


# ---------------------------------------------------------------------------------------------------------------
# What to expect: exact, without drawing


def variance(p: torch.Tensor, value: torch.Tensor, draws: torch.Tensor, sampler: str, shared: bool) -> torch.Tensor:
    """``E|out - E out|^2`` for every query, float64 ``[B, H, Lq]``; no randomness, all offsets are integrated over.

    ``p`` as :func:`probabilities` gives it, ``value`` ``[B, H_kv, n, Dv]`` (with sinks, a row of zeros at its end),
    ``draws`` int64 ``[H]``. Takes memory for ``B H Lq n Dv`` float64 numbers.
    """
    v, comb = value.double()[:, :, None, None], make_comb(p, draws, shared)
    if sampler == "iid":
        q = comb.expected / comb.draws[..., None]
        spread = (q[..., None] * (v - q[..., None, :] @ v).square()).sum((-1, -2))
        return (spread / comb.draws).flatten(1, 2)
    rows = torch.where(comb.always, 0.0, comb.weight)[..., None] * v
    prefix = (comb.prefix << (24 - comb.bits[..., None])).expand(rows.shape[:-1])
    return _comb_variance(prefix, rows, strata_per_offset(sampler)).flatten(1, 2)


def _comb_variance(X: torch.Tensor, rows: torch.Tensor, per: int) -> torch.Tensor:
    """Variance of the sum of ``rows`` ``[..., n, d]`` that the thresholds hit; ``X`` ``[..., n]`` in units of
    ``2**-24``, ``[...]`` out.

    The rows under the thresholds of one offset change only where U passes ``frac(X_j)``: row j makes room for the
    next. So walk over these places in order and integrate over the pieces between them.
    """
    one, d = 1 << 24, rows.shape[-1]
    strata = max(1, -(-int(X.max()) // one))
    per = per or strata
    blocks = -(-strata // per)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))  # behind the last row: nothing
    start = (torch.arange(strata, device=X.device) * one).expand(*X.shape[:-1], strata).contiguous()
    first = torch.searchsorted(X.contiguous(), start, right=True)
    held = rows.gather(-2, first[..., None].expand(*first.shape, d))
    held = torch.nn.functional.pad(held, (0, 0, 0, blocks * per - strata)).unflatten(-2, (blocks, per)).sum(-2)

    change = rows.diff(dim=-2).masked_fill((X % one == 0)[..., None], 0)
    change = torch.cat([torch.zeros_like(held), change], -2)
    begins = (torch.arange(blocks, device=X.device) * one).expand(*X.shape[:-1], blocks).contiguous()
    place = torch.cat([begins, X // one // per * one + X % one], -1)
    place, order = place.sort(dim=-1, stable=True)
    change = change.gather(-2, order[..., None].expand(change.shape)).cumsum(-2)
    block = (place // one).clamp(max=blocks - 1)
    length = place.diff(dim=-1, append=torch.full_like(place[..., :1], blocks * one)).double() / one
    first = torch.searchsorted(place, begins)
    held = held - change.gather(-2, first[..., None].expand(*first.shape, d))
    block = block[..., None].expand(change.shape)
    state = change + held.gather(-2, block)
    mean = torch.zeros_like(held).scatter_add(-2, block, state * length[..., None])
    return ((state - mean.gather(-2, block)).square().sum(-1) * length).sum(-1)


def read_probability(p: torch.Tensor, draws: torch.Tensor, sampler: str, shared: bool) -> torch.Tensor:
    """The probability that a row is read, float64 ``[B, H_kv, g, Lq, n]``, or ``[B, H_kv, 1, 1, n]`` if ``shared``; its
    sum over n is the expected number of distinct rows. Arguments as for :func:`variance`."""
    comb = make_comb(p, draws, shared)
    x, per = comb.expected, strata_per_offset(sampler) or comb.strata + 1
    if sampler == "iid":
        return 1 - (1 - x / comb.draws[..., None]) ** comb.draws[..., None]
    end = comb.prefix.double() / 2.0 ** comb.bits[..., None]
    low, high = (end - x).floor(), end.ceil() - 1  # the first and the last stratum of every row
    head, tail = low + 1 - (end - x), end - high  # and how much of them it fills
    apart = torch.where(low // per == high // per, (head + tail).clamp(max=1), 1 - (1 - head) * (1 - tail))
    read = torch.where(low == high, x, torch.where(high - low > 1, 1.0, apart))
    return torch.where(comb.always, 1.0, torch.where(x == 0, 0.0, read))


# ---------------------------------------------------------------------------------------------------------------
# Op


def _resolve(draws: list[int], fraction: float, table: Sequence[int], Lk: int) -> list[int]:
    """S of every head for ``Lk`` keys; 0 stands for an entry of the table, or the fraction of the keys."""
    varying = rows_at(table, Lk) if table else max(1, round(fraction * Lk))
    chosen = [S or varying for S in draws]
    if not 1 <= min(chosen) <= max(chosen) <= MAX_DRAWS:
        raise ValueError(f"draws={chosen}: must be integers from 1 to {MAX_DRAWS}")
    return chosen


def in_reach(Lq: Any, Lk: Any, window: int) -> Any:
    """How many keys some query sees, at most; ``window`` 0 is none. Sizes are integers or symbols of ``cost.py``."""
    smaller = sympy.Min if isinstance(Lk, sympy.Expr) else min
    return smaller(Lk, window + Lq - 1) if window else Lk


def _check_forms(H: int, device: torch.device, sinks: torch.Tensor | None, window: int, softcap: float) -> None:
    if sinks is not None and (sinks.shape != (H,) or not sinks.is_floating_point() or sinks.device != device):
        raise ValueError(
            f"sinks: {sinks.dtype} of shape {tuple(sinks.shape)} on {sinks.device}; must be floats of shape {(H,)} on "
            f"{device}, a logit per query head"
        )
    if window < 0:
        raise ValueError(f"window={window}: must be a number of keys, or 0 for all")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap={softcap}: must be above 0, or 0 for none")


def _body(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, Lq, _ = call.query.shape
    if Lq > MAX_QUERIES:
        raise ValueError(f"query: {Lq} rows; must be 1 to {MAX_QUERIES}, the queries of a decoding step")
    lengths, window, softcap = call.lengths, call.options.get("window", 0), call.options.get("softcap", 0.0)
    if lengths is not None and (lengths.shape != (B,) or lengths.dtype != torch.int64):
        raise ValueError(f"lengths: {lengths.dtype} of shape {tuple(lengths.shape)}; must be torch.int64 {(B,)}")
    _check_forms(H, call.query.device, call.sinks, window, softcap)
    if call.options.get("layers"):
        raise ValueError(f"layers={call.options['layers']}: must be [], as draws are those of the call's own layer")
    site = list(call.options["draws"])
    if len(site) not in (1, H):
        raise ValueError(f"draws: {len(site)} numbers; must be 1 or {H} (heads)")
    site *= H // len(site)
    _check_sampler(call.options["sampler"], call.options["shared"])
    check_levels(call.options.get("bernoulli", 0))
    return (_on_cuda if call.query.is_cuda else _on_cpu)(call, site)


def _on_cuda(call: Call, site: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, options = call.query, call.key, call.value, call.options
    (B, H, Lq, D), H_kv, levels = query.shape, key.shape[1], options.get("bernoulli", 0)
    if not options["shared"]:
        raise ValueError("shared=False: must be True on CUDA; the kernels draw rows for all heads of a KV head")
    if levels and not feature_major(key):
        raise ValueError(f"bernoulli={levels}: {_NEEDS_FEATURES}")
    seen = in_reach(Lq, call.Lk, options.get("window", 0))
    S = _resolve(site, options["fraction"], options.get("table", ()), seen)
    alike = call.padding is None and call.lengths is None  # otherwise every sequence has its own number of keys
    whole = seen < options["min_length"] or (seen <= min(S) and (alike or all(site)))
    if options["min_length"] < 0:
        key_bytes = key.numel() // call.Lk * seen * key.element_size()
        whole = whole or loses(B, H, H_kv, Lq, seen, key_bytes, max(S)) is not None
    plain = Lq == 1 and alike and call.sinks is None and not options.get("softcap", 0.0)
    plain = plain and D == value.shape[-1] and not feature_major(key)
    if whole and plain and cudnn_takes(query.device, query.dtype, D):
        return exact_attention(query, key[:, :, -seen:], value[:, :, -seen:], call.scale, causal=False)
    if whole:
        call = replace(call, options={**options, "bernoulli": 0})
    site = S if alike else site
    return santa_triton(call, None if whole else site, 0 if alike else max(options["min_length"], min(site) + 1))


def _on_cpu(call: Call, site: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    (B, H, Lq, _), options, window = call.query.shape, call.options, call.options.get("window", 0)
    table, least = options.get("table", ()), options["min_length"]
    _resolve(site, options["fraction"], table, in_reach(Lq, call.Lk, window))  # raises for bad draws
    visible = visible_keys(B, Lq, call.Lk, call.padding, call.lengths, call.query.device)
    chosen = []
    for n in (in_reach(Lq, n, window) for n in visible[:, -1].sum(-1).tolist()):
        S = _resolve(site, options["fraction"], table, n)
        chosen.append([0] * H if n < least or n <= min(S) else S)
    return santa_reference(call, torch.tensor(chosen, dtype=torch.int64).view(B, H))


def loses(B: int, H: int, H_kv: int, Lq: int, Lk: int, key_bytes: int, S: int) -> str | None:
    """Why exact attention was measured to be faster than ``S`` draws per head, on one H200; ``None`` where it is not.

    ``key_bytes`` are those of all keys. SANTA reads fewer bytes at any length, but launches twice; and what it keeps of
    the scores, of every query its own, is read and written again.
    """
    rows = H // H_kv * Lq
    if 4 * S > Lk:
        return f"{S} draws from {Lk} keys would read more than a quarter of them"
    needed = MIN_KEY_BYTES * max(1.0, rows / 8) * (2 if 16 * S > Lk else 1)
    if key_bytes < needed:
        return (
            f"{B} x {Lk} keys are {key_bytes / 2**20:.1f} MiB; below {needed / 2**20:.0f} MiB exact attention was "
            "measured to be as fast (min_length=0 samples all the same)"
        )
    return None


def _no_gradient(ctx, *grads):
    names = [f.name for f, needed in zip(fields(Call), ctx.needs_input_grad, strict=False) if needed]
    raise RuntimeError(
        f"santa: {', '.join(names)} needs a gradient, and sampled decoding has none; decode under torch.no_grad(), or "
        "leave 'santa' out of methods"
    )


def _check_sampler(sampler: Any, shared: Any) -> None:
    strata_per_offset(sampler)
    if not isinstance(shared, bool):
        raise ValueError(f"shared={shared!r}: must be True or False")
    if shared and sampler == "iid":
        raise ValueError("sampler='iid': needs shared=False; shared rows are drawn with 'sys', 'strat' or 'sys-<r>'")


def _budget(budget: Any) -> dict[str, Any]:
    """A number of draws goes where none are given for the site."""
    if isinstance(budget, tuple):
        return {"fraction": 0.0, "table": [min(rows, MAX_DRAWS) for rows in budget]}
    return {"fraction": budget if isinstance(budget, float) else 0.0}


def _draws(name: str, value: Any) -> Any:
    for path in value if isinstance(value, Mapping) else ():
        if not isinstance(path, str):
            raise TypeError(f"{name}: {path!r}: must be a module path, such as 'model.layers.0.self_attn'")
    given = [] if value is None else [*value.values()] if isinstance(value, Mapping) else [value]
    rows = [_heads(x) for x in given]
    width = max(map(len, rows), default=1)
    for row in rows:
        good = all(isinstance(S, int) and not isinstance(S, bool) and 1 <= S <= MAX_DRAWS for S in row)
        if not row or len(row) not in (1, width) or not good:
            raise ValueError(
                f"{name}={value!r}: must be an integer from 1 to {MAX_DRAWS}, a list of one per head, or a mapping of "
                "module paths to either"
            )
    return value


def _heads(draws: Any) -> list[Any]:
    return list(draws) if isinstance(draws, Sequence) and not isinstance(draws, (str, bytes)) else [draws]


def _sampler(name: str, value: Any) -> Any:
    strata_per_offset(value)
    return value


def _shared(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False")
    return value


def _levels(name: str, value: Any) -> Any:
    check_levels(value)
    return value


@dataclass(frozen=True)
class Santa(Options):
    """How SANTA draws rows."""

    budget: Any = option(
        512, "draws S per query head where draws says none", BUDGET,
        schema="float fraction, int[] table=[]", pack=_budget, shared="budget",
    )  # fmt: skip
    draws: Any = option(
        None, "S of every head and of every layer", schema="int[] draws", pack=lambda draws: {},
        kind=Kind("None (the budget), an integer, one per head, or a mapping of module paths to these", "", _draws),
    )  # fmt: skip
    sampler: str = option("sys", "how thresholds are drawn", Kind("`sys`, `strat`, `sys-<r>`, `iid`", "str", _sampler))
    shared: bool = option(True, "the heads of a KV head share their rows", Kind("True or False", "bool", _shared))
    bernoulli: int = option(
        0, "levels to which the query is rounded at random; 0 for none", Kind("0 to 256", "int", _levels),
        schema="int bernoulli=0",
    )  # fmt: skip

    def check(self) -> None:
        _check_sampler(self.sampler, self.shared)
        if isinstance(self.budget, int) and self.budget > MAX_DRAWS and not isinstance(self.draws, (int, Sequence)):
            raise ValueError(f"budget={self.budget!r}: must be at most {MAX_DRAWS} draws")

    @classmethod
    def by_layer(cls, given: Mapping[str, Any]) -> bool:
        return isinstance(given.get("draws"), Mapping)

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> dict[str, str]:
        return {path: f"['draws'][{path!r}]" for path in given["draws"]} if cls.by_layer(given) else {}

    @property
    def listed(self) -> list[Any]:
        """All draws that are given, for any site."""
        return [None, *self.draws.values()] if isinstance(self.draws, Mapping) else [self.draws]

    def at(self, site: Site) -> list[int]:
        """S of every head of a site, or one for all; 0 is what a fraction or a table gives."""
        every = self.budget if isinstance(self.budget, int) else 0
        here = site.entry(self.draws, every) if isinstance(self.draws, Mapping) else self.draws
        return _heads(every if here is None else here)


OP = define_op(
    "santa",
    "(Tensor query, Tensor key, Tensor value, Tensor? padding, Tensor seed, float scale, int layer, "
    f"Tensor? lengths=None, Tensor? sinks=None, *, {Santa.schema()}, int min_length, int window=0, float softcap=0.0, "
    "int[] layers=[]) -> (Tensor, Tensor)",  # layers: of 0.1.0, goes with 0.2
    of_any_size(_body),
    attention_fake,
    _no_gradient,
)


# ---------------------------------------------------------------------------------------------------------------
# Method


def _refuse(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    own: Santa = policy.of("santa")  # a bad value is reported when the model is rewritten, whatever is refused
    mask, reason = spec.mask, None
    width = max(len(_heads(draws)) for draws in own.listed)
    if mask.unknown is not None:
        reason = f"its mask is not proven: {mask.unknown}"
    elif not isinstance(spec.Lq, int) or spec.Lq > MAX_QUERIES:
        reason = f"it has {spec.Lq} queries, which together read nearly all values; SANTA decodes 1 to {MAX_QUERIES}"
    elif mask.segments:
        reason = "it keeps packed sequences apart; SANTA would let them see each other"
    elif mask.window is not None and not mask.causal:
        reason = f"it has a window of {mask.reach}; SANTA takes causal ones"
    elif not mask.causal and spec.Lq > 1:
        reason = f"it is not causal; SANTA takes the queries of decoding, here are {spec.Lq} that see each other"
    elif mask.causal and not known_equal(mask.offset, spec.Lk - spec.Lq):
        reason = f"its causal mask has offset {mask.offset}; needed is Lk - Lq, the last query sees every key"
    elif spec.dropout_p > 0:
        reason = f"it drops attention weights (dropout_p={spec.dropout_p}); call model.eval()"
    elif width not in (1, spec.H):
        reason = f"draws lists {width} numbers, the site has {spec.H} heads"
    else:
        reason = no_kernel(spec) or (_refuse_cuda(spec, own) if spec.device == "cuda" else None)
    return None if reason is None else Refusal("santa", reason)


def _refuse_cuda(spec: AttentionSpec, own: Santa) -> str | None:
    if not own.shared:
        return "there is no CUDA kernel for shared=False"
    if own.bernoulli and not spec.feature_major:
        return f"bernoulli={own.bernoulli} {_NEEDS_FEATURES}"
    if spec.H // spec.H_kv * spec.Lq > MAX_ROWS:
        return f"{spec.H // spec.H_kv} heads per key head times {spec.Lq} queries are more than {MAX_ROWS} rows"
    return None


def _loses(spec: AttentionSpec, policy: Policy) -> str | None:
    sizes = spec.B, spec.H, spec.H_kv, spec.Lq, spec.Lk, spec.D
    if spec.device != "cuda" or not all(isinstance(size, int) for size in sizes):
        return None  # decided at run time
    params = _params(Site(spec), policy)
    seen = in_reach(spec.Lq, spec.Lk, spec.mask.window or 0)
    S = max(_resolve(params["draws"], params["fraction"], params.get("table", ()), seen))
    return loses(*sizes[:4], seen, spec.B * spec.H_kv * seen * spec.D * spec.dtype.itemsize, S)


def _params(site: Site, policy: Policy) -> dict[str, Any]:
    spec, own = site.spec, policy.of("santa")
    return {
        "draws": own.at(site),
        **own.pack(),
        "min_length": -1 if policy.min_length is None else policy.min_length,
        **({} if spec is None or spec.mask.window is None else {"window": spec.mask.window}),
        **({} if spec is None or spec.softcap is None else {"softcap": spec.softcap}),
    }


def _rows(params: Mapping[str, Any], Lk: int) -> int:
    """The mean of the draws per head; 0 stands for the fraction."""
    Lk = in_reach(1, Lk, params.get("window", 0))
    drawn = _resolve(params["draws"], params["fraction"], params.get("table", ()), Lk)
    return round(sum(drawn) / len(drawn))


def _cost(spec: AttentionSpec, params: Mapping[str, Any]) -> c.Cost:
    """s is the mean of the draws per head. Value rows are counted as if no row were drawn twice, which is the most
    that is read, and what flat attention over many more than s keys does read. The stash is written and read once;
    statistics and partial results, about a hundredth of the keys, are not counted. Keys are those in reach of a window,
    and counted in full with ``bernoulli`` too: what it leaves unread depends on the query. Steps are the draws that one
    program makes, which wait for each other's rows; on average over chunks of keys."""
    keys = in_reach(c.Lq, c.Lk, params.get("window", 0))
    draws = sympy.Min(c.s, keys)
    heads = c.B * c.H * c.Lq
    rows = draws if params["shared"] else sympy.Min(c.s * c.H * c.Lq / c.H_kv, keys)
    flops = 2 * heads * (keys * c.D + draws * c.Dv)
    elements = heads * (c.D + c.Dv) + c.B * c.H_kv * (keys * c.D + rows * c.Dv) + 2 * heads * keys
    chunk = sympy.Piecewise((CHUNK // 2, keys * c.B * c.H_kv < CHUNK * DRAW_PROGRAMS), (CHUNK, True))
    steps = rows * sympy.Min(1, chunk / keys)
    sampled = c.Cost(flops, c.itemsize * elements, steps, launches=sympy.Integer(2), scores=2 * heads * keys)
    exact = c.dense_cost(c.visible_pairs(spec), keys)
    return sampled.unless((keys <= c.s) | (keys < params["min_length"]), exact)


METHOD = register(
    Method(
        name="santa",
        summary="decoding that reads all keys but only a random sample of the values, without bias",
        supports="1 to 16 queries over a cache, GQA, Dv != D, key padding, sliding windows, soft-caps, sinks, budgets "
        "per head and layer",
        refuses="prefill, packed sequences, biases, dropout, gradients",
        forms=("softcap", "sinks"),
        refuse=_refuse,
        options=Santa,
        params=_params,
        loses=_loses,
        cost=_cost,
        rows=_rows,
        per_head={"draws": 1},
    )
)
