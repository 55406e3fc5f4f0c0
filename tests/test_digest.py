"""What every method computes on fixed seeds, recorded: a change that is to change nothing can show that it did not.

    PYTHONPATH=. python tests/test_digest.py --record                      # writes tests/digest.json, on a CPU
    PYTHONPATH=. python tests/test_digest.py --device cuda --out FILE      # what the kernels compute, ...
    PYTHONPATH=. python tests/test_digest.py --device cuda --compare FILE  # ... and whether another tree does so too

Bits are compared where torch, transformers and the processor are those of the record, and where the result is which
rows were read; elsewhere a sum and eight values of every tensor, up to rounding. Inputs and weights are sums of
integers, so they are the same on every machine. Only names are used that a move of the source does not change.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import pkgutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import express_compile
from express_compile import METHODS, AttentionSpec, Mask, Policy, Site, rewrite_attention

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("digest.json")
COMMAND = "PYTHONPATH=. python tests/test_digest.py --record"
SEED, SCALE, LAYER, PATH = 5, 0.4, 3, "model.layers.3.self_attn"
# of the mean size of a tensor and of the value itself. With SSE4.2 in place of AVX-512 three float32 results of four
# have other bits, by at most 3e-6; halves are rounded once, which may go either way
ROUNDING = {"float64": 1e-13, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}

Digest = dict[str, dict[str, Any]]
"""Of every tensor of a result by its name: dtype, shape, sha256 of its bytes, sums of its values and of their sizes,
and eight of them."""


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A call of ``torch.ops.express_compile.<method>``. sizes: B, H, H_kv, Lq, Lk, D, Dv; padding: real tokens of every
    sequence, and the side they are not on; rows: the values are unit vectors and the result says which rows were read.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)  # of Policy, and of the method itself
    sizes: tuple[int, ...] = (2, 4, 2, 200, 200, 16, 16)
    dtype: torch.dtype = torch.float32
    padding: tuple[str, tuple[int, ...]] | None = None
    form: dict[str, Any] = field(default_factory=dict)  # window, softcap, sinks, feature_major
    rows: bool = False
    only: str = ""  # "cpu" where the kernels do not compute it

    @property
    def causal(self) -> bool:
        return self.method != "thinformer"


PREFILL, DECODE = (2, 4, 2, 200, 200, 16, 16), (2, 4, 2, 1, 200, 16, 16)
LEFT, RIGHT = ("left", (130, 200)), ("right", (61, 150))
PATTERN = {"stride": 16, "summary": 3}
# of every method the options of all its cases, and what others have beside or in place of them
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "express": {
        "": {"budget": 8, "sinks": 2, "window": 9, "protected": 0, "block": 16},
        "kernel": {"halving": "kernel"},
        "uniform": {"halving": "uniform"},
        "flatten": {"flatten": 0.5},
        "bare": {"sinks": 0, "window": 0},
        "inflation-0": {"inflation": 0},
        "inflation-3": {"inflation": 3},
        "protected": {"protected": 20, "block": 32},
        "min_length": {"min_length": 400},
    },
    "thinformer": {
        "": {"budget": 16},
        "kernel": {"halving": "kernel"},
        "uniform": {"halving": "uniform"},
        "flatten": {"flatten": 0.5},
        "fraction": {"budget": 0.1},
        "table": {"budget": (4, 4, 8, 16, 32)},
        "g": {"g": 0},
        "min_length": {"min_length": 400},
    },
    "santa": {
        "": {"budget": 16, "min_length": 0},
        "sys-3": {"sampler": "sys-3"},
        "strat": {"sampler": "strat"},
        "fraction": {"budget": 0.1},
        "table": {"budget": (4, 4, 8, 16, 32)},
        "draws": {"draws": [8, 16, 24, 12]},
        "min_length": {"min_length": 400},
    },
    "sparse": {
        "": {},
        "groups": {**PATTERN, "groups": 2},
        **{
            f"{pattern} {combine}": {**PATTERN, "pattern": pattern, "combine": combine}
            for pattern in ("fixed", "strided")
            for combine in ("merged", "per_head", "interleaved", "local", "far")
        },
    },
    "heads": {
        "": {"rows": ({"sinks": 2, "recent": 9, "selected": 1},), "block": 16},
        "mixture": {"rows": ({"sinks": 2, "recent": 9, "thinned": 8}, {"sinks": 2, "recent": 9, "selected": 1})},
        "window": {"rows": ({"sinks": 2, "recent": 9}, {"everything": True})},
        "protected": {"rows": ({"recent": 9, "protected": 20}, {"thinned": 8, "protected": 20}), "block": 32},
        "kernel": {"rows": ({"sinks": 2, "thinned": 8}, {"sinks": 5}), "halving": "kernel"},
        "min_length": {"min_length": 400},
    },
}


def cases() -> dict[str, Case]:
    """All calls by their names: the method, and in what they differ from the first one of it."""
    found: dict[str, Case] = {}

    def add(method: str, name: str, options: dict[str, Any] | None = None, **changed: Any) -> None:
        sizes = DECODE if method == "santa" else PREFILL
        options = {**OPTIONS[method][""], **(options or {})}
        found[f"{method} {name}".strip()] = Case(method, options, **{"sizes": sizes, **changed})

    for method, variants in OPTIONS.items():
        for name, options in variants.items():
            Lk = 320 if name == "protected" else 200  # the first contest is one of 256 rows
            Lq = 1 if method == "santa" else Lk
            add(method, name, options, sizes=(2, 4, 2, Lq, Lk, 16, 16))
            if name in ("", "kernel", "protected", "strat", "strided merged"):
                sizes = (1, 2, 2, Lq, Lk, 16, Lk)
                add(method, f"{name} rows", options, sizes=sizes, rows=True, dtype=torch.float64, only="cpu")
        for dtype in (torch.float16, torch.bfloat16):
            add(method, str(dtype).removeprefix("torch."), dtype=dtype)
        add(method, "float64", dtype=torch.float64, only="cpu")
        add(method, "D 64", sizes=(1, 2, 1, 1 if method == "santa" else 200, 200, 64, 64))
        add(method, "padded left", padding=LEFT)
        if method != "santa":
            add(method, "padded right", padding=RIGHT)
            add(method, "continued", sizes=(2, 4, 1, 37, 200, 16, 24))
            add(method, "continued padded left", sizes=(2, 4, 1, 37, 200, 16, 24), padding=LEFT)
    for name in ("", "kernel", "protected"):
        add("express", f"{name} long", OPTIONS["express"][name], sizes=(1, 4, 2, 700, 700, 16, 24))
    padding = ("left", (300, 420))
    add(
        "express",
        "protected padded left",
        OPTIONS["express"]["protected"],
        sizes=(2, 4, 2, 420, 420, 16, 16),
        padding=padding,
    )
    add("santa", "five queries", sizes=(2, 4, 2, 5, 200, 16, 24))
    add("santa", "window", form={"window": 70})
    add("santa", "softcap", form={"softcap": 3.0})
    add("santa", "sinks", form={"sinks": True})
    add("santa", "not shared", {"shared": False}, only="cpu")  # which has no kernel
    add("santa", "iid", {"sampler": "iid", "shared": False}, only="cpu")
    add("santa", "bernoulli", {"bernoulli": 4}, only="cpu")  # on CUDA: keys that lie feature by feature
    add("santa", "bernoulli feature-major", {"bernoulli": 4}, form={"feature_major": True})
    return {name.replace("  ", " "): case for name, case in found.items()}


# ------------------------------------------------------------------------------------------------------------ inputs


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """Float64 numbers of about the normal distribution, the same bits on every machine: multiples of 1/512."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-512, 513, (3, *shape), generator=generator).sum(0).double() / 512


