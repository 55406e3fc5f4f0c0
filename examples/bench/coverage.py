"""Which attention sites of which architectures are found, proven and rewritten, and what torch's own fusion matches.

    python examples/bench/coverage.py --out examples/bench/results/coverage.csv  # all: about ten minutes on two cores
    python examples/bench/coverage.py --only llama t5 --fusion                       # some, beside torch's fusion

Tiny random models (``architectures.py``) in both spellings of attention, without and with padding, in a prefill and
in one decoding step over both caches. ``methods=["exact"]`` rewrites a site to ``scaled_dot_product_attention``, so
that the rewritten graph has to give what the model gives, up to rounding, and the same gradients.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from architectures import ARCHITECTURES, LENGTH, Architecture, random, real_tokens, tokens
from records import add_arguments, append, run_of, show
from rich.progress import track
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from express_compile.core.plan import Plan
from express_compile.core.policy import Policy
from express_compile.passes.match import AttentionSite
from express_compile.passes.multihead import OPAQUE
from express_compile.passes.pipeline import rewrite_graph

COLUMNS = (
    "date,torch,transformers,commit,architecture,implementation,mask,phase,expected,found,proven,masks,rewritten,exact,"
    "refused,reasons,error,gradient_error,torch_fused,seconds"
).split(",")
SEPARATOR = " | "
POLICY = Policy(methods=("exact",))
FUSED_ALREADY = {"sdpa", *OPAQUE.values()}
PREFILL, DYNAMIC, STATIC = PHASES = "prefill", "dynamic cache", "static cache"
Output = tuple[torch.Tensor, list[torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One model with its inputs. ``masked``: with right-padded sequences. ``phase``: one of :data:`PHASES`."""

    architecture: str
    implementation: str
    masked: bool
    phase: str

    @property
    def expected(self) -> int:
        """The number of attention sites that one run has."""
        architecture = ARCHITECTURES[self.architecture]
        return architecture.sites if self.phase == PREFILL else architecture.step_sites


def cases(names: Iterable[str]) -> Iterator[Case]:
    """All cases of the architectures ``names``."""
    for name in names:
        architecture = ARCHITECTURES[name]
        phases = PHASES if architecture.static else PHASES[:2] if architecture.step_sites else PHASES[:1]
        for implementation in architecture.implementations:
            for masked in (False, True)[: 1 if architecture.mask is None else 2]:
                yield from (Case(name, implementation, masked, phase) for phase in phases)


# -- models and their inputs -------------------------------------------------------------------------------------


def prefill_inputs(architecture: Architecture, masked: bool) -> dict[str, Any]:
    """The keyword arguments of a forward pass; padded tokens have id 0."""
    inputs = architecture.inputs()
    if masked:
        real = inputs[architecture.mask] = real_tokens()
        if "input_ids" in inputs:
            inputs["input_ids"] = inputs["input_ids"] * real
    return inputs


def step_inputs(architecture: Architecture, model: nn.Module, masked: bool, phase: str) -> dict[str, Any]:
    """The keyword arguments of one decoding step over a cache that a prefill has just filled."""
    inputs = prefill_inputs(architecture, masked)
    inputs |= {"past_key_values": new_cache(model, phase), "use_cache": True}
    with torch.no_grad():
        before = model(**inputs)
    token = tokens(1, seed=5)
    step = {"past_key_values": inputs["past_key_values"], "use_cache": True}
    if "decoder_input_ids" in inputs:
        step |= {"decoder_input_ids": token, "encoder_outputs": (before.encoder_last_hidden_state,)}
        return step | ({architecture.mask: real_tokens()} if masked else {})
    step["input_ids"] = token
    return step | ({architecture.mask: nn.functional.pad(real_tokens(), (0, 1), value=1)} if masked else {})


