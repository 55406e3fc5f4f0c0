"""What worked on a transformers model before rewriting works after: weights, names, configurations, masks, generate."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import express_compile
from express_compile import is_rewritten, record_sites, restore_attention, rewrite_attention
from express_compile.core.spec import Mask
from express_compile.routes.module_code import calls_interface, depends_on_name, passes
from express_compile.routes.transformers import attention, cache, masks
from express_compile.routes.transformers.attention import attend
from express_compile.routes.transformers.masks import NAME, NAMES, ProvenMask, make_mask, make_mask_by_places
from express_compile.routes.transformers.sites import find_sites

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OF_D = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
OF_D |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
IDS = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones_like(IDS).index_fill_(1, torch.arange(3), 0).index_fill_(0, torch.tensor([1]), 1)
EXPRESS = {"methods": ["express", "exact"], "budget": 16, "min_length": 0}


def build(cls: type[nn.Module], config: Any, attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    return cls(config).eval()


def llama(attention: str = "eager", **more: Any) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2, **more)
    return build(transformers.LlamaForCausalLM, config, attention)


def gpt2(attention: str = "eager") -> nn.Module:
    tokens = {name: TOKENS[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    return build(
        transformers.GPT2LMHeadModel, transformers.GPT2Config(**tokens, n_embd=32, n_layer=2, n_head=4), attention
    )


def bert(attention: str = "eager") -> nn.Module:
    return build(transformers.BertForMaskedLM, transformers.BertConfig(**SIZES, **TOKENS), attention)


def bart(attention: str = "eager") -> nn.Module:
    config = transformers.BartConfig(**TOKENS, **OF_D, decoder_start_token_id=1, forced_eos_token_id=None)
    return build(transformers.BartForConditionalGeneration, config, attention)


def llava(attention: str = "eager") -> nn.Module:
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**SIZES, **TOKENS)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
    return build(transformers.LlavaForConditionalGeneration, config, attention)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b))


# ---------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("policy", [{"methods": ["exact"]}, EXPRESS], ids=["exact", "express"])
@pytest.mark.parametrize("make", [llama, gpt2, bert, bart], ids=lambda make: make.__name__)
def test_attention_weights_are_those_of_the_untouched_model(make, policy):
    model = make()
    inputs = {"input_ids": IDS, "attention_mask": PADDING, "output_attentions": True}
    before = model(**inputs)
    rewrite_attention(model, **policy)
    with record_sites() as sites:
        after = model(**inputs)
    names = [name for name in before if "attentions" in name]
    assert any(before[name] for name in names) and all(same(before[name], after[name]) for name in names)
    assert torch.equal(before.logits, after.logits)
    assert {(site.method, site.verdict) for site in sites} == {("exact", "refused")}
    assert all("asks for attention weights" in site.reason for site in sites)


def test_a_configuration_that_asks_for_weights_gives_them():
    model = llama(output_attentions=True)
    before = model(IDS, attention_mask=PADDING)
    rewrite_attention(model, **EXPRESS)
    after = model(IDS, attention_mask=PADDING, return_dict=False)
    assert same(before.attentions, after[-1]) and len(after[-1]) == 2
    assert same(before.attentions, restore_attention(model)(IDS, attention_mask=PADDING).attentions)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_gives_the_weights_of_every_step(more, cache):
    model = llama()
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    options |= {"cache_implementation": cache, "disable_compile": True, "attention_mask": PADDING, **more}
    before = model.generate(IDS, **options)
    rewrite_attention(model, **EXPRESS)
    after = model.generate(IDS, **options)
    assert torch.equal(before.sequences, after.sequences) and same(before.attentions, after.attentions)


def test_an_assistant_and_its_model_give_weights():
    model, assistant = llama(), llama()
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    before = model.generate(IDS[1:], assistant_model=assistant, **options)
    for part in (model, assistant):
        rewrite_attention(part, **EXPRESS)
    after = model.generate(IDS[1:], assistant_model=assistant, **options)
    assert torch.equal(before.sequences, after.sequences) and same(before.attentions, after.attentions)


def test_a_model_that_gave_no_weights_gives_none():
    model = llama("sdpa")
    before = model(IDS, output_attentions=True)
    rewrite_attention(model, **EXPRESS)
    with record_sites() as sites:
        after = model(IDS, output_attentions=True)
    assert before.attentions == after.attentions == () and torch.equal(before.logits, after.logits)
    assert all("attn_implementation='eager'" in site.reason for site in sites)


def test_strict_raises_where_weights_are_asked_for():
    model = rewrite_attention(llama(), methods=["express"], strict=True)
    model(IDS)
    with pytest.raises(ValueError, match="asks for attention weights"):
        model(IDS, output_attentions=True)


def t5(attention: str = "eager") -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return build(transformers.T5ForConditionalGeneration, transformers.T5Config(**sizes), attention)


ORDERS = {
    "before": lambda model: rewrite_attention(asking(model), **EXPRESS),
    "after": lambda model: asking(rewrite_attention(model, **EXPRESS)),
    "twice": lambda model: rewrite_attention(asking(rewrite_attention(model, **EXPRESS)), methods=["exact"]),
    "copied": lambda model: asking(pickle.loads(pickle.dumps(rewrite_attention(model, **EXPRESS)))),
    "restored": lambda model: restore_attention(asking(rewrite_attention(model, **EXPRESS))),
}


def asking(model: nn.Module) -> nn.Module:
    model.config.output_attentions = True
    return model


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("make", [llama, bert, t5, llava], ids=lambda make: make.__name__)
def test_a_configuration_asks_for_weights_and_is_saved_as_without_us(make, order, tmp_path):
    asked = {"input_ids": IDS, **({"decoder_input_ids": IDS} if make is t5 else {})}
    plain = asking(make())
    want, model = plain(**asked), order(make())
    got = model(**asked)
    names = [name for name in want if "attentions" in name]
    assert bool(names) == (make in (llama, bert))  # the parts of the others have configurations of their own
    assert [name for name in got if "attentions" in name] == names
    assert all(same(want[name], got[name]) for name in names)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "ours")
    for file in (tmp_path / "plain").glob("*.json"):
        assert (tmp_path / "ours" / file.name).read_text() == file.read_text()
    assert "express" not in model.config.to_json_string(use_diff=False)
    assert type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager").config.output_attentions


@pytest.mark.parametrize("make", [llama, bert, t5], ids=lambda make: make.__name__)
def test_a_configuration_without_eager_attention_says_why_it_gives_no_weights(make, tmp_path):
    model = rewrite_attention(make("sdpa"), **EXPRESS)
    with pytest.raises(ValueError, match=r"output_attentions=True: the model ran 'sdpa' attention before rewrite"):
        model.config.output_attentions = True
    assert model.config.output_attentions is False
    model.config._output_attentions = True
    with pytest.raises(Exception, match=r"output_attentions=True: the model ran 'sdpa' attention before rewrite"):
        model.save_pretrained(tmp_path)
    model.config.output_attentions = False
    model.save_pretrained(tmp_path)
    assert not any("express" in file.read_text() for file in tmp_path.glob("*.json"))


def test_a_configuration_that_is_not_ours_asks_for_weights_as_ever():
    config = transformers.LlamaConfig(**SIZES, **TOKENS, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="attribute is not supported when using the `attn_implementation` set to sdpa"):
        config.output_attentions = True
    fresh = transformers.LlamaConfig(**SIZES, **TOKENS)
    fresh.output_attentions = True
    assert fresh._attn_implementation == "eager" and fresh.output_attentions is True


# ------------------------------------------------------------------------------------ another attention by name


def verdicts(model: nn.Module) -> set[tuple[str, bool]]:
    with record_sites() as sites, torch.no_grad():
        model(IDS)
    return {(site.verdict, "after rewrite_attention" in site.reason) for site in sites}


def test_set_attn_implementation_takes_a_model_out_and_back():
    model = rewrite_attention(llama("sdpa"), methods=["exact"])
    plain, eager = llama("sdpa")(IDS).logits, llama("eager")(IDS).logits
    model.set_attn_implementation("eager")
    with pytest.warns(RuntimeWarning, match=r"layers.0.self_attn: .* set to 'eager'.*set_attn_implementation\('expr"):
        assert torch.equal(model(IDS).logits, eager)
    assert not is_rewritten(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert verdicts(model) == {("refused", True)}
    model.set_attn_implementation(NAME)
    assert is_rewritten(model) and verdicts(model) == {("exact", False)} and torch.equal(model(IDS).logits, plain)
    model.set_attn_implementation("eager")
    restore_attention(model)
    assert {part.config._attn_implementation for part in (model, model.model)} == {"eager"}
    assert torch.equal(model(IDS).logits, eager) and not model.model.layers[0].self_attn._forward_pre_hooks
    with pytest.raises(ValueError, match="not rewritten"):
        restore_attention(model)


def test_rewriting_again_after_another_attention_was_set():
    model = rewrite_attention(llama("sdpa"), **EXPRESS)
    model.set_attn_implementation("eager")
    rewrite_attention(model, **EXPRESS)
    assert is_rewritten(model) and len(model(IDS, output_attentions=True).attentions) == 2
    assert restore_attention(model).config._attn_implementation == "eager"


def test_strict_raises_where_another_attention_runs():
    model = rewrite_attention(llama("sdpa"), methods=["exact"], strict=True)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"strict=True: model.layers.0.self_attn: .* set to 'eager'"):
        model(IDS)


def test_a_dictionary_takes_out_one_part_of_a_model():
    model = rewrite_attention(llava("sdpa"), methods=["exact"])
    model.set_attn_implementation({"text_config": "eager"})
    inputs = {"input_ids": IDS.clone().index_fill_(1, torch.arange(4), 49), "pixel_values": torch.randn(2, 3, 16, 16)}
    with record_sites() as sites, torch.no_grad(), pytest.warns(RuntimeWarning, match="language_model.*'eager'"):
        model(**inputs)
    assert {("vision" in site.module, site.verdict) for site in sites} == {(True, "exact"), (False, "refused")}
    assert is_rewritten(model)
    restore_attention(model)
    names = [part._attn_implementation for part in (model.config.vision_config, model.config.text_config)]
    assert names == ["sdpa", "eager"] and model.model.language_model.config is model.config.text_config


# ------------------------------------------------------------------------------- what eager attention computes


def paligemma(attention: str = "eager") -> nn.Module:
    vision = transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)
    text = transformers.GemmaConfig(**SIZES, **TOKENS, num_key_value_heads=2, head_dim=8)
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=49)
    return build(transformers.PaliGemmaForConditionalGeneration, config, attention)


def colpali(attention: str = "eager") -> nn.Module:
    config = transformers.ColPaliConfig(vlm_config=paligemma().config, embedding_dim=8)
    return build(transformers.ColPaliForRetrieval, config, attention)


def gemma3(attention: str = "eager") -> nn.Module:
    vision = transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)
    more = {"use_bidirectional_attention": True, "layer_types": ["full_attention", "sliding_attention"]}
    more |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    text = transformers.Gemma3TextConfig(**SIZES, **TOKENS, **more)
    config = transformers.Gemma3Config(vision_config=vision, text_config=text, image_token_id=49, mm_tokens_per_image=4)
    return build(transformers.Gemma3ForConditionalGeneration, config, attention)


def flipped(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A model whose attention modules say of themselves the opposite of what its masks say."""

    def flipped(attention: str = "eager") -> nn.Module:
        model = make(attention)
        for module in model.modules():
            if calls_interface(type(module)) is not None:
                module.is_causal = not module.is_causal
        return model

    flipped.__name__ = f"{make.__name__} flipped"
    return flipped