def with_numbers(model: nn.Module, size: float) -> nn.Module:
    """``model`` in evaluation, its matrices and tables such numbers times ``size``."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                parameter.copy_(numbers(*parameter.shape, seed=100 + i) * size)
    return model.eval()


def real_tokens(padding: tuple[str, tuple[int, ...]], Lk: int) -> torch.Tensor:
    side, lengths = padding
    place = torch.arange(Lk) if side == "right" else torch.arange(Lk).flip(0)
    return place < torch.tensor(lengths)[:, None]


def tensors_of(case: Case, device: str) -> tuple[torch.Tensor, ...]:
    B, H, H_kv, Lq, Lk, D, Dv = case.sizes
    shapes = (B, H, Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv)
    query, key, value = (numbers(*shape, seed=i) for i, shape in enumerate(shapes))
    if case.rows:
        value = torch.eye(Lk).expand(shapes[2])
    query, key, value = (x.to(device, case.dtype).contiguous() for x in (query, key, value))
    return query, key.mT.contiguous().mT if case.form.get("feature_major") else key, value


# ----------------------------------------------------------------------------------------------------------- results


def policy_of(method: str, options: dict[str, Any]) -> Policy:
    """``options`` of the policy and, beside them, of the method itself."""
    own = {name: value for name, value in options.items() if name not in Policy.option_names()}
    rest = {name: value for name, value in options.items() if name not in own}
    return Policy(methods=(method,), method_options={method: own}, **rest)


def gradient(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the sum of ``out`` with some numbers as weights (the plain sum behind a layer norm has none)."""
    return torch.autograd.grad(out, inputs, numbers(*out.shape, seed=9).to(out))


