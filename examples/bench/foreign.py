"""Architectures that nothing here was built for: are their attention sites found, proven, rewritten, and is it right?

    make foreign                                                      # all, in an environment of its own (an hour)
    python examples/bench/foreign.py --only albert timm:vit_tiny_patch16_224 --out examples/bench/results/foreign.csv
    python examples/bench/foreign.py --inductor --out ...                   # 20 of them, really compiled

Tiny random models of transformers (by model type, shrunk by rule), timm, torchvision, diffusers, open_clip,
x-transformers and vit-pytorch, with attention written out where there is a choice, run with ``methods=["exact"]``: what
is rewritten has to give what the untouched model gives. Phases: a prefill, a right-padded prefill, a decoding step over
a growing cache. Routes: the backend's graphs (rewritten, then run as they are), ``rewrite_attention``, and with
``--inductor`` the backend as it is. ``expected`` is counted without us: softmaxes whose result meets a matrix product,
and fused attention, among the operators that the untouched model runs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import logging
import os
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from foreign_models import FOREIGN, INDUCTOR, Foreign
from records import add_arguments, append, run_of, show
from rich.progress import track
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from express_compile import Policy, record_sites, restore_attention, rewrite_attention
from express_compile.passes.pipeline import rewrite_graph
from express_compile.passes.place import Place
from express_compile.routes.compile import express

COLUMNS = (
    "date,torch,package,version,commit,architecture,phase,route,expected,graphs,listed,found,proven,rewritten,refused,"
    "reasons,error,outcome,seconds"
).split(",")
PHASES, ROUTES = ("prefill", "padded", "decode"), ("backend", "rewrite_attention")
TOLERANCE = 2e-5
IN_DOUBLE = 1e-10  # where float32 is over it: a model may enlarge the rounding of one product a thousandfold
POLICY = Policy(methods=("exact",))
SECONDS = 240  # for one case

# ------------------------------------------------------------------------------------ attention, counted without us

_KEEPS = re.compile(
    r"(_to_copy|clone|detach|dropout|native_dropout|mul|div|view|_unsafe_view|reshape|expand|permute|transpose|unsqueeze"
    r"|squeeze|alias|slice|select|split|split_with_sizes|constant_pad_nd|where|masked_fill|copy_|t|as_strided|diagonal"
    r"|_reshape_alias|contiguous|unbind|narrow|add|nan_to_num)\b"
)
_FUSED = re.compile(r"_scaled_dot_product|_native_multi_head_attention|_transformer_encoder_layer_fwd")


class Attention(TorchDispatchMode):
    """Counts attention among the operators that run: fused, and softmaxes of three or more dimensions whose result
    is a factor of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._weights: dict[int, tuple[torch.Tensor, list[int]]] = {}  # storage -> a tensor that keeps it, its softmax
        self._counted: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        if _FUSED.match(name):
            self.count += 1
        elif name in ("_softmax", "_safe_softmax", "softmax.int") and out.dim() >= 3:
            self._weights[self._key(out)] = out, [len(self._weights)]
        elif name in ("bmm", "mm", "baddbmm", "matmul"):
            for x in given:
                number = self._weights.get(self._key(x), (None, None))[1]
                if number is not None and number[0] not in self._counted:
                    self._counted.add(number[0])
                    self.count += 1
        elif _KEEPS.fullmatch(name):
            number = next((w[1] for x in given if (w := self._weights.get(self._key(x)))), None)
            if number is not None:
                for x in results:
                    self._weights[self._key(x)] = x, number
        return out

    @staticmethod
    def _key(x: torch.Tensor) -> int:
        return x.untyped_storage().data_ptr()


# ---------------------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class Case:
    """One architecture in one phase by one route."""

    architecture: str
    phase: str
    route: str


@dataclass
class Prepared:
    """A model with inputs. ``real``: positions of the output that are no padding, None for all."""

    model: nn.Module
    inputs: dict[str, Any]
    real: torch.Tensor | None = None
    step: dict[str, Any] = field(default_factory=dict)

    def run(self, called: Callable[..., Any]) -> list[torch.Tensor]:
        """The floating-point tensors of the output; a decoding step starts from a cache that is filled anew."""
        inputs = copy.copy(self.inputs)
        torch.manual_seed(1)
        with torch.no_grad():
            if self.step:
                before = self.model(**inputs, use_cache=True)
                inputs = {**self.step, "past_key_values": before.past_key_values, "use_cache": True}
                if "decoder_input_ids" in inputs:
                    inputs["encoder_outputs"] = (before.encoder_last_hidden_state,)
            torch.manual_seed(2)
            out = called(**inputs)
        tensors = list(_outputs(out))
        if self.real is not None:
            tensors = [x[self.real] for x in tensors if x.shape[:2] == self.real.shape]
        return tensors