PREFIX = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).repeat(2, 1)
ASKED = {
    "plain": {},
    "padded": {"attention_mask": PADDING},
    "prefix": {"attention_mask": torch.ones_like(IDS), "token_type_ids": PREFIX},
}
UNLIKE_SDPA = [paligemma, colpali, gemma3, flipped(llama), flipped(gpt2), flipped(bert), flipped(bart)]


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else next(x for x in out.values() if x is not None and x.dim() == 3)


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", UNLIKE_SDPA, ids=lambda make: make.__name__)
def test_what_is_exact_computes_what_the_attention_of_the_model_did(make, attention, asked):
    model = make(attention)
    if "token_type_ids" in asked and not any("PaliGemma" in type(module).__name__ for module in model.modules()):
        asked = {"attention_mask": PREFIX}
    with torch.no_grad():
        want = first(model(IDS, **asked))
        rewrite_attention(model, methods=["exact"])
        got = first(model(IDS, **asked))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(first(restore_attention(model)(IDS, **asked)), want)


def test_eager_attention_without_a_mask_hides_nothing_whatever_a_module_says_of_itself():
    model = rewrite_attention(flipped(llama)(), methods=["exact"])
    with record_sites() as sites:
        model(IDS)
    assert {site.mask for site in sites} == {"causal"}
    restore_attention(model)
    model = rewrite_attention(flipped(bert)(), methods=["exact"])
    with record_sites() as sites:
        model(IDS)
    assert {site.mask for site in sites} == {"none"}


