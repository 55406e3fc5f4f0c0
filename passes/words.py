"""What a node of a graph is called in the user's words: never by the name that Dynamo gave it."""

from __future__ import annotations

import re
from os.path import basename

import torch
from torch.fx import Node

from .nodes import dynamo_source, reached, sources, tensor_of

_FRAME = re.compile(r'File "(.+)", line (\d+)')
_VARIABLE = re.compile(r"[LG]\['(\w+)'\]")
_PART = re.compile(r"\._(?:modules|buffers|parameters)\['(\w+)'\]|\.(\w+)|\['(\w+)'\]|\[(\d+)\]")
_SYMBOLS = {"getitem": "an item", "iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/="}


def source_line(node: Node) -> str:
    """``file:line`` of the innermost frame outside torch that made a node; ``""`` if it was not recorded."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return ":".join(outside[-1]) if outside else ""


def spoken(node: Node) -> str:
    """``'mask'`` for an argument of that name, ``'attn.bias'`` for a buffer, and for a result what made it of what and
    where: ``cumsum of 'positions' (model.py:12)``."""
    if node.op == "placeholder":
        return _input(node)
    name = _SYMBOLS.get(label(node), label(node))
    inputs, line = sorted(_sources(node)), source_line(node)
    of = f" of {' and '.join(inputs)}" if 0 < len(inputs) < 3 else ""
    return f"{name}{of}{f' ({basename(line)})' if line else ''}"


def _sources(node: Node) -> set[str]:
    """The arguments and buffers that a node is computed from."""
    return {_input(x) for x in reached(node, sources) if x.op == "placeholder" and tensor_of(x) is not None}


def label(node: Node) -> str:
    """The same in one word, for formulas: an argument or a buffer, or what was called."""
    if node.op == "placeholder":
        return _input(node).strip("'").replace(" ", "_")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.rpartition("::")[2].strip("_")


def is_parameter(node: Node) -> bool:
    """Whether a node is a parameter of a module, or a view of one."""
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter) or "._parameters[" in _source(node)


def _source(node: Node) -> str:
    """Where Dynamo has an input from: ``L['self']._buffers['mask']``; ``""`` if that is not known."""
    name = getattr(dynamo_source(node), "name", "")
    return str(name() if callable(name) else name)


def _input(node: Node) -> str:
    name = _source(node)
    variable = _VARIABLE.match(name)
    parts = [] if variable is None else list(_PART.finditer(name, variable.end()))
    if variable is None or "".join(part[0] for part in parts) != name[variable.end() :]:
        return "an input of the graph"
    of_module = variable[1] == "self" or (parts and parts[0][1] is not None)
    words = "" if of_module and parts else variable[1]
    for part in parts:
        inner = part[1] or part[2]
        words += f".{inner}" if inner else f"[{part[4] or repr(part[3])}]"
    return f"'{words.removeprefix('.')}'"
