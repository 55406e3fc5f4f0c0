"""Express over packed sequences, called as engines call flash-attention's kernel for sequences of varied length."""

from __future__ import annotations

import secrets
from typing import Any

import torch

from ..core.method import METHODS
from ..core.policy import Policy
from ..core.spec import Site, layer_key
from ..kernels.express import VARLEN
from ..planning.choose import check_policy


def express_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    path: str = "",
    **options: Any,
) -> torch.Tensor:
    """Causal self-attention by Express of whole sequences that lie one behind the other: ``[T, H, Dv]``.

    query ``[T, H, D]``, key ``[T, H_kv, D]``, value ``[T, H_kv, Dv]``, of one floating dtype. cu_seqlens: int32
    ``[sequences + 1]`` on their device, where each sequence starts, and where the last one ends; on a GPU it is not
    read back, and tokens behind it get 0. max_seqlen: at least the tokens of the longest one; working memory follows
    it. scale: of the scores, ``1 / sqrt(D)`` unless given. path: that of the module, which with ``seed`` names the
    random numbers. ``options``: those of :func:`express_compile.rewrite_attention`, such as ``budget``; with
    ``seed=None`` every call draws anew.

    A sequence gets what it would get alone: the same bits on a CPU, the same rows on a GPU. Differentiable; gradients
    are computed one sequence after the other. Raises ``ValueError`` or ``TypeError`` for what does not fit.

    >>> starts = torch.tensor([0, 6000, 9000], dtype=torch.int32)
    >>> q, k, v = (torch.randn(9000, heads, 64) for heads in (8, 2, 2))
    >>> express_varlen(q, k, v, starts, 6000, budget=256, seed=0).shape
    torch.Size([9000, 8, 64])
    """
    policy = Policy.from_options(options)
    check_policy(policy)
    number = policy.seed if policy.seed is not None else secrets.randbelow(2**31)
    seed = torch.full((), number, dtype=torch.int64, device=query.device)
    params = METHODS["express"].params(Site(path=path), policy)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = VARLEN(query, key, value, cu_seqlens, max_seqlen, seed, scale, layer_key(path), **params)[0]
    return out
