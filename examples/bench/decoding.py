"""A decoding step: attention alone over long caches, and whole models with a static cache.

    python examples/bench/decoding.py --out examples/bench/results/speed.csv    # on a GPU, about six minutes
    python examples/bench/decoding.py --by-hand     # half a minute: CUDA graphs of the eager model, nothing compiled
    python examples/bench/decoding.py --parts cache whole    # an ExpressCache, and all kinds of steps side by side
    python examples/bench/decoding.py --tiny --shapes 2x256               # a taste on a CPU

*Attention alone*: the exact kernel of this project over all rows of a cache (``lengths``), over those that a mask shows
(``padding``), over weighted rows as an ExpressCache has them (``decode_cache``), and over selected pages with the
choice and its means kept (``decode_pages``); against the fastest exact kernel of the same run, ours included. One CUDA
graph of calls over caches that do not fit the L2 together.

*A step*: the shape of Llama-3.1-8B with random weights and a cache of random keys, so attention is flat: the case in
which SANTA reads the most values. As transformers runs it (``sdpa`` with a mask; ``repeated``: with the heads of keys
repeated, as it is traced); as an upper bound cuDNN without the mask over all of the cache; rewritten, exact and with
SANTA.

*Whole steps* of the same shape after a prompt of random tokens: time to first token, milliseconds per token as
``generate()`` sees them (one step after the other, each waited for; median, 99th percentile and maximum), and peak
memory beyond the weights. transformers and the methods that read a full cache replay CUDA graphs over a static
cache of random keys; an ExpressCache decodes behind its own prompt by the graphs that ``generate()`` uses, updates,
thinning and everything else included. *Cache*: what a layer of it costs alone, in CUDA graphs: its attention, and the
step, in which a token is held as well; beside them what the device takes to thin, in the mean of all steps.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark import layers_of, quantile
from records import SPEED_COLUMNS, add_arguments, append, run_of, show
from torch.nn.attention import SDPBackend, sdpa_kernel

from express_compile import ExpressCache, restore_attention, rewrite_attention
from express_compile.core.plan import SavedPlan
from express_compile.core.rows import Rows as HeadRows
from express_compile.kernels.attend.decode import Rows, decode_attention, decode_reference
from express_compile.kernels.attend.places import attend_places
from express_compile.kernels.heads import PerHead
from express_compile.kernels.held import Held
from express_compile.kernels.launch import Random
from express_compile.kernels.select.pages import PAGE, SUB, choose_pages, update_means
from express_compile.planning.devices import versions
from express_compile.planning.measure import Clock, replayed

H, H_KV, D, SCALE = 32, 8, 128, 128**-0.5
COPY_BANDWIDTH = 4.27e12  # bytes per second that a copy reads and writes on an H200 (bench.md)
APART = 400 << 20  # bytes of caches in a graph
PAGES = dict(pages=16, sinks=64, recent=256)
WEIGHTED = 2048  # rows of an ExpressCache of s=1024
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
STEPS = 12  # timed, after as many that compile and record graphs
BUSY = 40_000_000  # cycles of the device, some 20 ms: longer than the host takes to launch what is thinned at once
WHOLE_STEPS = 300  # of whole steps; protected places compete every 256 tokens
UNIFORM = HeadRows(32, 256, 1024, 256)
SELECTED = HeadRows(64, 256, selected=16)
WARM = 8192  # tokens of a prompt that compiles kernels, before one is timed
PLAN = Path(__file__).parents[1] / "plans" / "smollm2-135m.json"
LLAMA = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, rope_theta=500000.0, max_position_embeddings=1 << 20,
)  # fmt: skip
TINY = dict(LLAMA, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=97)  # fmt: skip


# ---- attention alone -----------------------------------------------------------------------------------------------


def microseconds(calls: list[Callable[[], Any]]) -> list[float]:
    """Of a call, in a CUDA graph of all of them: one that follows the other, as layers do."""

    def run() -> None:
        for call in calls:
            call()

    if not torch.cuda.is_available():
        return [1e3 * t / len(calls) for t in Clock("cpu")(run, 3)]
    run = replayed(run)
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    return times


def best_exact(q: torch.Tensor, caches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, list[float]]:
    """Times of PyTorch's exact kernels without a mask."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if not q.is_cuda:
        backends = {"math": SDPBackend.MATH}
    found = {}
    for name, backend in backends.items():
        with sdpa_kernel(backend):
            found[name] = microseconds(
                [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True)
                 for k, v in caches]
            )  # fmt: skip
    return found


