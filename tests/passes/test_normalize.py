"""The normaliser against PyTorch: what it reads of a call is what ``make_fx(pre_dispatch=True)`` records of it.

Every name that ``normalize.py`` knows is written in every way that PyTorch takes: as a function, a method, an
operator, an aten packet or overload, with its arguments by position or by keyword. The oracle is the aten call that
remains, read by its schema.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from express_compile.passes import normalize
from express_compile.passes.normalize import Operation, in_place, mutated_inputs, operation


class Input(str):
    """A placeholder of the program, by its name in ``INPUTS``."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


INPUTS = {
    **{"a": torch.tensor([[True, False, True], [False, False, True]]), "i": torch.arange(6).view(2, 3)},
    **{"t": normal(2, 3), "u": normal(2, 3) + 2, "x": normal(2, 3, 4), "y": normal(2, 4, 5), "z": normal(2, 3, 5)},
    **{
        "q": normal(2, 2, 3, 4),
        "one": normal(2, 1, 3),
        "s": torch.tensor(2.0),
        "n": normal(3, 2).T,
        "b": ~torch.eye(2, 3).bool(),
    },
}
A, B, J, N, ONE, Q, S, T, U, X, Y, Z = map(Input, ("a", "b", "i", "n", "one", "q", "s", "t", "u", "x", "y", "z"))

