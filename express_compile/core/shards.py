"""Which heads of a layer a process computes, where several share the heads (tensor parallel).

By DTensors: by the placements of the keys themselves, or by those of the weights of the attention module; or as
:func:`declare` was told. The random numbers and the plan of a head are those of its number among all heads of the
layer, so that N processes give the bits of one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .spec import HeadShard

_DECLARED = "_express_compile_heads"  # an attribute of modules: (rank, ranks)
SEEDS = 0xFFFFFFFF
"""The bits of a seed. The others count heads."""


def seed_of(seed: Any, shard: HeadShard | None) -> Any:
    """The seed, an int or an int64 tensor, that an op takes for a part of the KV heads: the number of the first one is
    in its upper half."""
    return seed if shard is None or not shard.first else seed + (shard.first << 32)


def is_dtensor(x: Any) -> bool:
    """Whether it is a DTensor, of which there is none before torch's module of that name is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def declare(model: nn.Module, rank: int, ranks: int) -> None:
    """Let every attention module in ``model`` count as the part ``rank`` of ``ranks`` equal parts of its heads."""
    for module in model.modules():
        module.__dict__[_DECLARED] = (rank, ranks)


def may_share_heads(module: nn.Module) -> bool:
    """Whether :func:`shard_of` has to look at a module."""
    return _DECLARED in module.__dict__ or (torch.distributed.is_available() and torch.distributed.is_initialized())


def shard_of(module: Any, H: Any, H_kv: Any, D: Any) -> HeadShard | None:
    """The KV heads that a call of attention in ``module`` has, by its weights or as :func:`declare` was told; None for
    all of them. H, H_kv, D: query heads and KV heads of the call, and features of a head.

    Raises ``ValueError`` where weights are sharded and it cannot be known whether the heads are.
    """
    if not isinstance(module, nn.Module):
        return None
    declared = vars(module).get(_DECLARED)
    if declared is not None:
        return HeadShard(declared[0] * H_kv, H_kv, declared[1] * H_kv)
    columns = _columns(module)
    if not columns:
        return None
    (rank, ranks), others = columns[0][0], {place for place, _ in columns[1:]}
    total = getattr(getattr(module, "config", None), "num_attention_heads", None)
    features = {n for _, n in columns}
    if not others - {(rank, ranks)}:
        if total == ranks * H or {ranks * H * D, ranks * (H + 2 * H_kv) * D} & features:
            return HeadShard(rank * H_kv, H_kv, ranks * H_kv)
        if total == H or {H * D, (H + 2 * H_kv) * D} & features:
            return None
    raise ValueError(f"{type(module).__name__}: its weights are sharded, and it calls attention with {H} heads; {_SAY}")


def shard_at(rank: int, ranks: int, total: int) -> HeadShard | None:
    """The KV heads, of ``total``, of one of ``ranks`` processes that share them evenly, or have copies where there are
    more processes than heads; None for a process alone."""
    return None if ranks == 1 else HeadShard(rank * total // ranks, max(1, total // ranks), total)


def shard_of_dtensor(key: Any) -> HeadShard | None:
    """The KV heads that this process has of a DTensor ``[B, H_kv, Lk, D]``, or None for all of them. Raises
    ``ValueError`` unless they are sharded evenly over one dimension of a mesh."""
    mesh, dims = key.device_mesh, [i for i, placement in enumerate(key.placements) if placement.is_shard(1)]
    if not dims:
        return None
    total, ranks = key.shape[1], mesh.size(dims[0])
    if len(dims) > 1 or total % ranks:
        raise ValueError(
            f"key: a DTensor with placements {key.placements}, {total} heads on a mesh of shape {tuple(mesh.shape)}; "
            "its heads must be sharded evenly over one dimension of the mesh"
        )
    return HeadShard(mesh.get_local_rank(dims[0]) * total // ranks, total // ranks, total)


_SAY = "which heads these are is not known: say it with express_compile.engines.distributed.shard_heads(model, mesh)"


def _columns(module: nn.Module) -> list[tuple[tuple[int, int], int]]:
    """Of every weight ``[out, in]`` whose output features are sharded: place and number of the parts, and features."""
    found: list[tuple[tuple[int, int], int]] = []
    if not may_share_heads(module):
        return found
    for parameter in module.parameters():
        if is_dtensor(parameter) and parameter.dim() == 2:
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            found += [
                ((mesh.get_local_rank(i), mesh.size(i)), parameter.shape[0])
                for i, placement in enumerate(parameter.placements)  # type: ignore[attr-defined]
                if placement.is_shard(0) and mesh.size(i) > 1
            ]
    return found
