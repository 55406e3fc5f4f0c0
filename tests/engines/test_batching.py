"""transformers' continuous batching of rewritten models: each packed request gets what it would get alone."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.generation import ContinuousBatchingConfig

from express_compile import is_rewritten, restore_attention, rewrite_attention
from express_compile.engines.batching import continuous_batching
from express_compile.routes.transformers.masks import NAME, PAGED

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 90, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
EXPRESS = {"methods": ["express"], "budget": 16, "sinks": 4, "window": 8, "protected": 0, "min_length": 64}
MIXED = ["sliding_attention", "full_attention"]
NEW = 5
PROMPTS = [torch.randint(1, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (150, 9, 200)]


def build(name: str = "Llama", attention: str = "sdpa", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**SIZES, **more)
    config._attn_implementation = attention
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)  # attention that has preferences
    return model


Outputs = list[tuple[list[int], torch.Tensor]]
"""The new tokens of every prompt, and their log probabilities."""


def configs(**config: Any) -> dict[str, Any]:
    config = {"max_batch_tokens": 512, "num_blocks": 16, "page_size": 64, "return_logprobs": True, **config}
    return {
        "generation_config": transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(**config),
    }


def batched(model: Any, prompts: list[list[int]] = PROMPTS, **config: Any) -> Outputs:
    """What ``generate_batch`` gives."""
    found = model.generate_batch(prompts, **configs(**config), progress_bar=False).values()
    assert all(out.error is None for out in found), [out.error for out in found]
    return [(out.generated_tokens, torch.tensor(out.logprobs)) for out in found]


def alone(model: Any, prompts: list[list[int]] = PROMPTS) -> Outputs:
    """What ``generate`` gives for one prompt after the other."""
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, len(prompt) :]
        found.append((new.tolist(), torch.cat(out.scores).log_softmax(-1).gather(1, new[:, None])[:, 0]))
    return found


def assert_same(a: Outputs, b: Outputs) -> None:
    for (tokens, logprobs), (expected, of_expected) in zip(a, b, strict=True):
        assert tokens == expected
        torch.testing.assert_close(logprobs, of_expected, rtol=0, atol=2e-4)


def test_what_stays_exact_gives_what_the_untouched_model_gives() -> None:
    model = build()
    expected = batched(model)
    assert_same(expected, alone(model))
    for policy in ({"methods": ["exact"]}, {**EXPRESS, "min_length": 300}):
        rewrite_attention(model, **policy)
        with continuous_batching(model):
            assert_same(batched(model), expected)
        restore_attention(model)


MODELS = {
    "plain": ("Llama", {}),
    "eager": ("Llama", {"attention": "eager"}),
    "windows": ("Mistral", {"sliding_window": 100}),
    "windows in some layers": ("Gemma3", {"head_dim": 16, "sliding_window": 40, "layer_types": MIXED}),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_request_is_prefilled_and_decoded_as_it_would_be_alone(model: str) -> None:
    family, more = MODELS[model]
    model = build(family, **more)
    exact = alone(model)
    rewrite_attention(model, **EXPRESS)
    expected = alone(model)
    with continuous_batching(model):
        found = batched(model)
        assert is_rewritten(model)
    assert_same(found, expected)
    assert_same(found[1:2], exact[1:2])  # 9 tokens are below min_length
    for long in (0, 2) if family != "Mistral" else ():  # Express takes no windows
        assert (found[long][1] - exact[long][1]).abs().max() > 1e-2
    assert_same(alone(model), expected)


def test_a_request_does_not_see_its_neighbours() -> None:
    model = rewrite_attention(build(), **EXPRESS)
    with continuous_batching(model):
        together = batched(model)
        for i, prompt in enumerate(PROMPTS):
            assert_same(batched(model, [prompt]), together[i : i + 1])


def test_a_prompt_that_comes_in_two_batches_is_prefilled_as_with_a_cache_of_its_own() -> None:
    model = rewrite_attention(build(), **EXPRESS)
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        cache = transformers.DynamicCache()
        model(ids[:, :128], past_key_values=cache)
        logits = model(ids[:, 128:], past_key_values=cache).logits[0, -1].log_softmax(-1)
    with continuous_batching(model):
        ((tokens, logprobs),) = batched(model, PROMPTS[2:], max_batch_tokens=128)
    assert tokens[0] == int(logits.argmax())
    assert abs(float(logprobs[0] - logits.max())) < 2e-4


def test_a_prompt_whose_beginning_is_cached_comes_out_as_with_a_cache_of_its_own() -> None:
    model = build()
    longer = PROMPTS[0] + [7, 8, 9] * 30
    expected = alone(model, [PROMPTS[0], longer])
    rewrite_attention(model, **{**EXPRESS, "min_length": 300})
    with continuous_batching(model), model.continuous_batching_context_manager(**configs()) as manager:
        found = []
        for prompt in (PROMPTS[0], longer):
            manager.add_request(prompt)
            found.append(manager.get_result(timeout=60))
    assert_same([(out.generated_tokens, torch.tensor(out.logprobs)) for out in found], expected)


def test_strict_fails_a_request_with_the_reason() -> None:
    model = rewrite_attention(build(), **EXPRESS, strict=True)
    with continuous_batching(model):
        (out,) = model.generate_batch(PROMPTS[:1], **configs(), progress_bar=False).values()
    assert "strict=True: 1 attention site was refused" in out.error
    assert "decoding 1 token(s) from a full cache would thin the whole cache again" in out.error


def test_names_are_as_before_in_the_end_also_after_an_error() -> None:
    model = rewrite_attention(build(), **EXPRESS)
    with pytest.raises(ZeroDivisionError), continuous_batching(model):
        assert model.config._attn_implementation == PAGED
        raise ZeroDivisionError
    assert model.config._attn_implementation == NAME
    with continuous_batching(model):
        restore_attention(model)
    assert model.config._attn_implementation == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(torch.tensor(PROMPTS[1:2])).logits.shape == (1, 9, 90)


def test_what_cannot_be_batched_says_so() -> None:
    model = build()
    with pytest.raises(ValueError, match="LlamaForCausalLM is not rewritten"), continuous_batching(model):
        pass
    rewrite_attention(model, **EXPRESS)
    with pytest.raises(ValueError, match="not supported for continuous batching"):  # by transformers itself
        batched(model)
    with continuous_batching(model), pytest.raises(RuntimeError, match="only generate_batch and its kin"):
        model(torch.tensor(PROMPTS[:1]))
    model.model.layers[1].self_attn = build().model.layers[1].self_attn
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn' \(LlamaAttention\)"), continuous_batching(model):
        pass
    gemma = rewrite_attention(build("Gemma2", "eager", head_dim=16, sliding_window=40, layer_types=MIXED), **EXPRESS)
    with pytest.raises(ValueError, match="has eager attention only"), continuous_batching(gemma):
        pass


def test_the_snippets_of_the_guide_run() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/guide/batching.md").read_text(encoding="utf-8")
    batch, packed = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(packed, names)
    assert names["out"].shape == (900, 4, 32) and names["out"].isfinite().all()
    exec(batch, names)
    assert [len(out.generated_tokens) for out in names["outputs"].values()] == [16, 16]
    assert not is_rewritten(names["model"])