def test_a_model_that_ran_eager_attention_decodes_as_it_did():
    for make in (paligemma, flipped(llama)):
        model = make()
        want = model.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        rewrite_attention(model, methods=["exact"])
        got = model.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(got.sequences, want.sequences)
        for a, b in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [bert, llama], ids=lambda make: make.__name__)
def test_a_call_like_one_that_was_left_exact_is_not_proven_again(make, monkeypatch):
    model, proofs, layers = make("sdpa"), [], SIZES["num_hidden_layers"]
    untouched = copy.deepcopy(model)
    prove = attention.prove
    monkeypatch.setattr(attention, "prove", lambda *args: (proofs.append(args), prove(*args))[1])
    rewrite_attention(model, methods=["exact"])

    def proven(ids: torch.Tensor, grad: bool = False, **more: Any) -> int:
        proofs.clear()
        with torch.set_grad_enabled(grad):
            assert torch.equal(
                model(ids, use_cache=False, **more).logits, untouched(ids, use_cache=False, **more).logits
            )
        return len(proofs)

    assert [proven(IDS), proven(IDS), proven(IDS[:1]), proven(IDS[:1]), proven(IDS)] == [layers, 0, layers, 0, 0]
    assert proven(IDS[:, :1]) == proven(IDS[:, :1]) == layers  # a step of decoding has another length the next time
    assert proven(IDS, attention_mask=PADDING) == proven(IDS, attention_mask=PADDING) == layers
    assert proven(IDS, grad=True) == layers
    assert proven(IDS, note=[1]) == proven(IDS, note=[1]) == layers and proven(IDS, note="a") == layers
    assert proven(IDS, note="a") == 0
    with record_sites() as sites:
        assert proven(IDS) == layers == len(sites)
    model.set_attn_implementation(NAMES["eager"])
    with torch.no_grad():
        model(IDS, use_cache=False)
    assert len(proofs) == 2 * layers  # sdpa goes by other things than eager attention
    model.set_attn_implementation(NAMES["sdpa"])
    model = copy.deepcopy(model)
    assert [proven(IDS), proven(IDS)] == [layers, 0]  # a copy finds out by itself
    rewrite_attention(model, methods=["thinformer", "express"], budget=4, min_length=0)
    with record_sites() as sites, pytest.raises(AssertionError):
        proven(IDS)
    assert {site.verdict for site in sites} == {"rewritten"}


