"""Device functions shared by the Triton kernels, and the counter-based random numbers with their torch twin.

Kernels and references draw from the same Philox4x32-10 streams, so that they can be compared decision by
decision. A stream is named by the key ``(seed, layer)`` and by the counter
``(draw, bucket, stage, sequence)``, see :func:`philox_uniform`.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the references still work, a launch raises require_triton's error
    triton = None
    tl = None


def jit(fn):
    """``triton.jit``, or the plain function where Triton is not installed."""
    return triton.jit(fn) if triton is not None else fn


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
    sequence: torch.Tensor | int,
) -> torch.Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24, in float32: Philox4x32-10 (Salmon et al., 2011).

    ``seed`` is a 0-dim int64 tensor (its low 32 bits count); ``layer`` is the upper key word. The counters
    broadcast against each other: ``draw`` (the pair), ``bucket``, ``stage`` (round and level) and ``sequence``
    (batch and KV head). Equal to :func:`draw_uniform` in a kernel, bit for bit.
    """
    device = draw.device
    words = [torch.as_tensor(c, dtype=torch.int64, device=device) for c in (draw, bucket, stage, sequence)]
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
def draw_uniform(seed, layer, draw, bucket, stage, sequence):
    """The same numbers inside a kernel; ``draw`` is a block of counters, the rest are scalars."""
    key = (tl.cast(layer, tl.uint64) << 32) | (seed.to(tl.uint64) & 0xFFFFFFFF)
    zero = draw * 0
    bits, _, _, _ = tl.philox(key, draw, zero + bucket, zero + stage, zero + sequence)
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08