def call(case: Case, device: str, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of one call by name: the result and, where the method has them, its gradients."""
    B, H, H_kv, Lq, Lk, D, Dv = case.sizes
    form = dict(case.form)
    sinks = {"sinks": numbers(H, seed=7).to(device, torch.float32)} if form.pop("sinks", False) else {}
    mask = Mask(
        causal=case.causal, offset=Lk - Lq if case.causal else 0, window=form.get("window"),
        padding=case.padding is not None,
    )  # fmt: skip
    spec = AttentionSpec(
        B, H, H_kv, Lq, Lk, D, Dv, case.dtype, device, SCALE, mask, softcap=form.get("softcap"), sinks=bool(sinks),
        feature_major=form.get("feature_major", False),
    )  # fmt: skip
    params = METHODS[case.method].params(Site(spec, PATH), policy_of(case.method, case.options))
    op = getattr(torch.ops.express_compile, case.method)
    given = tensors_of(case, device)
    differentiable = case.method != "santa" and not case.rows
    if differentiable:
        given = tuple(x.requires_grad_() for x in given)
    padding = None if case.padding is None else real_tokens(case.padding, Lk).to(device)
    out, lse = op(*given, padding, torch.tensor(seed, device=device), SCALE, LAYER, **sinks, **params)
    counts = torch.ones(B, Lq, dtype=torch.bool, device=device)
    if padding is not None and case.causal:  # what a padded query gives is nobody's
        counts = padding[:, -Lq:]
    counts = counts[:, None, :, None]
    if case.rows:
        return {"rows": out.detach() != 0}
    found = {"out": out.where(counts, 0).detach(), "lse": lse.where(counts[..., 0], 0).detach()}
    if differentiable:
        gradients = gradient(out.where(counts, 0), *given)
        found |= {f"d_{name}": x for name, x in zip(("query", "key", "value"), gradients, strict=True)}
    return found


class Attention(nn.Module):
    """No arithmetic but attention: a graph of it computes the same bits whoever compiles the rest."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=True)


class WrittenOut(nn.Module):
    """Attention as a model of one's own writes it, which is rewritten through its graph."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.project = causal, nn.Linear(32, 96, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(8)
        if self.causal:
            n = x.shape[1]
            hidden = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def backend() -> Callable[..., Any]:
    """What ``backend="express"`` means in this tree; what is installed may be another one, or nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return pkgutil.resolve_name(project["entry-points"]["torch_dynamo_backends"]["express"])


ROUTES: dict[str, dict[str, Any]] = {
    "express": {
        "methods": ["express"], "budget": 8, "sinks": 2, "window": 9, "protected": 0,
        "method_options": {"express": {"block": 16}},
    },
    "thinformer": {"methods": ["thinformer"], "budget": 8},
    "sparse": {
        "methods": ["sparse"], "method_options": {"sparse": {"stride": 8, "summary": 2, "combine": "interleaved"}},
    },
    "exact": {"methods": ["exact"]},
}  # fmt: skip


def graphs(device: str, seed: int) -> Iterator[tuple[str, Callable[[], dict[str, torch.Tensor]]]]:
    """Modules that are rewritten through their graphs, by either route."""

    def written_out(method: str) -> dict[str, torch.Tensor]:
        module = with_numbers(WrittenOut(method != "thinformer"), 0.25).to(device)
        x = numbers(2, 100, 32, seed=11).to(device, torch.float32).requires_grad_()
        out = rewrite_attention(module, **ROUTES[method], seed=seed)(x)
        return {"out": out.detach(), "d_x": gradient(out, x)[0]}

    def compiled(method: str) -> dict[str, torch.Tensor]:
        case = Case(method, sizes=(2, 4, 2, 100, 100, 16, 16))
        query, key, value = (x.requires_grad_() for x in tensors_of(case, device))
        options = {**ROUTES[method], "seed": seed}
        # the first graph that inductor compiles takes 10 s, and nothing of this one is its to compute
        with mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm):
            module = torch.compile(Attention(case.causal), backend=backend(), options=options, dynamic=False)
            out = module(query, key, value)
        return {"out": out.detach(), "d_key": gradient(out, key)[0]}

    for method in ROUTES:
        yield f"graph of {method}", lambda method=method: written_out(method)
        if method != "exact":
            yield f"compiled {method}", lambda method=method: compiled(method)