def test_the_two_names_bring_each_their_own_back():
    model = paligemma()
    want, other = model(IDS).logits, paligemma("sdpa")(IDS).logits
    assert (want - other).abs().max() > 1e-3  # transformers' own two differ
    rewrite_attention(model, methods=["exact"])
    for name, expected in ((NAMES["eager"], want), (NAMES["sdpa"], other), (NAMES["eager"], want)):
        model.set_attn_implementation("eager")
        model.set_attn_implementation(name)
        assert is_rewritten(model)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ configurations


def test_restoring_keeps_what_was_changed_in_the_configuration(tmp_path):
    model = llama()
    config = model.config
    rewrite_attention(model, methods=["exact"])
    model.resize_token_embeddings(60)
    model.config.id2label = {0: "a"}
    model.config.use_cache = False
    del model.config.mlp_bias
    restore_attention(model)
    assert model.config is config and model.model.config is config and config._attn_implementation == "eager"
    assert (config.vocab_size, config.use_cache, config.id2label) == (60, False, {0: "a"})
    assert "mlp_bias" not in config.__dict__
    config.mlp_bias = False
    model.save_pretrained(tmp_path)
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape[0] == 60


def test_restoring_keeps_a_nested_change_and_a_configuration_that_was_replaced():
    model = rewrite_attention(llava("sdpa"), methods=["exact"])
    model.resize_token_embeddings(70)
    tower = model.model.vision_tower
    other = tower.config = copy.deepcopy(tower.config)
    other._attn_implementation = "eager"
    restore_attention(model)
    assert model.config.text_config.vocab_size == 70 and model.model.language_model.config.vocab_size == 70
    assert tower.config is other


