"""Torch's own attention layers: what they compute, and the same in the open.

``torch.nn.MultiheadAttention`` arrives as one call of ``torch.nn.functional.multi_head_attention_forward``, and
``torch.nn.TransformerEncoderLayer`` without gradients as one ``torch._transformer_encoder_layer_fwd``. :func:`describe`
reads such a call; what it returns (``Expand``) writes projections, ``scaled_dot_product_attention`` and all that
follows in its place.

Masks: torch hides a key where a boolean mask is True. A float mask counts only if it is proven to hold nothing but 0
and what hides (``symbolic.HIDDEN``). ``is_causal`` is a hint that torch itself trusts only sometimes, and is never
trusted here.

Rows without any visible key: this package's ops give 0 there, and the layer's output its bias, as the SDPA path of
torch does; the fused kernel and the path with ``need_weights=True`` give NaN.

The fused kernel approximates gelu by tanh on CUDA; in the open it is the module's own, exact gelu.

What Dynamo leaves to eager code is no site: ``TransformerEncoder(mask_check=False)`` with a key padding, which makes
nested tensors (``enable_nested_tensor=False`` avoids them), a causal mask without ``is_causal``, whose values torch
compares, and on torch 2.11 the fused kernel with dynamic shapes (``torch.backends.mha.set_fastpath_enabled(False)``).
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..core.spec import AttentionSpec, Mask, known_equal
from .mask import Padding, prove, prove_key_padding
from .normalize import number
from .site import PADDED, Emit, Expand, Refused, Scope, entered
from .symbolic import COORDINATES

OPAQUE: dict[Callable[..., Any], str] = {
    F.multi_head_attention_forward: "multi_head_attention_forward",
    torch._transformer_encoder_layer_fwd: "_transformer_encoder_layer_fwd",
}
"""The functions that are opened up here, and their names."""


@dataclass(frozen=True)
class _Attention:
    """Attention with its projections; ``query`` is ``[L, B, E]`` or ``[L, E]``, or ``[B, L, E]`` if ``batch_first``.

    weights: of query, key and value, ``[E, E_in]`` each, or one ``[3 E, E]`` for all.
    attn_mask: ``[Lq, Lk]``, ``[B * H, Lq, Lk]`` or ``[B, H, Lq, Lk]``; key_padding: ``[B, Lk]`` or ``[Lk]``.
    hinted: torch computes causal attention, whatever ``attn_mask`` holds.
    """

    query: Node
    key: Node
    value: Node
    embed_dim: int
    heads: int
    weights: tuple[Node, ...]
    bias: Node | None
    out_weight: Node
    out_bias: Node | None
    attn_mask: Node | None
    key_padding: Node | None
    dropout_p: float = 0.0
    hinted: bool = False
    batch_first: bool = False


def describe(scope: Scope, node: Node) -> tuple[AttentionSpec, Padding | None, Expand]:
    """What a call of a function in :data:`OPAQUE` computes, where its key padding is, and how to open it up.

    Raises :class:`Refused` for what is not attention alone (learned or zero keys, weights that are used) and for what
    is not known when compiling.
    """
    call, _ = _read(node)
    out = node.meta["example_value"]
    out = out[0] if isinstance(out, tuple) else out
    query, key = _shape(call.query), _shape(call.key)
    batch, length = (0, 1) if call.batch_first else (1, 0)
    B, Lq, Lk = (number(size) for size in (query[batch] if len(query) == 3 else 1, query[length], key[length]))
    mask, padding = _mask(scope, node, call, (B, call.heads, Lq, Lk))
    D = call.embed_dim // call.heads
    spec = AttentionSpec(
        B=B,
        H=call.heads,
        H_kv=call.heads,
        Lq=Lq,
        Lk=Lk,
        D=D,
        Dv=D,
        dtype=out.dtype,
        device=out.device.type,
        scale=1.0 / math.sqrt(D),
        mask=mask,
        dropout_p=call.dropout_p,
    )
    return spec, padding, partial(_open_up, node, scope.contexts)


def _open_up(node: Node, autocast: Sequence[tuple[Any, ...]], emit: Emit) -> tuple[Node, Node]:
    """Read ``node`` as it is now, and write what it computes, with the dtypes ``autocast`` will give at run time."""
    _, expand = _read(node)
    with entered(autocast):
        return expand(emit)


def _read(node: Node) -> tuple[_Attention, Expand]:
    is_layer = OPAQUE[node.target] == "_transformer_encoder_layer_fwd"
    return _encoder_layer(node) if is_layer else _multi_head(node)


# ---- reading -------------------------------------------------------------------------------------------------------

_EXTRA = {
    "bias_k": "it appends a learned key and value (add_bias_kv=True)",
    "bias_v": "it appends a learned key and value (add_bias_kv=True)",
    "add_zero_attn": "it appends a key and a value of zeros (add_zero_attn=True)",
    "static_k": "its key is given after projection (static_k)",
    "static_v": "its value is given after projection (static_v)",
}


def _multi_head(node: Node) -> tuple[_Attention, Expand]:
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    args = bound.arguments
    for name, why in _EXTRA.items():
        if args[name] is not None and args[name] is not False:
            raise Refused(why)
    for user in node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            raise Refused("its output and its attention weights are passed on as one tuple")
        if user.args[1] % 2 == 1 and user.users:
            raise Refused(
                "its attention weights are used; need_weights=False gives its output alone", "need_weights=False"
            )
    separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = separate if _switch(args, "use_separate_proj_weight") else ("in_proj_weight",)
    # torch drops the mask and computes causal attention where the hint is given and nothing else is asked for
    hinted = _switch(args, "is_causal") and args["key_padding_mask"] is None and not _switch(args, "need_weights")
    call = _Attention(
        query=_tensor(args, "query"),
        key=_tensor(args, "key"),
        value=_tensor(args, "value"),
        embed_dim=_integer(args, "embed_dim_to_check"),
        heads=_integer(args, "num_heads"),
        weights=tuple(_tensor(args, name) for name in weights),
        bias=args["in_proj_bias"],
        out_weight=_tensor(args, "out_proj_weight"),
        out_bias=args["out_proj_bias"],
        attn_mask=args["attn_mask"],
        key_padding=args["key_padding_mask"],
        dropout_p=_dropout(args),
        hinted=hinted,
    )
    return call, partial(_attend, call)


def _encoder_layer(node: Node) -> tuple[_Attention, Expand]:
    schema = torch.ops.aten._transformer_encoder_layer_fwd.default._schema.arguments
    args = {parameter.name: parameter.default_value for parameter in schema}
    args.update(zip(args, node.args, strict=False))
    args.update(node.kwargs)
    kind = number(args["mask_type"])
    if args["mask"] is not None and kind not in (0, 1, 2):
        raise Refused(f"its mask is of the unknown type {kind}")
    src = _tensor(args, "src")
    call = _Attention(
        query=src,
        key=src,
        value=src,
        embed_dim=_integer(args, "embed_dim"),
        heads=_integer(args, "num_heads"),
        weights=(_tensor(args, "qkv_weight"),),
        bias=args["qkv_bias"],
        out_weight=_tensor(args, "proj_weight"),
        out_bias=args["proj_bias"],
        attn_mask=None if kind == 1 else args["mask"],
        key_padding=args["mask"] if kind == 1 else None,
        batch_first=True,
    )
    activation = F.gelu if _switch(args, "use_gelu") else F.relu
    return call, partial(_layer, call, args, activation, _switch(args, "norm_first"))


def _tensor(args: Mapping[str, Any], name: str) -> Node:
    example = args[name].meta.get("example_value") if isinstance(args[name], Node) else None
    if not isinstance(example, torch.Tensor):
        raise Refused(f"its {name} is not a tensor of the graph")
    if example.layout != torch.strided or example.is_nested:
        raise Refused(
            f"its {name} is a nested or sparse tensor; enable_nested_tensor=False avoids those of torch", PADDED
        )
    return args[name]


def _integer(args: Mapping[str, Any], name: str) -> int:
    value = number(args[name])
    if not isinstance(value, int):
        raise Refused(f"its {name} is not known when compiling")
    return value


def _switch(args: Mapping[str, Any], name: str) -> bool:
    if not isinstance(args[name], bool):
        raise Refused(f"its {name} is not known when compiling")
    return args[name]


def _dropout(args: Mapping[str, Any]) -> float:
    value = number(args["dropout_p"]) if _switch(args, "training") else 0.0
    if isinstance(value, torch.SymFloat) and statically_known_true(value <= 0.0):
        return 0.0  # torch has asked that, and Dynamo guards the answer
    if not isinstance(value, int | float):
        raise Refused("its dropout_p is not known when compiling")
    return float(value)


def _shape(node: Node) -> torch.Size:
    return node.meta["example_value"].shape


def _mask(scope: Scope, node: Node, call: _Attention, sizes: tuple[Any, Any, Any, Any]) -> tuple[Mask, Padding | None]:
    mask, padding = Mask(), None
    if call.attn_mask is not None:
        b, h, q, k = COORDINATES
        per_head = (b * call.heads + (h if call.heads > 1 else 0), q, k)
        coords = per_head if len(_shape(call.attn_mask)) == 3 else None
        mask, padding = prove(call.attn_mask, sizes, scope, node, coords=coords, hides=True)
    plain = (
        mask.causal and known_equal(mask.offset, 0) and mask.window is None and not mask.padding and not mask.segments
    )
    if call.hinted and mask.unknown is None and not plain:
        mask = Mask(unknown=f"is_causal=True says that it is causal, but it is proven to be: {mask}")
    if call.key_padding is None or mask.unknown is not None:
        return mask, padding
    hidden, keys = prove_key_padding(call.key_padding, scope, node)
    if keys is None:
        return hidden, None
    return replace(mask, padding=True), keys if padding is None else replace(padding, terms=padding.terms + keys.terms)


# ---- opening up ----------------------------------------------------------------------------------------------------


def _attend(call: _Attention, emit: Emit) -> tuple[Node, Node]:
    split, merge = ((0, 2, 1, 3), (0, 2, 1, 3)) if call.batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
    batched = len(_shape(call.query)) == 3
    heads = []
    for x in _projections(call, emit):
        x = x if batched else emit(torch.unsqueeze, x, 1)
        x = emit(torch.unflatten, x, -1, (call.heads, call.embed_dim // call.heads))
        heads.append(emit(torch.permute, x, split))
    visible = _visible(call, emit)
    attention = emit(F.scaled_dot_product_attention, *heads, attn_mask=visible, dropout_p=call.dropout_p)
    out = emit(torch.flatten, emit(torch.permute, attention, merge), -2)
    out = emit(F.linear, out, call.out_weight, call.out_bias)
    return attention, out if batched else emit(torch.squeeze, out, 1)


def _projections(call: _Attention, emit: Emit) -> list[Node]:
    inputs = (call.query, call.key, call.value)
    if len(call.weights) == 1 and len(set(inputs)) == 1:
        return _thirds(emit(F.linear, call.query, call.weights[0], call.bias), -1, emit)
    weights = call.weights if len(call.weights) == 3 else _thirds(call.weights[0], 0, emit)
    biases = (None, None, None) if call.bias is None else _thirds(call.bias, 0, emit)
    return [emit(F.linear, *arguments) for arguments in zip(inputs, weights, biases, strict=True)]


def _thirds(x: Node, dim: int, emit: Emit) -> list[Node]:
    parts = emit(torch.chunk, x, 3, dim)
    return [emit(operator.getitem, parts, i) for i in range(3)]


def _visible(call: _Attention, emit: Emit) -> Node | None:
    """The boolean mask of the masks that are proven: True where both are 0 or False."""
    seen = []
    if call.attn_mask is not None:
        per_head = len(_shape(call.attn_mask)) == 3
        mask = emit(torch.unflatten, call.attn_mask, 0, (-1, call.heads)) if per_head else call.attn_mask
        seen.append(emit(torch.eq, mask, 0))
    if call.key_padding is not None:
        keys = emit(operator.getitem, call.key_padding, (Ellipsis, None, None, slice(None)))
        seen.append(emit(torch.eq, keys, 0))
    return emit(torch.logical_and, *seen) if len(seen) == 2 else (seen or [None])[0]


def _layer(
    call: _Attention, args: Mapping[str, Any], activation: Callable[..., Any], norm_first: bool, emit: Emit
) -> tuple[Node, Node]:
    def norm(x: Node, i: int) -> Node:
        return emit(F.layer_norm, x, (call.embed_dim,), args[f"norm_weight_{i}"], args[f"norm_bias_{i}"], args["eps"])

    def forward(x: Node) -> Node:
        x = emit(activation, emit(F.linear, x, args["ffn_weight_1"], args["ffn_bias_1"]))
        return emit(F.linear, x, args["ffn_weight_2"], args["ffn_bias_2"])

    x = norm(call.query, 1) if norm_first else call.query
    attention, x = _attend(replace(call, query=x, key=x, value=x), emit)
    x = emit(torch.add, call.query, x)
    if norm_first:  # laid out like src, unlike the result of the fused kernel
        return attention, emit(torch.Tensor.contiguous, emit(torch.add, x, forward(norm(x, 2))))
    x = norm(x, 1)
    return attention, norm(emit(torch.add, x, forward(x)), 2)