def models(device: str, seed: int) -> Iterator[tuple[str, Callable[[], dict[str, torch.Tensor]]]]:
    """Models of transformers, rewritten in place."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 97, "max_position_embeddings": 512, **sizes}
    ids = torch.randint(97, (2, 120), generator=torch.Generator().manual_seed(1)).to(device)

    def llama(options: dict[str, Any]) -> nn.Module:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_key_value_heads=2))
        return rewrite_attention(with_numbers(model, 0.2).to(device), **options, seed=seed)

    def prefill(method: str, side: str | None) -> dict[str, torch.Tensor]:
        model = llama(ROUTES[method])
        mask = torch.ones_like(ids) if side is None else real_tokens((side, (120, 77)), 120).to(device).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = logits.where(mask.bool()[..., None], 0)
        d_weight = gradient(logits, model.model.layers[0].self_attn.k_proj.weight)[0]
        return {"logits": logits.detach(), "d_weight": d_weight}

    @torch.no_grad()
    def decode() -> dict[str, torch.Tensor]:
        draws = {"model.layers.0.self_attn": [4, 8, 8, 12]}
        model = llama(
            {
                **ROUTES["express"], "methods": ["express", "santa"], "min_length": 0,
                "method_options": {**ROUTES["express"]["method_options"], "santa": {"draws": draws}},
            }
        )  # fmt: skip
        cache, logits = transformers.DynamicCache(config=model.config), []
        for part in ids.split((100, 1, 1, 18), 1)[:3]:
            logits.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits[:, -1])
        return {"logits": torch.stack(logits, 1)}

    def bert() -> dict[str, torch.Tensor]:
        model = transformers.BertModel(transformers.BertConfig(**text), add_pooling_layer=False)
        rewrite_attention(with_numbers(model, 0.2).to(device), **ROUTES["thinformer"], seed=seed)
        mask = real_tokens(("right", (120, 77)), 120).to(device)
        out = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.where(mask[..., None], 0)
        d_weight = gradient(out, model.encoder.layer[0].attention.self.key.weight)[0]
        return {"out": out.detach(), "d_weight": d_weight}

    @torch.no_grad()
    def vit() -> dict[str, torch.Tensor]:
        config = transformers.ViTConfig(image_size=40, patch_size=4, **sizes)
        model = with_numbers(transformers.ViTModel(config, add_pooling_layer=False), 0.2).to(device)
        rewrite_attention(model, **ROUTES["thinformer"], seed=seed)
        pixels = numbers(2, 3, 40, 40, seed=12).to(device, torch.float32)
        return {"out": model(pixel_values=pixels).last_hidden_state}

    for method, side in (("express", None), ("express", "left"), ("express", "right"), ("sparse", "left")):
        yield f"llama {method} {side or ''}".strip(), lambda method=method, side=side: prefill(method, side)
    yield "llama santa", decode
    yield "bert thinformer", bert
    yield "vit thinformer", vit


# ----------------------------------------------------------------------------------------------------------- digests


def digest(tensors: dict[str, torch.Tensor]) -> Digest:
    """See :data:`Digest`. Raises ``ValueError`` for a tensor with a NaN."""
    found = {}
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        flat = x.flatten().double()
        if flat.isnan().any():
            raise ValueError(f"{name}: holds a NaN")
        finite = flat[flat.isfinite()]
        at = torch.linspace(0, len(flat) - 1, 8, dtype=torch.float64).round().long()
        found[name] = {
            "dtype": str(x.dtype).removeprefix("torch."),
            "shape": list(x.shape),
            "sha256": hashlib.sha256(x.flatten().view(torch.uint8).numpy().tobytes()).hexdigest(),
            "sum": math.fsum(finite.tolist()),
            "size": math.fsum(finite.abs().tolist()),
            "values": flat[at].tolist(),
        }
    return found


def calls(device: str, seed: int) -> Iterator[tuple[str, Callable[[], dict[str, torch.Tensor]]]]:
    for name, case in cases().items():
        if case.only in ("", device):
            yield name, lambda case=case: call(case, device, seed)


@contextmanager
def one_thread() -> Iterator[None]:
    """How sums are parted depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digests(device: str, seed: int = SEED) -> dict[str, Digest]:
    """The digest of every case by its name, computed on ``device``, ``"cpu"`` or ``"cuda"``.

    Raises ``RuntimeError`` if part of the package came from another tree, as it does where that one is installed and
    has modules that this one lacks.
    """
    torch.compiler.reset()  # Dynamo gives up on code that was compiled too often, and attention would be exact
    with one_thread():
        found = {}
        for name, run in itertools.chain(*(kind(device, seed) for kind in (calls, graphs, models))):
            try:
                found[name] = digest(run())
            except Exception as error:
                error.add_note(f"case {name!r}")
                raise
    loaded = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "express_compile"]
    home = Path(express_compile.__file__).resolve().parents[1]
    strange = [file for file in loaded if file and home not in Path(file).resolve().parents]
    if strange:
        raise RuntimeError(f"{strange[0]} was imported, which is not of {home}")
    return found


