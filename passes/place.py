"""Where a graph lies in its model: module paths as ``named_modules()`` gives them, whatever Dynamo made of the calls.

A graph knows a module by its id, and by the words in which the frame that Dynamo compiles reaches it:
``L['self'].attn``, ``L['this'].attn``, or nothing at all for the module whose ``forward`` that frame is. Which module
that is, in which model, and whose call it was that a graph break has parted from its callee, is on the Python stack
while Dynamo compiles (:func:`calls`).

One graph may serve many modules: Dynamo compiles the code of a layer once for all layers that look alike. Where a path
counts, :meth:`Place.pin` lets the graph serve this one only.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import GlobalStateSource, LocalSource
from torch._dynamo.symbolic_convert import tls
from torch.fx import GraphModule, Node

_PATHS = "express_compile_paths"
_CALLS = nn.Module._call_impl.__code__
_CAPTURES = "express_compile.routes.capture"  # has a function of that kind for what rewrite_attention changed
Scope = tuple[Mapping[str, Any], Mapping[str, Any], CodeType]
"""Local names, global names, and the code that uses them."""

_RESUMED = re.compile(r"^torch_dynamo_resume_in_|_at_\d+$")
_TORCH = os.path.dirname(torch.__file__)


# ---- the modules of a model ----------------------------------------------------------------------------------------


def named_modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``root.named_modules()`` with the paths that they had before any was given to ``torch.compile``; what it returned
    for a module has the path of that module, and comes before it."""
    return ((_uncompiled(path), module) for path, module in root.named_modules(prefix=prefix))


