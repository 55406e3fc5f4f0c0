"""The method rooms, imported as ``express_compile.kernels``: one file per method, nothing registered here.

In a checkout this folder can also be found as top-level ``kernels``, a name that belongs to Hugging Face's
package. Whoever imports that name gets theirs, or an empty module that transformers takes for "not installed".
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys


def _hand_over() -> None:
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    rest = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != root]
    for finder in sys.meta_path:
        path = rest if finder is importlib.machinery.PathFinder else None
        spec = finder.find_spec(__name__, path) if hasattr(finder, "find_spec") else None
        if spec is not None and spec.loader is not None:
            theirs = importlib.util.module_from_spec(spec)
            sys.modules[__name__] = theirs
            spec.loader.exec_module(theirs)
            return
    # transformers imports the name unguarded once find_spec has seen this folder, so raising would break it; it
    # decides "absent" by the missing version and file.
    __path__.clear()
    del globals()["__file__"]


if __name__ == "kernels":
    _hand_over()
