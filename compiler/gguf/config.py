"""A GGUF file's metadata as a configuration of transformers: every key is applied, or refused by name.

transformers names the model type and reads the main sizes. This file holds what each key means, sets what transformers
leaves out (rope scaling, head sizes, soft caps, biases, several end tokens), and checks that the built model has it.
Keys mean what llama.cpp's reader takes them for, its defaults included.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from pagegraph.compiler.gguf.file import GgufError, GgufFile
from pagegraph.compiler.model import rope

log = logging.getLogger("pagegraph.gguf")

# Key of the architecture -> names a configuration may have for it; the first that it has is set.
FIELDS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
# Keys that say nothing at these values, and change what the model computes at every other one.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.sliding_window": (0,),
    "attention.scale": (0,),
    "attention.temperature_scale": (0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
ROPE = {
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.attn_factor", "rope.scaling.original_context_length", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
PATTERN = "attention.sliding_window_pattern"  # every so many layers one sees all, or a flag a layer
CHECKED = {"attention.value_length"}
# The second is told by which norms there are: transformers looks, as llama.cpp does, and files say it wrongly.
WITHOUT_EFFECT = {"rope.scaling.finetuned", "use_parallel_residual", "tensor_data_layout", "vocab_size"}
READ_ON_OPENING = {"general.architecture", "general.type", "general.alignment", "split.count"}
# Names, origins, licences and how the file was made.
DESCRIPTIVE = re.compile(
    r"general\.(name|author|version|organization|finetune|basename|description|quantized_by|size_label|url|doi|uuid|repo_url|tags|languages"
    r"|datasets|file_type|quantization_version|(license|source|base_model|dataset)(\..+)?)$|split\.|quantize\.imatrix\."
)
EMBEDDING = "token_embd.weight"
ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
DEFAULT_BASE = 10000.0
# Layers of the models whose attention is scaled by the size of a head that the hidden states would divide into.
SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}

# Configuration flag -> the tensors it gives a bias to, by their names in the file.
BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
# Metadata -> what generation_config.json calls it.
SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def configuration(file: GgufFile) -> PretrainedConfig:
    """The configuration of the file's model.

    Raises GgufError for keys that cannot be applied, ValueError for unknown architectures.
    """
    _log_unread(file)
    found, own = _read_by_transformers(file), file.own()
    empty = CONFIG_MAPPING[found["model_type"]]()
    for key, value in own.items():
        _refuse_unapplied(file, empty, key, value)
        if key in FIELDS and value not in NEUTRAL.get(key, ()):
            found[_place(empty, key)] = value
    found[rope.CONTEXT_LENGTH] = own["context_length"]
    if EMBEDDING in file.tensors:  # with rows beyond the last token, as trainers pad them
        found["vocab_size"] = int(file.tensors[EMBEDDING].shape[-1])
    found.setdefault("pad_token_id", None)  # a class's own may lie outside the vocabulary
    if found["model_type"] == "mistral":
        found.setdefault("sliding_window", None)  # its files are of architecture llama, which has none
    if (pattern := own.get(PATTERN)) is not None:
        layers = own["block_count"]
        sliding = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in range(layers)]
        found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in sliding[:layers]]
    width = (
        own.get("attention.key_length")
        or found.get("head_dim")
        or own["embedding_length"] // own["attention.head_count"]
    )
    if own.get("attention.value_length", width) != width:
        raise file.refuse(
            f"{file.architecture}.attention.value_length",
            own["attention.value_length"],
            f"is not that of keys, {width}",
        )
    if file.architecture in SCALED_BY_HIDDEN:
        by_hidden = own["block_count"] == SCALED_BY_HIDDEN[file.architecture]
        found["query_pre_attn_scalar"] = own["embedding_length"] // own["attention.head_count"] if by_hidden else width
    _set_rope(file, empty, found, own, width)
    for flag, tensors in BIASES.items():
        if hasattr(empty, flag):
            found[flag] = any(f"blk.0.{tensor}.bias" in file.tensors for tensor in tensors)
    return CONFIG_MAPPING[found["model_type"]].from_dict(found)


def check_model(file: GgufFile, model: nn.Module, consumed: set[str]) -> None:
    """Raise where the built model differs from the file: tensors that became no weight, other rotary angles.

    consumed: names of the file's tensors that became weights.
    """
    left = file.tensors.keys() - consumed - {ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS}
    changing = sorted(name for name in left if not (name.endswith(".bias") and not file.values(name).any()))
    if changing:
        more = f" and {len(changing) - 6} more" if len(changing) > 6 else ""
        raise GgufError(
            f"{file.path.name}: {type(model).__name__} has no weights for the tensors"
            f" {', '.join(changing[:6])}{more}, which would be "
            "left out; take another file of this model, or its safetensors checkpoint"
        )
    _check_angles(file, model)


def generation_config(file: GgufFile, config: PretrainedConfig) -> dict[str, Any]:
    """What generation_config.json holds: ends of a sequence, and the sampling that the file recommends."""
    sampling = {name: file.metadata[key] for key, name in SAMPLING.items() if key in file.metadata}
    if idle := sorted(key for key in file.metadata if key.startswith("general.sampling.") and key not in SAMPLING):
        log.info("%s: recommendations that are not taken: %s", file.path.name, ", ".join(idle))
    if sampling:
        sampling["do_sample"] = True
    return {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, **sampling}


def _read_by_transformers(file: GgufFile) -> dict[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        found = load_gguf_checkpoint(file.path)["config"]
    except (KeyError, TypeError, IndexError) as error:
        raise GgufError(
            f"{file.path.name}: the metadata of architecture {file.architecture} lacks what a model needs ({error})"
        ) from error
    found.pop("rope_scaling", None)  # set here
    return found


def _log_unread(file: GgufFile) -> None:
    """Log the keys that belong neither to the architecture nor to the tokenizer.

    Unknown keys go into one line, descriptive ones into another at level debug. `generation_config` reads recommended
    sampling.
    """
    read_elsewhere = (f"{file.architecture}.", "tokenizer.", "general.sampling.")
    others = sorted(key for key in file.metadata if not key.startswith(read_elsewhere) and key not in READ_ON_OPENING)
    unknown = [key for key in others if not DESCRIPTIVE.match(key)]
    if unknown:
        log.info("%s: keys that are not known here and not applied: %s", file.path.name, ", ".join(unknown))
    if described := [key for key in others if DESCRIPTIVE.match(key)]:
        log.debug("%s: descriptive keys, not applied: %s", file.path.name, ", ".join(described))


def _refuse_unapplied(file: GgufFile, empty: PretrainedConfig, key: str, value: Any) -> None:
    """Raise for a key of the architecture that changes the model and has no place in the configuration."""
    if value in NEUTRAL.get(key, ()):
        return
    if key in ROPE | CHECKED | WITHOUT_EFFECT or key == PATTERN and hasattr(empty, "layer_types"):
        return
    if _place(empty, key) is None:
        raise file.refuse(
            f"{file.architecture}.{key}", value, "is not applied here and may change what the model computes"
        )
    if isinstance(value, list):
        raise file.refuse(f"{file.architecture}.{key}", value, "is given layer by layer, which is not served")


def _place(empty: PretrainedConfig, key: str) -> str | None:
    """The configuration's name for a key of the architecture.

    Models ask for `head_dim` whether or not their class lists it.
    """
    return next((name for name in FIELDS.get(key, ()) if hasattr(empty, name) or name == "head_dim"), None)


def _set_rope(file: GgufFile, empty: PretrainedConfig, found: dict[str, Any], own: dict[str, Any], width: int) -> None:
    """Set the rotary angles of `found`: base, rotated columns of a head, and how positions are scaled."""
    for name in ("rope_theta", "rope_parameters"):
        found.pop(name, None)
    usual = getattr(empty, "rope_parameters", None)
    if not usual:
        if scaled := sorted(key for key in own if key in ROPE and key.startswith("rope.scal")):
            raise file.refuse(
                f"{file.architecture}.{scaled[0]}", own[scaled[0]], "belongs to a model that rotates nothing"
            )
        return
    parameters = {"rope_theta": own.get("rope.freq_base", DEFAULT_BASE), **_scaling(file, own)}
    if "full_attention" in usual:
        sliding = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", DEFAULT_BASE)}
        found["rope_parameters"] = {"full_attention": parameters, "sliding_attention": sliding}
        return
    if own.get("rope.freq_base_swa", parameters["rope_theta"]) != parameters["rope_theta"]:
        base = own["rope.freq_base_swa"]
        raise file.refuse(
            f"{file.architecture}.rope.freq_base_swa", base, "is another base than that of the other layers"
        )
    rotated = own.get("rope.dimension_count", width)
    if rotated != width or "partial_rotary_factor" in usual:
        parameters["partial_rotary_factor"] = rotated / width
        found["partial_rotary_factor"] = rotated / width
    if "original_max_position_embeddings" in parameters and hasattr(empty, "original_max_position_embeddings"):
        found["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    found["rope_parameters"] = parameters


def _scaling(file: GgufFile, own: dict[str, Any]) -> dict[str, Any]:
    """transformers' words for how the file scales positions.

    The file's context_length is the length to serve, scaling included. If the file names no original length, yarn takes
    context_length for that too.
    """
    factor = own.get("rope.scaling.factor") or own.get("rope.scale_linear") or 1.0
    kind = own.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
    original = own.get("rope.scaling.original_context_length", own["context_length"])
    attention = own.get("rope.scaling.attn_factor", 1.0)
    if SHORT_FACTORS in file.tensors or LONG_FACTORS in file.tensors:
        if kind not in ("longrope", "none") or not {SHORT_FACTORS, LONG_FACTORS} <= file.tensors.keys():
            reason = f"does not go with {SHORT_FACTORS} and {LONG_FACTORS}, which belong together"
            raise file.refuse(f"{file.architecture}.rope.scaling.type", kind, reason)
        return _by_factors(original, attention, file.values(SHORT_FACTORS), file.values(LONG_FACTORS))
    if kind == "longrope" or kind == "yarn" and ROPE_FACTORS in file.tensors or kind not in ("none", "linear", "yarn"):
        reason = "is not served with the factors that this file has; none, linear and yarn are"
        raise file.refuse(f"{file.architecture}.rope.scaling.type", kind, reason)
    if kind == "none":
        factor = 1.0
    if kind != "yarn" and attention != 1.0:
        raise file.refuse(
            f"{file.architecture}.rope.scaling.attn_factor", attention, "is served with yarn and longrope alone"
        )
    if ROPE_FACTORS in file.tensors:
        factors = file.values(ROPE_FACTORS) * factor
        return _by_factors(own["context_length"], 1.0, factors, factors)
    if kind == "yarn":
        attention *= own.get("rope.scaling.yarn_attn_factor", 1.0)
        return {
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "attention_factor": attention * (1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0),
            "beta_fast": own.get("rope.scaling.yarn_beta_fast", 32.0), "beta_slow": own.get("rope.scaling.yarn_beta_slow", 1.0),
        }  # fmt: skip
    return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {"rope_type": "default"}


def _by_factors(original: int, attention: float, short: np.ndarray, long: np.ndarray) -> dict[str, Any]:
    """A factor for each pair of columns, as `longrope`; with equal factors that is the same at every length."""
    factors = {
        "short_factor": [float(one) for one in short.ravel()],
        "long_factor": [float(one) for one in long.ravel()],
    }
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
        **factors,
    }


def _check_angles(file: GgufFile, model: nn.Module) -> None:
    """Compare the built model's rotary frequencies with those computed from base, rotated columns and factors."""
    own = file.own()
    scaling = _scaling(file, own)
    if scaling["rope_type"] == "yarn" or LONG_FACTORS in file.tensors:
        return  # chosen by more than a factor a column
    for name, angles in model.named_buffers():
        leaf = name.rpartition(".")[2]
        if not leaf.endswith("inv_freq") or "original" in leaf:
            continue
        rotated = own.get("rope.dimension_count", 2 * len(angles))
        sliding = leaf.startswith("sliding")
        base = own.get("rope.freq_base_swa", DEFAULT_BASE) if sliding else own.get("rope.freq_base", DEFAULT_BASE)
        factor = 1.0 if sliding else torch.tensor(scaling.get("long_factor") or scaling.get("factor", 1.0))
        expected = 1.0 / (factor * base ** (torch.arange(0, rotated, 2) / rotated))
        if angles.shape != expected.shape or not torch.allclose(angles.cpu().float(), expected, rtol=1e-4, atol=0):
            raise GgufError(
                f"{file.path.name}: {type(model).__name__} would rotate by other angles than rope.* of the file say"
                f" ({name})"
            )
