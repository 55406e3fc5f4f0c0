"""Old names of modules that have moved: they are the new modules themselves, until 0.2."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module


def moved(old: str, new: str) -> None:
    """Let ``sys.modules[old]`` be the module ``express_compile.new``; whoever imports it is warned."""
    new = f"{__package__}.{new}"
    # 3: past this function and the module under the old name; frames of importlib are not counted
    warnings.warn(f"{old} has moved to {new}; the old name goes with 0.2", DeprecationWarning, stacklevel=3)
    sys.modules[old] = import_module(new)
