"""Time to first token: a whole model over a long prompt, exact, with plans per head, and with what is simpler.

    python examples/bench/first_token.py --plan examples/plans/smollm2-135m.json --out examples/bench/results/speed.csv
    python examples/bench/first_token.py --tiny --lengths 512 --plan examples/plans/smollm2-135m.json   # on a CPU

The shape of Llama-3.1-8B (``decoding.py``) with random weights and a small vocabulary, one prompt, a cache that is
filled, and the logits of the last token. Layers have the heads of a saved plan, per KV head or per query head, as
``benchmark.layers_of`` says; ``of_plan`` is how many rows the plan itself has on average. Beside them, at as many rows
as the first plan: ``window`` is FlexAttention over sinks and the last tokens, and ``express`` the same Express in all
heads; ``none`` is the model without attention, of which no choice of rows can be faster. Of the heads the output is
checked in three layers at the shortest length; ``error`` is the change of the logits, of random weights: it says
nothing about answers.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmark import check_call, equal_rows, layers_of, mean_rows, of_sites, quantile, relative, window_of
from decoding import LLAMA, TINY, random_llama
from records import SPEED_COLUMNS, add_arguments, append, run_of, show
from torch.nn.attention import SDPBackend, sdpa_kernel

from express_compile import restore_attention, rewrite_attention
from express_compile.core.call import Call, Op, run_by
from express_compile.core.plan import SavedPlan
from express_compile.kernels.heads import PerHead, options_at
from express_compile.planning.devices import versions
from express_compile.planning.measure import Clock

VOCABULARY = 32_000
SINKS = 32
LONG = 100_000  # tokens from which on a pass takes seconds: one repeat, and of the exact backends cuDNN alone


class Checked:
    """A runner of ops that checks what they give, each layer of ``layers`` once."""

    def __init__(self, layers: int) -> None:
        self.seen, self.errors = 0, list[tuple[float, float]]()
        self.at = {0, layers // 2, layers - 1}

    def __call__(self, op: Op, call: Call) -> Any:
        result = call.run(op)
        if self.seen in self.at:
            own = options_at(call.Lk, **call.options)
            self.errors.append(check_call(call, result[0], own))
        self.seen += 1
        return result


class FirstToken:
    """One model, and the milliseconds of its programs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        sizes = TINY if args.tiny else dict(LLAMA, vocab_size=VOCABULARY)
        with torch.no_grad():
            self.model = random_llama(self.device, dtype, sizes)
        self.clock, self.config, self.best = Clock(self.device), self.model.config, ""
        self.sites = [name for name, x in self.model.named_modules() if name.endswith(".self_attn")]
        self.saved = {path.stem: SavedPlan.load(path) for path in args.plan}
        self.checked: dict[str, tuple[float, float]] = {}

    @torch.no_grad()
    def run(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=True, logits_to_keep=1).logits
        return logits

    def timed(self, ids: torch.Tensor) -> tuple[list[float], torch.Tensor]:
        last: dict[str, torch.Tensor] = {}

        def call() -> None:
            last["logits"] = self.run(ids)

        return self.clock(call, self.args.repeats if ids.shape[1] < LONG else 1), last["logits"].float()

    @contextlib.contextmanager
    def attending(self, attend: Callable | None) -> Iterator[None]:
        """While active, attention of the model is ``attend(query, key, value)``, or nothing at all."""
        from transformers import AttentionInterface

        def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
                      **__: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
            out = query if attend is None else attend(query, key, value)
            return out.transpose(1, 2).contiguous(), None

        AttentionInterface.register("given", attention)
        self.model.set_attn_implementation("given")
        try:
            yield
        finally:
            self.model.set_attn_implementation("sdpa")

    def exact(self, ids: torch.Tensor) -> tuple[dict[str, list[float]], torch.Tensor]:
        """Times by the exact backend that transformers runs on, and the logits of the last."""
        backends, times = {"flash": SDPBackend.FLASH_ATTENTION}, {}
        if self.device == "cuda":
            backends = {**({} if ids.shape[1] >= LONG else backends), "cudnn": SDPBackend.CUDNN_ATTENTION}
        for name, backend in backends.items():
            with sdpa_kernel(backend):
                times[name], logits = self.timed(ids)
        self.best = min(times, key=lambda name: quantile(times[name], 0.5))
        return times, logits

    def with_rows(self, ids: torch.Tensor, name: str, layers: list[PerHead]) -> tuple[list[float], torch.Tensor]:
        """Times with the rows of ``layers``, or of the one for all; checked where that has not been done."""
        every = {path: layers[i % len(layers)].rows for i, path in enumerate(self.sites)}
        rewrite_attention(self.model, methods=[replace(layers[0], rows=every)], strict=True)
        try:
            if name not in self.checked:
                with run_by(check := Checked(len(self.sites))):
                    self.run(ids)
                self.checked[name] = max(check.errors, key=lambda x: x[0] / x[1])
            return self.timed(ids)
        finally:
            restore_attention(self.model)

    def rows_of(self, n: int) -> Iterator[dict[str, Any]]:
        """What is measured at one length."""
        ids = torch.randint(self.config.vocab_size, (1, n), device=self.device)
        exact, truth = self.exact(ids)
        against = quantile(exact[self.best], 0.5)
        with self.attending(None):
            alone, _ = self.timed(ids)
        linear = f"none_ms={quantile(alone, 0.5):.0f}"

        def row(method: str, params: str, rows: int, times: list[float], logits: torch.Tensor) -> dict[str, Any]:
            config, p50 = self.config, quantile(times, 0.5)
            error, allowed = self.checked.get(params, (0.0, 0.0))
            return dict(
                job="first_token", method=method, params=f"model=llama-3.1-8b-shape {params} rows={rows} {linear}",
                B=1, H=config.num_attention_heads, H_kv=config.num_key_value_heads, Lq=n, Lk=n, D=config.head_dim,
                Dv=config.head_dim, dtype=str(self.model.dtype).removeprefix("torch."), s=rows,
                ms_p20=quantile(times, 0.2), ms_p50=p50, ms_p80=quantile(times, 0.8), opponent=self.best,
                opponent_ms_p50=against, speedup=against / p50 if error <= allowed else "failed its check",
                error=relative(logits, truth),
            )  # fmt: skip

        for name, times in exact.items():
            yield row("exact", f"backend={name}", n, times, truth)
        rows, sizes = list[int](), (self.config.num_attention_heads, self.config.num_key_value_heads)
        for name, plan in self.saved.items():
            layers = layers_of(plan, *sizes, len(self.sites))
            rows.append(round(mean_rows(layers, n)))
            found = row("heads", f"plan={name}", rows[-1], *self.with_rows(ids, f"plan={name}", layers))
            yield {**found, "params": f"{found['params']} of_plan={mean_rows(of_sites(plan), n):.0f}"}
        same = [equal_rows(rows[0], n, True)]
        yield row("express", "plan=same", rows[0], *self.with_rows(ids, "plan=same", same))
        with self.attending(window_of(rows[0], SINKS, n, torch.device(self.device))):
            times, logits = self.timed(ids)
        yield row("window", "plan=window", rows[0], times, logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--plan", type=Path, nargs="+", required=True, help="saved plans")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers")
    add_arguments(parser)
    args = parser.parse_args()
    bench = FirstToken(args)
    common, found = {**run_of(args.commit), **versions()}, []
    for n in sorted(args.lengths):
        for row in bench.rows_of(n):
            found.append({**common, **row})
            print(f"{n} {row['method']} {row['params']}: {row['ms_p50']:.0f} ms", flush=True)
            if args.out:
                append(args.out, SPEED_COLUMNS, found[-1:])
    show(found, "method Lk params s ms_p50 opponent opponent_ms_p50 speedup error".split())


if __name__ == "__main__":
    main()
