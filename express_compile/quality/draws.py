"""Budgets per layer: where sampled decoding needs its draws, measured on a sample of text.

    KL_l(S) = lambda_l a_l S^-beta,    S_l ~ (lambda_l a_l)^(1 / (1 + beta))    minimizes their sum for a given total

``a_l S^-beta`` is the variance of the sampled attention of layer l and ``lambda_l`` what the logits make of it.
Sampling one layer at a time gives their product directly; the variance is exact (no draws) and gives ``beta``. It is a
cheap stand-in for the schedule that the SANTA paper (arXiv 2605.01910, Appendix J) learns in about 1,000 GPU hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from ..core.call import Call
from ..core.method import METHODS
from ..core.modes import OneThreadMode
from ..core.plain import number
from ..core.sites import record_sites
from ..core.spec import layer_key
from ..kernels.santa import probabilities, variance, visible_keys
from ..routes.eager import is_rewritten, restore_attention, rewrite_attention


class _OneLayer(OneThreadMode):
    """Runs SANTA in one layer, query by query as decoding would, and exact attention in the others."""

    def __init__(self, layer: int | None, seed: int = 0) -> None:
        super().__init__()
        self.layer, self.seed = layer, seed

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not METHODS["santa"].op:
            return function(*args, **kwargs)
        call = Call.of(function, args, kwargs)
        if call.layer != self.layer:
            self.see(call)
            return call.exactly().run(function)
        steps = []
        for i, n in enumerate(range(call.Lk - call.Lq + 1, call.Lk + 1)):
            padding = None if call.padding is None else call.padding[:, :n]
            one = replace(call, query=call.query[:, :, i : i + 1], key=call.key[:, :, :n], value=call.value[:, :, :n])
            steps.append(replace(one, padding=padding, seed=torch.full_like(call.seed, self.seed)).run(function))
        out, lse = (torch.cat(parts, 2) for parts in zip(*steps, strict=True))
        return out, lse

    def see(self, call: Call) -> None:
        """Called for every layer that runs exactly, with the call as it was to be."""


class _Variances(_OneLayer):
    """Runs everything exactly and notes the variance that sampling would have, at half, once and twice the draws."""

    def __init__(self, draws: int) -> None:
        super().__init__(None)
        self.draws = (max(1, draws // 2), draws, 2 * draws)
        self.found: dict[int, list[float]] = {}

    def see(self, call: Call) -> None:
        (B, H, Lq, _), options, device = call.query.shape, call.options, call.query.device
        visible = visible_keys(B, Lq, call.Lk, call.padding, None, device, options.get("window", 0))
        p = probabilities(call.query, call.key, visible, call.scale, options.get("softcap", 0.0), call.sinks)[0]
        value = nn.functional.pad(call.value, (0, 0, 0, p.shape[-1] - call.Lk))  # a sink's value is zero
        sums = [0.0, 0.0, 0.0]
        for i in range(Lq):
            for k, S in enumerate(self.draws):
                draws = torch.full((H,), S, device=device)
                found = variance(p[:, :, :, i : i + 1], value, draws, options["sampler"], options["shared"])
                sums[k] += found.mean().item() / Lq
        self.found[call.layer] = sums


@torch.no_grad()
def measure_layers(
    model: nn.Module,
    texts: Iterable[torch.Tensor],
    *,
    draws: int = 64,
    steps: int = 8,
    seeds: int = 4,
    sampler: str = "sys",
    shared: bool = True,
) -> dict[str, Any]:
    """What sampling costs in each layer of a Hugging Face causal language model.

    texts: token ids, int64 ``[1, n]`` each; the last ``steps`` (1 to 16) are decoded one by one, after a prefill with
        exact attention. ``draws`` is the budget S at which all is measured, ``seeds`` the samples per layer and text.

    Returns ``{"draws": S, "layers": {module path: numbers}}``, plain data for JSON. The numbers: ``variance``, the
    expected squared error of a head's output; ``slope``, the beta with which it falls between S / 2 and 2 S (0 where
    there is none); ``kl``, KL(exact || only this layer sampled) of the next token in nats, mean over seeds and steps.

    Raises ``ValueError`` for a rewritten model, for sizes that do not fit, and where no layer can be sampled.
    """
    if is_rewritten(model):
        raise ValueError("model: is rewritten; call restore_attention(model) first")
    for name, value, most in (("draws", draws, 1 << 15), ("steps", steps, 16), ("seeds", seeds, 1 << 31)):
        if not 1 <= number(name, value, int) <= most:
            raise ValueError(f"{name}={value!r}: must be from 1 to {most}")
    if isinstance(texts, (torch.Tensor, str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: a {type(texts).__name__}; must be several texts, such as a list of one")
    texts = list(texts)
    if not texts:
        raise ValueError("texts: must hold at least one text")
    for ids in texts:
        _check_text(ids, steps + 2 * draws)
    options = {"sampler": sampler, "shared": shared}
    santa = {"santa": {**options, "draws": draws}}
    rewrite_attention(model, methods=["santa"], budget=max(4, draws), min_length=0, method_options=santa)
    try:
        per_text = [_measure_text(model, ids, draws, steps, seeds) for ids in texts]
    finally:
        restore_attention(model)
    return {
        "draws": draws,
        "layers": {
            path: {name: fmean(found[path][name] for found in per_text) for name in per_text[0][path]}
            for path in per_text[0]
        },
    }


def _check_text(ids: Any, least: int) -> None:
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"texts: a {type(ids).__name__}; must be tensors of token ids")
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < least:
        raise ValueError(
            f"texts: ids of shape {tuple(ids.shape)}; must be [1, n] with n at least {least} (steps + 2 draws)"
        )


def _measure_text(
    model: nn.Module, ids: torch.Tensor, draws: int, steps: int, seeds: int
) -> dict[str, dict[str, float]]:
    prompt = ids.shape[1] - steps
    cache = model(ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()  # else what has left a window cannot be taken back

    def decode(mode: OneThreadMode) -> torch.Tensor:
        with mode:
            logits = model(ids[:, prompt:], past_key_values=cache, use_cache=True).logits
        cache.crop(-steps)
        return logits.double().log_softmax(-1)

    exact = _Variances(draws)
    with record_sites() as sites:
        truth = decode(exact)
    paths = [site.module for site in sites if site.method == "santa"]
    if not paths:
        raise ValueError(f"model: no layer can be sampled: {'; '.join(sorted({site.reason for site in sites}))}")
    found = {}
    for path in paths:
        layer = layer_key(path)
        kl = [(truth.exp() * (truth - decode(_OneLayer(layer, s)))).sum(-1).mean().item() for s in range(seeds)]
        half, once, twice = exact.found[layer]
        slope = math.log(half / twice) / math.log(exact.draws[2] / exact.draws[0]) if half > 0 and twice > 0 else 0.0
        found[path] = {"variance": once, "slope": slope, "kl": fmean(kl)}
    return found


def allocate(measured: Mapping[str, Any], total: int, beta: float | None = None) -> dict[str, int]:
    """Draws per module path that sum to ``total``, for ``method_options={"santa": {"draws": ...}}``; plain data.

    ``measured`` comes from :func:`measure_layers`; ``beta`` is the median of its slopes unless given. Every layer gets
    at least one draw. Raises ``ValueError`` for fewer draws than layers and for a ``beta`` that is not above -1.
    """
    if not isinstance(measured, Mapping) or not isinstance(measured.get("layers"), Mapping) or not measured["layers"]:
        raise TypeError(f"measured={measured!r}: must be what measure_layers returned")
    layers: Mapping[str, Mapping[str, float]] = measured["layers"]
    if number("total", total, int) < len(layers):
        raise ValueError(f"total={total!r}: must be at least one draw for each of {len(layers)} layers")
    if beta is None:
        beta = median([found["slope"] for found in layers.values() if found["slope"]] or [1.0])
    if not -1 < number("beta", beta, int, float) < math.inf:
        raise ValueError(f"beta={beta!r}: must be above -1 and finite")
    weight = {path: max(0.0, found["kl"]) ** (1 / (1 + beta)) for path, found in layers.items()}
    whole = sum(weight.values())
    spare = total - len(layers)
    share = {path: spare * (w / whole if whole else 1 / len(layers)) for path, w in weight.items()}
    draws = {path: 1 + int(x) for path, x in share.items()}
    for path in sorted(share, key=lambda path: int(share[path]) - share[path])[: total - sum(draws.values())]:
        draws[path] += 1
    return draws
