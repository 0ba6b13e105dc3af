"""Every type of transformers that generates text at tiny size: its default configuration, with the sizes that it names made
small.

Knows few architectures by name: what a default configuration leaves out, or what would contradict small sizes (`OWN`).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

# Name of a configuration's value -> a small one; only names to which the default configuration gives a value are set.
SMALL = dict(
    vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    hidden_size=64, d_model=64, n_embd=64, embedding_size=64, word_embed_proj_dim=64, hidden_dim=64,
    pronunciation_embed_dim=64, shape_embed_dim=64, shape_vocab_size=128, pronunciation_vocab_size=128,
    intermediate_size=96, intermediate_size_mlp=96, ffn_dim=96, d_ff=96, dim_ff=96, ffn_hidden_size=96, n_inner=96,
    encoder_ffn_dim=96, decoder_ffn_dim=96, dense_intermediate_size=96, moe_intermediate_size=48,
    shared_expert_intermediate_size=48, shared_intermediate_size=48, moe_shared_expert_intermediate_size=48,
    expert_ffn_hidden_size=48,
    num_hidden_layers=4, n_layer=4, n_layers=4, num_layers=4, encoder_layers=2, decoder_layers=2,
    num_decoder_layers=4, num_encoder_layers=2,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, encoder_attention_heads=4, decoder_attention_heads=4,
    num_encoder_attention_heads=4, num_decoder_attention_heads=4, num_key_value_heads=2, num_kv_heads=2,
    head_dim=16, global_head_dim=16, dim_head=16, linear_num_heads=4, linear_head_dim=16,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, swa_v_head_dim=16, num_global_key_value_heads=2,
    max_position_embeddings=256, n_positions=256, n_ctx=256, max_seq_len=256, seq_length=256, max_sequence_length=256,
    sliding_window=9, sliding_window_size=9, attention_chunk_size=9, attention_window_size=9, floor_scale=5,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, num_experts_per_token=2,
    moe_top_k=2, moe_k=2, top_k_experts=2, n_shared_experts=1, moe_topk=2, moe_num_shared_experts=1, n_group=1, topk_group=1,
    first_k_dense_replace=1, num_dense_layers=1, zero_expert_num=1,
    kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, rotary_dim=8,
    vocab_size_per_layer_input=128, hidden_size_per_layer_input=16, laurel_rank=8, altup_num_inputs=2, num_kv_shared_layers=0,
)  # fmt: skip
# The same in configurations of towers, and of what stands between a tower and the text model.
TOWER = dict(
    depth=2, num_hidden_layers=2, out_hidden_size=64, mlp_ratio=2.0, image_size=28, patch_size=14, projection_dim=64,
    attention_heads=4, output_dim=64, num_attention_heads=4, num_heads=4, num_channels=3, base_channels=32,
    encoder_hidden_size=64, text_hidden_size=64, embed_dim=64, channel_multiplier=[1, 1], num_position_embeddings=16,
    crop_size=28, num_blocks=2, ext_pw_out_channel=64, depthwise_separable_out_channel=64, nemo_conv_channels=16,
)  # fmt: skip
PROJECTOR = dict(projector_hidden_size=64, connector_hidden_dim=64, alignment_intermediate_size=64)
HALF_RECURRENT = ["linear_attention", "full_attention"] * 2
DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
    layer_types=HALF_RECURRENT,
)  # fmt: skip
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=32, mamba_n_groups=2, mamba_d_state=16, mamba_chunk_size=8)
# Latent attention: as many keys as queries, and a head is what is rotated.
LATENT = dict(num_key_value_heads=4, head_dim=8)


HALF_SLIDING = ["sliding_attention", "full_attention"] * 2


def _sections(*of_half_head: int, **more: Any) -> dict[str, Any]:
    """Rotary frequencies in three sections, one for each dimension of a position."""
    return dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=list(of_half_head), **more))


OWN: dict[str, dict[str, Any]] = {
    "chameleon": dict(
        vocabulary_map={"<image>": 3}, vq_config=dict(resolution=32, num_embeddings=16, latent_channels=32)
    ),
    "cohere_compass": dict(tie_word_embeddings=True),
    "emu3": dict(vocabulary_map={"<image>": 3}),
    "cosmos3_edge_text": _sections(2, 3, 3),
    "dbrx": dict(
        attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2, hidden_size=64),
    ),
    "deepseek_ocr2_text": dict(num_experts_per_tok=2, mlp_layer_types=["dense", "sparse"] * 2),
    "ernie4_5_vl_moe_text": dict(
        moe_intermediate_size=[48, 24], mlp_layer_types=["dense", "sparse"] * 2, **_sections(3, 3, 2)
    ),
    "gemma4": dict(text_config=dict(use_bidirectional_attention="vision"), vision_config={}),
    "gemma4_unified": dict(text_config=dict(use_bidirectional_attention="vision"), vision_config={}),
    "glm4v_text": _sections(2, 3, 3),
    "glm4v_moe_text": _sections(1, 1, 2, partial_rotary_factor=0.5),
    "glm_ocr_text": _sections(2, 3, 3),
    "granite4_vision": dict(
        text_config=dict(attention_multiplier=0.2, model_type="granite"),
        deepstack_layer_map=[],
        downsample_rate="1/2",
        spatial_vision_layers=[],
    ),
    "gemma3n_text": dict(num_kv_shared_layers=2, layer_types=HALF_SLIDING),
    "gemma4_text": dict(num_kv_shared_layers=2, layer_types=HALF_SLIDING),
    "hunyuan_vl_text": dict(head_dim=16, **_sections(2, 3, 3)),
    "hunyuan_vl": dict(vision_config=dict(max_image_size=64, img_max_token_num=16)),
    "paddleocr_vl_text": _sections(2, 3, 3),
    "qwen2_5_omni_text": _sections(2, 3, 3),
    "qwen2_5_vl_text": _sections(2, 3, 3),
    "qwen2_vl": dict(vision_config=dict(mlp_ratio=2)),
    "qwen2_vl_text": _sections(2, 3, 3),
    "step3p5": dict(sliding_window=9, layer_types=HALF_SLIDING),
    "qwen3_omni_moe_text": dict(decoder_sparse_step=1),
    "cohere_compass_text": dict(
        layer_types=HALF_SLIDING,
        rope_parameters={
            kind: dict(rope_type="default", rope_theta=1e4, mrope_section=[3, 3, 2]) for kind in HALF_SLIDING
        },
    ),
    "bamba": dict(attn_layer_indices=[1, 3], **MAMBA2),
    "deepseek_v2": dict(n_group=1, topk_group=1, num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1),
    "falcon_h1": dict(mamba_d_ssm=128, head_dim=16, lm_head_multiplier=0.5, **MAMBA2),
    "granitemoehybrid": dict(layer_types=HALF_RECURRENT, **MAMBA2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=8),
    "kimi_linear": dict(linear_num_heads=4, linear_head_dim=12, layer_types=HALF_RECURRENT),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "falcon": dict(multi_query=False, num_kv_heads=4),
    "gpt_neo": dict(attention_types=[[["global"], 4]]),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "llama4": dict(vision_config=dict(vision_output_dim=64, projector_input_dim=64, projector_output_dim=64)),
    "mamba2": dict(num_heads=4, head_dim=32, n_groups=2, state_size=16, chunk_size=8),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"] * 2),
    "ministral": dict(head_dim=16, layer_types=HALF_SLIDING),
    "nemotron": dict(num_key_value_heads=2),
    "nemotron_h": dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=8,
    ),
    "olmo_hybrid": dict(DELTA),
    "perception_lm": dict(vision_config=dict(model_args=dict(embed_dim=64))),
    "phimoe": dict(sliding_window=9),
    "prophetnet": dict(num_hidden_layers=None, num_decoder_layers=4),
    "qwen3_5_moe_text": dict(DELTA),
    "qwen3_5_text": dict(DELTA),
    "qwen3_next": dict(DELTA),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1, layer_types=["hybrid"] * 4),
}


def tiny(kind: str) -> PretrainedConfig:
    """The type's configuration at tiny size, of a model of more than text with every part small.

    Raises what its class raises where small sizes do not fit.
    """
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    text = default.get_text_config()
    own = dict(OWN.get(kind, {}))
    parts: dict[str, Any] = {}
    for name, part_class in config_class.sub_configs.items():
        part, changed = getattr(default, name, None), own.pop(name, None)
        if part is None and changed is not None:
            part = part_class()
        if part is not None:
            part_class = CONFIG_MAPPING[changed["model_type"]] if "model_type" in (changed or {}) else type(part)
            parts[name] = part_class(**{**_small(part, {} if part is text else TOWER), **(changed or {})})
    sizes = _small(default, {}) if text is default else _named(default, PROJECTOR)
    made = {name: value for name, value in {**sizes, **parts, **own}.items() if value is not None}
    config = config_class(**made)
    if config.get_text_config() not in (config, *parts.values()):
        raise ValueError("its text model is a part of a part")
    if parts and kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        config.architectures = [MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[kind]]
    return config


def _small(default: PretrainedConfig, more: dict[str, Any]) -> dict[str, Any]:
    """Small values of what `default` gives a value to."""
    wanted = _named(default, {**SMALL, **more})
    if "kv_lora_rank" in wanted:
        wanted |= LATENT
    if "is_decoder" in default.to_dict():
        wanted["is_decoder"] = True
    wanted |= OWN.get(default.model_type, {})
    return {name: value for name, value in wanted.items() if value is not None}


def _named(default: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    known = default.to_dict()
    return {name: value for name, value in values.items() if known.get(name) is not None}


def causal_types() -> list[str]:
    """Every type that AutoModelForCausalLM knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_text_types() -> list[str]:
    """Every type that AutoModelForImageTextToText knows."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def speech_types() -> list[str]:
    """Every type besides that AutoModelForMultimodalLM knows: of speech and text, and of all three."""
    return sorted({*MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES} - {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
