"""What looks like attention and is none that can be read: it is listed with the reason, and left as it is.

Nothing here is a proof. Two ends make something look like attention: a product of queries and keys leads to it, and it
leads to a product with values. In between may be anything but what starts a new tensor of features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from ..core.spec import known_equal
from .nodes import reached, shape_of, tensor_of
from .normalize import called, operation
from .site import Refused
from .softmax import PRODUCTS, Softmax, is_of_keys, letters, rank_of, softmax_of
from .words import is_parameter, label

_NEW_FEATURES = frozenset(
    ("linear", "conv1d", "conv2d", "conv3d", "addmm", "embedding", "layer_norm", "group_norm", "batch_norm", "rms_norm")
    + ("scaled_dot_product_attention", "softmax", "log_softmax", "multi_head_attention_forward", *PRODUCTS)
)
_MOVES = (
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "getitem",
    "expand",
)
_WEIGHS = ("sigmoid", "relu", "relu6", "elu", "silu", "gelu", "softplus", "leaky_relu", "tanh", "exp", "square", "pow")
_KERNEL = re.compile(r"(^|_)(attention|attn|mha|mla)(_|$)|flash", re.IGNORECASE)
_OWN = "express_compile"
_PLAIN = "torch.nn.functional.scaled_dot_product_attention"
_MIXED = "it mixes its heads between the product of queries and keys and the values (talking heads)"


def is_cut_off(written: Softmax) -> bool:
    """Whether a softmax, whose result is no factor of a product as it is, stands between two products all the same."""
    between = isinstance(written.scores, Node) and bool(_keys_before(written.scores))
    return between and _product_after(written.nodes[-1])


def weights_leave(node: Node) -> bool:
    """Whether a softmax comes after a product of queries and keys, and leaves its graph without one with values."""
    written = softmax_of(node)
    if written is None or not isinstance(written.scores, Node) or not _keys_before(written.scores):
        return False
    last = (x for x in reached(node, _after) if any(user.op == "output" for user in x.users))
    alike = (x for x in last if rank_of(x) == rank_of(node) and known_equal(shape_of(x)[-1], shape_of(node)[-1]))
    return any(alike) and not _product_after(node)


def weighs_features(written: Softmax) -> bool:
    """Whether a softmax is of the features that a linear layer has made: a router, a gate or a class."""
    scores, fixed = written.scores, (*_MOVES, "mul", "div", "add", "sub", "to", "contiguous", "clone")
    while isinstance(scores, Node) and called(scores) in fixed and not any(map(_is_data, scores.all_input_nodes[1:])):
        scores = scores.all_input_nodes[0]
    made = isinstance(scores, Node) and called(scores) in ("linear", "addmm", "conv1d", "conv2d", "conv3d")
    return made and not _is_mix(scores)


def _is_data(node: Node) -> bool:
    return tensor_of(node) is not None and not is_parameter(node)


def mixes_heads(written: Softmax) -> Refused | None:
    """The refusal of a softmax with a product over heads before or after it; None for another one."""
    after = reached(written.nodes[-1], lambda node: filter(_passes, node.users))
    before = reached(written.scores, lambda node: node.all_input_nodes if _passes(node) else ())
    mixed = any(_is_mix(user) for node in after for user in node.users)
    mixed = mixed or any(_is_mix(node) and _keys_before(_first(node)) for node in before)
    return Refused(_MIXED) if mixed else None


def unread(node: Node) -> Refused | None:
    """Why a node that stands for attention, other than a softmax or a function that is opened up, cannot be read; None
    for a node that does not."""
    if node.target is torch.ops.higher_order.flex_attention:
        return Refused("it is flex_attention, whose score_mod and block_mask are code that is not read", _PLAIN)
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        space, _, name = str(node.target).partition(".")
        if space not in (_OWN, "prim") and _KERNEL.search(name.partition(".")[0]):
            return Refused(f"it calls the kernel {space}.{name.partition('.')[0]}", "scaled_dot_product_attention")
    name = (called(node) or "").removesuffix("_")
    if name not in _WEIGHS or any(softmax_of(user) is not None for user in node.users):
        return None
    before = _keys_before(_first(node)) if node.all_input_nodes else None
    if not before or before & set(_WEIGHS) or not _product_after(node):
        return None
    if name == "exp":
        return Refused("it weighs values by exponentials that are not divided by their sum alone", "a softmax")
    return Refused(f"it weighs values by '{name}' of its scores, not by their softmax", "a softmax")


def _keys_before(scores: Node) -> set[str] | None:
    """The names of what stands between a product of queries and keys and ``scores``; None where there is no product."""
    names, found = {"scores"}, False
    for node in reached(scores, _before):
        if _is_of_keys(node):
            found = found or not any(map(is_parameter, node.all_input_nodes))
        elif _passes(node) or _is_mix(node):
            names.add(called(node) or label(node))
    return names if found else None


def _before(node: Node) -> Iterable[Node]:
    """What may be scores before a node that may be."""
    if _is_of_keys(node):
        return ()
    if _is_mix(node):
        return (_first(node),)
    assigned = (x for user in node.users if called(user) == "setitem" for x in user.all_input_nodes[1:])
    return (*node.all_input_nodes, *assigned) if _passes(node) else ()


def _is_of_keys(node: Node) -> bool:
    op = operation(node)
    return op is not None and op.name in PRODUCTS and rank_of(node) > 2 and is_of_keys(op)


def _product_after(weights: Node) -> bool:
    users = (user for node in reached(weights, _after) for user in node.users)
    return any(called(user) in PRODUCTS and not _is_mix(user) for user in users)


def _after(node: Node) -> Iterator[Any]:
    """What may be weights after a node that may be; what they are assigned to is."""
    for user in node.users:
        result = user.args[0] if called(user) == "setitem" and user.args[0] is not node else user
        if isinstance(result, Node) and (_passes(result) or _is_mix(result)):
            yield result


def _passes(node: Node) -> bool:
    """Whether a call keeps scores what they are: no sum over features, and a tensor."""
    if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    example = node.meta.get("example_value")
    tensors = example if isinstance(example, tuple | list) else (example,)
    return called(node) not in _NEW_FEATURES and all(isinstance(x, torch.Tensor) for x in tensors)


def _is_mix(node: Node) -> bool:
    """Whether a product sums over heads: over another dimension than the last of something of four dimensions."""
    name, inputs = called(node), node.all_input_nodes
    if name not in ("linear", "conv2d", "einsum", "matmul") or len(inputs) < 2 or rank_of(node) != 4:
        return False
    if rank_of(inputs[0]) != 4 or (name != "conv2d" and rank_of(inputs[1]) > 2):
        return False
    if name == "einsum":
        op = operation(node)
        first, _, result = ("", "", "") if op is None else letters(op)
        return first[-1:] in result
    return name == "conv2d" or called(inputs[0]) in ("permute", "transpose", "movedim")


def _first(node: Node) -> Node:
    return node.all_input_nodes[0]
