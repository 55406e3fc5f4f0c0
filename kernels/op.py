"""Custom ops: one place for their definition and for the only shape checks there are."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch.autograd import forward_ad

from express_compile.core.call import Call
from express_compile.core.options import Options
from express_compile.core.spec import AttentionSpec, known_equal

from . import prepared
from .attend.segments import Outputs
from .padding import each_alone, each_alone_backward
from .spans import Spans


class _Library(torch.library.Library):
    """Ops whose forward-mode derivative is an error: torch.library would leave tangents out without a word."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options: Any) -> None:
        super().impl(op_name, _above(op_name, fn) if dispatch_key == "Autograd" else fn, dispatch_key, **options)


def _above(name: str, kernel: Callable) -> Callable:
    """The autograd ``kernel`` of an op, which tangents do not pass. Where no gradient is asked for and nothing lies
    between it and CUDA, the body is called at once: the way there through the dispatcher takes as long as the body."""

    @functools.wraps(kernel)
    def run(keyset, *args, **options):
        if forward_ad._current_level >= 0 and any(
            isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
        ):
            raise RuntimeError(
                f"express_compile::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, "
                "torch.autograd.forward_ad); take gradients with backward(), or run exact attention: "
                "methods=['exact'], or restore_attention(model)"
            )
        is_direct = prepared.ENABLED and _is_next(keyset.raw_repr())
        if is_direct and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():
                return _ON_CUDA[name](*args, **options)
        return kernel(keyset, *args, **options)

    return run


@functools.cache
def _is_next(keys: int) -> bool:
    """Whether what an op calls below autograd is its body on CUDA, for the ``keys`` of a call."""
    below = torch._C.DispatchKeySet.from_raw_repr(keys) & torch._C._after_autograd_keyset
    return below.highestPriorityTypeId() == torch._C.DispatchKey.CUDA


_ASIDE = prepared.AUTOCAST  # keys for which ops of ours have no kernel
for _key in (torch._C.DispatchKey.BackendSelect, torch._C.DispatchKey.ADInplaceOrView):
    _ASIDE |= torch._C.DispatchKeySet(_key)


def _is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether nothing lies above autograd, nor between it and CUDA, for an op with these tensors in this thread."""
    added, left = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set() | _ASIDE
    found = [(torch._C._dispatch_keys(x) | added) - left for x in tensors]
    return all(keys.highestPriorityTypeId() in _PLAIN and _is_next(keys.raw_repr()) for keys in found)


_PLAIN = {getattr(torch._C.DispatchKey, name) for name in ("CUDA", "AutogradCUDA")}
LIBRARY = _Library("express_compile", "FRAGMENT")
_SCHEMAS: dict[str, str] = {}
_ON_CUDA: dict[str, Callable] = {}

_AUTOGRAD = [getattr(torch._C.DispatchKey, f"Autograd{x}") for x in ("Functionality", "CPU", "CUDA", "Other")]

PLAIN: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""The ops of :func:`define_attention` -> what they compute in plain PyTorch on the CPU, also traced: padding
is not read."""

# float64 has no kernel: it is for references and their tests, on the CPU
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def define_op(
    name: str,
    schema: str,
    body: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> torch._ops.OpOverload:
    """Define ``express_compile::<name>`` with one body for CPU and CUDA, a fake and a gradient.

    ``body`` runs below autograd: a ``backward`` must call an op of its own. Without one the op is not
    differentiable, and raises ``RuntimeError`` when that is tried.
    """
    qualified = f"express_compile::{name}"
    _SCHEMAS[name] = schema
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args, **options):
        with prepared.without_autocast():  # which would cast what a body computes in float32
            return body(*args, **options)

    names = [part.split()[1] for part in schema[1 : schema.index(")")].split(", ") if part != "*"]
    layer_at = names.index("layer") if "layer" in names else None
    LIBRARY.impl(name, run, "CPU")
    _ON_CUDA[name] = prepared.prepared(run, layer_at)
    LIBRARY.impl(name, _ON_CUDA[name], "CUDA")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)

    def refuse(ctx, *grads):
        raise RuntimeError(f"{qualified} has no gradient; methods=['exact'] has those of every order")

    torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context, lib=LIBRARY)
    op: torch._ops.OpOverload = getattr(torch.ops.express_compile, name).default
    op._op = prepared.directly(op._op, _ON_CUDA[name], _is_plain, layer_at)  # before anybody asks for its hash
    declare_sharding(op)
    return op


