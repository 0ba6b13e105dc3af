"""What a step costs at least: bytes over bandwidth and operations over matmul rate, from a model's sizes alone.

Knows the reference shapes and arithmetic; knows no engine and no device. Ceilings are handed in, measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

MODELS: dict[str, dict[str, object]] = {
    "8b": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=14336, vocab_size=128256,
        max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=128000, eos_token_id=128001, hidden_act="silu", dtype="bfloat16",
    ),
    "0.6b": dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=1024, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072, vocab_size=151936,
        max_position_embeddings=40960, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
        bos_token_id=151643, eos_token_id=151645, hidden_act="silu", dtype="bfloat16",
    ),
    "tiny": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512, vocab_size=1000,
        max_position_embeddings=8192, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, hidden_act="silu", dtype="float32",
    ),
}  # fmt: skip
MODELS["8b-128k"] = {
    **MODELS["8b"], "max_position_embeddings": 131072,
    "rope_scaling": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                         original_max_position_embeddings=8192),
}  # fmt: skip
MODELS["30b-a3b-24l"] = dict(  # half of the layers of Qwen3-30B-A3B
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=24,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, intermediate_size=6144, moe_intermediate_size=768,
    num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], vocab_size=151936,
    max_position_embeddings=40960, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    bos_token_id=151643, eos_token_id=151645, hidden_act="silu", dtype="bfloat16",
)  # fmt: skip
MODELS["30b-a3b"] = {**MODELS["30b-a3b-24l"], "num_hidden_layers": 48}
MODELS["gpt-oss-20b"] = dict(
    architectures=["GptOssForCausalLM"], model_type="gpt_oss", hidden_size=2880, num_hidden_layers=24,
    num_attention_heads=64, num_key_value_heads=8, head_dim=64, intermediate_size=2880, num_local_experts=32,
    num_experts_per_tok=4, attention_bias=True, sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12,
    vocab_size=201088, max_position_embeddings=131072, rope_theta=150000.0,
    rope_scaling=dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                      original_max_position_embeddings=4096),
    rms_norm_eps=1e-5, tie_word_embeddings=False, swiglu_limit=7.0, pad_token_id=199999, eos_token_id=200002,
    hidden_act="silu", dtype="bfloat16",
)  # fmt: skip
MODELS["70b"] = dict(  # Llama-3-70B
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=8192, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, head_dim=128, intermediate_size=28672, vocab_size=128256,
    max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=128000, eos_token_id=128001, hidden_act="silu", dtype="bfloat16",
)  # fmt: skip
MODELS["235b-a22b"] = dict(  # Qwen3-235B-A22B
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=4096, num_hidden_layers=94,
    num_attention_heads=64, num_key_value_heads=4, head_dim=128, intermediate_size=12288, moe_intermediate_size=1536,
    num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], vocab_size=151936,
    max_position_embeddings=40960, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    bos_token_id=151643, eos_token_id=151645, hidden_act="silu", dtype="bfloat16",
)  # fmt: skip
MODELS["qwen3-next-12l"] = dict(  # a quarter of the layers of Qwen3-Next-80B-A3B: three with a state to one that attends
    architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", hidden_size=2048, num_hidden_layers=12,
    num_attention_heads=16, num_key_value_heads=2, head_dim=256, partial_rotary_factor=0.25, rope_theta=10000000.0,
    full_attention_interval=4, linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128,
    linear_num_key_heads=16, linear_num_value_heads=32, intermediate_size=5120, moe_intermediate_size=512,
    shared_expert_intermediate_size=512, num_experts=512, num_experts_per_tok=10, norm_topk_prob=True, decoder_sparse_step=1,
    mlp_only_layers=[], vocab_size=151936, max_position_embeddings=262144, rms_norm_eps=1e-6, tie_word_embeddings=False,
    bos_token_id=151643, eos_token_id=151645, hidden_act="silu", dtype="bfloat16",
)  # fmt: skip
MODELS["nemotron-h-8b"] = dict(  # M: Mamba 2, -: MLP, *: attention
    architectures=["NemotronHForCausalLM"], model_type="nemotron_h", hidden_size=4096, num_hidden_layers=52,
    hybrid_override_pattern="M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-", num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, intermediate_size=21504, mlp_hidden_act="relu2", ssm_state_size=128, mamba_num_heads=128,
    mamba_head_dim=64, mamba_hidden_act="silu", n_groups=8, conv_kernel=4, expand=2, chunk_size=128, use_conv_bias=True,
    use_bias=False, mlp_bias=False, mamba_proj_bias=False, attention_bias=False, residual_in_fp32=False,
    time_step_min=0.001, time_step_max=0.1, time_step_floor=1e-4, vocab_size=131072,
    max_position_embeddings=8192, layer_norm_epsilon=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    dtype="bfloat16",
)  # fmt: skip
MAX_MODEL_LEN = {name: 8192 for name in MODELS} | {"8b-128k": 131072}  # that they are measured with
# Bytes a second from one GPU to the others of its host, in one direction: NVIDIA's data sheet of the H200 has 900 GB/s of
# NVLink, of both directions together. Not measured here.
NVLINK = 450e9
BYTES = 2  # of a weight or a cached element: bfloat16
# Bytes of a weight in the layers, in experts and in the head. Quantised while loading fp8 leaves the head alone, int4 gives it 8
# bits; mxfp4 is of experts alone, with a byte of scale to 32 weights.
WEIGHT_BYTES = {
    None: (BYTES, BYTES, BYTES), "fp8": (1, 1, BYTES), "int8": (1, 1, 1), "mxfp4": (BYTES, 0.5 + 1 / 32, BYTES),
    "int4": (0.5 + 2 * BYTES / 128, 0.5 + 2 * BYTES / 128, 1),
}  # fmt: skip
PUBLISHED = {"gpt-oss-20b": "mxfp4"}  # method of the weights that people download


def write_model(name: str, folder: Path) -> Path:
    """A model folder that holds the configuration alone, for `load_format: dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return folder


@dataclass(frozen=True)
class Ceilings:
    """Measured: bytes a second of a device copy (read plus written), FLOP/s of a large bf16 matmul."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Recurrence:
    """What layers with a state have, all of them together: elements of their matrices, bytes of a sequence's states, operations of
    a token in them (as `kernels.costs` counts)."""

    weights: int = 0
    state_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, dense or a mixture in every layer, whose `intermediate` is then that of one expert.

    Where a model has layers with a state, `attending` layers attend and `mlps` have an MLP or experts; None: all of them. Layers are counted as attending to all keys: of models whose windows are narrower, the floor of attention is too high.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    experts: int = 0
    choices: int = 0  # of a token
    attending: int | None = None
    mlps: int | None = None
    gated: bool = True  # the MLP
    # Elements of an MLP's matrices that are not of its experts, and of an attending layer's beside query, key, value and output.
    beside_experts: int = 0
    beside_qkv: int = 0
    recurrence: Recurrence = Recurrence()

    @classmethod
    def of(cls, name: str) -> Shape:
        given = MODELS[name]
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        experts = given.get("num_experts", given.get("num_local_experts", 0))
        inner = given.get("moe_intermediate_size", given["intermediate_size"])
        plain = cls(
            *(given[key] for key in names), inner, given["vocab_size"], experts, given.get("num_experts_per_tok", 0)
        )
        hybrid = HYBRIDS.get(given["model_type"])
        return hybrid(plain, given) if hybrid else plain

    def matmuls(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of the merged projections of a layer but those of experts, and of the head."""
        attention = self.heads * self.head_size
        mlp = {"gate_up": ((1 + self.gated) * self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}
        return {
            "qkv": (attention + 2 * self.kv_heads * self.head_size, self.hidden),
            "o": (self.hidden, attention),
            **({"router": (self.experts, self.hidden)} if self.experts else mlp),
            "lm_head": (self.vocab, self.hidden),
        }

    def share(self, ranks: int) -> Shape:
        """What one of so many ranks computes: heads, inner elements and vocabulary are cut, heads of keys and values held whole
        by several ranks where they are fewer. Raises ValueError where sizes do not divide, and of layers with a state."""
        if self.recurrence.weights:
            raise ValueError("layers with a state are not shared by ranks")
        cut = {"heads": self.heads, "intermediate": self.intermediate, "vocab": self.vocab}
        odd = [f"{size} {name}" for name, size in cut.items() if size % ranks]
        if self.kv_heads % ranks and ranks % self.kv_heads:
            odd.append(f"{self.kv_heads} kv_heads")
        if odd:
            raise ValueError(f"{ranks} ranks do not divide {', '.join(odd)}")
        return replace(
            self, **{name: size // ranks for name, size in cut.items()}, kv_heads=max(self.kv_heads // ranks, 1)
        )

    @property
    def sums(self) -> int:
        """Of a step's hidden states over ranks: behind attention and MLP of each layer, and behind the embedding."""
        return 2 * self.layers + 1

    def summed_bytes(self, tokens: int) -> int:
        """Bytes of hidden states of one sum over ranks."""
        return tokens * self.hidden * BYTES

    def link_bytes(self, tokens: int, seqs: int, ranks: int) -> float:
        """Bytes that a rank sends in a step at least: sums as a ring has them, and its part of the logits to each other rank."""
        gathered = seqs * self.vocab // ranks * BYTES * (ranks - 1)
        return 2 * (ranks - 1) / ranks * self.sums * self.summed_bytes(tokens) + gathered

    @property
    def weight_elements(self) -> int:
        """All matrices, the embedding counted beside the head; without norms."""
        return self.layer_weights + self.experts * self.expert_weights + 2 * self.vocab * self.hidden

    @property
    def layer_weights(self) -> int:
        """Elements of all layers' matrices but those of experts."""
        sizes = {name: n * k for name, (n, k) in self.matmuls().items() if name != "lm_head"}
        attention = sizes.pop("qkv") + sizes.pop("o") + self.beside_qkv
        mlp = sum(sizes.values()) + self.beside_experts
        return self.attention_layers * attention + self.mlp_layers * mlp + self.recurrence.weights

    @property
    def attention_layers(self) -> int:
        return self.layers if self.attending is None else self.attending

    @property
    def mlp_layers(self) -> int:
        return self.layers if self.mlps is None else self.mlps

    @property
    def expert_weights(self) -> int:
        """Elements of one expert in every layer."""
        return self.mlp_layers * 3 * self.hidden * self.intermediate if self.experts else 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.attention_layers * self.kv_heads * self.head_size * BYTES

    def step_floor(
        self,
        ceilings: Ceilings,
        query_start: np.ndarray,
        seq_lens: np.ndarray,
        method: str | None = None,
        cache: str = "auto",
        ranks: int = 1,
    ) -> float:
        """Seconds a step takes at least: matmuls, attention and recurrences each at the slower of bytes and operations.

        query_start [S + 1] and seq_lens [S] as in `compiler.step.inputs.StepInput`; the head runs on S rows. Weights and blocks
        are read as they are stored by `method` and `cache`; operations are bfloat16's whatever the method. Tokens choose their
        experts at random. Of several ranks one's share, and behind it what it sends over NVLink.
        """
        if ranks > 1:
            alone = self.share(ranks).step_floor(ceilings, query_start, seq_lens, method, cache)
            return alone + self.link_bytes(int(query_start[-1]), len(seq_lens), ranks) / NVLINK
        rows, lengths = np.diff(query_start).astype(np.int64), seq_lens.astype(np.int64)
        head = self.vocab * self.hidden
        tokens = int(rows.sum())
        chosen = self.experts * (1 - (1 - self.choices / self.experts) ** tokens) if self.experts else 0
        of_token = self.layer_weights + self.choices * self.expert_weights
        matmul_flop = 2 * (of_token * tokens + head * len(rows))
        pairs = int((rows * lengths - rows * (rows - 1) // 2).sum())
        attention_flop = 4 * self.attention_layers * self.heads * self.head_size * pairs
        of_layers, of_experts, of_head = WEIGHT_BYTES[method]
        blocks = self.kv_bytes * int(lengths.sum()) * (0.5 if cache == "fp8" else 1)
        read = self.layer_weights * of_layers + chosen * self.expert_weights * of_experts + head * of_head
        states = 2 * self.recurrence.state_bytes * int(np.count_nonzero(rows))
        return (
            max(read / ceilings.bandwidth, matmul_flop / ceilings.flops)
            + max(blocks / ceilings.bandwidth, attention_flop / ceilings.flops)
            + max(states / ceilings.bandwidth, self.recurrence.flops * tokens / ceilings.flops)
        )


def _qwen3_next(plain: Shape, given: dict) -> Shape:
    keys = given["linear_num_key_heads"] * given["linear_key_head_dim"]
    heads, width = given["linear_num_value_heads"], given["linear_key_head_dim"]
    values = heads * given["linear_value_head_dim"]
    attending = plain.layers // given["full_attention_interval"]
    recurrence = _recurrence(
        plain.layers - attending, plain.hidden, projected=2 * keys + 2 * values + 2 * heads, inner=values,
        channels=2 * keys + values, taps=given["linear_conv_kernel_dim"], state=width * values, of_element=7,
    )  # fmt: skip
    return replace(
        plain, attending=attending, recurrence=recurrence,
        beside_qkv=plain.heads * plain.head_size * plain.hidden,  # the gate of what attention gives
        beside_experts=(3 * given["shared_expert_intermediate_size"] + 1) * plain.hidden,
    )  # fmt: skip


def _nemotron_h(plain: Shape, given: dict) -> Shape:
    pattern, heads, width = given["hybrid_override_pattern"], given["mamba_num_heads"], given["ssm_state_size"]
    inner, shared = heads * given["mamba_head_dim"], 2 * given["n_groups"] * width
    recurrence = _recurrence(
        pattern.count("M"), plain.hidden, projected=2 * inner + shared + heads, inner=inner, channels=inner + shared,
        taps=given["conv_kernel"], state=inner * width, of_element=5,
    )  # fmt: skip
    return replace(plain, attending=pattern.count("*"), mlps=pattern.count("-"), gated=False, recurrence=recurrence)


def _recurrence(
    layers: int, hidden: int, *, projected: int, inner: int, channels: int, taps: int, state: int, of_element: int
) -> Recurrence:
    """projected: outputs of the projections into a layer; inner: inputs of that out of it; state: elements, float32, with so many
    operations of a token each."""
    return Recurrence(
        layers * hidden * (projected + inner),
        layers * (4 * state + BYTES * (taps - 1) * channels),
        layers * (of_element * state + 2 * taps * channels),
    )


HYBRIDS = {"qwen3_next": _qwen3_next, "nemotron_h": _nemotron_h}
