"""generate() compiles its decoding steps over a StaticCache; a rewritten model samples in them as it does eagerly."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch._dynamo.testing
import transformers
from transformers.generation.configuration_utils import CompileConfig

from express_compile import restore_attention, rewrite_attention
from express_compile.kernels import santa

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
SAMPLED = dict(methods=["santa"], budget=8, min_length=0, seed=3)
STEPS = 5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of every call of the reference its number of keys, and whether it sampled."""
    seen, reference = [], santa.santa_reference

    def spy(call, draws):  # None, or 0 for sequences that are exact
        seen.append((call.Lk, draws is not None and bool(torch.as_tensor(draws).any())))
        return reference(call, draws)

    monkeypatch.setattr(santa, "santa_reference", spy)
    return seen


def build(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def generate(model, n: int, B: int = 2, compiled: bool = True, backend: str = "aot_eager") -> torch.Tensor:
    """Logits ``[STEPS, B, vocabulary]`` of the tokens that follow a prompt, padded on the left in its first row."""
    config = CompileConfig(mode="default", backend=backend)
    config._compile_all_devices = True
    ids = torch.randint(0, 97, (B, n), generator=torch.Generator().manual_seed(n))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, cache_implementation="static", pad_token_id=0,
        eos_token_id=None, compile_config=config if compiled else None, disable_compile=not compiled,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(result.logits)


def test_compiled_steps_sample_as_eager_ones(calls) -> None:
    """Prompts of several lengths and batches, of which later ones are compiled for symbolic sizes."""
    model = build(transformers.LlamaConfig(**SIZES))
    shapes = [(30, 2), (41, 3), (52, 4)]
    exact = [generate(model, *shape) for shape in shapes]
    rewrite_attention(model, **SAMPLED)
    eager = [generate(model, *shape, compiled=False) for shape in shapes]
    calls.clear()
    compiled = [generate(model, *shape) for shape in shapes]
    assert [sampled for _, sampled in calls] == [True] * (3 * 2 * (STEPS - 1))
    for a, b, truth in zip(compiled, eager, exact, strict=True):
        assert (a - b).abs().max() <= 1e-5
        assert all((x - y).abs().max() > 1e-2 for x, y in zip(a[1:], truth[1:], strict=True)), "every step samples"


def test_as_many_draws_as_keys_are_exact(calls) -> None:
    model = build(transformers.LlamaConfig(**SIZES))
    exact = generate(model, 30)
    rewrite_attention(model, **{**SAMPLED, "budget": 256})
    assert (generate(model, 30, backend="inductor") - exact).abs().max() <= 1e-5
    assert [sampled for _, sampled in calls] == [False] * (2 * (STEPS - 1))


def test_without_a_seed_every_call_draws_anew() -> None:
    model = build(transformers.LlamaConfig(**SIZES))
    rewrite_attention(model, **{**SAMPLED, "seed": None})
    one, other = generate(model, 30), generate(model, 30)
    assert torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() > 1e-2
    rewrite_attention(model, **SAMPLED)
    assert torch.equal(generate(model, 30), generate(model, 30))


def test_policies_copies_and_restoring_take_effect_after_compiling(calls) -> None:
    model = build(transformers.LlamaConfig(**SIZES))
    exact = generate(model, 30)
    rewrite_attention(model, **SAMPLED)
    sampled = generate(model, 30)
    rewrite_attention(model, **{**SAMPLED, "seed": 4})
    assert (generate(model, 30) - sampled).abs().max() > 1e-2
    rewrite_attention(model, **SAMPLED, modules={"*.layers.1.*": {"methods": ["exact"]}})
    calls.clear()
    generate(model, 30)
    assert len(calls) == STEPS - 1
    restore_attention(model)
    calls.clear()
    assert (generate(model, 30) - exact).abs().max() <= 1e-5 and calls == []
    model = rewrite_attention(build(transformers.LlamaConfig(**SIZES)), **SAMPLED)
    other = copy.deepcopy(model)
    del model
    gc.collect()
    assert (generate(other, 30) - sampled).abs().max() <= 1e-5


@pytest.mark.parametrize("policy", [dict(methods=["express"], budget=8, min_length=0), dict(methods=["exact"])])
def test_other_methods_leave_decoding_exact(policy, calls) -> None:
    model = build(transformers.LlamaConfig(**SIZES))
    exact = generate(model, 30)
    rewrite_attention(model, **policy)
    assert (generate(model, 30) - exact).abs().max() <= 1e-5 and calls == []


def test_torch_compile_over_a_growing_cache(calls) -> None:
    """Every step has a key more and no mask: one graph for all lengths."""
    model = build(transformers.LlamaConfig(**SIZES))
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decode(run) -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :30], past_key_values=cache)
        return torch.stack([run(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)])

    exact = decode(model)
    rewrite_attention(model, **SAMPLED)
    eager = decode(model)
    calls.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = decode(torch.compile(model, backend=counter))
    assert calls == [(n, True) for n in range(31, 41) for _ in range(2)] and counter.frame_count <= 2
    assert (compiled - eager).abs().max() <= 1e-5 < 1e-2 < (compiled - exact).abs().max()


def test_a_window_whose_cache_evicts(calls) -> None:
    """The 16 keys that are left are sampled, by other draws at every step."""
    model = build(transformers.MistralConfig(**SIZES, sliding_window=16))
    exact = generate(model, 30)
    rewrite_attention(model, **SAMPLED)
    eager = generate(model, 30, compiled=False)
    calls.clear()
    compiled = generate(model, 30)
    assert calls == [(16, True)] * (2 * (STEPS - 1))
    assert (compiled - eager).abs().max() <= 1e-5 < 1e-2 < (compiled[1:] - exact[1:]).abs().amax((1, 2)).min()


def test_soft_caps_run_exactly(calls) -> None:
    model = build(
        transformers.Gemma2Config(**SIZES, head_dim=16, attn_logit_softcapping=2.0, attn_implementation="eager")
    )
    exact = generate(model, 30)
    rewrite_attention(model, **SAMPLED)
    calls.clear()
    assert (generate(model, 30) - exact).abs().max() <= 1e-5 and calls == []
