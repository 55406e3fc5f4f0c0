"""Tiny random models of many architectures, with the number of attention sites that each has, for coverage.py.

The models of transformers are named, not imported: one that is not there is an error of its own row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, LENGTH, LENGTHS = 64, 40, (40, 29)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": VOCAB, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**TOKENS, **SIZES}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {**SIZES, "image_size": 24, "patch_size": 4}
PAIR = {f"{part}_{name}": n for part in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
PAIR |= {"vocab_size": VOCAB, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}

# ---------------------------------------------------------------------------------------------------- inputs


def random(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (len(LENGTHS), length), generator=torch.Generator().manual_seed(seed))


def real_tokens() -> torch.Tensor:
    """The right-padded attention mask, int64 ``[B, L]``."""
    return (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(LENGTH)}


def two_texts() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(LENGTH), "decoder_input_ids": tokens(LENGTH - 9, seed=2)}


def spectrogram() -> dict[str, torch.Tensor]:
    return {"input_features": random(len(LENGTHS), 8, 2 * LENGTH), "decoder_input_ids": tokens(LENGTH - 9, seed=2)}


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": random(len(LENGTHS), 3, 24, 24)}


def text_and_pixels() -> dict[str, torch.Tensor]:
    return {**text(), **pixels()}


def states() -> dict[str, torch.Tensor]:
    return {"x": random(len(LENGTHS), LENGTH, 32)}


def two_states() -> dict[str, torch.Tensor]:
    return {"x": random(len(LENGTHS), 25, 32), "context": random(len(LENGTHS), LENGTH, 32, seed=4)}


# ---------------------------------------------------------------------------------------------------- written by hand


class NanoGPT(nn.Module):
    """Causal self-attention as in nanoGPT: one projection, a triangle of ones as a buffer."""

    def __init__(self, implementation: str, dim: int = 32, heads: int = 4, block_size: int = 64) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm, self.heads, self.flash = nn.LayerNorm(dim), heads, implementation == "sdpa"
        self.attn_dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(self.norm(x)).split(C, dim=2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class TimmBlock(nn.Module):
    """Self-attention of a vision transformer as in timm: q, k and v from one tensor, a scaled query."""

    def __init__(self, implementation: str, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.heads, self.scale, self.fused = heads, (dim // heads) ** -0.5, implementation == "sdpa"
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            out = self.attn_drop(attn.softmax(dim=-1)) @ v
        return x + self.proj(out.transpose(1, 2).reshape(B, N, C))


class DiffusersBlock(nn.Module):
    """Cross-attention as in diffusers: batch and heads in one dimension, scores by baddbmm, an additive mask."""

    def __init__(self, implementation: str, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.heads, self.scale, self.fused = heads, (dim // heads) ** -0.5, implementation == "sdpa"

    def head_to_batch_dim(self, x: torch.Tensor) -> torch.Tensor:
        B, n, C = x.shape
        return x.reshape(B, n, self.heads, C // self.heads).permute(0, 2, 1, 3).reshape(B * self.heads, n, -1)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        B, n, C = x.shape
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        bias = None if mask is None else ((1 - mask.to(x.dtype)) * -10000.0)[:, None, :]
        if self.fused:
            q, k, v = (y.view(B, -1, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
            bias = None if bias is None else bias.repeat_interleave(self.heads, dim=0).view(B, self.heads, 1, -1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(B, n, C)
            return x + self.to_out(out)
        q, k, v = map(self.head_to_batch_dim, (q, k, v))
        if bias is None:
            start, beta = torch.empty(q.shape[0], n, k.shape[1], dtype=q.dtype, device=q.device), 0
        else:
            start, beta = bias.repeat_interleave(self.heads, dim=0).expand(-1, n, -1), 1
        scores = torch.baddbmm(start, q, k.transpose(-1, -2), beta=beta, alpha=self.scale)
        out = torch.bmm(scores.softmax(dim=-1).to(v.dtype), v).reshape(B, self.heads, n, -1)
        return x + self.to_out(out.permute(0, 2, 1, 3).reshape(B, n, C))


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder with a key padding mask."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=None if mask is None else mask == 0)


class Stack(nn.Module):
    """Two blocks in a row."""

    def __init__(self, block: Callable[[str], nn.Module], implementation: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(implementation) for _ in range(2))

    def forward(self, x: torch.Tensor, *args: torch.Tensor | None, **kwargs: torch.Tensor | None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x


# ---------------------------------------------------------------------------------------------------- architectures


@dataclass(frozen=True)
class Architecture:
    """How to make a model, what to give it, and how often it computes attention.

    model: name of a model of transformers, or a module's constructor that takes the implementation.
    config, sizes: name and arguments of its configuration.
    inputs: makes the keyword arguments of a forward pass.
    sites: attention sites of a forward pass: layers x attentions per layer.
    step_sites: those of one decoding step; 0 where the model does not decode with a cache.
    mask: name of the argument for the padding mask ``[B, L]``; None if the model takes none.
    padded_output: whether the tokens of its output are those of the padding mask.
    static: whether it decodes over a StaticCache.
    implementations: spellings of attention that the model has.
    """

    model: str | Callable[[str], nn.Module]
    config: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, torch.Tensor]] = text
    sites: int = 2
    step_sites: int = 2
    mask: str | None = "attention_mask"
    padded_output: bool = True
    static: bool = True
    implementations: tuple[str, ...] = ("eager", "sdpa")

    def build(self, implementation: str) -> nn.Module:
        """The model in evaluation mode, with logits larger than at initialisation, so that attention matters."""
        torch.manual_seed(0)
        if isinstance(self.model, str):
            import transformers

            config = getattr(transformers, self.config)(**self.sizes)
            config._attn_implementation = implementation
            model = getattr(transformers, self.model)(config)
        else:
            model = self.model(implementation)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
        return model.eval()


def decoder(name: str, sizes: dict[str, Any] | None = None, **more: Any) -> Architecture:
    return Architecture(f"{name}Model", f"{name}Config", {**GROUPED, **more} if sizes is None else sizes)


def encoder(name: str, sizes: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(f"{name}Model", f"{name}Config", sizes, step_sites=0, static=False, **more)


def pair(name: str, sizes: dict[str, Any], **more: Any) -> Architecture:
    more = {"inputs": two_texts, "sites": 6, "step_sites": 4, "padded_output": False, **more}
    return Architecture(f"{name}Model", f"{name}Config", sizes, **more)


def blocks(
    block: Callable[[str], nn.Module], inputs: Callable[[], dict[str, torch.Tensor]], **more: Any
) -> Architecture:
    return Architecture(lambda name: Stack(block, name), inputs=inputs, step_sites=0, static=False, **more)


GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": decoder("Llama"),
    "mistral": decoder("Mistral", sliding_window=8),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3", head_dim=8),
    "gemma": decoder("Gemma", head_dim=8),
    "gemma2": decoder("Gemma2", head_dim=8, **ALTERNATING),
    "gemma3": Architecture("Gemma3TextModel", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, **ALTERNATING}),
    "phi": decoder("Phi", TEXT),
    "phi3": decoder("Phi3"),
    "gpt2": decoder("GPT2", GPT2_SIZES),
    "gpt_neox": decoder("GPTNeoX", TEXT),
    "gptj": decoder("GPTJ", {**GPT2_SIZES, "rotary_dim": 4}),
    "gpt_neo": decoder("GPTNeo", {
        "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 1]], "window_size": 8,
    }),
    "opt": decoder("OPT", {
        **TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32,
    }),
    "bloom": decoder("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": decoder("Falcon", {**TEXT}),
    "falcon-alibi": decoder("Falcon", {**TEXT, "alibi": True, "new_decoder_architecture": False}),
    "mpt": decoder("Mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "starcoder2": decoder("Starcoder2", sliding_window=8),
    "olmo2": decoder("Olmo2"),
    "cohere": decoder("Cohere"),
    "stablelm": decoder("StableLm"),
    "deepseek_v3": decoder("DeepseekV3", {
        **TEXT, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    }),
    "gpt_oss": decoder(
        "GptOss", head_dim=8, num_local_experts=2, num_experts_per_tok=1, **ALTERNATING
    ),
    "t5": pair("T5", {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "pad_token_id": 0, "decoder_start_token_id": 0,
    }),
    "bart": pair("Bart", {**PAIR, "max_position_embeddings": 128}),
    "whisper": pair("Whisper", {
        **PAIR, "num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": 64, "bos_token_id": 1,
    }, inputs=spectrogram, mask=None),
    "bert": encoder("Bert", TEXT),
    "roberta": encoder("Roberta", TEXT),
    "distilbert": encoder("DistilBert", {
        "vocab_size": VOCAB, "max_position_embeddings": 128, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
    }),
    "vit": encoder("ViT", IMAGE, inputs=pixels, mask=None),
    "clip": encoder("CLIP", {
        "text_config": TEXT, "vision_config": IMAGE, "projection_dim": 32,
    }, inputs=text_and_pixels, sites=4, padded_output=False),
    "nn.TransformerEncoder": Architecture(
        TorchEncoder, inputs=states, step_sites=0, mask="mask", static=False, implementations=("layers", "fused")
    ),
    "nanogpt": blocks(NanoGPT, inputs=states, mask=None),
    "timm-vit": blocks(TimmBlock, inputs=states, mask=None),
    "diffusers-cross": blocks(DiffusersBlock, inputs=two_states, mask="mask", padded_output=False),
}  # fmt: skip