def test_a_change_of_the_original_is_not_undone_by_restoring_a_copy():
    config = transformers.LlamaConfig(**SIZES, **TOKENS)
    one, other = transformers.LlamaForCausalLM(config).eval(), transformers.LlamaForCausalLM(config).eval()
    assert one.config is other.config
    rewrite_attention(one, methods=["exact"])
    other.resize_token_embeddings(60)
    restore_attention(one)
    assert config.vocab_size == 60


def test_a_model_made_from_the_configuration_of_a_rewritten_one_can_be_rewritten_and_restored():
    config = copy.deepcopy(rewrite_attention(llama("sdpa"), methods=["exact"]).config)
    model = build(transformers.LlamaForCausalLM, config, NAME)
    with pytest.raises(RuntimeError, match="never rewritten"):
        model(IDS)
    rewrite_attention(model, methods=["exact"])
    assert torch.equal(model(IDS).logits, llama("sdpa")(IDS).logits)
    assert restore_attention(model).config._attn_implementation == "sdpa"


# -------------------------------------------------------------------------------------------- which modules


@pytest.mark.parametrize(
    ("file", "cls", "depends"),
    [
        ("falcon", "FalconAttention", True),
        ("sam2", "Sam2Attention", False),  # looks ALL_ATTENTION_FUNCTIONS["sdpa"] up
        ("llama", "LlamaAttention", False),
    ],
)
def test_code_depends_on_a_name_that_it_compares_not_on_one_that_it_looks_up(file, cls, depends):
    modeling = pytest.importorskip(f"transformers.models.{file}.modeling_{file}")
    assert depends_on_name(getattr(modeling, cls), "sdpa") == depends


@pytest.mark.parametrize(
    ("file", "cls", "words"),
    [
        ("gemma2", "Gemma2Attention", True),
        ("gpt_oss", "GptOssAttention", True),
        ("splinter", "SplinterSelfAttention", False),
    ],
)
def test_a_softcap_and_sinks_are_seen_in_the_call(file, cls, words):
    modeling = pytest.importorskip(f"transformers.models.{file}.modeling_{file}")
    assert passes(calls_interface(getattr(modeling, cls)), ("softcap", "s_aux")) == words


def test_a_model_with_eager_attention_only_has_its_graphs_captured():
    model = build(transformers.SplinterModel, transformers.SplinterConfig(**SIZES, **TOKENS))
    assert find_sites(model) == {}
    before = model(IDS, attention_mask=PADDING).last_hidden_state
    rewrite_attention(model, methods=["exact"])
    with record_sites() as sites:
        after = model(IDS, attention_mask=PADDING).last_hidden_state
    assert (after - before).abs().max() <= 1e-5
    assert [(site.form, site.mask, site.verdict) for site in sites] == [("softmax", "key padding", "rewritten")] * 2


def test_a_model_that_branches_on_the_name_has_its_graphs_captured_and_its_masks_proven():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "num_key_value_heads": 2}
    sizes = {**SIZES, **TOKENS, **layers, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0}
    sizes |= {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8}
    model = build(transformers.Gemma4ForCausalLM, transformers.Gemma4TextConfig(**sizes), "sdpa")
    branches = depends_on_name(type(model.model), "sdpa")  # not yet in transformers 5.17
    assert (find_sites(model) == {}) == branches
    before = model(IDS, attention_mask=PADDING).logits
    rewrite_attention(model, methods=["exact"])
    with record_sites() as sites:
        after = model(IDS, attention_mask=PADDING).logits
    assert (after - before)[PADDING.bool()].abs().max() <= 1e-5
    assert [site.mask for site in sites] == ["causal, window 4, key padding", "causal, key padding"]


