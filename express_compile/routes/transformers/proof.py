"""What is proven about one call of transformers' attention: by the mask that came with it, and by its arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeGuard

import torch

from ...core.shards import is_dtensor
from ...core.spec import AttentionSpec, HeadShard, Mask, default_scale, feature_major
from ..program import proven_in_program
from ..tracers import is_exporting
from .masks import NAMES, ProvenMask, reason_of
from .sites import Site, held

# Arguments that change what attention computes and that the ops do not take. transformers' sdpa function ignores
# some of them, which is one more reason not to rewrite such a site.
EXTRAS = {
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "cache": "a paged cache",
    "indices": "sparse indices",
    "cu_seq_lens_q": "packed sequences",
}
_READ = "_express_compile_read"  # an attribute of an additive mask: its version, and what it was read as


class Given(NamedTuple):
    """One call: the module, ``[B, H, Lq, D]``, ``[B, H_kv, Lk, D]``, ``[B, H_kv, Lk, Dv]``, the mask and the rest; and
    which heads of the layer it has, if not all."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict[str, Any]
    shard: HeadShard | None = None

    @property
    def eager(self) -> bool:
        """Whether the module has to compute what eager attention does, for which all is in the mask."""
        return bool(held(self.module.config, "_attn_implementation_internal") == NAMES["eager"])

    @property
    def causal(self) -> bool:
        """Whether it hides the future where its mask does not say so."""
        if self.query.shape[2] > 1 and self.eager:
            return False
        causal = self.arguments.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if causal is None else causal)

    @property
    def gradient(self) -> str | None:
        """Why it counts as part of a training run, for ``Policy.training``; None where it does not."""
        if self.module.training:
            return "its module is in training mode"
        needed = torch.is_grad_enabled() and any(x.requires_grad for x in (self.query, self.key, self.value))
        return "its result needs a gradient" if needed else None


class Proof(NamedTuple):
    """What is proven: the mask, its padding ``[B, visible]``, and how many leading keys are visible at all."""

    mask: Mask
    padding: torch.Tensor | None
    visible: Any

    def seen(self, given: Given) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that are visible at all."""
        if self.visible == given.key.shape[2]:
            return given.key, given.value
        return given.key[:, :, : self.visible], given.value[:, :, : self.visible]

    def spec(self, given: Given) -> AttentionSpec:
        """What the call computes."""
        (B, H, Lq, D), H_kv, Dv = given.query.shape, given.key.shape[1], given.value.shape[3]
        dtype, device, asked = given.query.dtype, given.query.device.type, given.arguments.get
        scaling: Any = asked("scaling")
        scale, dropout = float(default_scale(D) if scaling is None else scaling), float(asked("dropout") or 0.0)
        forms: dict[str, Any] = {"softcap": asked("softcap"), "sinks": asked("s_aux") is not None}
        forms |= {"feature_major": feature_major(given.key), "shard": given.shard}
        return AttentionSpec(B, H, H_kv, Lq, self.visible, D, Dv, dtype, device, scale, self.mask, dropout, **forms)


def prove(site: Site, given: Given) -> Proof:
    """What is proven about a call."""
    (B, H, Lq, _), Lk, causal = given.query.shape, given.key.shape[2], given.causal
    unlike = _unlike_sdpa(site, given)
    if site.exact == "eager" and unlike is None:
        given = given._replace(mask=_read(given.mask))
    mask = given.mask
    unknown = _unreadable(given, unlike)
    if unknown is not None:
        return Proof(Mask(unknown=unknown), None, Lk)
    if is_proven(mask):
        return Proof(mask.proven, mask.padding, mask.visible)
    if mask is None:
        if not causal:
            return Proof(Mask(), None, Lk)
        if Lq == 1:
            return Proof(Mask(causal=True, offset=Lk - 1), None, Lk)
        return Proof(Mask(causal=True), None, min(Lk, Lq))  # sdpa's is_causal is aligned top-left
    row = _key_padding(mask, (B, H, Lq, Lk)) if Lq == 1 or not causal else None
    if row is not None:
        return Proof(Mask(causal=causal, offset=Lk - 1 if causal else 0, padding=True), row, Lk)
    if is_exporting() and (shown := proven_in_program(mask, (B, H, Lq, Lk))) is not None:
        return Proof(shown, None, Lk)
    return Proof(Mask(unknown=reason_of(mask)), None, Lk)


def _unreadable(given: Given, unlike: str | None) -> str | None:
    """Why nothing can be proven, whatever the values of the mask are; None where its kind decides."""
    query, key, value, mask = given.query, given.key, given.value, given.mask
    (B, H, Lq, D), (H_kv, Lk) = query.shape, key.shape[1:3]
    window = given.arguments.get("sliding_window")
    if not EXTRAS.keys().isdisjoint(given.arguments):
        extras = [f"{what} ({name})" for name, what in EXTRAS.items() if given.arguments.get(name) is not None]
        if extras:
            return f"the attention takes {', '.join(extras)}, which no method computes"
    if unlike is not None:
        return unlike
    if is_dtensor(key):
        return "its inputs are DTensors; shard the model so that attention gets local tensors (use_local_output=True)"
    if key.shape[:3] != value.shape[:3] or key.shape[0] != B or key.shape[3] != D or H % H_kv != 0:
        return f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        return "query, key and value differ in dtype or device"
    if window is not None and not _has_window(mask, window) and window < Lk:
        return f"local attention over {window} keys"
    if is_proven(mask) and (mask.shape[2:] != (Lq, Lk) or mask.shape[0] != B):
        return f"the mask has shape {tuple(mask.shape)} and does not fit {Lq} queries and {Lk} keys"
    return None


def _unlike_sdpa(site: Site, given: Given) -> str | None:
    """Why a call is not sdpa's attention, with a soft-cap and sinks as its arguments say; None where it is."""
    H, Lq = given.query.shape[1:3]
    softcap, sinks = given.arguments.get("softcap"), given.arguments.get("s_aux")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        return f"it has a logit soft-cap of {softcap!r}, which is no positive number"
    if sinks is not None:
        fits = sinks.shape == (H,) and sinks.is_floating_point() and sinks.device == given.query.device
        if not fits:
            shape = tuple(sinks.shape)
            return f"its attention sinks are {sinks.dtype} of shape {shape}, not a logit for each of {H} heads"
    if site.exact == "sdpa":
        return None
    only = "the model supports transformers' eager attention only"
    if softcap is None and sinks is None:
        return only
    return None if Lq == 1 else f"{only}, and the mask is that of {Lq} queries; those of one are read"


