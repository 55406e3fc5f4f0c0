"""rewrite_attention on tiny random Hugging Face models, with a toy method whose mathematics is exact."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import transformers
from torch import nn

import express_compile
from express_compile.core.method import METHODS, Method, Refusal, register
from express_compile.core.options import NUMBER, TABLE_AT, Options, option
from express_compile.core.policy import Policy
from express_compile.core.sites import record_sites
from express_compile.core.spec import AttentionSpec, Mask, known_equal
from express_compile.quality import fit
from express_compile.routes import eager
from express_compile.routes.eager import is_rewritten, restore_attention, rewrite_attention
from express_compile.routes.transformers.masks import ProvenMask

VOCAB = 97


# ---------------------------------------------------------------------------------------------- the toy method


def toy_weights(
    query: torch.Tensor, key: torch.Tensor, padding: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights [B, H, Lq, Lk] of bottom-right aligned causal attention, 0 where nothing is seen; and lse."""
    Lq, Lk = query.shape[2], key.shape[2]
    seen = torch.ones(Lq, Lk, dtype=torch.bool, device=query.device).tril(Lk - Lq)[None, None]
    if padding is not None:
        seen = seen & padding[:, None, None]
    scores = scale * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().masked_fill(~seen, 0.0), lse.float()


@torch.library.custom_op("express_compile::toy_eager", mutates_args=())
def toy_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    seed: torch.Tensor,
    scale: float,
    layer: int,
    gain: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, lse = toy_weights(query, key, padding, scale)
    out = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    noise = torch.rand((), generator=torch.Generator().manual_seed(int(seed) + layer)) if gain < 0 else 0.0
    return (gain * out + noise).contiguous(), lse


@toy_op.register_fake
def _(query, key, value, padding, seed, scale, layer, gain):
    shape = query.shape[:3]
    return query.new_empty((*shape, value.shape[-1])), query.new_empty(shape, dtype=torch.float32)


def _save(ctx, inputs, output):
    query, key, value, padding, _, scale, _, gain = inputs
    ctx.save_for_backward(query, key, value, padding)
    ctx.scale, ctx.gain = scale, gain


def _backward(ctx, grad_out, grad_lse):
    *qkv, padding = ctx.saved_tensors
    query, group = qkv[0], qkv[0].shape[1] // qkv[1].shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in qkv[1:])
    weights, _ = toy_weights(query, qkv[1], padding, ctx.scale)
    grad_out = ctx.gain * grad_out
    grad_weights = grad_out @ value.transpose(-1, -2)
    grad_scores = ctx.scale * weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    grads = (grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad_out)
    grads = (x.unflatten(1, (-1, group)).sum(2) for x in grads)
    return grad_scores @ key, *grads, None, None, None, None, None


toy_op.register_autograd(_backward, setup_context=_save)


def toy_refuses(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    if spec.mask.unknown is not None:
        return Refusal("toy_eager", f"its mask is not proven: {spec.mask.unknown}")
    if not spec.mask.causal:
        return Refusal("toy_eager", "bidirectional attention")
    if not known_equal(spec.mask.offset, spec.Lk - spec.Lq):
        return Refusal("toy_eager", "only bottom-right aligned causal attention")
    if spec.mask.window is not None:
        return Refusal("toy_eager", f"local attention over {spec.mask.window} keys")
    if spec.Lq == 1:
        return Refusal("toy_eager", "decoding")
    return None


@dataclass(frozen=True)
class Toy(Options):
    gain: float = option(1.0, "what the result is multiplied by", NUMBER)


TOY = Method(
    name="toy_eager",
    summary="exact causal attention, times a gain",
    supports="causal",
    refuses="decoding",
    refuse=toy_refuses,
    options=Toy,
)
TOY_ONLY = {"methods": ["toy_eager"]}
HALF = {**TOY_ONLY, "method_options": {"toy_eager": {"gain": 0.5}}}
THIN = {"methods": ["thinformer"], "budget": 64}  # more rows than there are keys


@pytest.fixture(autouse=True, scope="module")
def toy_is_registered() -> Iterator[None]:
    """Only while this file runs: other tests go through all registered methods."""
    register(TOY)
    yield
    del METHODS._methods[TOY.name]


# ---------------------------------------------------------------------------------------------------- models


def common(**extra) -> dict:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"vocab_size": VOCAB, "max_position_embeddings": 128, **sizes, **extra}