# ---------------------------------------------------------------------------------------------------- the mask


def mask(padding: bool = True) -> ProvenMask:
    row = PADDING.bool()[:, :6] if padding else None
    made = make_mask(2, 6, 6, attention_mask=row, device=torch.device("cpu"), allow_is_causal_skip=False)
    assert isinstance(made, ProvenMask)
    return made


def saved(x: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save({"mask": x}, file)
    file.seek(0)
    return torch.load(file)["mask"]


def written(x: torch.Tensor) -> torch.Tensor:
    x[..., 0] = True
    x[:, :, 2].fill_(False)
    x &= torch.ones(6, dtype=torch.bool)
    return x


LOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": saved,
    "clone": torch.clone,
    "to": lambda x: x.to("cpu"),
    "float16": lambda x: x.to(torch.float16),
    "type": lambda x: x.type(torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "slice": lambda x: x[:, :, 2:, :3],
    "new axis": lambda x: x[None],
    "index": lambda x: x[[1, 0]],
    "bool index": lambda x: x[x],
    "expand": lambda x: x.expand(2, 4, 6, 6),
    "view": lambda x: x.view(2, 6, 6),
    "repeat": lambda x: x.repeat_interleave(2, 0),
    "cat": lambda x: torch.cat([x, x]),
    "where": lambda x: torch.where(x, 0.0, -1.0),
    "==": lambda x: x == x,
    "~": lambda x: ~x,
    "iterate": list,
    "unbind": lambda x: x.unbind(0),
    "vmap": torch.vmap(lambda x: ~x),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
    "dlpack": torch.from_dlpack,
    "item": lambda x: x[0, 0, 0, 0].item(),
    "strides": lambda x: (x.stride(), x.is_contiguous(), x.untyped_storage().nbytes(), len(x)),
    "writes": written,
    "masked_fill_": lambda x: x.masked_fill_(torch.eye(6, dtype=torch.bool), False),
}


@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_proven_mask_is_a_tensor_to_everybody_else(look, padding):
    ours, theirs = look(mask(padding)), look(mask(padding).exact().clone())
    if isinstance(theirs, np.ndarray):
        assert np.array_equal(ours, theirs)
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours.clone(), theirs)
    elif isinstance(theirs, (list, tuple)) and isinstance(theirs[0], torch.Tensor):
        assert same(ours, theirs)
    else:
        assert ours == theirs


def test_copies_and_moves_of_a_mask_keep_its_proof():
    for kept in (copy.deepcopy(mask()), mask().to("cpu"), mask().contiguous(), mask().detach(), mask().to("meta")):
        assert isinstance(kept, ProvenMask) and kept.is_proven and kept.proven == Mask(causal=True, padding=True)
    moved = mask().to("meta")
    assert moved.device.type == moved.padding.device.type == "meta"
    assert mask().to("meta", torch.float32).dtype == torch.float32


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_into_a_mask_or_a_view_of_it_takes_its_proof(inference):
    with torch.inference_mode(inference):
        one, view, copied = mask(), mask(), mask()
        one[..., 0] = True
        part = view[:, :, 1]
        assert view.is_proven
        part.logical_not_()
        copied.clone().fill_(False)
    assert not one.is_proven and not view.is_proven and copied.is_proven
    assert bool(one[0, 0, :, 0].all()) and not isinstance(copy.deepcopy(one), ProvenMask)