def declare_sharding(op: torch._ops.OpOverload) -> None:
    """Let an op whose tensors begin with ``[batch, heads]`` take DTensors: its inputs are replicated, or sharded over
    batch, or over heads where KV heads can be shared evenly. ``seed`` is replicated, and may count heads from another
    one on each rank. Does nothing where torch has no distributed package.
    """
    given = {argument.name for argument in op._schema.arguments}
    if not torch.distributed.is_available() or "key" not in given or "cu_seqlens" in given:
        return
    from torch.distributed.tensor import Replicate, Shard, experimental  # not in every build of torch

    names, returns = [argument.name for argument in op._schema.arguments], len(op._schema.returns)

    def placements(*args: Any, **options: Any) -> list[tuple[list[Any], list[Any]]]:
        given = {**dict(zip(names, args, strict=False)), **options}
        key = given["key"]
        found = []
        for split in (None, 0, 1):
            if split is None or any(key.shape[split] % size == 0 for size in key.mesh.shape):
                shared = Replicate() if split is None else Shard(split)
                rows, heads = (shared if split == 0 else Replicate()), (Shard(0) if split == 1 else Replicate())
                own = {"padding": rows, "lengths": rows, "sinks": heads, "seed": Replicate()}
                inputs = [own.get(name, shared) if hasattr(x, "placements") else None for name, x in given.items()]
                found.append(([shared] * returns, inputs))
        return found

    experimental.register_sharding(op)(placements)


def of_any_size(body: Callable[[Call], Any], causal: bool = True) -> Callable[..., Any]:
    """``body(call)``, which returns ``(out, lse)``, as the body of an op, also where some size is 0.

    Checks the arguments; then ``body`` sees at least one sequence, head, query, key and feature of each.
    """

    def run(*args: Any, **options: Any) -> Any:
        call = Call.of_arguments(args, options)
        check_call(call, causal)
        if 0 in call.query.shape[:3]:
            return attention_fake(*call.args)
        if call.Lk == 0:
            out, lse = attention_fake(*call.args)
            return out.zero_(), lse.fill_(-math.inf)
        out, lse = body(_with_features(call))
        return out[..., : call.value.shape[3]].contiguous(), lse

    return run


def gradient_of_any_size(body: Callable[..., Any], causal: bool = True) -> Callable[..., Any]:
    """As :func:`of_any_size` for ``body(call, grad, out, lse)``, which returns gradients of query, key and value; the
    op takes these tensors before the arguments of the call."""

    def run(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *args: Any, **options: Any) -> Any:
        call = Call.of_arguments(args, options)
        check_call(call, causal)
        inputs = (call.query, call.key, call.value)
        if 0 in call.query.shape[:3] or call.Lk == 0:
            return tuple(x.new_zeros(x.shape) for x in inputs)
        grads = body(_with_features(call), _with_feature(grad), _with_feature(out), lse)
        return tuple(g[..., : x.shape[3]].contiguous() for g, x in zip(grads, inputs, strict=True))

    return run