# the arguments of a name, by the keyword that PyTorch has for them
_BINARY: list[dict[str, Any]] = [{"input": T, "other": U}, {"input": T, "other": 3}, {"input": 3, "other": T}]
_BITWISE = [{"input": A, "other": B}, {"input": J, "other": 3}]
_UNARY: list[dict[str, Any]] = [{"input": T}]
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("add", "sub"), [*_BINARY, {"input": T, "other": U, "alpha": 2}]),
    **dict.fromkeys(("mul", "div", "eq", "ne", "lt", "le", "gt", "ge"), _BINARY),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor"), _BITWISE),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor"), [{"input": A, "other": B}, {"input": T, "other": A}]),
    **dict.fromkeys(("floor_divide", "remainder"), _BINARY[:2]),
    **dict.fromkeys(("maximum", "minimum"), _BINARY[:1]),
    "clamp": [{"input": T, "min": 0.0}, {"input": T, "min": -0.5, "max": 0.5}],
    "clamp_min": [{"input": T, "min": 0.0}],
    "fill": [{"input": T, "value": 0.5}],
    "fill_diagonal": [{"input": T, "fill_value": 0.5}, {"input": N, "fill_value": 0.5, "wrap": True}],
    "eye": [{"n": 3}, {"n": 2, "m": 3}],
    "diag": [{"input": T}, {"input": T, "diagonal": 1}],
    "nan_to_num": [{"input": T}, {"input": T, "nan": 0.5}],
    "pad": [{"input": T, "pad": (1, 2)}, {"input": T, "pad": (1, 0, 0, 1), "mode": "constant", "value": 0.5}],
    **dict.fromkeys(("exp", "log"), _UNARY),
    **dict.fromkeys(("neg", "abs", "clone", "detach", "ones_like", "zeros_like"), _UNARY),
    "contiguous": [{"input": N}],
    "bitwise_not": [{"input": A}, {"input": J}],
    "logical_not": [{"input": A}, {"input": T}],
    "where": [{"condition": A, "input": T, "other": U}, {"condition": A, "input": T, "other": 0.0}],
    "masked_fill": [{"input": T, "mask": A, "value": 0.5}, {"input": T, "mask": A, "value": S}],
    **dict.fromkeys(("tril", "triu"), [{"input": T}, {"input": T, "diagonal": -1}]),
    "cumsum": [{"input": T, "dim": -1}, {"input": A, "dim": 0}],
    "diff": [{"input": T}, {"input": X, "n": 2, "dim": 1}, {"input": X, "dim": 1, "prepend": X}],
    "arange": [{"end": 4}, {"start": 1, "end": 7, "step": 2}],
    "scalar_tensor": [{"s": 2.5}],
    "full": [{"size": (2, 3), "fill_value": 0.5}],
    "new_full": [{"input": T, "size": (4, 5), "fill_value": 0.5}],
    "full_like": [{"input": T, "fill_value": 0.5}],
    **dict.fromkeys(("ones", "zeros"), [{"size": (2, 3)}]),
    **dict.fromkeys(("new_ones", "new_zeros"), [{"input": T, "size": (4, 5)}]),
    "unsqueeze": [{"input": T, "dim": 0}, {"input": T, "dim": -1}],
    "squeeze": [{"input": ONE}, {"input": ONE, "dim": 1}, {"input": ONE, "dim": (1,)}],
    "flatten": [{"input": X}, {"input": X, "start_dim": 1}, {"input": X, "end_dim": 1}],
    "unflatten": [{"input": X, "dim": -1, "sizes": (2, 2)}],
    "view": [{"input": X, "size": (6, -1)}],
    "reshape": [{"input": X, "shape": (6, -1)}],
    **dict.fromkeys(("expand", "broadcast_to"), [{"input": ONE, "size": (2, 4, 3)}]),
    "expand_as": [{"input": T, "other": U}],
    "repeat": [{"input": T, "repeats": (2, 1)}],
    "repeat_interleave": [{"input": X, "repeats": 2, "dim": 1}],
    "transpose": [{"input": X, "dim0": 0, "dim1": -1}],
    "permute": [{"input": X, "dims": (2, 0, 1)}],
    "to": [{"input": T, "dtype": torch.float64}, {"input": J, "dtype": torch.float32}],
    "scaled_dot_product_attention": [
        {"query": Q, "key": Q, "value": Q},
        {"query": Q, "key": Q, "value": Q, "attn_mask": None, "dropout_p": 0.0, "is_causal": True, "scale": 0.5},
    ],
    "softmax": [{"input": T, "dim": -1}, {"input": T, "dim": 1, "dtype": torch.float64}],
    "log_softmax": [{"input": T, "dim": -1}],
    **dict.fromkeys(("amax", "sum", "logsumexp"), [{"input": T, "dim": -1, "keepdim": True}]),
    "max": [{"input": T, "dim": -1, "keepdim": True}, {"input": T, "dim": 0}],
    "dropout": [{"input": T, "p": 0.0, "training": True}, {"input": T, "p": 0.3, "training": False}],
    "matmul": [{"input": X, "other": Y}],
    "bmm": [{"input": X, "mat2": Y}],
    "baddbmm": [
        {"input": Z, "batch1": X, "batch2": Y},
        {"input": Z, "batch1": X, "batch2": Y, "beta": 0, "alpha": 0.5},
    ],
}
# of an alias that takes others than what it means
OF_ALIASES: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("float", "double", "half", "bfloat16", "bool"), [{"input": J}]),
    **dict.fromkeys(("int", "long"), [{"input": T}]),
    "type": [{"input": T, "dtype": torch.float64}],
    "type_as": [{"input": T, "other": J}],
    **dict.fromkeys(("_softmax", "_log_softmax"), [{"input": T, "dim": -1, "half_to_float": False}]),
}
# of which no one aten call is left: slices become several, a constant is none, and so is a cast to where a tensor is;
# or which are written in place alone
WITHOUT_ATEN = {"getitem", "tensor", "einsum", "cpu", "cuda"} | {
    *("cat", "concat", "concatenate", "tile", "softmin", "zero", "special_softmax", "special_log_softmax"),
    *("special_logsumexp", "_safe_softmax", "mod", "floordiv", "clip", "fill_diagonal"),
}

# what torch calls an argument elsewhere: of the methods, of aten, and of aliases
OTHER_KEYWORDS: dict[str, str] = {"input": "self", "training": "train", "dim0": "axis0", "dim1": "axis1"}
# names of aten that are not ours, with what they mean: an oracle must not ask the normaliser
ATEN_NAMES = {
    **{"multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg"},
    **{"absolute": "abs", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le"},
    **{"not_equal": "ne", "swapaxes": "transpose", "swapdims": "transpose", "_unsafe_view": "view"},
    **{"_softmax": "softmax", "_to_copy": "to", "type_as": "to", "__and__": "bitwise_and", "__or__": "bitwise_or"},
    **{"__xor__": "bitwise_xor", "rsub": "sub", "__iand_": "bitwise_and", "__ior_": "bitwise_or"},
    **{"__ixor_": "bitwise_xor", "clip": "clamp", "_safe_softmax": "softmax", "_log_softmax": "log_softmax"},
    **{"special_softmax": "softmax", "special_log_softmax": "log_softmax", "special_logsumexp": "logsumexp"},
}
ATEN_PARAMETERS = {
    **{"self": "input", "mat2": "other", "train": "training", "axis0": "dim0", "axis1": "dim1"},
    ("view", "size"): "shape",
    ("_unsafe_view", "size"): "shape",
    ("scalar_tensor", "s"): "data",
}
_SYMMETRIC = ("bitwise_and", "bitwise_or", "bitwise_xor", "add", "mul")
MIRRORED = {name: name for name in _SYMMETRIC} | {
    "eq": "eq",
    "ne": "ne",
    "lt": "gt",
    "le": "ge",
    "gt": "lt",
    "ge": "le",
}

Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]  # kind of the node, its target, arguments, keyword arguments


