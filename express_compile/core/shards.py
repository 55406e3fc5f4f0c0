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


def shard_of(module: Any, key: Any, H_kv: Any, D: Any) -> HeadShard | None:
    """The KV heads that ``key`` ``[B, H_kv, Lk, D]`` of an attention module has, or None for all of them. None for the
    key: it is not known.

    Raises ``ValueError`` where weights are sharded and it cannot be known whether the heads are.
    """
    if is_dtensor(key):
        return _of_placements(key)
    declared = vars(module).get(_DECLARED) if isinstance(module, nn.Module) else None
    if declared is not None:
        return HeadShard(declared[0] * H_kv, H_kv, declared[1] * H_kv)
    columns = _columns(module)
    if not columns:
        return None
    if len({place for place, _ in columns}) > 1:
        raise ValueError(f"{_of(module, H_kv)}: its weights are sharded over more than one dimension of a mesh; {_SAY}")
    (rank, ranks), _ = columns[0]
    config = getattr(module, "config", None)
    total = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if isinstance(total, int) and isinstance(H_kv, int) and total in (H_kv, ranks * H_kv):
        return None if total == H_kv else HeadShard(rank * H_kv, H_kv, total)
    if any(features % (ranks * H_kv * D) == 0 for _, features in columns):
        return HeadShard(rank * H_kv, H_kv, ranks * H_kv)
    if any(features % (H_kv * D) == 0 for _, features in columns):
        return None
    raise ValueError(f"{_of(module, H_kv)}: its weights are sharded over {ranks} processes; {_SAY}")


_SAY = "which heads these are is not known: say it with express_compile.engines.distributed.shard_heads(model, mesh)"


def _of(module: Any, H_kv: int) -> str:
    return f"{type(module).__name__} calls attention with {H_kv} KV heads"


def _of_placements(key: Any) -> HeadShard | None:
    mesh, dims = key.device_mesh, [i for i, placement in enumerate(key.placements) if placement.is_shard(1)]
    if not dims:
        return None
    total, local = key.shape[1], key.to_local().shape[1] if len(dims) == 1 else 0
    if len(dims) > 1 or local * mesh.size(dims[0]) != total:
        raise ValueError(
            f"key: a DTensor with placements {key.placements}, {total} heads on a mesh of shape {tuple(mesh.shape)}; "
            "its heads must be sharded evenly over one dimension of the mesh"
        )
    return HeadShard(mesh.get_local_rank(dims[0]) * local, local, total)


def _columns(module: Any) -> list[tuple[tuple[int, int], int]]:
    """Of every weight ``[out, in]`` whose output features are sharded: place and number of the parts, and features."""
    found: list[tuple[tuple[int, int], int]] = []
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    for parameter in module.parameters() if isinstance(module, nn.Module) else ():
        if is_dtensor(parameter) and parameter.dim() == 2:
            mesh = parameter.device_mesh
            found += [
                ((mesh.get_local_rank(i), mesh.size(i)), parameter.shape[0])
                for i, placement in enumerate(parameter.placements)
                if placement.is_shard(0) and mesh.size(i) > 1
            ]
    return found
