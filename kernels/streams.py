"""Pieces of work on streams of their own, for kernels that leave most of a GPU idle while they wait for themselves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

_own = threading.local()  # a stream that two threads share would bring the work of one into a graph of the other


def _stream(device: torch.device, i: int) -> torch.cuda.Stream:
    streams = _own.__dict__.setdefault(str(device), [])
    while len(streams) <= i:
        streams.append(torch.cuda.Stream(device))
    stream: torch.cuda.Stream = streams[i]
    return stream


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Gives ``piece``: what is launched in ``with piece():`` comes after what the current stream was given before it,
    beside what it is given in this block, and before what it is given behind this block.

    A piece may use memory that was taken before it if nobody else writes there, and that memory has to be held until
    this block ends; memory that is taken inside of a piece stays that of its stream. CUDA graphs capture all of it. On
    other devices pieces are done where they stand.
    """
    if device.type != "cuda":
        yield contextlib.nullcontext
        return
    used: list[torch.cuda.Stream] = []
    current = torch.cuda.current_stream(device)

    @contextlib.contextmanager
    def piece() -> Iterator[None]:
        stream = _stream(device, len(used))
        stream.wait_stream(current)
        used.append(stream)
        with torch.cuda.stream(stream):
            yield

    try:
        yield piece
    finally:
        for stream in used:
            current.wait_stream(stream)
