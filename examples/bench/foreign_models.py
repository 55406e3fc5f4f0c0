"""Tiny random models of other people's packages, for foreign.py: a line each, shrunk by rule where a rule does it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Foreign:
    """package: whose model it is. build: the model and the keyword arguments of its forward pass.

    pads: whether it takes ``attention_mask`` beside ``input_ids``. decodes: whether it has a cache that grows.
    """

    package: str
    build: Callable[[], Built]
    pads: bool = False
    decodes: bool = False


def random(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ transformers

TINY: dict[str, Any] = {
    **dict.fromkeys("hidden_size d_model n_embd dim embedding_size word_embed_proj_dim".split(), 32),
    **dict.fromkeys("intermediate_size ffn_dim hidden_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim".split(), 48),
    **dict.fromkeys("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers".split(), 2),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads encoder_attention_heads".split(), 4),
    **dict.fromkeys("decoder_attention_heads num_experts num_local_experts n_routed_experts".split(), 4),
    **dict.fromkeys("max_position_embeddings n_positions".split(), 128),
    **dict(vocab_size=64, num_key_value_heads=2, head_dim=8, d_kv=8, num_experts_per_tok=2, moe_intermediate_size=16),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    **dict(image_size=32, patch_size=8, num_channels=3, sliding_window=16),
}  # fmt: skip
_OPTIONAL = ("head_dim", "num_key_value_heads", "n_inner", "sliding_window")  # None means something there


def shrink(config: Any) -> None:
    """Make a configuration tiny, whatever its model: sizes by the names that transformers uses."""
    for name, value in TINY.items():
        before = getattr(config, name, config)
        if before is config or isinstance(before, (list, tuple, dict)) or (before is None and name in _OPTIONAL):
            continue
        try:
            setattr(config, name, value)
        except NotImplementedError:  # a size that is the sum of others there
            continue
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if kinds:
        config.layer_types = (kinds * 2)[:2]


def of_transformers(name: str, **sizes: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_MAPPING

        kind = CONFIG_MAPPING[name]
        config = kind(**{key: value for key, value in sizes.items() if not key.startswith("set_")})
        for part in [config, *vars(config).values()]:
            if isinstance(part, transformers.PreTrainedConfig):
                shrink(part)
        for key, value in sizes.items():
            setattr(config, key.removeprefix("set_"), value)
        config._attn_implementation = "eager"
        model = MODEL_MAPPING[kind]
        model = (model[0] if isinstance(model, tuple) else model)(config)
        return model, _inputs_of(model, name)

    return build


def _inputs_of(model: nn.Module, name: str) -> dict[str, Any]:
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = tokens(2, 24)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = tokens(2, 15, seed=2)
    if "pixel_values" in takes and ("input_ids" not in takes or name in _BOTH):
        inputs["pixel_values"] = random(2, 3, 32, 32)
    if "input_values" in takes:
        inputs["input_values"] = random(2, 4000)
    return inputs


_DECODERS = """
afmoe apertus arcee aria_text bitnet biogpt cohere2 cohere2_moe cosmos3_edge_text ctrl cwm diffllama doge ernie4_5
ernie4_5_moe exaone4 exaone_moe flex_olmo glm glm4 glm4_moe gpt-sw3 gpt_bigcode gpt_neox_japanese granite granite_swa
granitemoe granitemoeshared helium hy_v3 hyperclovax imagegpt internlm3 iquestcoder jais2 jetmoe kolibri1 lfm2 lfm3
llama4_text mellum minimax minimax_m2 ministral3 mixtral modernbert-decoder molmo2_text nanochat olmo olmo3 olmoe
persimmon phimoe qwen2_moe qwen3_moe qwen3_next qwen3_vl_text qwen3_vl_moe_text qwen3_5_text muse_glimmer_text rembert
seed_oss smollm3 solar_open vaultgemma
""".split()
_ENCODERS = """
albert bert-generation big_bird camembert canine convbert data2vec-text deberta deberta-v2 dpr electra ernie esm
eurobert flaubert fnet funnel gte ibert jina_embeddings_v3 layoutlm longformer megatron-bert mobilebert modernbert
mpnet mra nomic_bert nystromformer roberta-prelayernorm roformer splinter squeezebert tapas ultrabert xlm xlm-roberta
xlm-roberta-xl xlnet yoso clip_text_model openai-gpt openai_privacy_filter
""".split()
_PAIRS = """
bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 marian mbart mt5 mvp pegasus pegasus_x plbart umt5
""".split()
_IMAGES = """
aimv2_vision_model beit chinese_clip_vision_model clip_vision_model data2vec-vision deit dinov2 dinov2_with_registers
dpt idefics3_vision ijepa internvl_vision mlcd pixio pixtral qianfan_ocr_vision siglip_vision_model vit_mae vit_msn
vitdet yolos
""".split()
_BOTH = "altclip chinese_clip clipseg flava metaclip_2 tipsv2".split()
_MIXED = """
aria aya_vision deepseek_vl exaone4_5 gemma3 git glmasr granite_speech idefics2 idefics3 internvl kosmos-2.5 lfm2_vl
llava llava_next llava_onevision mistral3 mllama molmo2 ovis2 paligemma qwen2_audio smolvlm vipllava voxtral
""".split()
_SOUND = "data2vec-audio hubert unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm sew".split()

# name: (pads, decodes, sizes); those that start with set_ are set after the configuration was shrunk
_SIZED: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    "cpmant": (True, False, {}),
    "fsmt": (True, False, {}),
    "nllb-moe": (True, False, {}),
    "switch_transformers": (True, False, {}),
    "prophetnet": (True, False, dict(num_encoder_layers=2, num_decoder_layers=2)),
    "xmod": (True, False, dict(default_language="en_XX")),
    "swin": (False, False, dict(window_size=2, set_depths=[2, 2], set_num_heads=[2, 4], set_num_layers=2,
                                set_embed_dim=32, set_patch_size=4)),
    "swinv2": (False, False, dict(window_size=2, set_depths=[2, 2], set_num_heads=[2, 4], set_num_layers=2,
                                  set_embed_dim=32, set_patch_size=4)),
    "codegen": (True, True, dict(set_rotary_dim=4)),
    "modernvbert": (True, False, {}),
    "qwen2_vl_text": (True, True, dict(
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4})),
    "qwen2_5_vl_text": (True, True, dict(
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4})),
    "deepseek_v2": (True, True, dict(set_num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                                     qk_nope_head_dim=8, v_head_dim=12, n_group=2, topk_group=1, set_head_dim=8)),
}  # fmt: skip
# ---------------------------------------------------------------------------------------------------------- others


def of_timm(name: str, size: int | None = None, **more: Any) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        timm.layers.set_fused_attn(False)
        given = {} if size is None else {"img_size": size}
        model = timm.create_model(name, pretrained=False, num_classes=7, **given, **more)
        side = size or model.default_cfg["input_size"][-1]
        return _Called(model), {"x": random(1, 3, side, side)}

    return build


class _Called(nn.Module):
    """A model whose first argument has one name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


