"""Tracers that would see exact attention where attention was rewritten, or would freeze what one call decided."""

from __future__ import annotations

import torch
from torch import nn

untraced = torch.compiler.disable(
    reason="a model rewritten by rewrite_attention runs its attention eagerly; to compile it whole, call "
    "restore_attention(model) and then torch.compile(model, backend='express')"
)


def is_exporting() -> bool:
    """Whether torch.export is at work, also where Dynamo traces the question: before torch 2.13 it takes
    ``torch.compiler.is_exporting()`` for true whatever it traces for."""
    return torch.compiler._is_exporting_flag


def tracer() -> str | None:
    """The tracer that is at work in this thread, torch.compile left out; None where nothing is traced."""
    if is_exporting():
        return "torch.export"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch.fx._symbolic_trace.is_fx_symbolic_tracing() or torch.fx.experimental.proxy_tensor.get_proxy_mode():
        return "torch.fx"
    return None


def refuse_tracers(module: nn.Module) -> None:
    """Raise ``RuntimeError`` where a call of ``module``, whose attention is rewritten, is traced."""
    if (by := tracer()) is not None:
        raise RuntimeError(cannot_trace(type(module).__name__, by))


@torch.compiler.assume_constant_result
def refuse_strict_export(name: str) -> None:
    """Raise ``RuntimeError`` where Dynamo traces for torch.export; ``name`` is that of the module's class."""
    if is_exporting():
        raise RuntimeError(
            f"{name}: torch.export(strict=True) would lose the rewriting; strict=False, the default, keeps it"
        )


def cannot_trace(name: str, by: str) -> str:
    """The message of that error; ``name`` is that of the module's class."""
    return f"{name}: {by} would lose the rewriting; call restore_attention(model) before it"
