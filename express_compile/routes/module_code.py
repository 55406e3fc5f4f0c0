"""What the code of a module's class says about its attention, without running it."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar, cast

from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def cache(function: F) -> F:
    """``functools.cache`` with the signature of ``function``; mypy does not take the class of a module for hashable."""
    return cast(F, functools.cache(function))


_WHOLE = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
}
_SOFTMAX = {"softmax", "log_softmax", "softmin", "Softmax", "LogSoftmax", "Softmin", "logsumexp"}
_SUMS = {"exp", "sum"}  # a softmax that is written out, if both are there
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__", "@"}


@cache
def _functions(cls: type) -> tuple[Callable[..., Any], ...]:
    """The functions that a class and its bases define, bases left out that say nothing of the attention of a model."""
    bases = [x for x in cls.__mro__ if x not in nn.Module.__mro__ and not _is_machinery(x.__module__)]
    members = [member for base in bases for member in vars(base).values()]
    members = [getattr(member, "__func__", getattr(member, "fget", member)) for member in members]
    return tuple(inspect.unwrap(member) for member in members if inspect.isroutine(member))


def _code(function: Callable[..., Any]) -> Iterator[CodeType]:
    code = getattr(function, "__code__", None)
    return iter(()) if code is None else _parts(code)


def _parts(code: CodeType) -> Iterator[CodeType]:
    pending = [code]
    while pending:
        code = pending.pop()
        yield code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


@cache
def calls_interface(cls: type) -> Callable[..., Any] | None:
    """The method of ``cls`` that looks its attention up in transformers' interface, if there is one."""
    for function in _functions(cls):
        if any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _code(function)):
            return function
    return None


@cache
def depends_on_name(cls: type, name: str) -> bool:
    """Whether a method of ``cls`` reads the name of the attention and mentions ``name``, for something else than to
    look it up (``ALL_ATTENTION_FUNCTIONS["sdpa"]``).

    Such code (the sparse indexers of DeepSeek V3.2, Falcon's own attention) takes another branch under another
    name, so it must go on reading the old one. What runs once, when a module is made, does not count.
    """
    for function in _functions(cls):
        if getattr(function, "__name__", "") == "__init__":
            continue
        codes = list(_code(function))
        if any("_attn_implementation" in code.co_names for code in codes) and any(_mentions(c, name) for c in codes):
            return True
    return False


def _mentions(code: CodeType, name: str) -> bool:
    steps = list(dis.get_instructions(code))
    return any(
        step.opname == "LOAD_CONST" and name in _flat((step.argval,)) and not _is_subscript(after)
        for step, after in zip(steps, [*steps[1:], None], strict=True)
    )


def _is_subscript(step: dis.Instruction | None) -> bool:
    return step is not None and (step.opname == "BINARY_SUBSCR" or step.argrepr == "[]")


@cache
def passes(function: Callable[..., Any], names: tuple[str, ...]) -> bool:
    """Whether ``function`` calls something with an argument of one of these ``names``."""
    constants = {constant for code in _code(function) for constant in _flat(code.co_consts)}
    return not constants.isdisjoint(names)


def _flat(constants: Any) -> Iterator[Any]:
    for constant in constants:
        if isinstance(constant, (tuple, frozenset)):
            yield from _flat(constant)
        else:
            yield constant


def writes_attention(module: Any) -> bool:
    """Whether the code of ``module`` (not of its children) holds attention: as one call, or as softmax and products.

    Read are its class, the functions that it calls by a global name, the functions and callable objects that it keeps
    as attributes, and products that are modules of their own, without parameters. It is a search, no proof: what is
    found is still matched in the graph.
    """
    names = set(_names(type(module)))
    for value in vars(module).values():
        if isinstance(value, FunctionType):
            names |= _reachable((value,))
        elif callable(value) and not isinstance(value, (nn.Module, type)) and not _is_foreign(type(value).__module__):
            names |= _names(type(value))
    for child in module.children():  # products may be modules, too
        if not any(True for _ in (*child.parameters(), *child.children())):
            names |= _names(type(child)) & _PRODUCTS
    return _is_attention(names, module)


def code_writes_attention(code: CodeType, owner: object = None) -> bool:
    """Whether a piece of code, a method of ``owner`` perhaps, holds attention itself and not in what it calls."""
    names = {name for part in _parts(code) for name in _operations(part)}
    return _is_attention(names, owner)


def _is_attention(names: Iterable[str], owner: object) -> bool:
    """Whether code with these names holds attention; ``owner`` may have its softmax as a module."""
    used = frozenset(names)
    softmax = used & _SOFTMAX or used >= _SUMS or (is_module(owner) and _has_softmax(owner))
    return bool(used & _WHOLE or (softmax and used & _PRODUCTS))


def is_module(value: object) -> bool:
    """Whether it is a module, and made already."""
    return isinstance(value, nn.Module) and "_modules" in vars(value)


def _has_softmax(module: Any) -> bool:
    return any(isinstance(child, nn.Softmax | nn.LogSoftmax | nn.Softmin) for child in module.children())


@cache
def _names(cls: type) -> frozenset[str]:
    return _reachable(_functions(cls))


def _reachable(functions: tuple[Callable[..., Any], ...]) -> frozenset[str]:
    """All names in the code of ``functions`` and of what they call by a global name; ``"@"`` for that operator."""
    names: set[str] = set()
    pending, seen = list(functions), set(functions)
    while pending:
        function = pending.pop()
        used = {name for code in _code(function) for name in _operations(code)}
        names |= used
        scope = getattr(function, "__globals__", {})
        values = [scope[name] for name in used & scope.keys()]
        modules = [value for value in values if isinstance(value, ModuleType) and not _is_foreign(value.__name__)]
        values += [vars(module).get(name) for module in modules for name in used]
        called = {inspect.unwrap(value) for value in values if isinstance(value, FunctionType)} - seen
        called = {callee for callee in called if not _is_foreign(callee.__module__)}
        seen |= called
        pending += called
    return frozenset(names)


def _operations(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    if any(step.argrepr in ("@", "@=") for step in dis.get_instructions(code) if step.opname == "BINARY_OP"):
        yield "@"


def _is_machinery(module: str) -> bool:
    """Whether a module is of transformers and no model of it."""
    return module.partition(".")[0] == "transformers" and not module.startswith("transformers.models.")


def _is_foreign(module: str | None) -> bool:
    """Whether a module belongs to Python, torch or the machinery of transformers."""
    root = (module or "").partition(".")[0]
    own = root == "__main__" or (root not in ("", "torch", "numpy") and root not in sys.stdlib_module_names)
    return not own or _is_machinery(module or "")
