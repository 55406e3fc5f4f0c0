"""Exact attention: PyTorch's own ``scaled_dot_product_attention``, the answer that is always right.

    out_i = sum_j exp(scale <q_i, k_j>) v_j / sum_j exp(scale <q_i, k_j>),    j <= i if causal

As a method it leaves a site as it is, whatever its mask, but for steps of decoding: the op ``exact_step``, where
:func:`takes_step`, reads the rows of a cache that are filled and no padding, and repeats no heads.
:func:`exact_attention` serves the other methods where exact is cheaper than they are: the fastest exact kernel of the
device, with the log-sum-exp.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from express_compile.core.cost import dense_cost, visible_pairs
from express_compile.core.method import Method, register
from express_compile.core.options import Options
from express_compile.core.rows import Rows
from express_compile.core.spec import AttentionSpec

from .attend import decode
from .attend.segments import Sources, causal_table, dense_table, segment_attention
from .op import at_the_end, define_op, no_kernel


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention, ``causal`` (aligned bottom-right) or over all keys: ``(out, lse)`` as in ``segments``.

    Shapes as in ``segments.segment_attention``. Uses PyTorch's CPU flash kernel or cuDNN where they apply (Dv = D,
    and for causal attention Lq = Lk), and segment attention elsewhere.
    """
    Lq, Lk, H = query.shape[2], key.shape[2], query.shape[1]
    # torch's kernels read rows without gaps whatever the strides say, and the CPU's gives NaN for a scale of 0 or less
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if scale <= 0:
        query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
    if (Lq == Lk or not causal) and query.shape[-1] == value.shape[-1]:
        if query.device.type == "cpu":
            k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, k, v, 0.0, causal, scale=scale)
            lse = lse.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
            return out.contiguous(), lse.contiguous()
        if cudnn_takes(query.device, query.dtype, query.shape[-1]):
            # cuDNN was faster than flash at every length measured on an H200 (bench.md)
            out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, causal, False, scale=scale
            )[:2]
            return out.contiguous(), lse.reshape(query.shape[:3]).contiguous()
    if causal:
        return segment_attention(query, Sources.tokens(key, value), causal_table(Lq, Lk), scale)
    return segment_attention(query, Sources.compacted(key, value), dense_table(Lq, Lk), scale)


@functools.cache
def cudnn_takes(device: torch.device, dtype: torch.dtype, D: int) -> bool:
    """Whether :func:`exact_attention` runs cuDNN's kernel for ``Dv = D``."""
    half = dtype in (torch.float16, torch.bfloat16)
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return half and modern and torch.backends.cudnn.is_available() and D in range(8, 129, 8)


MAX_WIDTH = 256  # features of a head


# ---- steps of decoding ---------------------------------------------------------------------------------------------


def takes_step(spec: AttentionSpec) -> bool:
    """Whether the op ``exact_step`` computes what a site does: few queries at the end of their keys."""
    mask, sizes = spec.mask, (spec.Lq, spec.H, spec.H_kv, spec.D, spec.Dv)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    if mask.unknown is not None or mask.window is not None or mask.segments or spec.forms or spec.dropout_p:
        return False
    last = at_the_end(spec) if mask.causal else spec.Lq == 1
    few = spec.Lq <= decode.MAX_QUERIES and spec.H // spec.H_kv * spec.Lq <= decode.MAX_ROWS
    narrow = max(spec.D, spec.Dv) <= MAX_WIDTH
    return last and few and narrow and no_kernel(spec) is None


def _step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The queries are the last of the tokens, and causal among themselves; ``padding`` bool ``[B, Lk]``."""
    if 0 in query.shape or 0 in value.shape:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    return (_on_cuda if query.is_cuda else _on_cpu)(query, key, value, scale, decode.Rows(padding=padding))


def _on_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, rows: decode.Rows
) -> torch.Tensor:
    return decode.decode_triton(query, key, value, scale, rows)[0]


def _on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, rows: decode.Rows
) -> torch.Tensor:
    """SDPA from the first to the last place that some sequence has filled."""
    seen = decode.visible_rows(query, key, rows)[:, :1]  # [B, 1, n, Lk]
    places = seen.flatten(0, 2).any(0).nonzero()[:, 0]
    first, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)
    key, value, seen = key[:, :, first:stop], value[:, :, first:stop], seen[..., first:stop]
    if query.shape[2] > 1:
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, k, v, seen, scale=scale)
    packed = query.view(query.shape[0], key.shape[1], -1, query.shape[3])  # heads of a key head as its queries
    return F.scaled_dot_product_attention(packed, key, value, seen, scale=scale).flatten(1, 2)[:, :, None]


OP = define_op(
    "exact_step",
    "(Tensor query, Tensor key, Tensor value, Tensor? padding, float scale) -> Tensor",
    _step,
    lambda query, key, value, padding, scale: query.new_empty(*query.shape[:3], value.shape[-1]),
)


# ---- method --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact(Options):
    """Exact attention has no options."""


METHOD = register(
    Method(
        name="exact",
        summary="PyTorch's own scaled_dot_product_attention",
        supports="everything PyTorch supports",
        refuses="nothing",
        refuse=lambda spec, policy: None,
        params=lambda site, policy: {},
        options=Exact,
        sees=lambda options, site: Rows(everything=True),
        cost=lambda spec, params: dense_cost(visible_pairs(spec)),
        step=lambda spec: OP if takes_step(spec) else None,
    )
)