def _uncompiled(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def module_paths(root: nn.Module, prefix: str = "") -> dict[str, str]:
    """The id of every module inside ``root`` -> its path: that of :func:`named_modules`.

    Modules that are kept as plain attributes, or in lists, tuples and dicts of them, are not among those; they have the
    path of the attribute, ``"layers.0"``.
    """
    found: dict[str, str] = {}
    pending = deque([(prefix, root)])
    while pending:
        path, module = pending.popleft()
        inside = [(p, m) for p, m in named_modules(module, path) if str(id(m)) not in found]
        found.update((str(id(m)), p) for p, m in inside)
        for p, m in inside:
            for name, value in vars(m).items():
                if name != "_modules":
                    pending.extend(x for x in _modules_in(value, _joined(p, name)) if str(id(x[1])) not in found)
    return found


def _modules_in(value: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(item, (nn.Module, list, tuple, dict)) and item is not value:
                yield from _modules_in(item, _joined(path, str(key)))


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


# ---- the calls on the Python stack ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """What runs on this thread, out to ``torch.compile``.

    compiled: the module or function that was compiled; None if there is none.
    modules: those that are being called inside of it, innermost first.
    outside: the frames around all of them, innermost first.
    """

    compiled: Any
    modules: tuple[nn.Module, ...]
    outside: tuple[FrameType, ...] = ()


def calls() -> Calls:
    """The calls that are in progress, the caller's own frame left out."""
    frame = sys._getframe(1).f_back
    outside: list[FrameType] = []
    modules: list[nn.Module] = []
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and "fn" in frame.f_locals:
            return Calls(_compiled(frame.f_locals["fn"]), tuple(modules), tuple(outside))
        # Dynamo runs changed copies of a code, so it is known by its name
        theirs = code.co_filename == _CALLS.co_filename or frame.f_globals.get("__name__") == _CAPTURES
        if theirs and code.co_name.endswith("_call_impl"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                outside.clear()
                if not modules or modules[-1] is not module:
                    modules.append(module)
        else:
            outside.append(frame)
        frame = frame.f_back
    return Calls(None, tuple(modules))


def _compiled(function: Callable[..., Any]) -> Any:
    """The module whose method was compiled, or the function."""
    while not isinstance(owner := getattr(function, "__self__", None), nn.Module):
        if not hasattr(function, "__wrapped__"):
            return getattr(function, "__func__", function)
        function = function.__wrapped__
    return owner


# ---- the place of a graph ------------------------------------------------------------------------------------------


class Numbers:
    """The numbers of sites inside their modules, for all graphs of a model.

    A module that graph breaks cut into pieces has sites in several of them; each piece goes on counting where those
    before it stopped. A piece is known by its name, so one that is compiled anew has the same numbers.
    """

    def __init__(self) -> None:
        self._of: dict[str, dict[tuple[str, int], int]] = {}

    def __call__(self, path: str, piece: str, i: int) -> int:
        known = self._of.setdefault(path, {})
        return known.setdefault((piece, i), len(known))

    @property
    def paths(self) -> Set[str]:
        """Of the modules that have sites."""
        return self._of.keys()


_NUMBERS: weakref.WeakKeyDictionary[Any, Numbers] = weakref.WeakKeyDictionary()


@dataclass
class Place:
    """Where a graph of Dynamo lies; without arguments one of which nothing is known but what the graph says.

    paths: of the modules that it may be in, by id.
    holders: (id, path) of the modules whose calls it is a part of, outermost first; the path of a module that the
        model does not have is None.
    piece: which piece of the call of the last one; ``""`` for that which begins with the call.
    root: what was compiled; None if that is not known. top: the module that paths are relative to, or None.
    is_outermost: whether it is a piece of the call of that, and of no other.
    holder: the last one; caller: the last one on the stack; local: the name that the frame has for the holder.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    holders: tuple[tuple[str, str | None], ...] = ()
    piece: str = ""
    numbers: Numbers = field(default_factory=Numbers)
    root: Any = None
    top: Any = None
    is_outermost: bool = False
    holder: nn.Module | None = None
    caller: nn.Module | None = None
    local: str | None = None

    @classmethod
    def of_graph(cls, root: nn.Module | None = None, path: str = "") -> Place:
        """The place of the graph that Dynamo compiles just now in this thread.

        root, path: the module that paths are relative to, and its own path; by default what was compiled.
        """
        tx = _translator()
        if tx is None:
            return cls()
        now = calls()
        modules, own = now.modules, tx.f_locals.get("self")
        is_call = tx.f_code.co_filename == _CALLS.co_filename and isinstance(own, nn.Module)
        if is_call and own not in modules[:1]:
            modules = (own, *modules)
        compiled = now.compiled if root is None else root
        if compiled is None and modules:
            compiled = modules[-1]  # another entrance to Dynamo
        if isinstance(compiled, nn.Module):
            paths = module_paths(compiled, path)
            modules = modules if compiled in modules[-1:] else (*modules, compiled)
        elif now.modules:
            paths = paths_of(now)
        else:
            paths = _named(*_own_names(compiled), (tx.f_locals, tx.f_globals, tx.f_code))
        holder = modules[0] if modules else None
        around = is_call or (holder is not None and not now.modules)  # torch's code, or ours, that calls the holder
        begins = around or _is_code_of(tx.f_code, compiled if holder is None else holder)
        begins = begins and not _RESUMED.match(tx.f_code.co_name)
        return cls(
            paths=paths,
            holders=tuple((str(id(module)), paths.get(str(id(module)))) for module in reversed(modules)),
            piece="" if begins else tx.f_code.co_name,
            numbers=Numbers() if compiled is None else _NUMBERS.setdefault(compiled, Numbers()),
            root=now.compiled,
            top=compiled,
            is_outermost=len(modules) < 2 and _RESUMED.sub("", tx.f_code.co_name) in _names(now.compiled),
            holder=holder,
            caller=now.modules[0] if now.modules else None,
            local=next((name for name, value in tx.f_locals.items() if holder is not None and value is holder), None),
        )

    def module(self, path: str) -> nn.Module | None:
        """The module of this path; None if that is not known."""
        modules = self.top.modules() if isinstance(self.top, nn.Module) else ()
        return next((module for module in modules if self.paths.get(str(id(module))) == path), None)

    def name(self, gm: GraphModule) -> None:
        """Let :func:`module_path` give the paths of this place to the nodes of ``gm``."""
        for graph in {part.graph for part in gm.modules() if isinstance(part, GraphModule)}:
            for node in graph.nodes:
                inside = _recorded(node)
                known: Sequence[tuple[str, str | None]]
                known = [(key, self.paths.get(key.partition("@")[0])) for key, _ in inside]
                if not self.holders and known and known[0][1] is None:
                    known = inside  # by the names that a function has for its modules
                node.meta[_PATHS] = (*self.holders, *((key, path) for key, path in known if path is not None))

    @property
    def nearest(self) -> str:
        """The path of the innermost holder that the model has."""
        return next((path for _, path in reversed(self.holders) if path is not None), "")

    @property
    def lost(self) -> str:
        """Why a site of the innermost holder cannot be told from those of other modules."""
        what = type(self.holder).__name__
        return f"the model has no path to the {what} that it is in, which a graph break parts from its caller"

    def number(self, path: str, i: int) -> int:
        """The number of the i-th site that this graph has in the module at ``path``."""
        is_cut = bool(self.holders) and path == self.holders[-1][1]
        return self.numbers(path, self.piece if is_cut else "", i)

    @property
    def is_model(self) -> bool:
        """Whether ``paths`` are those of all modules of what was compiled."""
        return isinstance(self.root, nn.Module)

    def ends(self, gm: GraphModule) -> bool:
        """Whether ``gm`` is the last graph of what was compiled: it ends where that returns."""
        if self.root is None:
            return True
        reason = getattr(gm, "compile_subgraph_reason", None)
        return self.is_outermost and getattr(reason, "reason", "return_value") == "return_value"

    def pin(self) -> None:
        """Let the graph that is compiled just now serve only the module that it is compiled for.

        A whole model in one graph (``fullgraph=True``) has no layers to mix up.
        """
        context, tx = torch._guards.TracingContext.try_get(), _translator()
        if context is None or tx is None or tx.one_graph or self.root is None:
            return
        guards = context.guards_context.dynamo_guards
        if self.local is not None:  # cheap, and says no first
            guards.add(torch._guards.Guard(LocalSource(self.local, is_input=True), GuardBuilder.ID_MATCH))
        guard = partial(_guard_calls, _reference(self.root), _reference(self.caller))
        guards.add(torch._guards.Guard(GlobalStateSource(), guard))


def _guard_calls(root: Callable[[], Any], caller: Callable[[], Any], builder: Any, guard: Any) -> None:
    """Have Dynamo look who calls; layers are no recompilations of each other, so each has a limit of its own."""

    def is_here(_: Any) -> bool:
        now = calls()
        return now.compiled is root() and (now.modules[0] if now.modules else None) is caller()

    builder.guard_manager.root.add_epilogue_lambda_guard(is_here, ["it is called by another module"], None)
    if not builder.id_matched_objs and caller() is not None:
        builder.id_matched_objs["<caller>"] = caller


def _reference(value: Any) -> Callable[[], Any]:
    return (lambda: None) if value is None else weakref.ref(value)


def _names(compiled: Any) -> tuple[str, ...]:
    """The names of the code that a compiled callable begins with; ``inner`` is Dynamo's around modules of torch.nn."""
    return ("forward", "inner") if isinstance(compiled, nn.Module) else (getattr(compiled, "__name__", ""),)


def _is_code_of(code: CodeType, callee: Any) -> bool:
    """Whether it is that of a function, or of the ``forward`` of a module, and not of a helper."""
    function = type(callee).forward if isinstance(callee, nn.Module) else callee
    return callable(function) and getattr(inspect.unwrap(function), "__code__", code) is code


def _translator() -> Any:
    return getattr(tls, "current_tx", None)


def paths_of(now: Calls) -> dict[str, str]:
    """The paths of the modules of what was compiled, by id; those of a function begin with its names for them."""
    if isinstance(now.compiled, nn.Module):
        return module_paths(now.compiled)
    frames = [x for x in reversed(now.outside) if not x.f_code.co_filename.startswith(_TORCH)]
    return _named(*_own_names(now.compiled), *((x.f_locals, x.f_globals, x.f_code) for x in frames))


def _own_names(compiled: Any) -> Iterator[Scope]:
    """What a function has names for before it is called."""
    function = inspect.unwrap(compiled) if callable(compiled) else None
    if isinstance(function, FunctionType):
        yield inspect.getclosurevars(function).nonlocals, function.__globals__, function.__code__


def _named(*scopes: Scope) -> dict[str, str]:
    """The paths of all modules that these scopes have names for; the first name counts."""
    found: dict[str, str] = {}
    for local, world, code in scopes:
        named = [(f"L['{name}']", value) for name, value in local.items()]
        named += [(f"G['{name}']", world[name]) for name in code.co_names if name in world]
        held = [(name, vars(value)) for name, value in named if _has_attributes(value)]
        named += [(f"{name}.{key}", value) for name, inner in held for key, value in inner.items()]
        for name, value in named:
            for path, module in _modules_in(value, name):
                for key, inner in module_paths(module, _in_words(path)).items():
                    found.setdefault(key, inner)
    return found


def _has_attributes(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, (nn.Module, ModuleType))


# ---- the place of a node -------------------------------------------------------------------------------------------


def _recorded(node: Node) -> list[tuple[str, str]]:
    """The modules that a node was traced in, as Dynamo has recorded them: (key, path)."""
    return [(key, _in_words(path)) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]


def _in_words(path: str) -> str:
    """A path of Dynamo, relative to the compiled root. What a function compiles begins with its name for the module."""
    path = re.sub(r"\._modules\[(?:'(\w+)'|\"(\w+)\")\]", lambda m: f".{m[1] or m[2]}", path)
    root = re.match(r"[LG]\['(\w+)'\]", path)
    if root is not None:
        # a compiled module of torch.nn itself is the variable fn of a wrapper
        is_root = root[1] == "self" or root[0] == "L['fn']"
        path = path[root.end() :] if is_root else root[1] + path[root.end() :]
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    return _uncompiled(path.removeprefix("."))


def module_path(nodes: Iterable[Node]) -> str | None:
    """Path of the innermost module that all of ``nodes`` were traced in, ``""`` for the root.

    That of :meth:`Place.name`, where None means a module that the model does not have; else relative to the frame that
    Dynamo compiled.
    """
    stacks = [node.meta.get(_PATHS) or tuple(_recorded(node)) for node in nodes]
    common = list(takewhile(lambda level: len(set(level)) == 1, zip(*stacks, strict=False)))
    return common[-1][0][1] if common else ""