def _outputs(out: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of an output, without caches."""
    if isinstance(out, torch.Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, dict):
        for name, value in out.items():
            if "key_values" not in name and "cache" not in name:
                yield from _outputs(value)
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from _outputs(value)


def phases(foreign: Foreign) -> list[str]:
    return [phase for phase, has in zip(PHASES, (True, foreign.pads, foreign.decodes), strict=True) if has]


def prepare(foreign: Foreign, phase: str) -> Prepared:
    """The model of an architecture, in evaluation mode, with the inputs of a phase."""
    torch.manual_seed(0)
    model, inputs = foreign.build()
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():  # scores that differ from each other
            nn.init.normal_(parameter, std=1.0 / parameter[0].numel() ** 0.5)
    prepared = Prepared(model, inputs)
    if phase == "padded":
        shape = inputs["input_ids"].shape
        mask = (torch.arange(shape[1]) < torch.tensor([shape[1], shape[1] - 7])[:, None]).long()
        decoder = "decoder_input_ids" in inputs
        prepared = Prepared(model, {**inputs, "attention_mask": mask}, None if decoder else mask.bool())
    elif phase == "decode":
        name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        prepared.step = {name: torch.randint(3, 60, (2, 1), generator=torch.Generator().manual_seed(7))}
    return prepared


# ----------------------------------------------------------------------------------------------------------- routes


def by_backend(prepared: Prepared, row: dict[str, Any]) -> list[torch.Tensor]:
    found: list[Any] = []
    graphs = 0

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        found.extend(rewrite_graph(gm, POLICY, inputs))
        Place.of_graph().pin()  # else equal layers may share a graph, whose sites would count once
        return gm.forward

    got = prepared.run(torch.compile(prepared.model, backend=backend))
    row |= {"graphs": graphs} | summary(
        (p.verdict, p.reason, "" if s.spec is None else str(s.spec.mask), p.method) for s, p in found
    )
    return got


def by_rewriting(prepared: Prepared, row: dict[str, Any]) -> list[torch.Tensor]:
    rewritten = copy.deepcopy(prepared.model)
    rewrite_attention(rewritten, POLICY)
    try:
        with record_sites() as sites:
            got = prepared.run(rewritten)
    finally:
        restore_attention(rewritten)
    row |= summary((s.verdict, s.reason, s.mask, s.method) for s in sites if s.form != "not captured")
    row["reasons"] += "".join(f" | not captured: {s.module}" for s in sites if s.form == "not captured")
    return got


def by_inductor(prepared: Prepared, row: dict[str, Any]) -> list[torch.Tensor]:
    # by the function: its name is known only where the package is installed
    return prepared.run(torch.compile(prepared.model, backend=partial(express, options={"methods": ["exact"]})))


RUN = {"backend": by_backend, "rewrite_attention": by_rewriting, "inductor": by_inductor}


def summary(sites: Any) -> dict[str, Any]:
    """What became of the sites that a route reports, by column; ``listed`` and ``found`` are all of them."""
    count: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for verdict, reason, mask, _ in sites:
        count["listed"] += 1
        count[verdict] += 1
        known = bool(mask) and mask != "-" and not mask.startswith("unknown")
        count["proven"] += known
        if verdict == "refused":
            reasons[reason] += 1
        elif not known and mask:
            reasons[f"mask: {mask}"] += 1
    words = " | ".join(f"{n} x {reason}" for reason, n in reasons.items())
    return dict(
        listed=count["listed"], found=count["rewritten"] + count["exact"] + count["refused"], proven=count["proven"],
        rewritten=count["rewritten"] + count["exact"], refused=count["refused"], reasons=words,
    )  # fmt: skip


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure(case: Case) -> dict[str, Any]:
    """The row of a case. ``outcome``: "right", "wrong", or at which stage what was raised."""
    foreign = FOREIGN[case.architecture]
    row: dict[str, Any] = dict(architecture=case.architecture, phase=case.phase, route=case.route)
    row |= dict(package=foreign.package, version=importlib.metadata.version(foreign.package), reasons="")
    start, stage = time.perf_counter(), "untouched"
    try:
        with limited(SECONDS):
            torch._dynamo.reset()
            prepared = prepare(foreign, case.phase)
            with Attention() as attention:
                want = prepared.run(prepared.model)
            row["expected"] = attention.count if not prepared.step else step_count(prepared)
            again = prepared.run(prepared.model)
            noise = error_of(again, want)
            stage = case.route
            got = RUN[case.route](prepared, row)
            row["error"] = error_of(got, want)
            right = row["error"] <= max(TOLERANCE, 2 * noise)
            if not right:
                stage = f"{case.route} in float64"
                error = error_in_double(foreign, case)
                row["reasons"] += f" | in float64 the error is {error:.0e}"
                right = error <= IN_DOUBLE
            row["outcome"] = "right" if right else "wrong"
    except Exception as error:
        if row.get("expected") == 0 and "no attention found" in str(error):  # and the model is as it was
            return row | {"error": 0.0, "outcome": "right", "seconds": round(time.perf_counter() - start, 1)}
        words = (str(error).strip().splitlines() or [""])[0]
        row["outcome"] = f"{stage}: {type(error).__name__}: {words[:160]}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def error_in_double(foreign: Foreign, case: Case) -> float:
    """The error of a case in float64: what was rounding is gone, what is wrong is not."""
    torch._dynamo.reset()
    prepared = prepare(foreign, case.phase)
    prepared.model = prepared.model.double()
    prepared.inputs = {name: _doubled(value) for name, value in prepared.inputs.items()}
    want = prepared.run(prepared.model)
    return error_of(RUN[case.route](prepared, {"reasons": ""}), want)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def step_count(prepared: Prepared) -> int:
    counts = []

    def called(**inputs: Any) -> Any:
        with Attention() as attention:
            out = prepared.model(**inputs)
        counts.append(attention.count)
        return out

    prepared.run(called)
    return counts[-1]


def error_of(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest relative difference (Frobenius) of an output; infinite where shapes or NaN differ."""
    if [x.shape for x in got] != [x.shape for x in want]:
        return float("inf")
    errors = [0.0]
    for x, y in zip(got, want, strict=True):
        if not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        x, y = (torch.where(z.isfinite(), z, 0).double() for z in (x, y))
        errors.append(float((x - y).norm() / y.norm().clamp(min=1e-12)))
    return max(errors)


# ---------------------------------------------------------------------------------------------------------- running


def totals(rows: list[dict[str, Any]]) -> str:
    """A line per package and route."""
    lines = []
    for package, route in dict.fromkeys((row["package"], row["route"]) for row in rows):
        some = [row for row in rows if (row["package"], row["route"]) == (package, route)]
        add = {name: sum(row.get(name) or 0 for row in some) for name in ("expected", "found", "proven", "rewritten")}
        right, wrong = (sum(row["outcome"] == word for row in some) for word in ("right", "wrong"))
        largest = max((row["error"] for row in some if "error" in row), default=0.0)
        lines.append(
            f"{package} {route}: {len({row['architecture'] for row in some})} architectures, {len(some)} cases, "
            f"{right} right, {wrong} wrong, {len(some) - right - wrong} failed; sites expected {add['expected']}, "
            f"found {add['found']}, proven {add['proven']}, rewritten {add['rewritten']}; largest error {largest:.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FOREIGN, default=None, metavar="NAME")
    parser.add_argument("--package", nargs="+", default=None, help="only architectures of these packages")
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--route", nargs="+", choices=ROUTES, default=ROUTES)
    parser.add_argument("--inductor", action="store_true", help="compile 20 of them with inductor instead")
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    names = args.only or (INDUCTOR if args.inductor else FOREIGN)
    routes = ("inductor",) if args.inductor else args.route
    names = [name for name in names if args.package is None or FOREIGN[name].package in args.package]
    cases = [Case(name, phase, route) for name in names for phase in phases(FOREIGN[name]) for route in routes]
    cases = [case for case in cases if case.phase in args.phase]
    run = {"torch": torch.__version__}
    run |= {name: value for name, value in run_of(args.commit).items() if name in COLUMNS}
    rows = []
    for case in track(cases, "foreign"):
        rows.append({**run, **measure(case)})
        if args.out:
            append(Path(args.out), COLUMNS, rows[-1:])
    show(rows, "architecture phase route expected found proven rewritten refused error outcome".split(), 190, ".2g")
    print(totals(rows))


if __name__ == "__main__":
    main()
