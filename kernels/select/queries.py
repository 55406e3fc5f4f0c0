"""Blocks of queries: those of a block see the same rows of the past."""

from __future__ import annotations

from typing import Any

import numpy as np

from express_compile.core.plain import number


def check_block(name: str, value: Any) -> int:
    """A number of queries per block. Raises ``TypeError`` or ``ValueError`` for others."""
    if number(name, value, int) not in (16, 32, 64, 128):
        raise ValueError(f"{name}={value!r}: must be 16, 32, 64 or 128 queries")
    return int(value)


class InBlocks:
    """Options of a method that holds the first ``sinks`` and the last ``recent`` tokens for ``block`` queries at once.

    Blocks start ``sinks + recent`` tokens behind multiples of ``block``, wherever a prefill starts: one in chunks gives
    what one in a single piece does, and the slices of a coreset keep even lengths.
    """

    sinks: int
    recent: int
    block: int

    def in_block(self, position: int) -> int:
        """How far ``position`` lies behind the start of its block of queries."""
        return (position - self.sinks - self.recent) % self.block

    def blocks_of(self, Lq: int, Lk: int) -> tuple[int, np.ndarray]:
        """Of the last ``Lq`` of ``Lk`` tokens as queries: how far the first one lies behind the start of its block, and
        where each block begins, 0 or more, int64. Raises ``ValueError`` for ``Lq > Lk``."""
        if not 0 < Lq <= Lk:
            raise ValueError(f"Lq={Lq}: must be from 1 to the number of keys, Lk={Lk}")
        shift = self.in_block(Lk - Lq)
        return shift, np.maximum(0, np.arange(Lk - Lq - shift, Lk, self.block, dtype=np.int64))
