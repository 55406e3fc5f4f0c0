"""A method of your own in one file: StreamingLLM (arXiv 2309.17453), where a query sees the first and the last tokens.

python examples/custom_method.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from express_compile import AttentionSpec, Method, Policy, Refusal, explain, register
from express_compile.core.call import Call
from express_compile.core.options import ROWS, Options, option
from express_compile.core.rows import Rows
from express_compile.kernels.op import at_the_end, define_attention


@dataclass(frozen=True)
class Streaming(Options):
    """Which tokens a query sees."""

    sinks: int = option(4, "the first tokens", ROWS, shared="sinks")
    recent: int = option(256, "the last tokens before a query", ROWS, shared="window")


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` ``[B, H, Lq, Dv]`` and the log-sum-exp ``[B, H, Lq]``; exact for fewer keys than ``min_length``."""
    recent = call.Lk if call.Lk < call.options["min_length"] else call.options["recent"]
    i = torch.arange(call.Lk - call.Lq, call.Lk, device=call.query.device)[:, None]
    j = torch.arange(call.Lk, device=call.query.device)
    seen = (j <= i) & ((j < call.options["sinks"]) | (j >= i - recent))
    wide = torch.promote_types(call.query.dtype, torch.float32)
    group = call.query.shape[1] // call.key.shape[1]
    query, key, value = call.query.to(wide), *(x.to(wide).repeat_interleave(group, 1) for x in (call.key, call.value))
    scores = (query @ key.mT * call.scale).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ value).to(call.query.dtype), scores.logsumexp(-1)


def refuse(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    """The masks that it would get wrong; a reason is shown to the user as it is."""
    mask = spec.mask
    plain = mask.unknown is None and mask.causal and mask.window is None and not mask.segments and at_the_end(spec)
    if not plain or spec.dropout_p or (mask.padding and spec.device != "cpu"):
        return Refusal("streaming", f"it takes causal attention without dropout; this mask: {mask}")
    return None


define_attention("streaming", Streaming, attend)  # the op, its fake, its gradient, padding and empty sizes
describe = dict(summary="the first and the last tokens", supports="causal attention", refuses="other masks")
approximates = lambda params, Lk: Lk > params["sinks"] + params["recent"] + 1  # noqa: E731
sees = lambda own, site: Rows(sinks=own.sinks, recent=own.recent)  # noqa: E731
register(Method("streaming", **describe, refuse=refuse, options=Streaming, sees=sees, approximates=approximates))

if __name__ == "__main__":
    attention = lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)  # noqa: E731
    print(explain(attention, torch.randn(1, 4, 64, 8), methods=[Streaming(sinks=2, recent=16)], error=True))
