"""Dispatch modes of which one thread at a time is in any."""

from __future__ import annotations

import threading
from typing import Any, Self

from torch.utils._python_dispatch import TorchDispatchMode

ONE_THREAD = threading.RLock()
"""Held by the thread that is in a :class:`OneThreadMode`."""


class OneThreadMode(TorchDispatchMode):
    """A mode that waits until no other thread is in such a one: PyTorch saves and restores what it knows of modes
    without regard to threads, and where those of two overlap takes itself to be in one ever after."""

    def __enter__(self) -> Self:
        ONE_THREAD.acquire()
        try:
            super().__enter__()
        except BaseException:
            ONE_THREAD.release()
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            super().__exit__(*raised)
        finally:
            ONE_THREAD.release()
