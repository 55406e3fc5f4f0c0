"""Exported programs and compiled packages of rewritten models.

``torch.export.export`` of a model that :func:`express_compile.rewrite_attention` changed holds its approximate
attention as ops of ours. Importing this module registers them, for a process that loads such a program or a package
that AOTInductor made of it. :func:`decompose` writes them out in plain PyTorch, for one that never imports us.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..core.call import Call
from ..core.method import METHODS
from ..kernels.op import PLAIN

METHODS.load()


def decompose(program: ExportedProgram) -> ExportedProgram:
    """``program`` with every op of ours written out in operations of PyTorch, for one length on the CPU.

    What the ops compute on the CPU, with the same random numbers; a compiler may round in another way, and where two
    rows are nearly alike another one may be kept. A package that AOTInductor compiles from it needs neither Python nor
    this package. The graph grows by hundreds of nodes for each halving, and so does the time to compile it.

    Raises ``RuntimeError`` for attention that has symbolic sizes, that is on another device than the CPU, or whose op
    is not written in plain PyTorch.
    """
    nodes = [x for x in program.graph.nodes if getattr(x.target, "namespace", None) == "express_compile"]
    for node in nodes:
        if (reason := _why_not(node)) is not None:
            raise RuntimeError(f"{node.target}: {reason}")
    module, (args, kwargs) = program.module(), program.example_inputs
    for node in module.graph.nodes:
        node.target = PLAIN.get(node.target, node.target)
    return torch.export.export(module, args, kwargs)


def _why_not(node: Node) -> str | None:
    query, key = (x.meta["val"] for x in (Call.of_node(node).query, Call.of_node(node).key))
    if node.target not in PLAIN:
        return (
            "its sampling is not written in plain PyTorch; keep it as an op, and import express_compile.engines.export"
        )
    if query.device.type != "cpu":
        return f"it is on {query.device}, where it is made of kernels; keep it as an op"
    if any(isinstance(size, torch.SymInt) for size in (*query.shape, *key.shape)):
        return "its sizes are symbols; which rows are kept is laid out for one length: export without dynamic_shapes"
    return None
