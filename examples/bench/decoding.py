"""A decoding step of whole models with a long static cache, compiled as generate() does, exact and with SANTA.

    python examples/bench/decoding.py --out examples/bench/results/speed.csv    # on a GPU, about five minutes
    python examples/bench/decoding.py --tiny --shapes 2x256               # a taste on a CPU

The shape of Llama-3.1-8B with random weights and a cache of random keys, so attention is flat: the case in which SANTA
reads the most values. Exact is the faster of two: transformers' own sdpa attention, which decodes over a static cache
with a mask; and, as the best exact kernel, cuDNN without the mask over all of the cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from benchmark import quantile
from records import SPEED_COLUMNS, add_arguments, append, run_of, show
from torch.nn.attention import SDPBackend, sdpa_kernel

from express_compile import restore_attention, rewrite_attention
from express_compile.planning.devices import versions
from express_compile.planning.measure import Clock

STEPS = 12  # timed, after as many that compile and record graphs
LLAMA = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, rope_theta=500000.0, max_position_embeddings=1 << 20,
)  # fmt: skip
TINY = dict(LLAMA, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=97)  # fmt: skip


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
def step_times(model: torch.nn.Module, B: int, n: int, clock: Clock, mode: str) -> tuple[list[float], torch.Tensor]:
    """Milliseconds of single steps, and the logits of the last."""
    torch.compiler.reset()
    cache, device = filled_cache(model, B, n), next(model.parameters()).device
    ids = torch.full((B, 1), 5, device=device)
    mask = torch.ones(B, 1, 1, n, dtype=torch.bool, device=device)
    position = torch.full((B, 1), n - 1, device=device)
    compiled = torch.compile(model.forward, mode=mode)

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits

    for _ in range(STEPS):
        step()
    times = clock(step, STEPS)
    return times, step().float().clone()


def rows_of(model: torch.nn.Module, B: int, n: int, S: int, clock: Clock, mode: str) -> dict[str, Any]:
    """SANTA with S draws per head against the faster exact attention; ``error`` compares the logits of one step."""
    from transformers import AttentionInterface

    AttentionInterface.register("unmasked", unmasked)
    exact: dict[str, list[float]] = {}
    torch.manual_seed(1)
    exact["transformers"], truth = step_times(model, B, n, clock, mode)
    if clock.on_gpu:
        model.set_attn_implementation("unmasked")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            exact["cudnn"], _ = step_times(model, B, n, clock, mode)
        model.set_attn_implementation("sdpa")
    rewrite_attention(model, methods=["santa"], budget=S, seed=0)
    torch.manual_seed(1)
    times, logits = step_times(model, B, n, clock, mode)
    restore_attention(model)
    p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
    milliseconds = {name: quantile(x, 0.5) for name, x in exact.items()}
    best, config = min(milliseconds, key=milliseconds.get), model.config
    return dict(
        job="decode_model", method="santa",
        params=f"model=llama-3.1-8b-shape transformers_ms={milliseconds['transformers']:.3f}",
        B=B, H=config.num_attention_heads, H_kv=config.num_key_value_heads, Lq=1, Lk=n, D=config.head_dim,
        Dv=config.head_dim,
        dtype=str(model.dtype).removeprefix("torch."), s=S, ms_p20=p20, ms_p50=p50, ms_p80=p80, opponent=best,
        opponent_ms_p50=milliseconds[best], speedup=milliseconds[best] / p50,
        error=((logits - truth).norm() / truth.norm()).item(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1x131072", "8x32768"], help="sequences x tokens in the cache")
    parser.add_argument("--draws", type=int, default=128, help="S, draws per head")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers")
    add_arguments(parser)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = random_llama(device, dtype, TINY if args.tiny else LLAMA)
    clock, rows = Clock(device), []
    for shape in args.shapes:
        B, n = map(int, shape.split("x"))
        rows.append(rows_of(model, B, n, args.draws, clock, "reduce-overhead" if device == "cuda" else "default"))
        show(rows[-1:], "params B Lk s ms_p50 opponent opponent_ms_p50 speedup error".split())
        if args.out:
            append(args.out, SPEED_COLUMNS, [{**run_of(args.commit), **versions(), **rows[-1]}])


if __name__ == "__main__":
    main()
