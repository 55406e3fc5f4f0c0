"""Exact steps of decoding in a rewritten model: what transformers gives, of the filled rows of a cache alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from transformers.generation.configuration_utils import CompileConfig

from express_compile import rewrite_attention
from express_compile.kernels import exact
from express_compile.kernels.attend import decode

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
STEPS = 6
EXACT = dict(methods=["exact"])
EXPRESS = dict(methods=["express"], budget=8, min_length=1000)
POLICIES = pytest.mark.parametrize("policy", [EXACT, EXPRESS], ids=["exact", "express"])


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every step by our own attention how many places of the cache it was given."""
    seen, sdpa, step, inside = [], F.scaled_dot_product_attention, exact._on_cpu, []

    def spy(query, key, *args, **options):
        seen.extend(key.shape[2:3] * len(inside))
        return sdpa(query, key, *args, **options)

    def spied(*args):
        inside.append(True)
        out = step(*args)
        inside.clear()
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(exact, "_on_cpu", spied)
    return seen


def build(**more) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, **more)).eval()


def generate(model, cache: str, padded: bool, compiled: bool = False, n: int = 30):
    """Tokens ``[2, n + STEPS]`` and logits ``[STEPS, 2, vocabulary]``."""
    config = CompileConfig(mode="default", backend="aot_eager")
    config._compile_all_devices = True
    ids = torch.randint(0, 97, (2, n), generator=torch.Generator().manual_seed(n))
    mask = torch.ones_like(ids)
    mask[0, : 7 * padded] = 0
    how = dict(cache_implementation=cache, compile_config=config if compiled else None, disable_compile=not compiled)
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True, **how,
    )  # fmt: skip
    return result.sequences, torch.stack(result.logits)


@POLICIES
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("cache, compiled", [("dynamic", False), ("static", False), ("static", True)])
def test_generate_gives_what_it_gave(rows_read, policy, padded, cache, compiled) -> None:
    """Of a static cache of 36 places the 30 to 35 that are filled are read; a growing one has no others, and without
    padding it is left to PyTorch on the CPU."""
    model = build()
    tokens, logits = generate(model, cache, padded, compiled)
    rewrite_attention(model, **policy)
    assert rows_read == []
    found, found_logits = generate(model, cache, padded, compiled)
    assert torch.equal(found, tokens) and (found_logits - logits).abs().max() <= 1e-5
    filled = [30 + i for i in range(1, STEPS) for _ in range(2)]
    assert rows_read == ([] if cache == "dynamic" and not padded else filled)


def test_generate_through_the_kernels(monkeypatch) -> None:
    """In the interpreter, which is what a GPU runs."""
    calls = []

    def kernels(*args):
        calls.append(args)
        return decode.decode_triton(*args)[0]

    model = build()
    tokens, logits = generate(model, "static", True)
    rewrite_attention(model, **EXACT)
    monkeypatch.setattr(exact, "_on_cpu", kernels)
    found, found_logits = generate(model, "static", True)
    assert torch.equal(found, tokens) and (found_logits - logits).abs().max() <= 1e-5
    assert len(calls) == 2 * (STEPS - 1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_that_are_not_filled_may_hold_anything(attention) -> None:
    model, ids = build(attn_implementation=attention), torch.arange(40)[None]

    def run(fill: float) -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        first = model(ids[:, :30], past_key_values=cache).logits[:, -1:]
        for layer in cache.layers:
            layer.keys[:, :, 30:] = layer.values[:, :, 30:] = fill
        return torch.cat([first, *(model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40))], 1)

    truth = run(0.0)
    assert run(math.nan).isnan().any(), "PyTorch's own reads them"
    rewrite_attention(model, **EXACT)
    assert (run(math.nan) - truth).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 4, 16])
def test_several_queries_at_once(rows_read, n) -> None:
    """As in assisted decoding: the last tokens of a static cache, causal among themselves; more are no step."""
    model, ids = build(), torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(0))

    def run(n: int) -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=80)
        model(ids[:, :30], past_key_values=cache)
        return model(ids[:, 30 : 30 + n], past_key_values=cache).logits

    truth, more = run(n), run(17)
    rewrite_attention(model, **EXACT)
    assert (run(n) - truth).abs().max() <= 1e-5 and rows_read == [30 + n] * 2
    assert (run(17) - more).abs().max() <= 1e-5 and rows_read == [30 + n] * 2


@torch.no_grad()
@pytest.mark.parametrize("growing", [False, True], ids=["static", "growing"])
def test_one_graph_serves_all_lengths(growing) -> None:
    model, ids = build(), torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[0, :7] = 0

    def decode_with(run) -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        if not growing:
            cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        model(ids[:, :30], past_key_values=cache, attention_mask=mask[:, :30])
        sizes = [i + 1 if growing else 64 for i in range(30, 40)]
        return torch.stack(
            [run(ids[:, n : n + 1], past_key_values=cache, attention_mask=mask[:, :size]).logits
             for n, size in zip(range(30, 40), sizes, strict=True)]
        )  # fmt: skip

    truth = decode_with(model)
    rewrite_attention(model, **EXACT)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = decode_with(torch.compile(model, backend=counter))
    assert (compiled - truth).abs().max() <= 1e-5 and counter.frame_count <= (2 if growing else 1)
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("step_in_graph" in str(target) for target in targets) == 2 * counter.frame_count


def test_what_is_more_than_a_result_is_left_to_pytorch(rows_read) -> None:
    model, ids = build(), torch.randint(0, 97, (1, 31), generator=torch.Generator().manual_seed(0))
    rewrite_attention(model, **EXACT)
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        model(ids[:, :30], past_key_values=cache)
    model(ids[:, 30:], past_key_values=cache).logits.sum().backward()
    assert rows_read == [] and model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()
    model = rewrite_attention(build(attn_implementation="eager"), **EXACT)
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        model(ids[:, :30], past_key_values=cache)
        step = model(ids[:, 30:], past_key_values=cache, output_attentions=True)
    assert rows_read == [] and step.attentions[0].shape == (1, 4, 1, 40)


@torch.no_grad()
@pytest.mark.parametrize("policy", [EXACT, EXPRESS], ids=["exact", "express"])
def test_the_backend_reads_filled_rows_alone(policy) -> None:
    """A model that was never rewritten, whose graph holds its mask: by padding on the left and by a static cache."""
    model, ids = build(), torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :7] = 0
    compiled = torch.compile(model, backend="express", options=policy)

    def run(step, fill: float) -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        model(ids[:, :30], past_key_values=cache, attention_mask=mask[:, :30])
        for layer in cache.layers:
            layer.keys[:, :, 30:] = layer.values[:, :, 30:] = fill
        steps = [
            step(ids[:, i : i + 1], past_key_values=cache, attention_mask=mask[:, : i + 1]).logits
            for i in range(30, 33)
        ]
        return torch.cat(steps, 1)

    truth = run(model, 0.0)
    assert run(model, math.nan).isnan().any()
    assert (run(compiled, math.nan) - truth).abs().max() <= 1e-5


def test_a_compiled_step_that_needs_a_gradient_keeps_it() -> None:
    model, ids = build(), torch.randint(0, 97, (1, 31), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="express", options=EXACT)
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        model(ids[:, :30], past_key_values=cache)
    compiled(ids[:, 30:], past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
