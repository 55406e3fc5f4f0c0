"""Attention that runs outside of every graph: seen as it runs, because no graph shows it.

Dynamo leaves code to Python behind ``torch.compiler.disable``, where it cannot resume after a graph break, in frames
that it skips (torch's own among them), and where it is switched off. A dispatch mode sees the operators that run there:
torch's attention, and a softmax whose weights meet values in a product. It is a search, no proof: nothing of it is
rewritten.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import graph_break_reasons
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.modes import OneThreadMode
from ..core.sites import NOT_MATCHED, SiteReport
from ..passes.cut import PARTED
from ..passes.place import calls

_HERE = os.path.dirname(os.path.dirname(__file__))
_TORCH = os.path.dirname(torch.__file__)
_NEAREST = "code that Dynamo captures: TORCH_LOGS=graph_breaks shows what it does not"
_KNOWN = ("_recorded.<locals>.run", "_run_eagerly")  # in capture.py and transformers/attention.py
_WHOLE = (
    "_scaled_dot_product",
    "scaled_dot_product",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "_triton_multi_head_attention",
    "flex_attention",
)
_WEIGHTS = ("_softmax", "_safe_softmax", "_log_softmax")
_PRODUCTS = ("bmm", "mm", "baddbmm", "matmul")
# what weights may pass on their way to the values, as long as they keep their sizes
_STEPS = (
    *("view", "_unsafe_view", "reshape", "expand", "clone", "_to_copy", "native_dropout", "detach", "alias", "exp"),
    *("mul", "div", "masked_fill", "where", "transpose", "permute", "unsqueeze", "squeeze", "slice", "contiguous"),
)


@dataclass(frozen=True)
class _Line:
    """Where a call comes from: file:line, the first line of its function, the modules that it is in, outermost first,
    and whether Dynamo was told to leave it alone."""

    source: str
    start: int
    modules: tuple[nn.Module, ...]
    disabled: bool

    def ends(self, site: SiteReport) -> bool:
        """Whether a site that a graph shows up to its product goes on here: it is listed there."""
        (file, _, product), (own, _, softmax) = (x.rpartition(":") for x in (site.source, self.source))
        return site.reason.startswith(PARTED) and file == own and self.start <= int(product) <= int(softmax)


class Outside(OneThreadMode):
    """While active, finds the attention that this thread runs in no graph; not that inside of :meth:`in_graph`.

    paths: gives the paths of modules by their ids. found: what was seen, each line of each module once.
    """

    supports_higher_order_operators = True

    def __init__(self, paths: Callable[[], Mapping[str, str]], found: list[SiteReport]) -> None:
        super().__init__()
        self.paths, self.found = paths, found
        self._in_graph = False
        self._weights = WeakTensorKeyDictionary()  # -> _Line
        self._breaks = len(graph_break_reasons)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles as it does without this mode."""
        return True

    @property
    def breaks(self) -> tuple[str, ...]:
        """What has parted graphs since this was made, each line once: ``"file:line: why"``."""
        return tuple(dict.fromkeys(map(_words, graph_break_reasons[self._breaks :])))

    def in_graph(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, which runs a graph."""

        def unseen(*args: Any) -> Any:
            self._in_graph = True
            try:
                return run(*args)
            finally:
                self._in_graph = False

        return unseen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._in_graph:
            self._look(func.name().partition("::")[2].partition(".")[0] or func.name(), args, out)
        return out

    def _look(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        if name.startswith(_WHOLE) and not name.endswith("backward"):
            self._add(_line(), None)
            return
        out = out[0] if isinstance(out, (tuple, list)) and out else out
        if not isinstance(out, torch.Tensor):
            return
        if name in _WEIGHTS:
            if out.dim() > 1 and args[1] in (-1, out.dim() - 1) and (line := _line()) is not None:
                self._weights[out] = line
            return
        tensors = [x for x in args[:3] if isinstance(x, torch.Tensor)]
        weights = next((x for x in tensors if x in self._weights), None)
        if weights is None:
            return
        if name in _PRODUCTS:
            if not any(isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter) for x in tensors):
                self._add(self._weights[weights], _line())
        elif name in _STEPS and out.numel() == weights.numel():
            self._weights[out] = self._weights[weights]

    def _add(self, line: _Line | None, product: _Line | None) -> None:
        if line is None or any(map(line.ends, self.found)):
            return
        pairs = zip(line.modules, (product or line).modules, strict=False)
        around = [module for module, _ in takewhile(lambda pair: pair[0] is pair[1], pairs)]
        paths = self.paths()
        path = next((paths[str(id(module))] for module in reversed(around) if str(id(module)) in paths), "")
        why = "behind torch.compiler.disable" if line.disabled else self._why()
        reason = f"it runs in no graph, {why}"
        site = SiteReport(path, line.source, NOT_MATCHED, "", "exact", "refused", reason, nearest=_NEAREST)
        if not any((x.module, x.source, x.form) == (path, line.source, NOT_MATCHED) for x in self.found):
            self.found.append(site)

    def _why(self) -> str:
        breaks = self.breaks
        if not breaks:
            return "in code that Dynamo skips, or with compilation switched off"
        return f"in code that Dynamo did not capture, after a graph break at {breaks[-1]}"


def _words(reason: Any) -> str:
    """A graph break of Dynamo in one line."""
    where = f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}: " if reason.user_stack else ""
    return f"{where}{reason.reason.splitlines()[0] if reason.reason else 'no reason given'}"


def _line() -> _Line | None:
    """The line that calls just now; None inside of a graph of a rewritten model, or of attention that it knows."""
    frame: FrameType | None = sys._getframe(2)
    inner: FrameType | None = None
    disabled = False
    while frame is not None:
        code = frame.f_code
        if code.co_qualname == "compile_wrapper":
            break
        if code.co_filename.startswith(_HERE):
            if code.co_qualname in _KNOWN:
                return None
        elif not code.co_filename.startswith(_TORCH):
            inner = inner or frame
        # that around a mode's own code is none of the user's
        disabled = disabled or (inner is not None and code.co_qualname.startswith("DisableContext."))
        frame = frame.f_back
    source = "" if inner is None else f"{inner.f_code.co_filename}:{inner.f_lineno}"
    return _Line(source, 0 if inner is None else inner.f_code.co_firstlineno, calls().modules[::-1], disabled)
