"""transformers' continuous batching (``generate_batch``, a paged cache) of a rewritten model.

transformers packs the tokens of many requests into one sequence and hands attention where each one starts. Under our
name here every request is one call of its own, with the mask it would have alone: so its prompt is prefilled by the
plan that ``model(input_ids)`` would have, with the same random numbers, and no request can see another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from ..passes.place import named_modules
from ..routes.module_code import calls_interface
from ..routes.tracers import untraced
from ..routes.transformers.attention import Result, attend
from ..routes.transformers.configs import renamed
from ..routes.transformers.masks import PAGED, make_mask
from ..routes.transformers.sites import is_in_force, rewritten_sites, site_of

_PACKED = PagedAttentionArgs.__annotations__.keys()  # arguments that speak of all requests together
_READ = "_express_compile_read"  # an attribute of the tensor of starts: those, and the masks, for all layers


@contextmanager
def continuous_batching(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """While active, a model that ``rewrite_attention`` rewrote can be run by transformers' continuous batching.

    >>> with continuous_batching(model):
    ...     model.generate_batch(prompts, continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False))

    That is ``generate_batch``, ``continuous_batching_context_manager`` and ``init_continuous_batching``; other calls of
    the model raise ``RuntimeError`` until the end. What a request dies of, such as ``strict=True``, is its ``error``.
    ``ValueError``: the model is not rewritten, or some of its attention is not or has eager attention only.
    """
    if not rewritten_sites(model):
        raise ValueError(f"{type(model).__name__} is not rewritten: call rewrite_attention(model, ...) before")
    for path, module in named_modules(model):
        if calls_interface(type(module)) is None:
            continue
        site = site_of(module) if is_in_force(module) else None
        if site is None or site.exact == "eager":
            which = "is not rewritten" if site is None else "has eager attention only (a soft-cap or sinks)"
            raise ValueError(
                f"{path!r} ({type(module).__name__}) {which} and cannot keep packed requests apart: "
                "restore_attention(model), after which generate_batch is all transformers'"
            )
    with renamed(model, PAGED):
        yield model


@untraced
def attend_paged(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: PagedAttentionCache | None = None,
    **arguments: Any,
) -> Result:
    """What transformers calls: ``[1, H, T, D]`` in, the ``T`` tokens of all requests; ``[1, T, H, Dv]`` out."""
    if cache is None or attention_mask is not None:
        raise RuntimeError(
            f"{type(module).__name__}: within continuous_batching(model) only generate_batch and its kin run the model"
        )
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "generate_batch records a CUDA graph, which holds no lengths; a rewritten model needs "
            "continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False)"
        )
    key, value = cache.update(key, value, module.layer_idx, arguments)
    starts, masks = _read(arguments["cu_seq_lens_q"])
    starts_k, _ = _read(arguments["cu_seq_lens_k"])
    window = getattr(cache.layer_to_allocator[module.layer_idx], "sliding_window", None)
    own = {name: x for name, x in arguments.items() if name not in _PACKED}
    positions = arguments.get("position_ids")
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    for (q0, q1), (k0, k1) in zip(pairwise(starts), pairwise(starts_k), strict=True):
        sizes = q1 - q0, k1 - k0, window
        if sizes[0] == 0:
            continue
        if sizes not in masks:
            masks[sizes] = _mask(*sizes, query.device)
        if positions is not None:
            own["position_ids"] = positions[:, q0:q1]
        parts = query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1]
        out[:, q0:q1] = attend(module, *parts, masks[sizes], **own, is_causal=True)[0]
    return out, None


def _read(cu_seq_lens: torch.Tensor) -> tuple[list[int], dict[tuple[int, int, int | None], torch.Tensor | None]]:
    """Where each request starts, read back once for all layers, and masks by numbers of queries, of keys and window."""
    if (known := getattr(cu_seq_lens, _READ, None)) is None:
        known = cu_seq_lens.tolist(), {}
        setattr(cu_seq_lens, _READ, known)
    return known


def _mask(Lq: int, Lk: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of ``Lq`` queries that are the last of ``Lk`` tokens, as the model would make it for one request."""
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    return make_mask(1, Lq, Lk, Lk - Lq, mask_function=function, local_size=window, device=device)


AttentionInterface.register(PAGED, attend_paged)
