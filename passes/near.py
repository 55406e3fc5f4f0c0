"""What looks like attention and is none that can be read: it is listed with the reason, and left as it is.

Nothing here is a proof. Two ends make something look like attention: a product of queries and keys leads to it, and it
leads to a product with values. In between may be anything but what starts a new tensor of features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch.fx import Node

from ..core.spec import known_equal
from .normalize import called, operation
from .site import Refused
from .softmax import PRODUCTS, is_of_keys, rank_of, softmax_of
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
_MIXED = "it mixes its heads between the product of queries and keys and the values (talking heads)"


def is_cut_off(node: Node) -> bool:
    """Whether a softmax, whose result is no factor of a product as it is, stands between two products all the same."""
    written = softmax_of(node)
    return isinstance(written.scores, Node) and bool(_keys_before(written.scores)) and _product_after(node)


def weights_leave(node: Node) -> bool:
    """Whether a softmax comes after a product of queries and keys, and leaves its graph without one with values."""
    written = softmax_of(node)
    if written is None or not isinstance(written.scores, Node) or not _keys_before(written.scores):
        return False
    keys = node.meta["example_value"].shape[-1]

    def leaves(last: Node, user: Node) -> bool:
        weights = last.meta.get("example_value")
        same = isinstance(weights, torch.Tensor) and rank_of(last) == rank_of(node)
        return user.op == "output" and same and known_equal(weights.shape[-1], keys)

    return not _product_after(node) and _leads_to(node, leaves)


def weighs_features(node: Node) -> bool:
    """Whether a softmax is of the features that a linear layer has made: a router, a gate or a class."""
    scores, fixed = softmax_of(node).scores, (*_MOVES, "mul", "div", "add", "sub", "to", "contiguous", "clone")
    while isinstance(scores, Node) and called(scores) in fixed and not any(map(_is_data, scores.all_input_nodes[1:])):
        scores = scores.all_input_nodes[0]
    made = isinstance(scores, Node) and called(scores) in ("linear", "addmm", "conv1d", "conv2d", "conv3d")
    return made and not _is_mix(scores)


def _is_data(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor) and not is_parameter(node)


def mixes_heads(softmax: Node) -> Refused | None:
    """The refusal of a softmax with a product over heads before or after it; None for another one."""
    written, after = softmax_of(softmax), [softmax]
    seen = set(after)
    while after:
        for user in after.pop().users:
            if _is_mix(user):
                return Refused(_MIXED)
            if user not in seen and _passes(user):
                seen.add(user)
                after.append(user)
    before, seen = [written.scores], set()
    while before:
        node = before.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if _is_mix(node) and _keys_before(_first(node)):
            return Refused(_MIXED)
        before.extend(node.all_input_nodes if _passes(node) else ())
    return None


def unread(node: Node) -> Refused | None:
    """Why a node that stands for attention, other than a softmax or a function that is opened up, cannot be read; None
    for a node that does not."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        space, _, name = str(node.target).partition(".")
        if space not in (_OWN, "prim") and _KERNEL.search(name.partition(".")[0]):
            return Refused(f"it calls the kernel {space}.{name.partition('.')[0]}", "scaled_dot_product_attention")
    name = called(node)
    if name not in _WEIGHS or any(softmax_of(user) is not None for user in node.users):
        return None
    before = _keys_before(node.all_input_nodes[0]) if node.all_input_nodes else None
    if not before or before & set(_WEIGHS) or not _product_after(node):
        return None
    if name == "exp":
        return Refused("it weighs values by exponentials that are not divided by their sum alone", "a softmax")
    return Refused(f"it weighs values by '{name}' of its scores, not by their softmax", "a softmax")


def _keys_before(scores: Node) -> set[str] | None:
    """The names of what stands between a product of queries and keys and ``scores``; None where there is no product."""
    open_nodes, seen, names, found = [scores], {scores}, {"scores"}, False
    while open_nodes:
        node = open_nodes.pop()
        op = operation(node)
        if op is not None and op.name in PRODUCTS and rank_of(node) > 2 and is_of_keys(op):
            found = found or not any(map(is_parameter, node.all_input_nodes))
        elif _passes(node) or _is_mix(node):
            names.add(called(node) or label(node))
            inputs = (_first(node),) if _is_mix(node) else (*node.all_input_nodes, *_written_into(node))
            fresh = [x for x in inputs if x not in seen]
            seen.update(fresh)
            open_nodes.extend(fresh)
    return names if found else None


def _product_after(weights: Node) -> bool:
    return _leads_to(weights, lambda _, user: called(user) in PRODUCTS and not _is_mix(user))


def _leads_to(weights: Node, is_end: Callable[[Node, Node], bool]) -> bool:
    open_nodes, seen = [weights], {weights}
    while open_nodes:
        node = open_nodes.pop()
        for user in node.users:
            if is_end(node, user):
                return True
            if called(user) == "setitem" and user.args[0] is not node:
                user = user.args[0]
            if user not in seen and (_passes(user) or _is_mix(user)):
                seen.add(user)
                open_nodes.append(user)
    return False


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
        first, _, rest = operation(node).get("equation").replace(" ", "").partition(",")
        return first[-1:] in rest.partition("->")[2]
    return name == "conv2d" or called(inputs[0]) in ("permute", "transpose", "movedim")


def _first(node: Node) -> Node:
    return node.all_input_nodes[0]


def _written_into(node: Node) -> Iterable[Node]:
    """What is assigned to parts of a tensor."""
    return (x for user in node.users if called(user) == "setitem" for x in user.all_input_nodes[1:])