def llama_config(**extra) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**common(num_key_value_heads=2, **extra))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config())


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common(num_key_value_heads=2)))


def qwen2_mixed() -> nn.Module:
    """One full layer, one with a sliding window of 6."""
    config = transformers.Qwen2Config(
        **common(num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    )
    assert config.layer_types == ["full_attention", "sliding_attention"]
    return transformers.Qwen2ForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    )


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**common(num_key_value_heads=2, sliding_window=6))
    )


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**common()))


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        **common(
            num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0, sliding_window=6, query_pre_attn_scalar=8
        ),
        attn_implementation="eager",
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **common(num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6)
    )
    return transformers.GptOssForCausalLM(config)


def llava() -> nn.Module:
    """A vision model and a language model, each with its own part of one configuration."""
    vision = {name: size for name, size in common().items() if name.startswith(("hidden", "interm", "num_"))}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=4),
        text_config=llama_config(),
        image_token_index=VOCAB - 1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def falcon() -> nn.Module:
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )


# model, verdicts of its sites, words that the reasons of the refused ones must hold
MODELS = [
    pytest.param(llama, ["rewritten"] * 2, "", id="llama"),
    pytest.param(qwen2, ["rewritten"] * 2, "", id="qwen2"),
    pytest.param(gpt2, ["rewritten"] * 2, "", id="gpt2"),
    pytest.param(qwen2_mixed, ["rewritten", "refused"], "local attention over 6 keys", id="qwen2-mixed"),
    pytest.param(mistral, ["refused"] * 2, "local attention over 6 keys", id="mistral"),
    pytest.param(bert, ["refused"] * 2, "bidirectional", id="bert"),
    pytest.param(gemma2, ["refused"] * 2, "soft-cap", id="gemma2"),
    pytest.param(gpt_oss, ["refused"] * 2, "attention sinks", id="gpt-oss"),
]


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [3, 16] and their padding mask; the second and third row have 5 and 11 padded positions."""
    ids = torch.randint(1, VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 16, dtype=torch.int64)
    for row, n in ((1, 5), (2, 11)):
        mask[row, slice(0, n) if side == "left" else slice(16 - n, 16)] = 0
    return ids, mask if side != "none" else torch.ones_like(mask)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, **extra) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask, **extra).logits


# ---------------------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("make", "verdicts", "words"), MODELS)
def test_outputs_equal_those_before_on_real_tokens(make, verdicts, words, side):
    model = build(make)
    ids, mask = padded_batch(side)
    before = logits(model, ids, mask)
    rewrite_attention(model, **TOY_ONLY)
    with record_sites() as sites:
        after = logits(model, ids, mask)
    real = mask.bool()
    assert (after - before)[real].abs().max() <= 1e-5
    assert [site.verdict for site in sites] == verdicts
    for site in sites:
        if site.verdict == "rewritten":
            assert site.method == "toy_eager"
            assert site.mask == ("causal" if side == "none" else "causal, key padding")
        else:
            assert site.method == "exact" and words in site.reason

    # Control: the op really runs where the report says so, and nowhere else.
    rewrite_attention(model, **HALF)
    changed = (logits(model, ids, mask) - before)[real].abs().max() > 1e-3
    assert changed == ("rewritten" in verdicts)
    assert torch.equal(logits(restore_attention(model), ids, mask), before)


@pytest.mark.parametrize("make", [llama, qwen2_mixed, mistral, bert], ids=lambda make: make.__name__)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_exact_sites_are_bitwise_sdpa(make, side):
    model = build(make)
    ids, mask = padded_batch(side)
    before = logits(model, ids, mask)
    rewrite_attention(model, methods=["exact"])
    with record_sites() as sites:
        assert torch.equal(logits(model, ids, mask), before)
    assert {site.method for site in sites} == {"exact"}


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", [transformers.DynamicCache, transformers.StaticCache], ids=lambda c: c.__name__)
@pytest.mark.parametrize("make", [llama, qwen2_mixed], ids=lambda make: make.__name__)
def test_exact_sites_are_sdpa_over_a_cache(make, cache, side):
    """Bitwise over a growing one; empty places of a static one are not read, so sums may round apart."""
    model = build(make)
    ids, mask = padded_batch(side)
    more = {"max_cache_len": 24} if cache is transformers.StaticCache else {}

    def chunks() -> torch.Tensor:
        past = cache(config=model.config, **more)
        parts = [(0, 7), (7, 15), (15, 16)]
        return torch.cat([logits(model, ids[:, a:b], mask[:, :b], past_key_values=past) for a, b in parts], 1)

    before = chunks()
    rewrite_attention(model, methods=["exact"])
    assert (chunks() - before).abs().max() <= (1e-6 if more else 0)
    rewrite_attention(model, **TOY_ONLY)
    with record_sites() as sites:
        after = chunks()
    assert (after - before)[mask.bool()].abs().max() <= 1e-5
    full = [site.verdict for site in sites if site.module.endswith("layers.0.self_attn")]
    assert full == ["rewritten", "rewritten", "refused"]


def test_without_an_attention_mask_packed_positions_are_refused_and_plain_ones_are_not():
    model = rewrite_attention(build(llama), **HALF)
    ids = padded_batch("none")[0]
    with record_sites() as sites:
        logits(model, ids, position_ids=torch.arange(16)[None], use_cache=False)
    assert {site.verdict for site in sites} == {"rewritten"}
    packed = torch.cat([torch.arange(7), torch.arange(9)])[None].expand(3, -1)
    with record_sites() as sites:
        after = logits(model, ids, position_ids=packed, use_cache=False)
    assert {site.verdict for site in sites} == {"refused"} and "packed" in sites[0].mask
    assert torch.equal(after, logits(restore_attention(model), ids, position_ids=packed, use_cache=False))


def test_a_dense_mask_of_the_caller_is_refused_and_used():
    model = build(llama)
    ids = padded_batch("none")[0]
    mask = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    mask |= torch.eye(16, dtype=torch.bool)
    before = logits(model, ids, mask)
    rewrite_attention(model, **HALF)
    with record_sites() as sites:
        assert torch.equal(logits(model, ids, mask), before)
    assert {site.verdict for site in sites} == {"refused"} and "the caller built" in sites[0].mask


def test_chunked_prefill_is_causal_with_an_offset():
    model = build(llama)
    ids, mask = padded_batch("left")
    whole = logits(model, ids, mask)
    rewrite_attention(model, **TOY_ONLY)
    cache = transformers.DynamicCache(config=model.config)
    first = logits(model, ids[:, :9], mask[:, :9], past_key_values=cache)
    with record_sites() as sites:
        second = logits(model, ids[:, 9:], mask, past_key_values=cache)
    assert {(site.verdict, site.mask) for site in sites} == {("rewritten", "causal, offset 9, key padding")}
    assert (torch.cat([first, second], 1) - whole)[mask.bool()].abs().max() <= 1e-5


# ---------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("make", [llama, qwen2_mixed, gpt2], ids=lambda make: make.__name__)
def test_generate_gives_the_same_tokens(make, side, cache):
    model = build(make)
    ids, mask = padded_batch(side)

    def generate() -> tuple[torch.Tensor, torch.Tensor]:
        result = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return result.sequences, torch.stack(result.logits)

    tokens, before = generate()
    rewrite_attention(model, **TOY_ONLY)
    with record_sites() as sites:
        same, after = generate()
    assert torch.equal(same, tokens) and (after - before).abs().max() <= 1e-5
    layers = 2
    expected = ["rewritten", "refused"] if make is qwen2_mixed else ["rewritten"] * layers
    assert [site.verdict for site in sites[:layers]] == expected
    assert {site.verdict for site in sites[layers:]} == {"refused"} and len(sites) == 6 * layers
    assert torch.equal(generate()[0], tokens)  # control below: with another gain the logits move
    rewrite_attention(model, **HALF)
    assert (generate()[1] - before).abs().max() > 1e-3


# ------------------------------------------------------------------------------------ locality and reversal


def test_two_models_that_share_one_config_are_independent():
    config = llama_config()
    torch.manual_seed(0)
    one, two = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    two.load_state_dict(one.state_dict())
    ids, mask = padded_batch("left")
    before = logits(one, ids, mask)
    implementation = config._attn_implementation
    rewrite_attention(one, **HALF)
    assert is_rewritten(one) and not is_rewritten(two)
    assert config._attn_implementation == implementation and two.config is config
    assert torch.equal(logits(two, ids, mask), before)
    assert (logits(one, ids, mask) - before)[mask.bool()].abs().max() > 1e-3
    rewrite_attention(two, **TOY_ONLY)
    restore_attention(one)
    assert one.config is config and one.model.layers[0].self_attn.config is config
    assert torch.equal(logits(one, ids, mask), before)
    assert is_rewritten(two) and (logits(two, ids, mask) - before)[mask.bool()].abs().max() <= 1e-5


@pytest.mark.parametrize("policies", [(HALF, TOY_ONLY), (TOY_ONLY, HALF)], ids=["half first", "toy first"])
@pytest.mark.parametrize("first", [0, 1])
def test_models_that_share_layers_can_be_restored_in_any_order(policies, first):
    """As a language model and a reward model over one trunk: what is rewritten last runs in both."""
    one, two = models = [build(llama), build(llama)]
    two.model.layers = one.model.layers
    ids, mask = padded_batch("left")
    configs, before = [model.config for model in models], [logits(model, ids, mask) for model in models]
    for model, policy in zip(models, policies, strict=True):
        rewrite_attention(model, **policy)
    for model in (models[first], models[1 - first]):
        restore_attention(model)
    for model, config, expected in zip(models, configs, before, strict=True):
        assert model.config is config and model.model.config is config
        assert torch.equal(logits(model, ids, mask), expected)
    assert all(layer.self_attn.config is one.config for layer in one.model.layers)


def test_a_model_made_of_models_with_nested_configurations():
    model = build(llava)
    config, parts = model.config, (model.config.text_config, model.config.vision_config)
    before_names = [part._attn_implementation for part in (config, *parts)]
    ids, mask = padded_batch("right")
    ids = torch.cat([torch.full((3, 16), VOCAB - 1), ids.clamp(max=VOCAB - 2)], 1)
    mask = torch.cat([torch.ones(3, 16, dtype=torch.int64), mask], 1)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    before = logits(model, ids, mask, pixel_values=pixels)
    rewrite_attention(model, **TOY_ONLY)
    with record_sites() as sites:
        after = logits(model, ids, mask, pixel_values=pixels)
    assert (after - before)[mask.bool()].abs().max() <= 1e-5
    verdicts = {(site.verdict, "vision" in site.module, "language" in site.module) for site in sites}
    assert verdicts == {("refused", True, False), ("rewritten", False, True)} and len(sites) == 4
    assert [part._attn_implementation for part in (config, *parts)] == before_names
    restore_attention(model)
    assert model.config is config and (config.text_config, config.vision_config) == parts
    assert torch.equal(logits(model, ids, mask, pixel_values=pixels), before)


def test_restore_leaves_no_trace():
    model = build(llama)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    keys = list(model.state_dict())
    rewrite_attention(model, **TOY_ONLY)
    assert list(model.state_dict()) == keys
    rewrite_attention(model, **HALF)
    restore_attention(model)
    for path, module in model.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
        assert all(module.__dict__[name] is value for name, value in before[path].items() if name == "config"), path
    with pytest.raises(ValueError, match="not rewritten"):
        restore_attention(model)


def test_copies_and_pickles_of_a_rewritten_model_are_rewritten_and_independent():
    model = build(llama)
    ids, mask = padded_batch("right")
    exact = logits(model, ids, mask)
    rewrite_attention(model, **HALF)
    before = logits(model, ids, mask)
    duplicate = copy.deepcopy(model)
    unpickled = pickle.load(io.BytesIO(pickle.dumps(model)))
    restore_attention(model)
    for other in (duplicate, unpickled):
        assert is_rewritten(other) and torch.equal(logits(other, ids, mask), before)
        assert torch.equal(logits(restore_attention(other), ids, mask), exact)


def test_saving_a_rewritten_model_writes_nothing_of_ours(tmp_path):
    model = rewrite_attention(build(llama), **TOY_ONLY)
    model.save_pretrained(tmp_path)
    assert "express" not in (tmp_path / "config.json").read_text()
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids, mask = padded_batch("none")
    assert torch.equal(logits(again, ids, mask), logits(restore_attention(model), ids, mask))


def test_a_part_of_a_model_can_be_rewritten():
    model = build(llama)
    ids, mask = padded_batch("none")
    before = logits(model, ids, mask)
    rewrite_attention(model.model.layers[1], **HALF)
    with record_sites() as sites:
        after = logits(model, ids, mask)
    assert [site.module for site in sites] == ["self_attn"] and (after - before).abs().max() > 1e-3
    assert torch.equal(logits(restore_attention(model), ids, mask), before)


# ------------------------------------------------------------------------------------------ seeds and training


def test_seeds():
    ids, mask = padded_batch("none")
    noisy = {**TOY_ONLY, "method_options": {"toy_eager": {"gain": -1.0}}}  # a negative gain makes the toy random
    model = rewrite_attention(build(llama), seed=3, **noisy)
    first = logits(model, ids, mask)
    assert torch.equal(logits(model, ids, mask), first)
    assert not torch.equal(logits(rewrite_attention(model, seed=4, **noisy), ids, mask), first)
    rewrite_attention(model, seed=None, **noisy)
    torch.manual_seed(5)
    drawn, again = logits(model, ids, mask), logits(model, ids, mask)
    torch.manual_seed(5)
    assert not torch.equal(drawn, again) and torch.equal(logits(model, ids, mask), drawn)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients_flow_through_the_op(checkpointing):
    model = build(llama).train()
    ids, mask = padded_batch("left")
    labels = ids.masked_fill(mask == 0, -100)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    rewrite_attention(model, **TOY_ONLY)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    with record_sites() as sites:
        after = gradients()
    assert {site.verdict for site in sites} == {"rewritten"}
    assert max((a - b).abs().max() for a, b in zip(after, before, strict=True)) <= 1e-6
    rewrite_attention(model, **HALF)
    assert max((a - b).abs().max() for a, b in zip(gradients(), before, strict=True)) > 1e-4


# ------------------------------------------------------------------------------------------------ the mask


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_causal_mask_is_the_dense_sdpa_mask_to_everybody_else(side, skip):
    from transformers.masking_utils import create_causal_mask

    model = rewrite_attention(build(llama), **TOY_ONLY)
    embeds, padding = torch.zeros(3, 16, 32), padded_batch(side)[1]
    arguments = {"inputs_embeds": embeds, "attention_mask": padding, "past_key_values": None}
    ours = create_causal_mask(config=model.config, allow_is_causal_skip=skip, **arguments)
    theirs = create_causal_mask(config=restore_attention(model).config, allow_is_causal_skip=skip, **arguments)
    assert (ours is None) == (theirs is None) == (skip and side == "none")
    if ours is None:
        return
    assert isinstance(ours, ProvenMask) and ours.shape == theirs.shape and not isinstance(theirs, ProvenMask)
    check_looks_like(ours, theirs)
    assert ours.proven == Mask(causal=True, padding=side != "none") and ours.visible == 16
    assert ours.padding is None if side == "none" else torch.equal(ours.padding, padding.bool())


def check_looks_like(ours: ProvenMask, theirs: torch.Tensor) -> None:
    for operation in (lambda m: m & True, lambda m: m[:, :, 1:, 1:].clone(), lambda m: (~m).float(), torch.logical_not):
        result = operation(ours)
        assert type(result) is torch.Tensor and torch.equal(result, operation(theirs))
    assert torch.equal(ours.exact(), theirs)
    assert ours.exact() is ours.exact()


@pytest.fixture(scope="module")
def bert_configs() -> tuple[transformers.BertConfig, transformers.BertConfig]:
    """The configuration of a model before and after rewriting."""
    model = build(bert)
    return model.config, rewrite_attention(copy.deepcopy(model), **THIN).config


@st.composite
def paddings(draw: st.DrawFn) -> torch.Tensor:
    """Bool ``[B, Lk]``: any tokens are padding, or none, or all of a sequence."""
    B, Lk = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        return torch.ones(B, Lk, dtype=torch.bool)
    return torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=Lk, max_size=Lk), min_size=B, max_size=B)))


@hypothesis.given(padding=paddings(), queries=st.none() | st.integers(1, 6), skip=st.booleans())
def test_a_bidirectional_mask_is_the_dense_sdpa_mask_to_everybody_else(bert_configs, padding, queries, skip):
    """Self-attention without ``queries``, else cross attention from so many queries."""
    from transformers.masking_utils import create_bidirectional_mask

    B, Lk = padding.shape
    states = torch.zeros(B, Lk, 32)
    cross = {} if queries is None else {"encoder_hidden_states": states}
    arguments = {"inputs_embeds": states if queries is None else torch.zeros(B, queries, 32), **cross}
    plain, rewritten = bert_configs
    theirs = create_bidirectional_mask(plain, attention_mask=padding, allow_is_bidirectional_skip=skip, **arguments)
    ours = create_bidirectional_mask(rewritten, attention_mask=padding, allow_is_bidirectional_skip=skip, **arguments)
    assert (ours is None) == (theirs is None) == bool(skip and padding.all())
    if ours is None:
        return
    if (queries or Lk) == 1:  # there is nothing to save
        assert type(ours) is torch.Tensor and torch.equal(ours, theirs)
        return
    assert isinstance(ours, ProvenMask) and ours.shape == theirs.shape
    assert ours.proven == Mask(padding=not padding.all()) and ours.visible == Lk
    assert ours.padding is None if padding.all() else torch.equal(ours.padding, padding)
    check_looks_like(ours, theirs)


PADDING = padded_batch("right")[1].bool()[:, None, None]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        pytest.param(PADDING, "key padding", id="one-row"),
        pytest.param(PADDING[1:2], "key padding", id="one-row-for-the-batch"),
        pytest.param(PADDING.expand(3, 1, 16, 16), "key padding", id="expanded"),
        pytest.param(PADDING.expand(3, 4, 16, 16), "key padding", id="expanded-to-heads"),
        pytest.param(PADDING.expand(3, 1, 16, 16).contiguous(), "unknown (a dense mask that", id="dense"),
        pytest.param(PADDING.expand(3, 4, 1, 16).contiguous(), "unknown (a dense mask that", id="per-head"),
        pytest.param(PADDING.float().log(), "unknown (an additive mask, such as", id="additive"),
    ],
)
def test_a_boolean_mask_of_one_row_is_a_key_padding_whatever_it_holds(mask, words):
    model, ids = build(bert), padded_batch("none")[0]
    before = logits(model, ids, mask)
    for budget in (64, 4):
        rewrite_attention(model, methods=["thinformer"], budget=budget)
        with record_sites() as sites:
            after = logits(model, ids, mask)
        assert {site.mask.startswith(words) for site in sites} == {True}
        if words != "key padding":
            assert torch.equal(after, before)
        else:
            assert ((after - before).abs().max() <= 1e-5 * before.abs().max()) == (budget == 64)


def test_a_boolean_mask_of_one_row_in_a_causal_module_is_refused():
    model, ids = build(llama), padded_batch("none")[0]
    before = logits(model, ids, PADDING)
    rewrite_attention(model, **THIN)
    with record_sites() as sites:
        assert torch.equal(logits(model, ids, PADDING), before)
    assert {site.verdict for site in sites} == {"refused"} and "the caller built" in sites[0].mask


def test_models_in_threads_do_not_mix_up_their_masks_or_reports():
    makes, sides = [llama, gpt2, qwen2, llama], ["left", "none", "right", "right"]
    models = [build(make) for make in makes]
    batches = [padded_batch(side) for side in sides]
    expected = []
    for model, batch in zip(models, batches, strict=True):
        rewrite_attention(model, **HALF)
        expected.append(logits(model, *batch))

    def work(i: int) -> tuple[bool, set[str], int]:
        with record_sites() as sites:
            same = all(torch.equal(logits(models[i], *batches[i]), expected[i]) for _ in range(5))
        return same, {site.mask for site in sites}, len(sites)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert results == [(True, {"causal" if side == "none" else "causal, key padding"}, 10) for side in sides]


def test_one_model_may_be_called_by_several_threads():
    model = rewrite_attention(build(llama), **HALF)
    batches = [padded_batch(side) for side in ("none", "left", "right")]
    expected = [logits(model, *batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda i: logits(model, *batches[i % 3]), range(12)))
    assert all(torch.equal(result, expected[i % 3]) for i, result in enumerate(results))


def test_torch_compile_leaves_rewritten_attention_alone():
    model = build(llama)
    ids, mask = padded_batch("left")
    rewrite_attention(model, **HALF)
    before = logits(model, ids, mask)
    with record_sites() as sites:
        after = logits(torch.compile(model, backend="eager"), ids, mask)
    assert torch.equal(after, before) and {site.verdict for site in sites} == {"rewritten"}
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call restore_attention"):
        logits(torch.compile(model, backend="eager", fullgraph=True), ids, mask)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ refusals


def test_models_whose_attention_is_out_of_reach():
    with pytest.raises(ValueError, match="no attention found.*backend='express'"):
        rewrite_attention(nn.Sequential(nn.Linear(2, 2)))


def test_the_configuration_of_a_model_with_its_own_attention_stays():
    model = build(falcon)  # branches on the name and never asks the interface
    config, implementation = model.config, model.config._attn_implementation
    ids, mask = padded_batch("none")
    before = logits(model, ids, mask)
    rewrite_attention(model, **TOY_ONLY)
    with record_sites() as sites:
        assert (logits(model, ids, mask) - before).abs().max() <= 1e-5
    assert [(site.form, site.verdict) for site in sites] == [("sdpa", "rewritten")] * 2
    assert model.config is config and config._attn_implementation == implementation
    assert torch.equal(logits(restore_attention(model), ids, mask), before)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (TypeError, "unknown option 'budgt'.*budget", {"budgt": 3}),
        (ValueError, "unknown method 'flash'.*toy_eager", {"methods": ["flash"]}),
        (ValueError, "unknown method 'flash'", {"method_options": {"flash": {}}}),
        (TypeError, "unknown option 'gian'; allowed are gain", {"method_options": {"toy_eager": {"gian": 1}}}),
        (ValueError, "window=-1", {"window": -1}),
        (ValueError, "halving='fair'", {"halving": "fair"}),
        (ValueError, "halving='fair'", {"methods": ["thinformer"], "halving": "fair"}),
        (ValueError, "g=-5: must be", {"methods": ["thinformer"], "method_options": {"thinformer": {"g": -5}}}),
        (ValueError, "g=-5: must be", {"method_options": {"thinformer": {"g": -5}}}),
        (ValueError, "flatten=-1", {"methods": ["thinformer"], "method_options": {"thinformer": {"flatten": -1}}}),
        (TypeError, "policy=512", {"policy": 512}),
        (TypeError, "policy and budget", {"policy": Policy(), "budget": 8}),
    ],
)
def test_bad_arguments_raise_at_once_and_change_nothing(error, words, options):
    model = build(llama)
    with pytest.raises(error, match=words):
        rewrite_attention(model, **options)
    assert not is_rewritten(model)
    rewrite_attention(model, **HALF)
    ids, mask = padded_batch("none")
    before = logits(model, ids, mask)
    with pytest.raises(error, match=words):
        rewrite_attention(model, **options)
    assert is_rewritten(model) and torch.equal(logits(model, ids, mask), before)


def test_without_transformers_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'express-compile\[transformers\]'"):
        rewrite_attention(nn.Linear(2, 2))


def test_a_module_added_later_says_that_it_was_not_rewritten():
    model = rewrite_attention(build(llama), **TOY_ONLY)
    other = transformers.LlamaForCausalLM(copy.deepcopy(model.config))
    with pytest.raises(RuntimeError, match="LlamaAttention was sent to .* never rewritten"):
        logits(other, padded_batch("none")[0])


def test_something_else_than_a_module_is_refused():
    with pytest.raises(TypeError, match="model='llama'"):
        rewrite_attention("llama")


def test_strict_raises_where_a_named_method_is_refused():
    ids, mask = padded_batch("none")
    model = rewrite_attention(build(llama), strict=True, **TOY_ONLY)
    with record_sites() as sites:
        logits(model, ids, mask)
    assert {site.verdict for site in sites} == {"rewritten"}
    with pytest.raises(ValueError, match=r"strict=True(.|\n)*layers\.0\.self_attn +local attention over 6 keys"):
        logits(rewrite_attention(build(mistral), strict=True, **TOY_ONLY), ids, mask)


# ------------------------------------------------------------------------------------------ parts of a policy


def test_modules_run_what_their_globs_say():
    ids, mask = padded_batch("none")
    before = logits(build(llama), ids, mask)
    halves = {
        name: logits(rewrite_attention(build(llama), **HALF, modules=modules), ids, mask)
        for name, modules in {
            "none": {},
            "first": {"*.0.*": "exact"},
            "gains": {"model.layers.*": {"method_options": {"toy_eager": {"gain": 1.0}}}},
            "all": {"*": "exact"},
        }.items()
    }
    assert torch.equal(halves["all"], before)
    torch.testing.assert_close(halves["gains"], before)
    # only the second layer halves its attention: as if the weights behind it were halved
    model = build(llama)
    model.model.layers[1].self_attn.o_proj.weight.data *= 0.5
    torch.testing.assert_close(halves["first"], logits(model, ids, mask))
    assert (halves["none"] - halves["first"]).abs().max() > 1e-4

    model = rewrite_attention(build(llama), **HALF, modules={"*.0.*": "exact"})
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with record_sites() as sites:
            assert torch.equal(logits(twin, ids, mask), halves["first"])
        assert [(s.verdict, s.reason) for s in sites] == [
            ("exact", "modules['*.0.*'] names 'exact' first"),
            ("rewritten", "causal attention"),
        ]


def test_strict_wants_a_site_for_every_glob():
    model = build(llama)
    with pytest.raises(
        ValueError, match=r"modules\['\*.cross_attn'\] matches no .* model\.layers\.0\.self_attn, model"
    ):
        rewrite_attention(model, strict=True, modules={"*.cross_attn": "exact"}, **TOY_ONLY)
    assert not is_rewritten(model)
    rewrite_attention(model, modules={"*.cross_attn": "exact"}, **TOY_ONLY)
    assert eager.unmatched(model) == ("modules['*.cross_attn']",)
    with pytest.raises(ValueError, match="halving='balancd'"):
        rewrite_attention(model, modules={"*": {"methods": ["express"], "halving": "balancd"}})


def test_causal_only_leaves_encoders_alone():
    ids, mask = padded_batch("none")
    before = logits(build(bert), ids, mask)
    with record_sites() as sites:
        assert torch.equal(logits(rewrite_attention(build(bert), **THIN, causal_only=True), ids, mask), before)
        logits(rewrite_attention(build(bert), **THIN), ids, mask)
        logits(rewrite_attention(build(llama), **TOY_ONLY, causal_only=True), ids, mask)
    assert [s.verdict for s in sites] == ["exact"] * 2 + ["rewritten"] * 4
    assert sites[0].reason.startswith("causal_only=True, and it is not causal")


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_without_training_gradients_are_those_of_exact_attention(reentrant):
    ids, mask = padded_batch("none")

    def gradients(model, recorded):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        with record_sites() as sites:
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        recorded += [site.reason for site in sites]
        return [parameter.grad for parameter in model.parameters()]

    reasons = []
    expected = gradients(build(llama), reasons)
    got = gradients(rewrite_attention(build(llama), **HALF, training=False), reasons)
    assert all(map(torch.equal, got, expected))
    why = "its result needs a gradient" if reentrant is None else "its module is in training mode"
    assert set(reasons) == {f"training=False, and {why}"}
    assert not all(map(torch.equal, gradients(rewrite_attention(build(llama), **HALF), []), expected))
    halved = logits(rewrite_attention(build(llama), **HALF, training=False), ids, mask)
    assert torch.equal(halved, logits(rewrite_attention(build(llama), **HALF), ids, mask))


def test_a_function_as_budget_is_made_a_table_once_for_every_length():
    asked = []

    def budget(n):
        asked.append(n)
        return max(4, n // 2)

    model = rewrite_attention(build(llama), methods=["express", "thinformer"], budget=budget)
    asked.clear()
    for n in (16, 12, 16):
        logits(model, padded_batch("none")[0][:, :n])
    assert asked == [*TABLE_AT, *TABLE_AT]  # each length once, for all layers; and whichever it is, the same rows


def test_public_names_are_importable_from_the_package():
    assert express_compile.rewrite_attention is fit.rewrite_attention  # with a sample it chooses rows first
    assert express_compile.restore_attention is restore_attention
