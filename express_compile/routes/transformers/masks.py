"""The mask of a rewritten Hugging Face model: what is proven about it travels inside it.

transformers builds one mask per forward pass and hands it through the model to every attention module.
:func:`make_mask` builds it under our name: a :class:`ProvenMask` where transformers asked for plain causal or
bidirectional attention and sdpa would get a dense mask, and in every other case exactly what sdpa would get. A model
that ran eager attention gets a mask wherever that got one: sdpa may do without and go by ``module.is_causal``, which
eager attention does not read and models set without regard to it (PaliGemma).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.utils.import_utils import is_tracing

from ...core.spec import Mask
from ...kernels.launch import on_another_thread
from ..program import without_wide_window
from ..tracers import is_exporting, untraced
from .mask_functions import proven

NAME = "express_compile"
# The attention that a model ran before -> the name under which it runs ours, which has to mean the same.
NAMES = {"sdpa": NAME, "eager": f"{NAME}_eager"}
# The name while transformers batches continuously: to names with "flash" in them it hands lengths instead of masks.
PAGED = f"{NAME}_flash"
_REASON = "_express_compile_reason"  # an attribute of a mask that is not proven


def reason_of(mask: torch.Tensor) -> str:
    """Why a mask is not proven, in words."""
    kind = "a dense mask" if mask.dtype == torch.bool else "an additive mask, such as a position bias,"
    return getattr(mask, _REASON, f"{kind} that the model or the caller built")


class ProvenMask(torch.Tensor):
    """A mask ``[B, 1, Lq, Lk]`` that is proven, and is only computed if somebody looks at it.

    Any torch operation on it is that on the plain boolean tensor which transformers' sdpa mask would hold, so code that
    does not know the class gets the right numbers and loses the proof. Detached, copied by ``deepcopy`` or moved to
    another device it keeps the proof; who writes into it, or into a view of it, takes the proof away.

    proven: what a query sees of the first ``visible`` keys; it sees none of the others.
    padding: bool ``[B, visible]``, True for real tokens, or None when there are only real ones.
    """

    proven: Mask
    visible: int
    padding: torch.Tensor | None
    _arguments: dict[str, Any]
    _exact: torch.Tensor | None
    _version_built: int

    @staticmethod
    def __new__(
        cls: type[ProvenMask], proven: Mask, visible: int, padding: torch.Tensor | None, arguments: dict[str, Any]
    ) -> ProvenMask:
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=arguments["device"])
        mask.proven, mask.visible, mask.padding = proven, visible, padding
        mask._arguments, mask._exact, mask._version_built = arguments, None, 0
        return mask

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in _METADATA:
                return function(*args, **kwargs)
            if (keep := _KEEP.get(function)) is not None and args[0].is_proven:
                if (kept := keep(*args, **kwargs)) is not None:
                    return kept
            # here and not below the dispatcher, where writes into views are not counted
            args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.exact, (args, kwargs))
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.exact, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ProvenMask(shape={tuple(self.shape)}, proven={str(self.proven)!r}, visible={self.visible})"

    @property
    def is_proven(self) -> bool:
        """Whether the proof still holds: nothing was written into the tensor."""
        return self._exact is None or self._exact._version == self._version_built

    def exact(self) -> torch.Tensor:
        """The boolean tensor ``[B, 1, Lq, Lk]``, for transformers' sdpa attention; computed once for all layers."""
        if self._exact is None:
            never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            with torch.inference_mode(False):  # inference tensors do not count what is written into them
                exact = _sdpa_mask({**self._arguments, **never})
                assert exact is not None, "nothing is skipped"
                # an expanded tensor could not be written into
                self._exact = exact.clone() if exact.is_inference() else exact.contiguous()
            self._version_built = self._exact._version
        return self._exact

    def _copied(self, copy: Callable[[torch.Tensor], torch.Tensor], device: Any) -> ProvenMask:
        known = self._arguments["attention_mask"]
        arguments = {**self._arguments, "attention_mask": None if known is None else copy(known), "device": device}
        padding = None if self.padding is None else copy(self.padding)
        return type(self)(self.proven, self.visible, padding, arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self._copied(torch.clone, self.device) if self.is_proven else self.exact().clone()
        memo[id(self)] = copied
        return copied

    # What looks at the memory of a tensor without any operation on it.

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.exact().__reduce_ex__(protocol)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.exact().__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.exact().__dlpack__(*args, **kwargs)

    def numpy(self, **kwargs: Any) -> Any:
        return self.exact().numpy(**kwargs)

    def tolist(self) -> Any:
        return self.exact().tolist()

    def data_ptr(self) -> int:
        return self.exact().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.exact().untyped_storage()


_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "device", "dtype", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "requires_grad", "data")
}
_METADATA |= {getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point")}
_METADATA |= {torch.Tensor.detach, torch.Tensor.is_inference, torch.Tensor.__hash__}


def _to(mask: ProvenMask, *args: Any, **kwargs: Any) -> ProvenMask | None:
    """What ``Tensor.to`` makes of a mask, if that is the same one on this or another device; None otherwise."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype not in (None, torch.bool) or kwargs.get("copy"):
        return None
    if device is None or device == mask.device:
        return mask
    return mask._copied(lambda x: x.to(device), device)


_KEEP: dict[Any, Callable[..., ProvenMask | None]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cpu: lambda mask: _to(mask, "cpu"),
    torch.Tensor.bool: lambda mask: mask,
    torch.Tensor.contiguous: lambda mask, **kwargs: None if kwargs else mask,
}


# transformers 5.2, the newest beside NVIDIA's kvpress, has the places of queries for their number and the first of them
BY_PLACES = "cache_position" in inspect.signature(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]).parameters


def _sdpa_mask(arguments: dict[str, Any]) -> torch.Tensor | None:
    if BY_PLACES:
        places = torch.arange(arguments["q_length"], device=arguments["device"]) + arguments["q_offset"]
        arguments = {**arguments, "cache_position": places}
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**arguments)


def make_mask_by_places(cache_position: torch.Tensor, **arguments: Any) -> torch.Tensor | None:
    """:func:`make_mask` with the places of the queries, int64 ``[Lq]``."""
    device = cache_position.device
    return make_mask(q_length=len(cache_position), q_offset=cache_position[0], device=device, **arguments)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **rest: Any,
) -> torch.Tensor | None:
    """transformers' mask function under our name: a :class:`ProvenMask` where proven, else what sdpa would get."""
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": causal_mask_function if mask_function is None else mask_function,
        "attention_mask": attention_mask,
        "device": "cpu",
        **rest,
    }
    if getattr(rest.get("config"), "_attn_implementation", None) == NAMES["eager"]:
        arguments["allow_is_causal_skip"] = False
    if torch.compiler.is_dynamo_compiling() and (q_length == 1 or is_exporting()):
        return _sdpa_mask(arguments)
    return _make_mask_of_program(arguments) if is_exporting() else _make_mask(arguments)