def test_a_mask_that_a_hook_changed_is_used_as_it_is():
    def open_first(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"][..., 0] = True

    inputs = {"input_ids": IDS, "attention_mask": PADDING}
    expected = llama("sdpa")
    expected.model.layers[0].self_attn.register_forward_pre_hook(open_first, with_kwargs=True)
    model = rewrite_attention(llama("sdpa"), methods=["express"])
    model.model.layers[0].self_attn.register_forward_pre_hook(open_first, with_kwargs=True)
    with record_sites() as sites, torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    assert {site.verdict for site in sites} == {"refused"} and "a dense mask" in sites[0].reason


# -------------------------------------------------------------------------------------------------------- export


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")
def test_a_model_rewritten_to_exact_is_traced_and_another_one_says_what_to_do():
    def trace(model: nn.Module) -> Any:
        return torch.jit.trace(model, (IDS,), check_trace=False)

    model = Logits(llama("sdpa")).eval()
    before = model(IDS)
    rewrite_attention(model, methods=["exact"])
    assert (trace(model)(IDS) - before).abs().max() <= 1e-6
    rewrite_attention(model, **EXPRESS)
    with pytest.raises(RuntimeError, match=r"call restore_attention\(model\)"):
        trace(model)
    assert (trace(restore_attention(model))(IDS) - before).abs().max() <= 1e-6


def test_whether_this_is_an_export_is_asked_in_one_place():
    """Before torch 2.13 Dynamo takes torch.compiler.is_exporting() for true in every graph: compiled models raised."""
    files = Path(express_compile.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "torch.compiler.is_exporting" in file.read_text()] == ["tracers.py"]


# ----------------------------------------------------- NVIDIA's kvpress, and the transformers that it takes, 5.2


@pytest.fixture
def by_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' masks take the places of queries, as in 5.2."""
    sdpa = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def old(cache_position: torch.Tensor, **arguments: Any) -> torch.Tensor | None:
        q_length, q_offset = cache_position.numel(), int(cache_position[0])
        assert cache_position.tolist() == list(range(q_offset, q_offset + q_length))
        return sdpa(**{**arguments, "q_length": q_length, "q_offset": q_offset})

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", old)
    monkeypatch.setattr(masks, "BY_PLACES", True)
    monkeypatch.setattr(cache, "BY_PLACES", True)


@pytest.mark.parametrize("q_offset, q_length", [(0, 8), (3, 5), (7, 1)])
def test_a_mask_by_places_is_the_one_by_numbers(by_places, q_offset, q_length):
    places, rest = torch.arange(q_offset, q_offset + q_length), {"batch_size": 2, "kv_length": 8}
    rest |= {"attention_mask": PADDING, "allow_is_causal_skip": False}
    made = make_mask_by_places(places, **rest)
    expected = torch.ones(q_length, 8).tril(q_offset).bool() & PADDING[:, None, None].bool()
    assert torch.equal(made.exact() if isinstance(made, ProvenMask) else made, expected)
    if q_length > 1:
        assert made.proven == Mask(causal=True, offset=q_offset, padding=True) and torch.equal(made.cpu(), expected)


def test_a_cache_of_few_rows_says_which_transformers_it_needs(by_places):
    model = llama("sdpa")
    with pytest.raises(RuntimeError, match=f"needs transformers 5.17 or newer: this is {transformers.__version__}"):
        express_compile.ExpressCache(model, budget=16)
    assert not is_rewritten(model)


def test_a_patch_of_all_attention_functions_may_hand_dropout_on_by_place(monkeypatch):
    def patched(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float, **rest: Any) -> Any:
        return attend(module, query, key, value, attention_mask, dropout, **rest)

    model = rewrite_attention(llama("sdpa"), **EXPRESS)
    before = model(IDS).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, patched)
    assert torch.equal(model(IDS).logits, before)
    rewrite_attention(model.train(), methods=["exact"])
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    assert not torch.equal(model(IDS).logits, model(IDS).logits), "the dropout arrives"