def new_cache(model: nn.Module, phase: str) -> Any:
    """An empty cache, with one for the encoder's keys where the model has an encoder."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    config = model.config.get_text_config(decoder=True)

    def one(length: int) -> Any:
        return DynamicCache(config=config) if phase == DYNAMIC else StaticCache(config=config, max_cache_len=length)

    return EncoderDecoderCache(one(LENGTH + 8), one(LENGTH)) if model.config.is_encoder_decoder else one(LENGTH + 8)


def run_case(case: Case, model: nn.Module, run: Callable[..., Any], inference: bool = False) -> Output:
    """The output of ``run``, which is the model or what it was compiled to, and the gradients of its embeddings.

    In a padded batch the output is that of the real tokens. Gradients are those of the output's product with a
    fixed random tensor (the sum over what a LayerNorm gives is constant), with respect to every embedding and every
    floating-point input; only a prefill has them, and none with ``inference``.
    """
    architecture = ARCHITECTURES[case.architecture]
    if case.phase != PREFILL:
        with torch.no_grad():
            return output_of(run(**step_inputs(architecture, model, case.masked, case.phase))), []
    inputs = prefill_inputs(architecture, case.masked)
    options = {"use_cache": False} if architecture.step_sites else {}
    model.requires_grad_(False)
    roots = [x for x in (*inputs.values(), *embeddings(model)) if x.is_floating_point()]
    roots = [] if inference or case.implementation == "fused" else roots
    for x in roots:
        x.requires_grad_(True)
    out = output_of(run(**inputs, **options))
    if case.masked and architecture.padded_output:
        out = out[real_tokens().bool()]
    if not roots:
        return out, []
    loss = (out * random(*out.shape, seed=6)).sum()
    gradients = torch.autograd.grad(loss, roots, allow_unused=True, materialize_grads=True)
    return out.detach(), list(gradients)


def embeddings(model: nn.Module) -> list[nn.Parameter]:
    return list(dict.fromkeys(m.weight for m in model.modules() if isinstance(m, nn.Embedding)))


def output_of(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    return out.last_hidden_state if "last_hidden_state" in out else torch.cat([out.text_embeds, out.image_embeds])


def relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Norm of the difference by the norm of ``b``, over all tensors."""
    a, b = (torch.cat([x.flatten().double() for x in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


# -- one case ----------------------------------------------------------------------------------------------------


def measure(case: Case, fusion: bool = False) -> dict[str, Any]:
    """The row of a case.

    Where the model cannot be built, run or compiled, its ``reasons`` are the first line of the error; where Dynamo
    cuts it into several graphs, which may part the softmax from its products, they say so.
    """
    row: dict[str, Any] = dict(
        architecture=case.architecture, implementation=case.implementation, mask="padded" if case.masked else "none",
        phase=case.phase, expected=case.expected, found=0, proven=0, rewritten=0, exact=0, refused=0,
    )  # fmt: skip
    planned: list[tuple[AttentionSite, Plan]] = []
    stage = "the model itself"
    try:
        model = ARCHITECTURES[case.architecture].build(case.implementation)
        expected, gradients = run_case(case, model, model)
        stage, seconds, graphs = "compiled", 0.0, 0

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            nonlocal seconds, graphs
            graphs += 1
            start = time.perf_counter()
            planned.extend(rewrite_graph(gm, POLICY, inputs))
            seconds += time.perf_counter() - start
            return gm.forward

        torch._dynamo.reset()
        got, got_gradients = run_case(case, model, torch.compile(model, backend=backend))
        row |= verdicts(planned) | {"seconds": seconds, "error": relative([got], [expected])}
        if graphs != 1:
            cut = f"Dynamo cut the model into {graphs} graphs"
            row["reasons"] = SEPARATOR.join(filter(None, (row["reasons"], cut)))
        if gradients:
            row["gradient_error"] = relative(got_gradients, gradients)
        if fusion:
            already = sum(site.form in FUSED_ALREADY for site, _ in planned)
            # SDPA that torch takes apart (on a CPU, with a mask for each head) is matched once more
            count = min(already + fused_by_torch(case, model), case.expected)
            row["torch_fused"] = f"{count} ({already} already)" if already else str(count)
    except Exception as error:
        words = str(error).strip().splitlines()
        row |= verdicts(planned) | {"reasons": f"{stage}: {type(error).__name__}: {' '.join(words[:1])}"}
    return row


def verdicts(planned: list[tuple[AttentionSite, Plan]]) -> dict[str, Any]:
    """What became of the sites, in numbers; a site with a refusal of its own counts as refused unless rewritten."""
    count: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    for site, plan in planned:
        verdict = "refused" if site.refusal is not None and plan.verdict != "rewritten" else plan.verdict
        count[verdict] += 1
        if verdict == "refused":
            reasons[site.refusal or plan.reason] += 1
        if site.spec is None:
            continue
        if site.spec.mask.unknown is None:
            masks[str(site.spec.mask)] += 1
        else:
            reasons[f"mask: {site.spec.mask.unknown}"] += 1
    return dict(
        found=len(planned), proven=masks.total(), masks=listed(masks), rewritten=count["rewritten"],
        exact=count["exact"], refused=count["refused"], reasons=listed(reasons),
    )  # fmt: skip


def listed(words: Counter[str]) -> str:
    return SEPARATOR.join(f"{n} x {word}" for word, n in words.items())


def fused_by_torch(case: Case, model: nn.Module) -> int:
    """Sites that inductor's pattern matcher turns into SDPA when it compiles for inference.

    The passes over the joint graph, where this happens, are all that runs of inductor: no code is generated.
    """

    def keep(gm: torch.fx.GraphModule, _: list[Any], **__: Any) -> Callable[..., Any]:
        return make_boxed_func(gm.forward)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_fx(gm, inputs, inner_compile=keep)

    torch._dynamo.reset()
    counters.clear()
    # what an earlier compilation left on the disk would not be matched again
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
        run_case(case, model, torch.compile(model, backend=backend), inference=True)
    return counters["inductor"]["fuse_attention"]


# -- running -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--fusion", action="store_true", help="count what torch's own fusion matches as well")
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a second thread would mostly wait
    logging.disable(logging.WARNING)  # Dynamo and transformers remark on every tiny model
    rows = [measure(case, args.fusion) for case in track(list(cases(args.only)), "coverage")]
    show(rows, "architecture implementation mask phase expected found proven rewritten exact refused error "
         "gradient_error torch_fused seconds".split(), width=190, digits=".2g")  # fmt: skip
    print(histogram(rows))
    if args.out:
        run = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
        run |= {name: value for name, value in run_of(args.commit).items() if name in COLUMNS}
        append(args.out, COLUMNS, [{**run, **row} for row in rows])


def histogram(rows: list[dict[str, Any]]) -> str:
    """How many cases each reason stands in, most first."""
    count: Counter[str] = Counter()
    for row in rows:  # names of nodes without their numbers
        reasons = re.sub(r"_\d+'", "'", row.get("reasons", "")).split(SEPARATOR)
        count.update({reason.split(" x ", 1)[-1] for reason in reasons if reason})
    return "\n".join(f"{n:5} cases  {reason}" for reason, n in count.most_common())


if __name__ == "__main__":
    main()
