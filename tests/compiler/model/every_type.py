"""Every causal-LM type of transformers at tiny size: its default configuration, with the sizes that it names made
small.

Knows few architectures by name: what a default configuration leaves out, or what would contradict small sizes (`OWN`).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
# Latent attention: as many keys as queries, and a head is what is rotated.
LATENT = dict(num_key_value_heads=4, head_dim=8)
HALF_SLIDING = ["sliding_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": dict(
        layer_types=HALF_SLIDING,
        rope_parameters={kind: dict(rope_type="default", rope_theta=1e4) for kind in HALF_SLIDING},
    ),
    "deepseek_v2": dict(n_group=1, topk_group=1, num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1),
    "falcon": dict(multi_query=False, num_kv_heads=4),
    "gpt_neo": dict(attention_types=[[["global"], 4]]),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8),
    "ministral": dict(head_dim=16, layer_types=HALF_SLIDING),
    "nemotron": dict(num_key_value_heads=2),
    "phimoe": dict(sliding_window=9),
    "prophetnet": dict(num_hidden_layers=None, num_decoder_layers=4),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1, layer_types=["hybrid"] * 4),
}


def tiny(kind: str) -> PretrainedConfig:
    """The type's configuration at tiny size.

    Raises ValueError where it holds other models beside a text model, or what its class raises where small sizes do not
    fit.
    """
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    if default.get_text_config() is not default:
        raise ValueError("holds other models beside the text model")
    known = default.to_dict()
    wanted = {name: value for name, value in SMALL.items() if known.get(name) is not None}
    if "kv_lora_rank" in wanted:
        wanted |= LATENT
    if "is_decoder" in known:
        wanted["is_decoder"] = True
    wanted |= OWN.get(kind, {})
    return config_class(**{name: value for name, value in wanted.items() if value is not None})


def causal_types() -> list[str]:
    """Every type that AutoModelForCausalLM knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