# ------------------------------------------------------------------------------------------------------ generate

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "sliding cache": {"cache_implementation": "hybrid", "disable_compile": True},
    "no cache": {"use_cache": False},
    "two sequences": {"num_return_sequences": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "forbidden words": {"bad_words_ids": [[7], [8]], "min_new_tokens": 3},
    "everything returned": {"output_hidden_states": True, "output_scores": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_generate_gives_the_same_whatever_it_is_asked(options):
    """Bit by bit, but for a static cache: its empty places are not read, so sums of one row less may round apart."""
    one = "prompt_lookup_num_tokens" in options
    ids, padding = (IDS[1:], None) if one else (IDS, PADDING)
    model = llama("sdpa")

    def generate() -> Any:
        torch.manual_seed(1)
        more = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return model.generate(ids, attention_mask=padding, **{**more, **options})

    before = generate()
    rewrite_attention(model, methods=["exact"])
    after = generate()
    assert torch.equal(before.sequences, after.sequences) and before.keys() == after.keys()
    if options.get("cache_implementation") == "static":
        torch.testing.assert_close(before.logits, after.logits, rtol=1e-6, atol=1e-6)
    else:
        assert same(before.logits, after.logits)


def test_a_rewritten_model_moves_saves_and_ties_as_before(tmp_path):
    model = rewrite_attention(llama("eager", tie_word_embeddings=True), **EXPRESS)
    model.to(torch.bfloat16)
    model.tie_weights()
    with record_sites() as sites:
        half = model(IDS).logits
    assert half.dtype == torch.bfloat16 and {site.verdict for site in sites} == {"rewritten"}
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert again.config._attn_implementation == "sdpa" and again.lm_head.weight is again.model.embed_tokens.weight
    assert NAME not in (tmp_path / "config.json").read_text()
    assert same(again.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])


# ------------------------------------------------------------------------------------- masks that are read by value


def llama4(attention: str = "eager", chunk: int = 8192) -> nn.Module:
    more = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**SIZES, **TOKENS, **more, attention_chunk_size=chunk)
    return build(transformers.Llama4ForCausalLM, config, attention)


@pytest.mark.parametrize("mask, shown", [(None, "causal"), (PADDING, "causal, key padding")], ids=["all", "padded"])
@pytest.mark.parametrize("chunk, fits", [(8192, True), (8, True), (5, False)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_chunks_that_are_longer_than_the_sequence_are_proven(attention, chunk, fits, mask, shown):
    model = llama4(attention, chunk)
    with torch.no_grad():
        want = model(IDS, attention_mask=mask).logits
        rewrite_attention(model, methods=["exact"])
        with record_sites() as sites:
            got = model(IDS, attention_mask=mask).logits
    # in a padded batch of chunks of 5 the first sequence has 5 real tokens, but the other one has 8
    assert {site.mask == shown for site in sites} == {fits} and len(sites) == 2
    real = torch.ones_like(IDS) if mask is None else mask
    assert ((got - want).abs().amax(-1) * real).max() < 2e-6


def test_images_hide_nothing_in_a_batch_without_any():
    model, plain = gemma3(), gemma3()
    for types, shown in ((torch.zeros_like(IDS), "causal"), (PREFIX.flip(1), None)):
        with torch.no_grad():
            want = plain(IDS, token_type_ids=types).logits
            rewrite_attention(model, methods=["exact"])
            with record_sites() as sites:
                got = model(IDS, token_type_ids=types).logits
        masks = [site.mask for site in sites if "language_model" in site.module]
        assert (masks[0] == shown) == (shown is not None) and (got - want).abs().max() < 2e-6


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("q_offset", [0, 2])
def test_a_mask_that_differs_anywhere_from_a_causal_one_is_not_proven(padded, q_offset):
    Lq, Lk = 4, 4 + q_offset
    padding = torch.ones(2, Lk, dtype=torch.bool)
    padding[1, :2] = not padded
    held = torch.zeros(2, 1, Lq, Lk, dtype=torch.bool)

    def function(b, h, q, k):
        return (k <= q) ^ held[b, h, q - q_offset, k]

    def made() -> Any:
        places = {"batch_size": 2, "q_length": Lq, "kv_length": Lk, "q_offset": q_offset}
        return make_mask(**places, mask_function=function, attention_mask=padding, allow_is_causal_skip=False)

    mask, exact = made(), torch.ones(Lq, Lk, dtype=torch.bool).tril(q_offset) & padding[:, None, None]
    assert isinstance(mask, ProvenMask) and mask.proven == Mask(causal=True, offset=q_offset, padding=padded)
    assert mask.visible == Lk and torch.equal(mask.exact(), exact)
    assert (mask.padding is None) != padded and (not padded or torch.equal(mask.padding, padding))
    for place in (padding[:, None, None] & torch.ones(Lq, Lk, dtype=torch.bool)).nonzero().tolist():
        held.zero_()[tuple(place)] = True
        assert not isinstance(made(), ProvenMask)