def distinct(calls: Iterator[Call]) -> list[Call]:
    """The calls that PyTorch takes, each once."""
    different = {
        (kind, target, repr(args), repr(kwargs)): (kind, target, args, kwargs) for kind, target, args, kwargs in calls
    }
    return [call for call in different.values() if runs(call)]


def written(name: str, arguments: dict[str, Any], alias: str) -> Iterator[Call]:
    """Every way to call ``alias``, which means ``name``, with these arguments."""
    values = tuple(arguments.values())
    keywords = [dict(arguments), {OTHER_KEYWORDS.get(k, k): v for k, v in arguments.items()}]
    spread = [values]
    if isinstance(values[-1], tuple):  # sizes one by one
        spread.append((*values[:-1], *values[-1]))
    packet = getattr(torch.ops.aten, alias, None)
    functions = [getattr(space, alias, None) for space in (torch, F, torch.Tensor, torch._C._nn)]
    functions += [packet, *([getattr(packet, overload) for overload in packet.overloads()] if packet else [])]
    for function in filter(callable, functions):
        yield from (("call_function", function, way, {}) for way in spread)
        for named, kept in itertools.product(keywords, range(len(arguments) + 1)):
            by_name = dict(list(named.items())[kept:])
            yield "call_function", function, values[:kept], by_name
    if isinstance(values[0], Input) or name == "where":
        # x.where(condition, other)
        places = [1, 0, 2] if name == "where" else range(len(values))
        ordered = {list(arguments)[place]: values[place] for place in places}
        own, rest = next(iter(ordered.values())), dict(list(ordered.items())[1:])
        for way in spread:
            yield "call_method", alias, (*ordered.values(),) if name == "where" else way, {}
        for named in (rest, {OTHER_KEYWORDS.get(k, k): v for k, v in rest.items()}):
            yield from (("call_method", alias, (own, *values[1:n]), dict(list(named.items())[n - 1 :])) for n in (1, 2))


_OPERATORS = {
    "div": "truediv",
    "bitwise_and": "and_",
    "bitwise_or": "or_",
    "bitwise_xor": "xor",
    "bitwise_not": "invert",
}


def with_operators(name: str, arguments: dict[str, Any]) -> Iterator[Call]:
    """``x & y``, ``x.__and__(y)`` and ``y.__rand__(x)``."""
    function = getattr(operator, _OPERATORS.get(name, name), None)
    values = tuple(arguments.values())
    if function is None or "alpha" in arguments or not isinstance(values[0], Input | int | float):
        return
    yield "call_function", function, values, {}
    if function is operator.invert:
        yield "call_function", operator.inv, values, {}
    symbol = function.__name__.removesuffix("_")
    if isinstance(values[0], Input):
        yield "call_method", f"__{symbol}__", values, {}
    if isinstance(values[-1], Input) and len(values) == 2:
        yield "call_method", f"__r{symbol}__", values[::-1], {}


def in_place_calls(name: str, arguments: dict[str, Any], alias: str) -> Iterator[Call]:
    """``x.add_(y)``, ``torch.Tensor.add_(x, y)`` and ``x += y``."""
    values = tuple(arguments.values())
    if not isinstance(values[0], Input):
        return
    yield "call_method", f"{alias}_", values, {}
    yield "call_method", f"{alias}_", values[:1], dict(list(arguments.items())[1:])
    yield "call_function", getattr(torch.Tensor, f"{alias}_"), values, {}
    augmented = getattr(operator, f"i{_OPERATORS.get(name, name)}", None)
    if augmented is not None and "alpha" not in arguments:
        yield "call_function", augmented, values, {}
        yield "call_method", f"__{augmented.__name__}__", values, {}


