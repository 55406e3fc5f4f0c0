"""Device functions shared by the Triton kernels, and the counter-based random numbers with their torch twin.

Kernels and references draw from the same Philox4x32-10 streams, so that they can be compared decision by
decision. A stream is named by the key ``(seed, layer)`` and by the counter
``(draw, bucket, stage, head)``, see :func:`philox_uniform`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the references still work, a launch raises require_triton's error
    triton = None
    tl = None


# Products of float32 tiles on tensor cores: each factor is split into three bfloat16. On an H200 attention (D = 64)
# erred by 2.0e-7 and took 0.32 ms; by 5.1e-7 and 1.60 ms with "ieee", which the interpreter takes instead. With
# "tf32x3" Triton 3.6 reads illegal memory at D = 128. Other dtypes do not look at it.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32_DOT = None if tl is None else tl.constexpr("ieee" if _INTERPRETED else "bf16x6")


def jit(fn: Callable | None = None, *, general: str = "") -> Any:
    """``triton.jit``, or the plain function where Triton is not installed.

    ``general`` names arguments, separated by spaces, for whose values no kernel of their own is compiled: counts
    that follow the length of the sequence.
    """
    if fn is None:
        return functools.partial(jit, general=general)
    return fn if triton is None else triton.jit(fn, do_not_specialize=general.split())


_compiled: dict[tuple, tuple[Any, list]] = {}
_recent: dict[tuple, tuple[Any, list]] = {}  # the same by values, which is found faster; forgotten when it is full
_RECENT = 4096


def _kind(x: Any) -> Any:
    """What a kernel may be compiled for: the dtype and alignment of a tensor, the divisibility of an integer."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, int):
        return (x == 1) + 2 * (x % 16 == 0) + 4 * (x >= 1 << 31)
    return (x.base.dtype, *x.block_shape) if hasattr(x, "block_shape") else type(x)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first tensor, constant arguments as options.

    Finds the compiled kernel again in a fraction of the time that Triton takes, which exceeds that of many kernels.
    """
    device = next(x for x in args if isinstance(x, torch.Tensor)).device
    if device.type != "cuda" or not isinstance(kernel, triton.JITFunction):
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device) if device.index != torch.cuda.current_device() else contextlib.nullcontext():
        values = [x if type(x) is int else _kind(x) for x in args]
        recent = (kernel.fn, device.index, *options.values(), *values)
        found = _recent.get(recent)
        if found is None:
            general = [parameter.do_not_specialize for parameter in kernel.params]
            kinds = [x >= 1 << 31 if free else _kind(x) for x, free in zip(args, general, strict=False)]
            key = (kernel.fn, device.index, *options.values(), *kinds)
            if key not in _compiled:
                names = kernel.arg_names[len(args) :]
                _compiled[key] = kernel[grid](*args, **options), [options[name] for name in names]
                return
            if len(_recent) == _RECENT:
                _recent.clear()
            found = _recent[recent] = _compiled[key]
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def constant(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of ``array`` on ``device`` that may be kept for later calls.

    Another thread makes it, so that it is a plain tensor in whatever mode the caller runs: modes (fake tensors,
    inference, functorch's levels, a default device) belong to a thread, and so does the memory of CUDA graphs that it
    makes, which is overwritten by other graphs (inductor refuses that with an error).
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_copied, array, device).result()


def _copied(array: np.ndarray, device: torch.device) -> torch.Tensor:
    copied = torch.tensor(array, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return copied


def require_triton() -> None:
    """Raise ``RuntimeError`` where Triton is missing."""
    if triton is None:
        raise RuntimeError("CUDA tensors need Triton, which is not installed: pip install 'triton>=3.6'")


def next_power_of_two(x: int) -> int:
    """Smallest power of two that is at least ``x``."""
    return 1 << (x - 1).bit_length()


_MASK32 = 0xFFFFFFFF
_ROUNDS = 10


def philox_uniform(
    seed: torch.Tensor,
    layer: int,
    draw: torch.Tensor,
    bucket: torch.Tensor | int,
    stage: torch.Tensor | int,
    head: torch.Tensor | int,
) -> torch.Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24, in float32: Philox4x32-10 (Salmon et al., 2011).

    ``seed`` is a 0-dim int64 tensor (its low 32 bits count); ``layer`` is the upper key word. The counters
    broadcast against each other: ``draw`` (the pair), ``bucket``, ``stage`` (round and level) and ``head``; that
    none of them says which sequence of a batch it is makes batches invariant: a sequence draws the same numbers
    wherever it stands. Equal to :func:`draw_uniform` in a kernel, bit for bit.
    """
    device = draw.device
    words = [torch.as_tensor(c, dtype=torch.int64, device=device) for c in (draw, bucket, stage, head)]
    c0, c1, c2, c3 = (w & _MASK32 for w in torch.broadcast_tensors(*words))
    k0 = seed.to(device=device, dtype=torch.int64) & _MASK32
    k1 = torch.full_like(k0, layer & _MASK32)
    for _ in range(_ROUNDS):
        # int64 products wrap around modulo 2**64, which keeps all 64 bits of the unsigned product
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((b >> 32) & _MASK32) ^ c1 ^ k0,
            b & _MASK32,
            ((a >> 32) & _MASK32) ^ c3 ^ k1,
            a & _MASK32,
        )
        k0 = (k0 + 0x9E3779B9) & _MASK32
        k1 = (k1 + 0xBB67AE85) & _MASK32
    return (c0 >> 8).to(torch.float32) * 2.0**-24


@jit
def draw_uniform(seed, layer, draw, bucket, stage, head):
    """The same numbers inside a kernel; ``draw`` is a block of counters, the rest are scalars."""
    key = (tl.cast(layer, tl.uint64) << 32) | (seed.to(tl.uint64) & 0xFFFFFFFF)
    zero = draw * 0
    bits, _, _, _ = tl.philox(key, draw, zero + bucket, zero + stage, zero + head)
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08