def conditions(device: str) -> dict[str, str]:
    """What must be alike for bits to be compared."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device == "cuda":
        return {**versions, "device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    described = {}
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            described[name.strip()] = value.strip()
    flags = hashlib.sha256(" ".join(sorted(described.get("flags", "").split())).encode()).hexdigest()[:16]
    kind = [described.get(name, "?") for name in ("model name", "cpu family", "model")]
    return {**versions, "device": " / ".join([*kind, flags]), "capability": torch.backends.cpu.get_cpu_capability()}


def differences(found: dict[str, Digest], recorded: dict[str, Digest], bitwise: bool) -> dict[str, str]:
    """By the name of every case that is not as ``recorded`` what differs: bits, or if not ``bitwise`` values by more
    than rounding explains."""
    different = {name: "not recorded" for name in found.keys() - recorded.keys()}
    different |= {name: "not computed" for name in recorded.keys() - found.keys()}
    for name in sorted(found.keys() & recorded.keys()):
        is_, was = found[name], recorded[name]
        if is_.keys() != was.keys():
            different[name] = f"gives {', '.join(is_)}; recorded are {', '.join(was)}"
        elif words := [f"{x}: {how}" for x in is_ if (how := _difference(is_[x], was[x], bitwise))]:
            different[name] = "; ".join(words)
    return different


def _difference(is_: dict[str, Any], was: dict[str, Any], bitwise: bool) -> str:
    """In words, how a tensor differs; empty if it does not."""
    if any(is_[fact] != was[fact] for fact in ("dtype", "shape")):
        return f"{is_['dtype']} {is_['shape']}, was {was['dtype']} {was['shape']}"
    if is_["sha256"] == was["sha256"]:
        return ""
    if bitwise or was["dtype"] == "bool":
        return f"other bits; its sum is {is_['sum']!r}, was {was['sum']!r}"
    return "" if _alike(is_, was) else f"sum {is_['sum']!r}, was {was['sum']!r}; {is_['values']}, was {was['values']}"


def _alike(is_: dict[str, Any], was: dict[str, Any]) -> bool:
    rounding = ROUNDING[was["dtype"]]
    mean = was["size"] / max(1, math.prod(was["shape"]))
    pairs = zip(is_["values"], was["values"], strict=True)
    values = all(a == b or abs(a - b) <= rounding * (mean + abs(b)) for a, b in pairs)
    return values and abs(is_["sum"] - was["sum"]) <= rounding * was["size"]


def lines(different: dict[str, str]) -> str:
    return "\n".join(f"{name}: {how}" for name, how in different.items())


# ------------------------------------------------------------------------------------------------------------- tests


@functools.cache
def here() -> dict[str, Any]:
    return digests("cpu")


def test_every_method_and_route_computes_what_was_recorded() -> None:
    record = json.loads(RECORD.read_text())
    different = differences(here(), record["digests"], bitwise=conditions("cpu") == record["conditions"])
    assert not different, f"{lines(different)}\nwhere that is meant to be, record it: {COMMAND}"


def test_another_seed_is_told_from_the_recorded_one_by_its_bits_and_without_them() -> None:
    recorded = json.loads(RECORD.read_text())["digests"]
    found = digests("cpu", SEED + 1)
    drawn = {name for name in found if not any(word in name for word in ("sparse", "exact", "min_length"))}
    drawn -= {name for name, case in cases().items() if case.method == "heads" and "thinned" not in str(case.options)}
    assert len(drawn) > 60
    # bits of the record are those of the machine that made it
    for before, bitwise in ((here(), True), (recorded, False)):
        assert differences(found, before, bitwise).keys() == drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    does = parser.add_mutually_exclusive_group(required=True)
    does.add_argument("--record", dest="out", action="store_const", const=RECORD, help=f"--out {RECORD.name}")
    does.add_argument("--out", type=Path, help="file to write what is computed to")
    does.add_argument("--compare", type=Path, help="such a file; exits with 1 where it says something else")
    given = parser.parse_args()
    if given.out == RECORD and given.device != "cpu":
        parser.error("--record: the record is that of the CPU; give --out FILE")
    found, here = digests(given.device), conditions(given.device)
    if given.out:
        text = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
        given.out.write_text(f'{{"conditions": {json.dumps(here)},\n"digests": {{\n{text}\n}}}}\n')
        print(f"{len(found)} cases written to {given.out}")
        return
    record = json.loads(given.compare.read_text())
    bitwise = here == record["conditions"]
    different = differences(found, record["digests"], bitwise)
    print(lines(different))
    print(f"{len(found)} cases compared {'bit by bit' if bitwise else 'up to rounding'}: {len(different)} differences")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