def of_torchvision(make: Callable[[Any], nn.Module], *shape: int) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        return _Called(make(torchvision.models)), {"x": random(*shape)}

    return build


def of_diffusers(name: str, sizes: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Callable[[], Built]:
    def build() -> Built:
        import diffusers

        return getattr(diffusers, name)(**sizes), inputs()

    return build


def of_open_clip(tower: str, **more: Any) -> Callable[[], Built]:
    def build() -> Built:
        import open_clip

        vision = dict(image_size=32, layers=2, width=32, head_width=8, patch_size=8)
        text = dict(context_length=24, vocab_size=64, width=32, heads=4, layers=2)
        parts = dict(vision_cfg={**vision, **more.get("vision", {})}, text_cfg={**text, **more.get("text", {})})
        rest = {name: option for name, option in more.items() if name not in ("vision", "text")}
        home = open_clip.model if tower != "CoCa" else open_clip.coca_model
        model = getattr(home, tower)(embed_dim=32, **parts, **rest)
        return model, {"image": random(2, 3, 32, 32), "text": tokens(2, 24)}

    return build


def of_x_transformers(kind: str = "Decoder", **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import x_transformers as x

        layers = getattr(x, kind)(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
        return _Called(x.TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers)), {"x": tokens(2, 40)}

    return build


def of_vit_pytorch(path: str, *shape: int, **sizes: Any) -> Callable[[], Built]:
    def build() -> Built:
        import importlib

        module, _, name = path.rpartition(".")
        model = getattr(importlib.import_module(f"vit_pytorch.{module}" if module else "vit_pytorch"), name)(**sizes)
        return _Called(model), {"x": random(*(shape or (2, 3, 32, 32)))}

    return build


_VIT = dict(image_size=32, patch_size=8, num_classes=7, dim=32, depth=2, heads=4, mlp_dim=48)
_TIMM: dict[str, tuple[int | None, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (64, {"depth": 2}),
    "vit_small_patch16_rope_224": (64, {"depth": 2}),
    "vit_base_patch16_clip_224": (64, {"depth": 1}),
    "vit_relpos_small_patch16_224": (64, {"depth": 2}),
    "vit_srelpos_small_patch16_224": (64, {"depth": 2}),
    "deit_tiny_distilled_patch16_224": (64, {"depth": 2}),
    "deit3_small_patch16_224": (64, {"depth": 2}),
    "beit_base_patch16_224": (64, {"depth": 1}),
    "eva02_tiny_patch14_224": (56, {"depth": 2}),
    "cait_xxs24_224": (64, {"depth": 2}),
    "convit_tiny": (64, {"depth": 2}),
    "crossvit_tiny_240": (None, {}),
    "swin_tiny_patch4_window7_224": (56, {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}),
    "swinv2_tiny_window8_256": (64, {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}),
    "xcit_nano_12_p16_224": (64, {"depth": 2}),
    "twins_svt_small": (64, {}),
    "pvt_v2_b0": (None, {}),
    "coat_tiny": (None, {}),
    "levit_128s": (None, {}),
    "efficientformer_l1": (None, {}),
    "mobilevit_xxs": (None, {}),
    "mobilevitv2_050": (None, {}),
    "maxvit_rmlp_pico_rw_256": (None, {}),
    "coatnet_nano_rw_224": (None, {}),
    "gcvit_xxtiny": (None, {}),
    "davit_tiny": (None, {}),
    "mvitv2_tiny": (None, {}),
    "hiera_tiny_224": (None, {}),
    "visformer_tiny": (None, {}),
    "tnt_s_patch16_224": (None, {}),
    "volo_d1_224": (None, {}),
    "nest_tiny": (None, {}),
    "tiny_vit_5m_224": (None, {}),
    "fastvit_sa12": (None, {}),
    "edgenext_xx_small": (None, {}),
    "nextvit_small": (None, {}),
    "samvit_base_patch16": (64, {"depth": 2, "global_attn_indexes": (1,)}),
    "repvit_m0_9": (None, {}),
    "efficientvit_b0": (None, {}),
    "efficientvit_m0": (None, {}),
    "bat_resnext26ts": (None, {}),
    "halonet26t": (None, {}),
    "lambda_resnet26t": (None, {}),
    "botnet26t_256": (None, {}),
    "resnet50_clip": (None, {}),
}  # fmt: skip
_IMAGE_NOISE = dict(attention_head_dim=4, norm_num_groups=8)


def _noise(*shape: int, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"sample": random(*shape), "timestep": torch.tensor([3]), **{k: v() for k, v in more.items()}}


def _states(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: random(*shape, seed=5)


_DIFFUSERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "unet2d": ("UNet2DModel", dict(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **_IMAGE_NOISE,
    ), _noise(1, 3, 16, 16)),
    "unet2d-condition": ("UNet2DConditionModel", dict(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **_IMAGE_NOISE,
    ), _noise(1, 4, 16, 16, encoder_hidden_states=_states(1, 9, 16))),
    "unet3d-condition": ("UNet3DConditionModel", dict(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ), _noise(1, 4, 3, 16, 16, encoder_hidden_states=_states(1, 9, 16))),
    "autoencoder-kl": ("AutoencoderKL", dict(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ), lambda: {"sample": random(1, 3, 16, 16)}),
    "vq-model": ("VQModel", dict(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        norm_num_groups=8, up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=3,
    ), lambda: {"sample": random(1, 3, 16, 16)}),
    "dit": ("DiTTransformer2DModel", dict(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=8,
    ), lambda: {"hidden_states": random(1, 4, 8, 8), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}),
    "pixart": ("PixArtTransformer2DModel", dict(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        cross_attention_dim=32, caption_channels=16, norm_num_groups=8, use_additional_conditions=False,
    ), lambda: {"hidden_states": random(1, 4, 8, 8), "timestep": torch.tensor([3]),
        "encoder_hidden_states": random(1, 9, 16), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
    "sd3": ("SD3Transformer2DModel", dict(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
    ), lambda: {"hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 9, 16),
        "pooled_projections": random(1, 16), "timestep": torch.tensor([3])}),
    "flux": ("FluxTransformer2DModel", dict(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ), lambda: {"hidden_states": random(1, 16, 4), "encoder_hidden_states": random(1, 9, 32),
        "pooled_projections": random(1, 32), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(9, 3)}),
    "prior": ("PriorTransformer", dict(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=16, num_embeddings=7,
        additional_embeddings=4,
    ), lambda: {"hidden_states": random(2, 16), "timestep": 2, "proj_embedding": random(2, 16),
        "encoder_hidden_states": random(2, 7, 16)}),
    "auraflow": ("AuraFlowTransformer2DModel", dict(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, out_channels=4, pos_embed_max_size=64,
    ), lambda: {"hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 9, 32),
        "timestep": torch.tensor([0.5])}),
    "sana": ("SanaTransformer2DModel", dict(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    ), lambda: {"hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 9, 8),
        "timestep": torch.tensor([3])}),
    "wan": ("WanTransformer3DModel", dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=64, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ), lambda: {"hidden_states": random(1, 4, 2, 8, 8), "encoder_hidden_states": random(1, 9, 16),
        "timestep": torch.tensor([3])}),
    "cogvideox": ("CogVideoXTransformer3DModel", dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2, max_text_seq_length=8,
    ), lambda: {"hidden_states": random(1, 2, 4, 8, 8), "encoder_hidden_states": random(1, 8, 8),
        "timestep": torch.tensor([3])}),
    "ltx": ("LTXVideoTransformer3DModel", dict(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    ), lambda: {"hidden_states": random(1, 32, 8), "encoder_hidden_states": random(1, 9, 16),
        "timestep": torch.tensor([3]), "encoder_attention_mask": torch.ones(1, 9, dtype=torch.bool),
        "num_frames": 2, "height": 4, "width": 4}),
    "lumina2": ("Lumina2Transformer2DModel", dict(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    ), lambda: {"hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 9, 8),
        "timestep": torch.tensor([0.5]), "encoder_attention_mask": torch.ones(1, 9, dtype=torch.bool)}),
}  # fmt: skip
_TORCHVISION: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "vit": (lambda m: m.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=7), (2, 3, 32, 32)),
    "swin": (lambda m: m.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=7), (2, 3, 64, 64)),
    "swin_v2": (lambda m: m.SwinTransformer(
        [4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=7, block=m.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=m.swin_transformer.PatchMergingV2), (2, 3, 64, 64)),
    "maxvit": (lambda m: m.MaxVit(
        input_size=(32, 32), stem_channels=16, partition_size=4, block_channels=[16, 32], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.0, num_classes=7), (2, 3, 32, 32)),
    "swin3d": (lambda m: m.video.SwinTransformer3d(
        [2, 4, 4], 32, [2, 2], [2, 4], [2, 4, 4], num_classes=7), (1, 3, 4, 32, 32)),
}  # fmt: skip
_OPEN_CLIP: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIP", {}),
    "clip-gelu-cls": ("CLIP", {"quick_gelu": True, "vision": {"attentional_pool": True, "attn_pooler_heads": 4}}),
    "custom-text": ("CustomTextCLIP", {}),
    "custom-text-embed-cls": ("CustomTextCLIP", {"text": {"embed_cls": True}}),
    "coca": ("CoCa", {
        "multimodal_cfg": dict(context_length=24, vocab_size=64, width=32, heads=4, layers=2),
        "vision": {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text": {"embed_cls": True, "output_tokens": True},
    }),
}  # fmt: skip
_X: dict[str, dict[str, Any]] = {
    "decoder": {}, "decoder-flash": {"attn_flash": True}, "rotary": {"rotary_pos_emb": True},
    "alibi": {"alibi_pos_bias": True}, "t5-bias": {"rel_pos_bias": True}, "gqa": {"attn_kv_heads": 2},
    "one-kv-head": {"attn_one_kv_head": True}, "qk-norm": {"attn_qk_norm": True},
    "talking": {"attn_pre_talking_heads": True},
    "topk": {"attn_sparse_topk": 8}, "memory-kv": {"attn_num_mem_kv": 4}, "gate-values": {"attn_gate_values": True},
    "dynamic-bias": {"dynamic_pos_bias": True}, "softclamp": {"attn_softclamp_logits": True},
    "encoder": {"kind": "Encoder"}, "encoder-flash": {"kind": "Encoder", "attn_flash": True},
    "sigmoid": {"attn_sigmoid": True},
}  # fmt: skip
_VITS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "vit": ("ViT", (), _VIT), "simple-vit": ("SimpleViT", (), _VIT),
    "deep-vit": ("deepvit.DeepViT", (), _VIT),
    "cait": ("cait.CaiT", (), {**_VIT, "cls_depth": 1}),
    "qk-norm": ("simple_vit_with_qk_norm.SimpleViT", (), _VIT),
    "registers": ("simple_vit_with_register_tokens.SimpleViT", (), _VIT),
    "parallel": ("parallel_vit.ViT", (), {**_VIT, "num_parallel_branches": 2}),
    "small-dataset": ("vit_for_small_dataset.ViT", (), _VIT),
    "patch-merger": ("vit_with_patch_merger.ViT", (), {**_VIT, "patch_merge_layer": 1, "patch_merge_num_tokens": 8}),
    "ats": ("ats_vit.ViT", (), {**_VIT, "max_tokens_per_depth": (16, 12)}),
    "xcit": ("xcit.XCiT", (), {**_VIT, "cls_depth": 1}),
    "rvt": ("rvt.RvT", (), _VIT),
    "learnable-memory": ("learnable_memory_vit.ViT", (), _VIT),
    "max-vit": ("max_vit.MaxViT", (2, 3, 56, 56), dict(num_classes=7, dim=16, depth=(1, 1), dim_head=8, window_size=7)),
    "twins": ("twins_svt.TwinsSVT", (1, 3, 56, 56), dict(
        num_classes=7, s1_emb_dim=8, s2_emb_dim=16, s3_emb_dim=16, s4_emb_dim=16, s1_patch_size=1, s2_patch_size=2,
        s3_patch_size=2, s4_patch_size=2, s1_local_patch_size=7, s2_local_patch_size=7, s3_local_patch_size=7,
        s4_local_patch_size=7)),
}  # fmt: skip