def _has_window(mask: torch.Tensor | None, window: int) -> bool:
    """Whether a mask says by itself what a window hides: it is proven, or it is all that hides keys from one query."""
    if is_exporting():
        return mask is not None  # transformers leaves none out there
    if is_proven(mask):
        return mask.proven.window == window
    return mask is not None and mask.dim() == 4 and mask.shape[2] == 1


def is_proven(mask: torch.Tensor | None) -> TypeGuard[ProvenMask]:
    return isinstance(mask, ProvenMask) and mask.is_proven


def _read(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The additive mask of one query in eager attention as a boolean one, or None where it hides nothing, if it has 0
    for some keys of every sequence and hides all others; any other mask as it is. Two bits are read back, once for all
    layers."""
    if mask is None or mask.dtype == torch.bool or mask.dim() != 4 or mask.shape[2] != 1:
        return mask
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return mask  # nothing can be read back, and replays bring other values
    version = None if mask.is_inference() else mask._version
    known = getattr(mask, _READ, None)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    if torch.compiler.is_compiling():
        return mask
    shown = mask == 0
    proven = (shown | (mask <= torch.finfo(mask.dtype).min)).all() & shown.any(-1).all()
    proven, whole = torch.stack([proven, shown.all()]).tolist()
    found = None if whole else shown if proven else mask
    setattr(mask, _READ, (version, found))
    return found


def _key_padding(mask: torch.Tensor, sizes: tuple[int, int, int, int]) -> torch.Tensor | None:
    """The row ``[B, Lk]`` of a boolean mask that, whatever its values are, is the same for all heads and queries."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[3] != sizes[3]:
        return None
    if any(size not in (1, whole) for size, whole in zip(mask.shape, sizes, strict=True)):
        return None
    if any(mask.shape[d] != 1 and mask.stride(d) != 0 for d in (1, 2)):
        return None
    return mask[:, 0, 0].expand(sizes[0], sizes[3])