def attention_rows(B: int, n: int, device: str, dtype: torch.dtype, weighted: bool = False) -> list[dict[str, Any]]:
    """One token over ``n`` rows; the output of every call is checked against the reference in float32."""
    torch.manual_seed(0)
    q = torch.randn(B, H, 1, D, device=device, dtype=dtype)
    each = 2 * B * H_KV * n * D * q.element_size()
    count = max(2, min(64, -(-APART // each))) if device == "cuda" else 1
    caches = [tuple(torch.randn(B, H_KV, n, D, device=device, dtype=dtype) for _ in range(2)) for _ in range(count)]
    lengths = torch.full((B,), n, device=device, dtype=torch.int32)
    weights = torch.rand(B, H_KV, n, device=device).log()
    everything = {"lengths": Rows(lengths), "padding": Rows(padding=torch.ones(B, n, device=device, dtype=torch.bool))}
    if weighted:
        everything = {"weights": Rows(lengths, log_weight=weights)}
    exact, ours, rows = best_exact(q, caches), {}, []
    shape = dict(B=B, H=H, H_kv=H_KV, Lq=1, Lk=n, D=D, Dv=D, dtype=str(dtype).removeprefix("torch."))

    def check(name: str, out: torch.Tensor, read: Rows) -> float:
        truth, _ = decode_reference(q.float(), *(x.float() for x in caches[0]), SCALE, read)
        error = ((out.float() - truth).norm() / truth.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{name} at B={B}, n={n}: off by {error:.1e}, so it has no speed")
        return error

    def row(job: str, method: str, params: str, times: list[float], error: float) -> dict[str, Any]:
        p20, p50, p80 = (quantile(times, x) / 1e3 for x in (0.2, 0.5, 0.8))
        best = min(exact, key=lambda name: statistics.median(exact[name]))
        rate = each / COPY_BANDWIDTH / p50 * 1e3
        against = statistics.median(exact[best]) / 1e3
        return dict(
            job=job, method=method, params=f"{params} bandwidth={rate:.2f}".strip(), **shape, ms_p20=p20, ms_p50=p50,
            ms_p80=p80, opponent=best, opponent_ms_p50=against, speedup=against / p50, error=error,
        )  # fmt: skip

    def calls(read: Rows) -> list[Callable[[], Any]]:
        return [lambda k=k, v=v: decode_attention(q, k, v, SCALE, **read._asdict()) for k, v in caches]

    for name, read in everything.items():
        error = check(name, calls(read)[0]()[0], read)
        times = microseconds(calls(read))
        rows.append(row("decode_cache" if weighted else "decode_exact", "exact", f"rows={name}", times, error))
        ours.setdefault("ours", times)
    if weighted:
        return rows
    exact |= ours
    first, means = torch.zeros_like(lengths), []
    for k, _ in caches:
        means.append(k.new_empty(B, H_KV, -(-n // SUB), D))
        update_means(means[-1], k, first, lengths)

    def select(k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        update_means(kept, k, first, lengths, 1)
        pages = choose_pages(q, kept, SCALE, (first, lengths), **PAGES)
        return decode_attention(q, k, v, SCALE, lengths=lengths, pages=pages)[0], pages

    out, pages = select(*caches[0], means[0])
    error = check("pages", out, Rows(lengths, pages=pages))
    times = microseconds([lambda k=k, v=v, m=m: select(k, v, m) for (k, v), m in zip(caches, means, strict=True)])
    params = " ".join(f"{name}={value}" for name, value in PAGES.items())
    rows.append(row("decode_pages", "pages", f"{params} rows={PAGE * pages.shape[2]}", times, error))
    return rows


# ---- whole models --------------------------------------------------------------------------------------------------


def random_llama(device: str, dtype: torch.dtype, sizes: dict[str, Any]) -> torch.nn.Module:
    """A Llama with random weights, made on ``device``."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype)
    rotary = type(model.model.rotary_emb)(model.config)  # its buffer holds numbers that are no parameters
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model.eval()


def filled_cache(model: torch.nn.Module, B: int, n: int) -> Any:
    """A StaticCache for ``n`` tokens with random keys and values, in which the last ``2 STEPS`` are still to come."""
    from transformers import StaticCache

    cache, like = StaticCache(config=model.config, max_cache_len=n), next(model.parameters())
    shape = B, model.config.num_key_value_heads, 1, model.config.head_dim
    for layer in cache.layers:
        layer.lazy_initialization(like.new_zeros(shape), like.new_zeros(shape))
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(n - 2 * STEPS - 2)
    return cache


def unmasked(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
             scaling: float | None = None, **_: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention over all of the cache, whatever the mask says: what the best exact kernel is measured with."""
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


@torch.no_grad()
def step_times(
    model: torch.nn.Module, B: int, n: int, clock: Clock, mode: str | None
) -> tuple[list[float], torch.Tensor]:
    """Milliseconds of single steps, and the logits of the last. Without a ``mode`` of torch.compile the model runs as
    it is, on a GPU as a CUDA graph."""
    torch.compiler.reset()
    cache, device = filled_cache(model, B, n), next(model.parameters()).device
    ids = torch.full((B, 1), 5, device=device)
    mask = torch.ones(B, 1, 1, n, dtype=torch.bool, device=device)
    position = torch.full((B, 1), n - 1, device=device)
    run = model.forward if mode is None else torch.compile(model.forward, mode=mode)
    given = dict(attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
    if mode is None and clock.on_gpu:
        held: list[torch.Tensor] = []
        replay = replayed(lambda: held.append(run(ids, **given).logits))
        times = clock(replay, STEPS)
        replay()
        return times, held[-1].float().clone()

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(ids, **given).logits

    for _ in range(STEPS):
        step()
    times = clock(step, STEPS)
    return times, step().float().clone()


def repeated(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
             scaling: float | None = None, **_: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What a compiler traces of transformers' attention over a static cache: masked, over repeated heads."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def rows_of(model: torch.nn.Module, B: int, n: int, S: int, clock: Clock, mode: str | None) -> list[dict[str, Any]]:
    """Exact steps against those of transformers, and SANTA with S draws per head against the fastest exact ones;
    ``error`` compares the logits of one step with those of transformers."""
    from transformers import AttentionInterface

    exact: dict[str, list[float]] = {}
    torch.manual_seed(1)
    exact["transformers"], truth = step_times(model, B, n, clock, mode)
    others = {"repeated": repeated} if mode is None else {}
    others |= {"cudnn": unmasked} if clock.on_gpu else {}
    for name, attention in others.items():
        AttentionInterface.register(name, attention)
        model.set_attn_implementation(name)
        torch.manual_seed(1)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if name == "cudnn" else contextlib.nullcontext():
            exact[name], _ = step_times(model, B, n, clock, mode)
        model.set_attn_implementation("sdpa")
    found = {}
    for name, policy in {"exact": dict(methods=["exact"]), "santa": dict(methods=["santa"], budget=S, seed=0)}.items():
        rewrite_attention(model, **policy)
        torch.manual_seed(1)
        found[name] = step_times(model, B, n, clock, mode)
        restore_attention(model)
    milliseconds = {name: quantile(x, 0.5) for name, x in exact.items()}
    own = min(milliseconds[name] for name in ("transformers", "repeated") if name in milliseconds)
    config, rows = model.config, []
    for name, (times, logits) in found.items():
        p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
        error = ((logits - truth).norm() / truth.norm()).item()
        if name == "exact" and not error <= 10 * TOLERANCE[model.dtype]:
            raise SystemExit(f"exact at B={B}, n={n}: logits are off by {error:.1e}, so it has no speed")
        best = min(milliseconds, key=milliseconds.__getitem__) if name == "santa" else "transformers"
        against = milliseconds[best] if name == "santa" else own
        measured = " ".join(f"{x}_ms={milliseconds[x]:.3f}" for x in milliseconds)
        params = f"model=llama-3.1-8b-shape {measured}"
        rows.append(
            dict(
                job="decode_step" if mode is None else "decode_model" if name == "santa" else "decode_model_exact",
                method=name, params=params, B=B,
                H=config.num_attention_heads, H_kv=config.num_key_value_heads, Lq=1, Lk=n, D=config.head_dim,
                Dv=config.head_dim, dtype=str(model.dtype).removeprefix("torch."), s=S if name == "santa" else "",
                ms_p20=p20, ms_p50=p50, ms_p80=p80, opponent=best, opponent_ms_p50=against, speedup=against / p50,
                error=error,
            )
        )  # fmt: skip
    return rows


# ---- an ExpressCache, and whole steps ------------------------------------------------------------------------------


def thinning(layers: list[Held], new: Sequence[torch.Tensor], end: torch.Tensor, tokens: int) -> float:
    """Microseconds per token and layer, over so many steps with the query, key and value ``new``, to decide what is
    thinned and to move rows when that is due. The device is kept busy until the host has launched all of it."""
    spent = 0.0

    def timed(call: Callable[[], Any]) -> None:
        nonlocal spent
        if not end.is_cuda:
            started = time.perf_counter()
            call()
            spent += 1e6 * (time.perf_counter() - started)
            return
        before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY)
        before.record()
        call()
        behind.record()
        torch.cuda.synchronize()
        spent += 1e3 * before.elapsed_time(behind)

    for _ in range(tokens):
        layers[0].count_into(end)
        for layer in layers:
            if layer.rest() <= 0:
                timed(lambda layer=layer: layer.settle(single=True))
                layer.prepare_step(end)
            has_more = layer.idle() <= 0
            if has_more:
                timed(layer.launch_due)
            layer.step_triton(*new)
            if has_more:
                timed(lambda layer=layer: layer.look_ahead(1))
            layer.end_step()
    return spent / tokens / len(layers)


def cache_rows(B: int, n: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One layer of an ExpressCache of s=1024 behind ``n`` tokens, per layer and token: its attention alone, where
    nothing is updated, and the step that it is in a graph of ``generate()``. The output is checked against the
    reference over the same rows."""
    torch.manual_seed(0)
    count = 2 if B > 1 or device == "cpu" else 12
    q, k, v = (torch.randn(B, heads, 1, D, device=device, dtype=dtype) for heads in (H, H_KV, H_KV))
    layers, end = [], torch.empty(B, dtype=torch.int32, device=device)
    for layer in range(count):
        seed = torch.tensor(0, device=device)
        layers.append(Held(PerHead((UNIFORM,)), k, v, Random(seed, layer), SCALE, layer))
        layers[-1].fill(*(torch.randn(B, H_KV, n, D, device=device, dtype=dtype) for _ in range(2)))
        layers[-1].settle(single=True)
        layers[-1].prepare_step(end)
    layers[0].count_into(end)
    first, part = layers[0], layers[0].parts[0]
    out = first.launch_step(q, k, v)
    held = Rows(log_weight=part.log_weight)
    truth, _ = decode_reference(q.float(), part.key.float(), part.value.float(), SCALE, held)
    error = ((out.float() - truth).norm() / truth.norm()).item()
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"ExpressCache at B={B}, n={n}: off by {error:.1e}, so it has no speed")
    live = int((part.log_weight > -torch.inf).sum())
    step = microseconds([lambda x=x: x.step_triton(q, k, v) for x in layers])
    attend = microseconds([lambda x=x: attend_places(q, k, v, x._table[1], end, SCALE, False) for x in layers])
    for _ in range(2):  # the first time finds tables and kernels
        thinned = thinning(layers, (q, k, v), end, 512 if device == "cuda" else 4)
    p20, p50, p80 = (quantile(attend, x) / 1e3 for x in (0.2, 0.5, 0.8))
    bandwidth = 2 * live * D * q.element_size() / COPY_BANDWIDTH / p50 * 1e3
    shape = dict(B=B, H=H, H_kv=H_KV, Lq=1, Lk=n, D=D, Dv=D, dtype=str(dtype).removeprefix("torch."), s=UNIFORM.thinned)
    params = f"rows={live / B / H_KV:.0f} bandwidth={bandwidth:.2f}"
    attended = dict(job="decode_cache", method="heads", params=params, ms_p20=p20, ms_p50=p50, ms_p80=p80, error=error)
    p20, whole, p80 = (quantile(step, x) / 1e3 for x in (0.2, 0.5, 0.8))
    params = f"append_us={1e3 * (whole - p50):.2f} share={(whole - p50) / p50:.3f} thinning_us={thinned:.2f}"
    updated = dict(
        job="cache_update", method="heads", params=params, ms_p20=p20, ms_p50=whole, ms_p80=p80, opponent="attention",
        opponent_ms_p50=p50, speedup=p50 / whole,
    )  # fmt: skip
    return [{**shape, **attended}, {**shape, **updated}]


def planned_rows(model: torch.nn.Module, path: Path = PLAN) -> dict[str, Sequence[HeadRows]]:
    """The rows of every KV head, of a saved plan per KV head: an ExpressCache holds no others."""
    plan, config = SavedPlan.load(path), model.config
    if any(site.per == "query head" for site in plan.sites):
        raise SystemExit(f"{path}: has rows per query head; an ExpressCache takes a plan that was fitted without them")
    sizes = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    return {f"model.layers.{i}.self_attn": own.rows for i, own in enumerate(layers_of(plan, *sizes))}


@torch.no_grad()
def prompted(model: torch.nn.Module, B: int, n: int, cache: Any) -> float:
    """Seconds to the logits of the first token after ``n`` random ones."""
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (B, n), device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert logits.isfinite().all(), "a first token"
    return time.perf_counter() - started


def waited(step: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of single steps, the device waited for after each."""
    wait, times = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None), []
    for _ in range(count):
        wait()
        started = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - started))
    return times


@torch.no_grad()
def full_steps(model: torch.nn.Module, B: int, n: int, count: int) -> list[float]:
    """Steps over a full static cache: replays of one graph; the tokens stay the same number, within a page."""
    cache, device = filled_cache(model, B, n), next(model.parameters()).device
    ids = torch.full((B, 1), 5, device=device)
    given = dict(attention_mask=torch.ones(B, 1, 1, n, dtype=torch.bool, device=device), past_key_values=cache,
                 position_ids=torch.full((B, 1), n - 1, device=device), use_cache=True)  # fmt: skip

    def step() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(n - 1)
        model(ids, **given)

    return waited(replayed(step) if device.type == "cuda" else step, count)


@torch.no_grad()
def cache_steps(model: torch.nn.Module, B: int, n: int, cache: ExpressCache, count: int) -> list[float]:
    """Steps behind the ``n`` tokens that ``cache`` holds, as ``generate()`` runs them."""
    device = next(model.parameters()).device
    ids, position = torch.full((B, 1), 5, device=device), torch.full((B, 1), n, device=device)

    def step() -> None:
        given = dict(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
        cache.steps(model, given)
        position.add_(1)

    waited(step, 3)  # the first one records a graph
    return waited(step, count)


@contextlib.contextmanager
def compiled(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """``model`` compiled, in one piece or around what is not traced."""
    torch.compiler.reset()
    if wanted:
        model.compile()
    try:
        yield
    finally:
        model._compiled_call_impl = None


WHOLE = ("transformers", "exact", "santa", "selected", "cache", "planned")


def whole_rows(
    model: torch.nn.Module, B: int, n: int, S: int, count: int, only: Sequence[str] = WHOLE, compile: bool = True,
    saved: Path = PLAN,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of whole steps at one length, each as soon as it was measured, compiled ones as CUDA graphs; a method
    that does not fit the memory has none."""
    from transformers import DynamicCache

    on_gpu = torch.cuda.is_available()
    planned = planned_rows(model, saved)
    uniform = {path: [UNIFORM] for path in planned}
    selected = {path: [SELECTED] for path in uniform}
    methods: dict[str, tuple[dict[str, Any] | None, Any]] = {
        "transformers": (None, None), "exact": (dict(methods=["exact"]), None),
        "santa": (dict(methods=["santa"], budget=S, seed=0), None), "selected": (dict(methods=["exact"]), selected),
        "cache": (dict(methods=["exact"]), uniform), "planned": (dict(methods=["exact"]), planned),
    }  # fmt: skip
    first = {"santa": "exact"}  # SANTA is no method for a prompt
    config, ttft, exact = model.config, {}, {}
    for name, (policy, plan) in methods.items():
        if name not in only:
            continue
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            weights = torch.cuda.memory_allocated()
        if policy is not None:
            rewrite_attention(model, **policy)
        cache = None
        try:
            for length in (min(n, WARM), n):
                if name not in first:
                    cache = None
                    cache = DynamicCache(config=config) if plan is None else ExpressCache(model, rows=plan, graphs=True)
                    ttft[name] = prompted(model, B, length, cache)
            with compiled(model, compile):
                if plan is None:
                    cache = None
                    times = full_steps(model, B, n, 60 if on_gpu else 2)
                else:
                    assert isinstance(cache, ExpressCache)
                    times = cache_steps(model, B, n, cache, count)
        except torch.cuda.OutOfMemoryError:
            print(f"{name}: B={B}, n={n}: more than the memory of the device")
            continue
        finally:
            held = f" rows={cache.rows_held:.0f}" if isinstance(cache, ExpressCache) else ""
            cache = None
            if policy is not None:
                restore_attention(model)
        if plan is None and name != "santa":
            exact[name] = quantile(times, 0.5)
        best = "exact" if name not in exact and "exact" in exact else "transformers"
        against = exact.get(best)
        p20, p50, p80, p99 = (quantile(times, x) for x in (0.2, 0.5, 0.8, 0.99))
        seconds = ttft.get(first.get(name, name), float("nan"))
        said = f"model=llama-3.1-8b-shape compiled={int(compile)} ttft_s={seconds:.3f} p99_ms={p99:.3f}"
        said += f" mean_ms={statistics.fmean(times):.3f} max_ms={max(times):.3f}{held}"
        peak = (torch.cuda.max_memory_allocated() - weights) / 1e6 if on_gpu else ""
        yield dict(
            job="whole_step", method=name, params=said, B=B, H=config.num_attention_heads, Lq=1, Lk=n,
            H_kv=config.num_key_value_heads, D=config.head_dim, Dv=config.head_dim, ms_p20=p20, ms_p50=p50, ms_p80=p80,
            dtype=str(model.dtype).removeprefix("torch."), opponent=best, opponent_ms_p50=against,
            speedup=against / p50 if against else None, peak_mb=peak,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1x131072", "8x32768"], help="sequences x tokens in the cache")
    parser.add_argument("--weighted", nargs="+", default=[f"1x{WEIGHTED}", f"32x{WEIGHTED}"], help="of an ExpressCache")
    parser.add_argument(
        "--parts", nargs="+", default=["attention", "model"], choices=["attention", "model", "cache", "whole"]
    )
    parser.add_argument("--cached", nargs="+", default=["1x32768", "32x32768"], help="behind an ExpressCache alone")
    parser.add_argument("--steps", type=int, default=WHOLE_STEPS, help="timed behind an ExpressCache")
    parser.add_argument("--methods", nargs="+", default=WHOLE, choices=WHOLE, help="of whole steps")
    parser.add_argument("--plan", type=Path, default=PLAN, help="a saved plan per KV head: the heads of ``planned``")
    parser.add_argument("--draws", type=int, default=128, help="S, draws per head")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers")
    parser.add_argument("--by-hand", action="store_true", help="CUDA graphs of the eager model instead of a compiler")
    add_arguments(parser)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def keep(rows: list[dict[str, Any]]) -> None:
        show(rows, "job method params B Lk s ms_p50 opponent opponent_ms_p50 speedup error".split())
        if args.out:
            append(args.out, SPEED_COLUMNS, [{**run_of(args.commit), **versions(), **row} for row in rows])

    names = ("shapes", "weighted", "cached")
    shapes = {name: [tuple(map(int, x.split("x"))) for x in getattr(args, name)] for name in names}
    if "attention" in args.parts:
        for (B, n), weighted in itertools.chain(
            ((x, False) for x in shapes["shapes"]), ((x, True) for x in shapes["weighted"])
        ):
            keep(attention_rows(B, n, device, dtype, weighted))
    if "cache" in args.parts:
        for B, n in shapes["cached"]:
            keep(cache_rows(B, n, device, dtype))
    if not {"model", "whole"} & set(args.parts):
        return
    with torch.no_grad():
        model = random_llama(device, dtype, TINY if args.tiny else LLAMA)
    mode = "reduce-overhead" if device == "cuda" else "default"
    for B, n in shapes["shapes"] if "whole" in args.parts else ():
        for row in whole_rows(model, B, n, args.draws, args.steps, args.methods, not args.by_hand, args.plan):
            keep([row])
    for B, n in shapes["shapes"] if "model" in args.parts else ():
        keep(rows_of(model, B, n, args.draws, Clock(device), None if args.by_hand else mode))


if __name__ == "__main__":
    main()