def _with_feature(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a feature of zeros where it has none: of no effect on scores, and cut off from values."""
    return x if x.shape[3] else x.new_zeros(*x.shape[:3], 1)


def _with_features(call: Call) -> Call:
    query, key, value = map(_with_feature, (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value)


def by_autograd(body: Callable[[Call], Any]) -> Callable[..., Any]:
    """The gradient of a body in plain PyTorch, which is computed again for it."""

    def backward(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
            for key in _AUTOGRAD:  # an op's body runs below autograd
                torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
            inputs = [x.detach().requires_grad_() for x in (call.query, call.key, call.value)]
            again, _ = body(replace(call, query=inputs[0], key=inputs[1], value=inputs[2]))
            return torch.autograd.grad(again, inputs, grad)

    return backward


def define_attention(
    name: str,
    options: type[Options],
    body: Callable[[Call], Any],
    backward_body: Callable[..., Any] | None = None,
    causal: bool = True,
    min_length: bool = True,
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """The ops ``<name>`` and ``<name>_backward`` of a method whose gradient needs ``out`` and ``lse`` alone.

    ``body(call)`` returns ``(out, lse)``; ``backward_body(call, grad, out, lse)`` the gradients of query, key and
    value, :func:`by_autograd` unless given. Keyword arguments of the ops are the options, and ``min_length`` if that is
    so. Both get arguments that are checked and of no size 0, and on the CPU no padding: every sequence is computed
    alone. ``causal``: the queries are the last tokens.
    """
    keywords = ", ".join(filter(None, (options.schema(), "int min_length" if min_length else "")))
    tensors = "Tensor query, Tensor key, Tensor value"
    parameters = (
        f"{tensors}, Tensor? padding, Tensor seed, float scale, int layer{', *, ' if keywords else ''}{keywords}"
    )
    gradient = backward_body or by_autograd(body)
    alone, alone_backward = each_alone(body, own=causal), each_alone_backward(gradient, own=causal)

    def forward(call: Call) -> Any:
        return (body if call.padding is None or call.query.is_cuda else alone)(call)

    def backward(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Any:
        run = gradient if call.padding is None or call.query.is_cuda else alone_backward
        return run(call, grad, out, lse)

    def setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        call = Call(*inputs)
        ctx.save_for_backward(*output, call.query, call.key, call.value, call.padding, call.seed)
        ctx.scale, ctx.layer, ctx.options = call.scale, call.layer, keyword_only_inputs
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
        grads = backward_op(grad, *ctx.saved_tensors, ctx.scale, ctx.layer, **ctx.options)
        return *grads, None, None, None, None

    op = define_op(
        name,
        f"({parameters}) -> (Tensor, Tensor)",
        of_any_size(forward, causal),
        attention_fake,
        differentiate,
        setup_context,
    )
    backward_op = define_op(
        f"{name}_backward",
        f"(Tensor grad, Tensor out, Tensor lse, {parameters}) -> (Tensor, Tensor, Tensor)",
        gradient_of_any_size(backward, causal),
        lambda grad, out, lse, query, key, value, *_, **options: tuple(
            x.new_empty(x.shape) for x in (query, key, value)
        ),
    )
    PLAIN[op] = of_any_size(body, causal)
    return op, backward_op


def define_packed(
    name: str,
    op: torch._ops.OpOverload,
    backward: torch._ops.OpOverload,
    over: Callable[[Call, Spans, int, Outputs], None],
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """The ops ``<name>_varlen`` and ``<name>_varlen_backward``: the ops ``op`` and ``backward`` of a causal method for
    packed sequences, each of which gets what it would alone.

    query ``[T, H, D]``, key ``[T, H_kv, D]``, value ``[T, H_kv, Dv]``, with the tokens ``cu_seqlens[b]`` to
    ``cu_seqlens[b + 1]`` of sequence b, int32 ``[B + 1]``, and no more than ``max_seqlen`` of any. Gives ``out``
    ``[T, H, Dv]`` and ``lse`` ``[H, T]``; of tokens in no sequence 0 and minus infinity. On CUDA ``over(call, spans,
    max_seqlen, into)`` computes all sequences at once and reads nothing back; on the CPU, and for gradients, each one
    is a call.
    """
    schema = str(op._schema)
    parameters = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    parameters = parameters.replace("Tensor? padding", "Tensor cu_seqlens, SymInt max_seqlen")

    def forward(*args: Any, **options: Any) -> Any:
        call, cu_seqlens, max_seqlen = _packed_call(args, options)
        T, H, _ = args[0].shape
        out = args[0].new_zeros(T, H, call.value.shape[3])
        lse = args[0].new_full((H, T), -math.inf, dtype=torch.promote_types(out.dtype, torch.float32))
        if call.query.is_cuda and out.numel() and len(cu_seqlens) > 1:
            own = _with_features(call)
            every = (x.expand(len(cu_seqlens) - 1, *x.shape[1:]) for x in (own.query, own.key, own.value))
            into = Outputs(*(x[None].expand(len(cu_seqlens) - 1, *x.shape) for x in (out.transpose(0, 1), lse)))
            own = replace(own, **dict(zip(("query", "key", "value"), every, strict=True)))
            over(own, Spans.of_packed(cu_seqlens, T), min(max_seqlen, T), into)
            return out, lse
        for at, alone in _each_packed(call, cu_seqlens, max_seqlen):
            own_out, own_lse = alone.run(op)
            out[at], lse[:, at] = own_out[0].transpose(0, 1), own_lse[0]
        return out, lse

    def gradient(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *args: Any, **options: Any) -> Any:
        call, cu_seqlens, max_seqlen = _packed_call(args, options)
        grads = tuple(x.new_zeros(x.shape) for x in args[:3])
        for at, alone in _each_packed(call, cu_seqlens, max_seqlen):
            results = *(x[at].transpose(0, 1)[None] for x in (grad, out)), lse[None, :, at]
            for target, part in zip(grads, backward(*results, *alone.args, **alone.keywords), strict=True):
                target[at] = part[0].transpose(0, 1)
        return grads

    def setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        query, key, value, cu_seqlens, max_seqlen, seed, *ctx.others = inputs
        ctx.save_for_backward(*output, query, key, value, cu_seqlens, seed)
        ctx.max_seqlen, ctx.options = max_seqlen, keyword_only_inputs
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
        *saved, seed = ctx.saved_tensors
        grads = packed_backward(grad, *saved, ctx.max_seqlen, seed, *ctx.others, **ctx.options)
        return *grads, *[None] * (3 + len(ctx.others))

    def fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> Any:
        dtype = torch.promote_types(query.dtype, torch.float32)
        return query.new_empty(*query.shape[:2], value.shape[2]), query.new_empty(query.shape[1::-1], dtype=dtype)

    packed = define_op(
        f"{name}_varlen", f"({parameters}) -> (Tensor, Tensor)", forward, fake, differentiate, setup_context
    )
    packed_backward = define_op(
        f"{name}_varlen_backward",
        f"(Tensor grad, Tensor out, Tensor lse, {parameters}) -> (Tensor, Tensor, Tensor)",
        gradient,
        lambda grad, out, lse, query, key, value, *_, **options: tuple(
            x.new_empty(x.shape) for x in (query, key, value)
        ),
    )
    return packed, packed_backward


def _packed_call(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Call, torch.Tensor, int]:
    """The call of all tokens as one sequence, ``[1, H, T, .]``, where each one starts and the most tokens of one.
    Raises ``ValueError`` or ``TypeError`` for arguments that do not fit; on CUDA ``cu_seqlens`` is not read."""
    *tensors, cu_seqlens, max_seqlen, seed, scale, layer = args
    for word, x in zip(("query", "key", "value"), tensors, strict=True):
        if x.dim() != 3:
            raise ValueError(f"{word}: shape {tuple(x.shape)}; must be [tokens, heads, head size]")
    query, key, value = (x.transpose(0, 1)[None] for x in tensors)
    call = Call(query, key, value, None, seed, scale, layer, options=options)
    check_call(call)
    if call.Lq != call.Lk:
        raise ValueError(f"key: {call.Lk} tokens; must be as many as those of query, {call.Lq}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}; must be torch.int32")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.device != tensors[0].device:
        raise ValueError(
            f"cu_seqlens: shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}; must be [sequences + 1] on "
            f"{tensors[0].device}"
        )
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen={max_seqlen}: must be 1 or more")
    return call, cu_seqlens, max_seqlen


def _each_packed(call: Call, cu_seqlens: torch.Tensor, max_seqlen: int) -> Iterator[tuple[slice, Call]]:
    """Where the tokens of every sequence are, and the call of it alone. Reads ``cu_seqlens`` and raises ``ValueError``
    where it does not fit."""
    starts = cu_seqlens.tolist()
    if starts[0] < 0 or starts[-1] > call.Lk or any(not 0 <= b - a <= max_seqlen for a, b in pairwise(starts)):
        raise ValueError(
            f"cu_seqlens={starts}: must rise from 0 to at most {call.Lk}, by at most max_seqlen={max_seqlen} at a time"
        )
    for at in (slice(*ends) for ends in pairwise(starts)):
        query, key, value = (x[:, :, at].contiguous() for x in (call.query, call.key, call.value))
        yield at, replace(call, query=query, key=key, value=value)


def contract() -> str:
    """A digest of the signatures of all ops.

    PyTorch keeps compiled graphs on disk by what their forward pass calls. One that was compiled when the op of a
    gradient took other arguments must not be found again.
    """
    return hashlib.sha256(repr(sorted(_SCHEMAS.items())).encode()).hexdigest()[:16]


def attention_fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **options):
    """``out`` and ``lse`` of any attention op, without values."""
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[:3], dtype=lse_dtype)


def at_the_end(spec: AttentionSpec) -> bool:
    """Whether a causal mask is known to be that of queries which are the last tokens: the last one sees every key."""
    whole = known_equal(spec.Lq, spec.Lk) and known_equal(spec.mask.offset, 0)
    return whole or known_equal(spec.mask.offset, spec.Lk - spec.Lq)


def no_kernel(spec: AttentionSpec) -> str | None:
    """Why nothing can run on the device of a site; the CPU runs the references, in every dtype."""
    if spec.dtype not in (torch.float16, torch.bfloat16, torch.float32) and spec.device != "cpu":
        return f"there is no kernel for {spec.dtype}"
    return None if spec.device in ("cpu", "cuda") else f"there is no kernel for device {spec.device}"


def _check_tensor(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name}: shape {tuple(x.shape)}; must be [batch, heads, length, head size]")
    if x.dtype not in DTYPES or x.dtype != query.dtype:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: dtype {x.dtype}; query, key and value must share one of {allowed}")
    if x.dtype == torch.float64 and x.is_cuda:
        raise TypeError(f"{name}: dtype {x.dtype}; the kernels take float16, bfloat16 or float32")
    if x.device != query.device:
        raise ValueError(f"{name}: on {x.device}, but query is on {query.device}; all must be on one device")


def check_call(call: Call, causal: bool = True) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless the tensors of a call fit together.

    ``query`` ``[B, H, Lq, D]``, ``key`` ``[B, H_kv, Lk, D]``, ``value`` ``[B, H_kv, Lk, Dv]`` of one floating
    dtype and device, ``H_kv`` dividing ``H``, ``Lq <= Lk`` if ``causal``; ``padding`` bool ``[B, Lk]`` or None. Any
    size may be 0.
    """
    query, key, value, padding = call.query, call.key, call.value, call.padding
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, x, query)
    B, H, Lq, D = query.shape
    if key.shape[0] != B or key.shape[3] != D:
        raise ValueError(f"key: shape {tuple(key.shape)}; batch and head size must be those of query, {B} and {D}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: shape {tuple(value.shape)}; must begin like key's, {tuple(key.shape[:3])}")
    if H % key.shape[1] if key.shape[1] else H:
        raise ValueError(f"key: {key.shape[1]} heads; must divide the {H} heads of query")
    if causal and Lq > key.shape[2]:
        raise ValueError(f"query: {Lq} rows; must be at most the number of keys, {key.shape[2]}")
    if padding is None:
        return
    if padding.dtype != torch.bool:
        raise TypeError(f"padding: dtype {padding.dtype}; must be torch.bool, True for a real token")
    if padding.shape != (B, key.shape[2]) or padding.device != query.device:
        raise ValueError(
            f"padding: shape {tuple(padding.shape)} on {padding.device}; must be {(B, key.shape[2])} on {query.device}"
        )