def used(call: Call) -> list[Input]:
    """The placeholders of a call, each once."""
    return list(dict.fromkeys(x for x in (*call[2], *call[3].values()) if isinstance(x, Input)))


def filled(call: Call, values: dict[Input, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with ``values`` for its placeholders."""
    args, kwargs = call[2:]
    insert = lambda x: values[x] if isinstance(x, Input) else x  # noqa: E731
    return tuple(map(insert, args)), {name: insert(x) for name, x in kwargs.items()}


def run(call: Call, values: dict[Input, torch.Tensor]) -> Any:
    args, kwargs = filled(call, values)
    if call[0] == "call_function":
        return call[1](*args, **kwargs)
    return getattr(args[0], call[1])(*args[1:], **kwargs)


def fresh(call: Call) -> dict[Input, torch.Tensor]:
    return {name: INPUTS[name].clone() for name in used(call)}


def runs(call: Call) -> bool:
    """Whether PyTorch takes a call."""
    try:
        return isinstance(run(call, fresh(call)), torch.Tensor | tuple)
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False


def node_of(call: Call) -> Node:
    graph = torch.fx.Graph()
    values = {name: graph.placeholder(name) for name in used(call)}
    for name, node in values.items():
        node.meta["example_value"] = INPUTS[name]
    return graph.create_node(*call[:2], *filled(call, values))


def recorded(calls: Sequence[Call]) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of the one aten call that is recorded of each call; every one gets placeholders of its own."""
    inputs = [fresh(call) for call in calls]

    def program(*tensors: torch.Tensor) -> list[torch.Tensor]:
        left = iter(tensors)
        results = [run(call, {name: next(left) for name in own}) for call, own in zip(calls, inputs, strict=True)]
        return [result[0] if isinstance(result, tuple) else result for result in results]

    traced = make_fx(program, pre_dispatch=True)(*(x for own in inputs for x in own.values()))
    places = [n for n in traced.graph.nodes if n.op == "placeholder"]
    named = dict(zip(places, (name for own in inputs for name in own), strict=True))
    (outputs,) = next(n for n in traced.graph.nodes if n.op == "output").args
    return [read(node.args[0] if node.target is operator.getitem else node, named) for node in outputs]


def read(node: Node, named: dict[Node, Input]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an aten call of placeholders, by its schema."""
    inner = [n for n in node.all_input_nodes if n not in named]
    if node.target is torch.ops.aten.mul.Tensor and [n.target for n in inner] == [torch.ops.aten.reciprocal.default]:
        return "div", {"input": plain(node.args[1], named), "other": plain(inner[0].args[0], named)}
    assert isinstance(node.target, torch._ops.OpOverload) and not inner, f"not one aten call: {node.format_node()}"
    aten, bound = node.target._schema.name.removeprefix("aten::"), {}
    for i, parameter in enumerate(node.target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name, parameter.default_value)
        keyword = ATEN_PARAMETERS.get((aten, parameter.name), ATEN_PARAMETERS.get(parameter.name, parameter.name))
        bound[keyword] = plain(value, named)
    if aten == "rsub":  # other - self
        bound["input"], bound["other"] = bound["other"], bound["input"]
    return ATEN_NAMES.get(aten, aten), bound


def plain(value: Any, named: dict[Node, Input] | None = None) -> Any:
    """An argument as it is compared: a sequence of one is its element, every other one a tuple, a node its name."""
    if isinstance(value, list | tuple):
        values = tuple(plain(x, named) for x in value)
        return values[0] if len(values) == 1 else values
    if isinstance(value, Node):
        return Input(value.name) if named is None else named.get(value, value)
    return value


# what the normaliser leaves out, or says by the result alone
IGNORED = {"memory_format", "layout", "device", "pin_memory", "dtype", "requires_grad", "enable_gqa", "output_size"}


def differs(op: Operation | None, aten: tuple[str, dict[str, Any]]) -> str | None:
    """In words, what an operation says that its aten call does not; None if nothing."""
    name, bound = aten
    if op is None:
        return "is not read"
    given = {k: plain(v) for k, v in op.args.items()}
    if MIRRORED.get(op.name) == name and given.get("input") != bound["input"]:
        given["input"], given["other"] = given["other"], given["input"]
        op = Operation(name, given)
    if op.name != name:
        return f"is read as {op.name}, is {name}"
    if name == "to":
        return None if given["input"] == bound["input"] else f"casts {given['input']}"
    if name == "arange":
        bound = {"start": 0, "step": 1, **bound}
    for keyword in ({*given, *bound}) - IGNORED:
        default = DEFAULTS.get((name, keyword))
        ours, theirs = given.get(keyword, default), bound.get(keyword, default)
        if ours != theirs and not (keyword not in given and theirs in (None, (), False)):
            return f"{keyword} is read as {ours!r}, is {theirs!r}"
    return None


DEFAULTS = {
    **{("add", "alpha"): 1, ("sub", "alpha"): 1, ("tril", "diagonal"): 0, ("triu", "diagonal"): 0},
    **{("diff", "n"): 1, ("diff", "dim"): -1, ("flatten", "start_dim"): 0, ("flatten", "end_dim"): -1},
    **{("scaled_dot_product_attention", "dropout_p"): 0.0, ("baddbmm", "alpha"): 1, ("baddbmm", "beta"): 1},
}


ALIASES = dict(normalize._ALIASES)


def calls_of(name: str) -> Iterator[tuple[str, Call]]:
    """Every call that means ``name`` and that PyTorch takes, with the name it is called by."""
    aliases = [name, *(alias for alias, meant in ALIASES.items() if meant == name)]
    for alias in aliases:
        for arguments in OF_ALIASES.get(alias, ARGUMENTS[name]):
            yield from ((alias, call) for call in distinct(written(name, arguments, alias)))
    for arguments in ARGUMENTS[name]:
        yield from ((call[1].strip("_") if isinstance(call[1], str) else call[1].__name__.strip("_"), call)
                    for call in distinct(with_operators(name, arguments)))  # fmt: skip


def wrong(name: str) -> Iterator[str]:
    """What is read otherwise than it is recorded, of all calls that mean ``name``."""
    calls = [call for _, call in calls_of(name)]
    for call, aten in zip(calls, recorded(calls), strict=True):
        words = differs(operation(node_of(call)), aten)
        if words:
            yield f"{call}: {words}"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_calls_are_read_as_they_are_recorded(name: str) -> None:
    assert list(wrong(name)) == []


def test_every_name_is_written() -> None:
    assert set(ARGUMENTS) | WITHOUT_ATEN >= set(normalize.SIGNATURES)
    tried = {alias for name in ARGUMENTS for alias, _ in calls_of(name)}
    assert tried >= (set(normalize.SIGNATURES) | set(normalize._ALIASES)) - WITHOUT_ATEN
    assert tried >= {name.strip("_") for name in normalize._REFLECTED}


@pytest.mark.parametrize(
    ("name", "table", "changed"),
    [
        ("sub", "SIGNATURES", {"sub": ("other", "input", "alpha")}),
        ("gt", "_ALIASES", {"greater": "ge"}),
        ("transpose", "_KEYWORDS", {"axis0": "dim1", "axis1": "dim0"}),
        ("bitwise_and", "_ALIASES", {"and": "bitwise_or"}),
        ("softmax", "SIGNATURES", {"softmax": ("input", "dtype", "dim")}),
        ("view", "_KEYWORDS", {("view", "size"): "size"}),
    ],
)
def test_a_wrong_normaliser_is_noticed(
    name: str, table: str, changed: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalize, table, {**getattr(normalize, table), **changed})
    assert next(wrong(name), None) is not None


NAMES = {*normalize._WRITES, *(alias for alias, name in normalize._ALIASES.items() if name in normalize._WRITES)}
IN_PLACE = sorted(name for name in NAMES - {"zero"} if hasattr(torch.Tensor, f"{name}_"))


@pytest.mark.parametrize("alias", IN_PLACE)
def test_writes_are_read_as_what_they_write(alias: str) -> None:
    name = normalize._ALIASES.get(alias, alias)
    calls = [c for arguments in ARGUMENTS[name] for c in distinct(in_place_calls(name, arguments, alias))]
    assert len(calls) >= (4 if len(ARGUMENTS[name]) > 1 else 2)
    for call, (aten, bound) in zip(calls, recorded(calls), strict=True):
        node = node_of(call)
        op = in_place(node)
        assert differs(op, (ATEN_NAMES.get(aten.removesuffix("_"), aten.removesuffix("_")), bound)) is None, call
        assert operation(node) is None and mutated_inputs(node) == [node.args[0]]


INDICES = (0, (slice(None), 1), (None, Ellipsis, slice(1, None)), (slice(None), None))


@pytest.mark.parametrize("index", INDICES)
def test_indices(index: Any) -> None:
    for call in distinct(
        (kind, target, (T, index), {})
        for kind, target in (
            ("call_function", operator.getitem),
            ("call_method", "__getitem__"),
        )
    ):
        op = operation(node_of(call))
        assert op.name == "getitem" and op.get("input").name == T
        assert torch.equal(INPUTS[T][op.get("index")], run(call, INPUTS))


def test_constants_and_sums_of_products() -> None:
    for call in (("call_function", torch.tensor, (2.5,), {}), ("call_function", torch.tensor, (), {"data": 2.5})):
        assert operation(node_of(call)) == Operation("tensor", {"data": 2.5})
    x, y = INPUTS[X], INPUTS[Y]
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in (X, Y)]
    for args in (("bqd,bdk->bqk", *nodes), ("bqd,bdk->bqk", nodes)):
        op = operation(graph.call_function(torch.einsum, args))
        assert op == Operation("einsum", {"equation": "bqd,bdk->bqk", "operands": tuple(nodes)})
    assert torch.allclose(torch.einsum(op.get("equation"), x, y), x @ y, atol=1e-6)


def test_what_comes_third_in_a_softmax_is_not_taken_for_a_dtype() -> None:
    softmax = {"input": T, "dim": 1}
    for target, third in ((F.softmax, 3), (torch.softmax, torch.float64), (torch.ops.aten._softmax.default, False)):
        call = ("call_function", target, (T, 1, third), {})
        assert {k: plain(v) for k, v in operation(node_of(call)).args.items()} == softmax
        assert differs(operation(node_of(call)), recorded([call])[0]) is None
    call = ("call_function", F.softmax, (T, 1, 3, torch.float64), {})
    assert {k: plain(v) for k, v in operation(node_of(call)).args.items()} == softmax


def test_functions_that_only_have_the_name_are_not_read() -> None:
    def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x

    assert operation(node_of(("call_function", softmax, (T, -1), {}))) is None
    assert operation(node_of(("call_function", torch.softmax, (T, -1), {}))) is not None
    assert operation(node_of(("call_function", torch.add, (T, U), {"out": T}))) is None


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], Callable[..., Any], tuple[Any, ...]]:
    """A shape and a method that changes the layout of it, with its arguments."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    rank = len(shape)
    dim = st.integers(-rank, rank - 1)
    order = draw(st.permutations(range(rank)))
    pairs: Sequence[tuple[str, tuple[Any, ...]]] = (
        ("transpose", (draw(dim), draw(dim))),
        ("swapaxes", (draw(dim), draw(dim))),
        ("permute", (draw(st.sampled_from([tuple(order), tuple(d - rank for d in order)])),)),
        ("permute", tuple(order)),
        ("unsqueeze", (draw(st.integers(-rank - 1, rank)),)),
        ("squeeze", (draw(dim),)),
        ("flatten", tuple(sorted((draw(st.integers(0, rank - 1)), draw(st.integers(0, rank - 1)))))),
        ("reshape", (-1, shape[0])),
        ("view", ((shape[0], -1),)),
        ("unflatten", (draw(st.just(0)), (1, shape[0]))),
        ("expand", (2, *[-1] * rank)),
        ("repeat", (2, *[1] * rank)),
        ("repeat_interleave", (2, draw(dim))),
    )
    return shape, *draw(st.sampled_from(pairs))


@settings(max_examples=60)
@given(layouts())
def test_layouts_of_any_shape(drawn: tuple[tuple[int, ...], str, tuple[Any, ...]]) -> None:
    """Read as recorded, and what is read computes the same."""
    shape, method, arguments = drawn
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    call = ("call_method", method, (T, *arguments), {})
    before = INPUTS[T]
    INPUTS[T] = x
    try:
        op = operation(node_of(call))
        assert differs(op, recorded([call])[0]) is None
        named = [
            op.args[p.removeprefix("*")] for p in normalize.SIGNATURES[op.name][1:] if p.removeprefix("*") in op.args
        ]
        assert torch.equal(getattr(x, op.name)(*named), run(call, INPUTS))
    finally:
        INPUTS[T] = before