def _make_mask_of_program(arguments: dict[str, Any]) -> torch.Tensor | None:
    """A mask in a program that torch.export makes, where sizes may be symbols and tensors have no values yet."""
    q_length, kv_length, padding = (arguments[name] for name in ("q_length", "kv_length", "attention_mask"))
    # tracing, and the fake tensors of it, belong to a thread
    known = on_another_thread(proven, arguments["mask_function"])
    causal, window = known.causal, known.window
    plain = known == Mask(causal=causal, window=window) and (causal or window is None)
    plain = plain and arguments.get("local_size") in (None, window)
    offsets = [arguments["q_offset"], arguments["kv_offset"]]
    starts = all(isinstance(x, int) and x == 0 for x in offsets) and bool(q_length == kv_length)
    fits = padding is None or (padding.dim() == 2 and bool(padding.shape[1] == kv_length))
    if not plain or not fits or not (starts or not causal):
        return _sdpa_mask(arguments)
    shown = without_wide_window(Mask(causal=causal, window=window, padding=padding is not None), kv_length)
    return ProvenMask(shown, kv_length, None if padding is None else padding.bool(), arguments)


@untraced
def _make_mask(arguments: dict[str, Any]) -> torch.Tensor | None:
    q_length, kv_length = arguments["q_length"], arguments["kv_length"]
    q_offset, attention_mask = arguments["q_offset"], arguments["attention_mask"]
    mask_function = arguments["mask_function"]
    local_size = arguments.get("local_size")
    tracing = is_tracing(attention_mask if attention_mask is not None else q_offset)
    known = Mask(unknown="it is traced") if tracing else proven(mask_function)
    causal, window = known.causal, known.window
    plain = known.unknown is None and known == Mask(causal=causal, window=window) and (causal or window is None)
    plain = plain and local_size in (None, window)
    if tracing or not plain or (q_length == 1 and (window is None or kv_length <= window)):
        # One query needs no mask function: its mask *is* the padding, which the attention function reads off.
        mask = _sdpa_mask(arguments)
        if mask is not None and not tracing and not plain:
            if q_length > 1 and (same := _as_causal(mask, arguments)) is not None:
                return same
            other = "packed sequences, blocks or a custom mask function"
            setattr(mask, _REASON, other if local_size is None else f"local attention over {local_size} keys")
        return mask
    arguments, offset, visible = _placed(arguments, causal)
    if offset < 0 or not _is_padding(arguments):
        return _sdpa_mask(arguments)
    padding = _padding(arguments, visible)
    # transformers' own mask functions read this one bit back, too
    padding = None if padding is None or bool(padding.all()) else padding
    may_skip = arguments.get("allow_is_causal_skip", True) if causal else arguments.get("allow_is_bidirectional_skip")
    if may_skip and padding is None and (offset == 0 or q_length == kv_length) and _sdpa_mask(arguments) is None:
        return None  # model code may behave in another way if there is a mask where sdpa needs none
    window = None if window is None or window >= visible else window
    shown = Mask(causal=causal, offset=offset, window=window, padding=padding is not None)
    return ProvenMask(shown, visible, padding, arguments)


