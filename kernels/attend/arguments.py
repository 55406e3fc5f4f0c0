"""What the two kernels of segment attention are given: the one of :mod:`.segments` and the one of :mod:`.hopper`."""

from __future__ import annotations

from collections import namedtuple

import torch

# What the kernel reads but by descriptor, and writes; ``largest``: of keys and values of a head, for float32. ``jobs``
# (:mod:`.job`) and ``chosen``: of a launch for heads that see rows of different tables (:mod:`.mixed`). ``spans``
# (:mod:`..spans`): of a batch whose tokens the kernel finds by place, into ``out`` and ``lse`` with strides.
KernelTensors = namedtuple(
    "KernelTensors", "q k v index lengths largest scale_log2 G out lse jobs chosen spans", defaults=(None, None, None)
)


# What :func:`.segments.tile_lists` gives, or ``merged_lists``; and where in a table the jobs of each program begin.
Lists = namedtuple("Lists", "start tiles log2_weight tail slots begin", defaults=(None, None))


KernelSizes = namedtuple("KernelSizes", "H Lq q_offset shift")


# Widths, queries and rows of a tile, and parts of a block.
KernelShape = namedtuple("KernelShape", "D DV BD BDV BM BN PARTS")


def describable(x: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
    """``x`` ``[B, H, L, D]`` with its shape and strides as a tensor descriptor may have them. It takes rows without
    gaps, and a base and strides that are multiples of 16 bytes; anything else is copied."""
    shape, unit = list(x.shape), 16 // x.element_size()
    # the stride of an axis of size 1 means nothing, but has to be valid
    strides = [stride if size > 1 else unit for size, stride in zip(shape[:3], x.stride(), strict=False)]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(not stride or stride % unit for stride in strides):
        columns = -(-shape[3] // unit) * unit
        return describable(x.new_empty(*shape[:3], columns)[..., : shape[3]].copy_(x))
    return x, shape, [*strides, 1]
