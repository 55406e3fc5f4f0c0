"""Tiny models of 13 families for transformers' own common tests, as its ``ModelTesterMixin`` wants them.

Collected by ``examples/bench/transformers_tests.py``, with transformers' tests importable as ``tests``. The tests are
transformers'; here is only what they are run on.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

BATCH, LENGTH, VOCAB = 3, 7, 99
SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2}
LAYERS_OF_D = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
LAYERS_OF_D |= {"encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "encoder_layers": 2, "decoder_layers": 2}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def text() -> dict[str, torch.Tensor]:
    ids = ids_tensor([BATCH, LENGTH], VOCAB).clamp(min=3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": floats_tensor([BATCH, 3, 30, 30])}


def two_texts() -> dict[str, torch.Tensor]:
    source, target = text(), text()
    return {**source, "decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}


def speech() -> dict[str, torch.Tensor]:
    ids = text()["input_ids"]
    return {
        "input_features": floats_tensor([BATCH, 80, 60]),
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.ones_like(ids),
    }


class Tester:
    """What the tests ask of a family: a configuration, inputs, and sizes to compare with."""

    batch_size, is_training, num_hidden_layers, num_attention_heads, hidden_size = BATCH, True, 2, 4, 32

    def __init__(self, config: Callable[[], Any], inputs: Callable[[], dict[str, torch.Tensor]], **sizes: int) -> None:
        self.get_config, self.inputs = config, inputs
        for name, value in {"seq_length": LENGTH, "encoder_seq_length": LENGTH, **sizes}.items():
            setattr(self, name, value)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), self.inputs()


class Case(unittest.TestCase):
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    sizes: dict[str, int] = {}

    def setUp(self) -> None:
        cls = type(self)
        self.model_tester = Tester(cls.config, cls.inputs, **cls.sizes)


def family(name: str, classes: str, config: Callable[[], Any], inputs: Callable[..., Any] = text, **more: Any) -> None:
    """Define the test class of a family; ``classes`` are names in transformers, separated by spaces."""
    body = {"config": staticmethod(config), "inputs": staticmethod(inputs), **more}
    body["all_model_classes"] = tuple(getattr(transformers, part) for part in classes.split())
    globals()[f"Test_{name}"] = type(f"Test_{name}", (ModelTesterMixin, Case), {**body, "__module__": __name__})


family("llama", "LlamaModel LlamaForCausalLM", lambda: transformers.LlamaConfig(**GROUPED))
family("mistral", "MistralModel MistralForCausalLM", lambda: transformers.MistralConfig(**GROUPED))
family("qwen2", "Qwen2Model Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**GROUPED))
family("gemma2", "Gemma2Model Gemma2ForCausalLM", lambda: transformers.Gemma2Config(**GROUPED, head_dim=8))
family(
    "gemma3",
    "Gemma3TextModel Gemma3ForCausalLM",
    lambda: transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
)
family(
    "gpt2",
    "GPT2Model GPT2LMHeadModel",
    lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
)
family("gpt_neox", "GPTNeoXModel GPTNeoXForCausalLM", lambda: transformers.GPTNeoXConfig(**SIZES, **TOKENS))
family("phi3", "Phi3Model Phi3ForCausalLM", lambda: transformers.Phi3Config(**GROUPED))
family(
    "bert", "BertModel BertForMaskedLM BertForTokenClassification", lambda: transformers.BertConfig(**SIZES, **TOKENS)
)
family(
    "t5",
    "T5Model T5ForConditionalGeneration",
    lambda: transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_ff=37,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    ),
    two_texts,
    is_encoder_decoder=True,
    sizes={"decoder_seq_length": LENGTH},
)
family(
    "whisper",
    "WhisperModel WhisperForConditionalGeneration",
    lambda: transformers.WhisperConfig(
        vocab_size=VOCAB,
        **LAYERS_OF_D,
        **NO_DROPOUT,
        max_source_positions=30,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    ),
    speech,
    is_encoder_decoder=True,
    sizes={"encoder_seq_length": 30, "seq_length": 30, "decoder_seq_length": LENGTH, "key_length": 30},
)
family(
    "clip",
    "CLIPVisionModel CLIPVisionModelWithProjection",
    lambda: transformers.CLIPVisionConfig(**SIZES, image_size=30, patch_size=6, projection_dim=16),
    images,
    test_resize_embeddings=False,
    sizes={"seq_length": 26, "encoder_seq_length": 26},
)
family(
    "clip_text",
    "CLIPTextModel",
    lambda: transformers.CLIPTextConfig(**SIZES, **TOKENS, projection_dim=16),
    test_resize_embeddings=False,
)
family(
    "vit",
    "ViTModel ViTForImageClassification",
    lambda: transformers.ViTConfig(**SIZES, image_size=30, patch_size=6),
    images,
    test_resize_embeddings=False,
    sizes={"seq_length": 26, "encoder_seq_length": 26},
)