def _placed(arguments: dict[str, Any], causal: bool) -> tuple[dict[str, Any], int, int]:
    """The arguments with a number for ``q_offset``, which a StaticCache keeps in a tensor that it advances in place
    before attention runs; by how much queries are behind the keys of their number; and how many keys are visible."""
    arguments = {**arguments, "q_offset": int(arguments["q_offset"])}
    offset = arguments["q_offset"] - arguments["kv_offset"] if causal else 0
    length = arguments["kv_length"]
    return arguments, offset, min(length, arguments["q_length"] + offset) if causal else length


def _is_padding(arguments: dict[str, Any]) -> bool:
    """Whether the mask of the caller says which tokens are real, if there is one."""
    known = arguments["attention_mask"]
    return known is None or known.shape[:-1] == (arguments["batch_size"],)


def _padding(arguments: dict[str, Any], visible: int) -> torch.Tensor | None:
    """Which of the visible keys are real tokens, bool ``[B, visible]``; None where the caller does not say so."""
    known, start = arguments["attention_mask"], arguments["kv_offset"]
    if known is None:
        return None
    padding = known[:, start : start + visible].bool()
    return nn.functional.pad(padding, (0, visible - padding.shape[1]))


def _as_causal(mask: torch.Tensor, arguments: dict[str, Any]) -> ProvenMask | None:
    """A mask of any function, which hides keys by value as a causal one with a padding does, as that one: chunks that
    are longer than the sequence, images in a batch without any. None for any other.

    It was built already; a query is compared first, and then a sequence at a time.
    """
    arguments, offset, visible = _placed(arguments, causal=True)
    if offset < 0 or not _is_padding(arguments) or mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    padding, (_, _, Lq, Lk) = _padding(arguments, visible), mask.shape
    keys = torch.arange(Lk, device=mask.device)
    shown = keys[None] < visible
    if padding is not None:
        shown = nn.functional.pad(padding, (0, Lk - visible))
    if not torch.equal(mask[:, 0, -1], shown.expand(len(mask), Lk)):
        return None
    seen = keys <= torch.arange(offset, offset + Lq, device=mask.device)[:, None]
    if not all(torch.equal(own[0], seen & one) for own, one in zip(mask, shown.expand(len(mask), Lk), strict=True)):
        return None
    padding = None if padding is None or bool(padding.all()) else padding
    return ProvenMask(Mask(causal=True, offset=offset, padding=padding is not None), visible, padding, arguments)
