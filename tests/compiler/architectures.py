"""Tiny random configurations of decoder architectures, by name: sizes small, features switched on."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
ROPE = dict(rope_theta=10000.0)
ALPHA = dict(rope_type="dynamic", rope_theta=10000.0, factor=1.0, alpha=1000.0)
DEEPSEEK = dict(
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    n_shared_experts=1,
    first_k_dense_replace=1,
    num_key_value_heads=4,
)

DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=24, linear_value_head_dim=24,
    layer_types=["linear_attention", "full_attention"] * 2, head_dim=16,
)  # fmt: skip
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=32, mamba_n_groups=2, mamba_d_state=16, mamba_chunk_size=8)
# Layers that keep state, beside such that attend and without.
RECURRENT: dict[str, tuple[str, dict]] = {
    "qwen3_next": ("qwen3_next", dict(shared_expert_intermediate_size=48, **DELTA, **MOE)),
    "kimi_linear": (
        "kimi_linear",
        dict(
            linear_num_heads=4, linear_head_dim=12, layer_types=["linear_attention", "full_attention"] * 2,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4, **MOE,
        ),
    ),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"] * 2, block_ff_dim=96)),
    "nemotron_h": (
        "nemotron_h",
        dict(
            num_hidden_layers=None, layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], head_dim=16,
            mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=2, chunk_size=8, n_routed_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=48, moe_shared_expert_intermediate_size=48,
        ),
    ),
    "falcon_h1": ("falcon_h1", dict(mamba_d_ssm=128, head_dim=16, lm_head_multiplier=0.5, **MAMBA2)),
    "jamba": (
        "jamba",
        dict(
            attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=8, num_experts=4, num_experts_per_tok=2,
            use_mamba_kernels=False,
        ),
    ),
    "mamba2": ("mamba2", dict(num_heads=4, head_dim=32, n_groups=2, state_size=16, chunk_size=8)),
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama3_rope": (
        "llama",
        dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        ),
    ),
    "llama_yarn": (
        "llama",
        dict(
            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
        ),
    ),
    "llama_of_windows_in_name": (
        "llama",
        dict(layer_types=["sliding_attention"] * 4, sliding_window=9),
    ),  # which its class ignores
    "llama_linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "mistral_window": ("mistral", dict(sliding_window=9)),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=2)),
    "qwen3": ("qwen3", dict(head_dim=24)),
    "gemma": ("gemma", dict(head_dim=24)),
    "gemma2": ("gemma2", dict(head_dim=24, sliding_window=9, query_pre_attn_scalar=20)),
    "gemma3": (
        "gemma3_text",
        dict(
            head_dim=24,
            sliding_window=9,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "phi": ("phi", {}),
    "phi3": ("phi3", dict(sliding_window=9)),
    "phimoe": ("phimoe", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9)),
    "gpt2": ("gpt2", dict(n_embd=64, n_layer=4, n_head=4, n_positions=256)),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", dict(ffn_dim=96, word_embed_proj_dim=64)),
    "stablelm": ("stablelm", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", dict(sliding_window=9)),
    "granite": ("granite", dict(attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0)),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", dict(sliding_window=9)),
    "smollm3": ("smollm3", {}),
    "glm4": ("glm4", dict(head_dim=16)),
    "starcoder2": ("starcoder2", dict(sliding_window=9)),
    "exaone4": ("exaone4", dict(sliding_window=9)),
    "nemotron": ("nemotron", {}),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=16, **MOE)),
    "olmoe": ("olmoe", MOE),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=16, rope_parameters=ALPHA)),
    "hunyuan_moe": ("hunyuan_v1_moe", dict(head_dim=16, num_experts=4, moe_topk=2, rope_parameters=ALPHA)),
    "llama4": (
        "llama4_text",
        dict(head_dim=16, intermediate_size_mlp=96, num_local_experts=4, attention_chunk_size=9, floor_scale=5),
    ),
    "gpt_oss": ("gpt_oss", dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=9)),
    "deepseek_v2": ("deepseek_v2", dict(q_lora_rank=None, **DEEPSEEK)),
    **RECURRENT,
    "deepseek_v3": ("deepseek_v3", dict(q_lora_rank=24, n_group=1, topk_group=1, **DEEPSEEK)),
}


def tiny_config(name: str, **changed: object) -> PretrainedConfig:
    """The named architecture's configuration at tiny size, of four layers unless told."""
    kind, own = ARCHITECTURES[name]
    return AutoConfig.for_model(kind, **{**SIZES, **own, **changed})