def _catalogue() -> dict[str, Foreign]:
    """Name -> architecture. What is not of transformers has its package in front of its name."""
    found: dict[str, Foreign] = {}
    kinds = (
        (_DECODERS, True, True), (_ENCODERS, True, False), (_PAIRS, True, True), (_IMAGES, False, False),
        (_BOTH, True, False), (_MIXED, True, True), (_SOUND, False, False),
    )  # fmt: skip
    for names, pads, decodes in kinds:
        for name in names:
            found[name] = Foreign("transformers", of_transformers(name), pads, decodes)
    for name, (pads, decodes, sizes) in _SIZED.items():
        found[name] = Foreign("transformers", of_transformers(name, **sizes), pads, decodes)
    for name, (size, more) in _TIMM.items():
        found[f"timm:{name}"] = Foreign("timm", of_timm(name, size, **more))
    for name, (make, shape) in _TORCHVISION.items():
        found[f"torchvision:{name}"] = Foreign("torchvision", of_torchvision(make, *shape))
    for name, (model, sizes, inputs) in _DIFFUSERS.items():
        found[f"diffusers:{name}"] = Foreign("diffusers", of_diffusers(model, sizes, inputs))
    for name, (tower, more) in _OPEN_CLIP.items():
        found[f"open_clip:{name}"] = Foreign("open_clip_torch", of_open_clip(tower, **more))
    for name, options in _X.items():
        found[f"x-transformers:{name}"] = Foreign("x-transformers", of_x_transformers(**options))
    for name, (path, shape, sizes) in _VITS.items():
        found[f"vit-pytorch:{name}"] = Foreign("vit-pytorch", of_vit_pytorch(path, *shape, **sizes))
    return found


FOREIGN = _catalogue()
INDUCTOR = """
albert biogpt cohere2 deberta electra gpt_bigcode granite mbart mixtral mpnet olmo persimmon siglip_vision_model
swinv2 rembert timm:vit_tiny_patch16_224 timm:beit_base_patch16_224 torchvision:swin diffusers:unet2d-condition
open_clip:clip
""".split()
