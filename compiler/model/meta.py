"""A transformers model without its weights: parameters on the meta device, rotary frequencies fixed for one length.

Knows a configuration and what transformers builds by it; knows nothing of files, devices or how a model attends.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from pagegraph.compiler.model import rope
from pagegraph.compiler.model.config_json import reason_of
from pagegraph.compiler.model.left_out import towers_if_installed
from pagegraph.compiler.model.probe import UnsupportedModel


def build_meta(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str,
    *,
    max_model_len: int,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The language model of `config`, with its towers if it has any: parameters on the meta device, real buffers on the
    CPU.

    `config` is not changed. Rotary frequencies that depend on the sequence length (rope types
    `dynamic` and `longrope`) are fixed for `max_model_len` tokens. Raises UnsupportedModel where transformers
    has no language model of the type or cannot build it, or its class does not know attention implementations;
    ValueError for an unknown rope type.
    """
    config = copy.deepcopy(config)
    rope.parameters_of(config)  # refuses types that nothing computes
    try:
        with no_init_weights(), _parameters_on_meta(), towers_if_installed(config):
            model = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except (ImportError, OSError):
        raise
    except Exception as error:
        why = f"transformers builds no model by this config.json ({reason_of(error)})"
        if isinstance(error, KeyError) and error.args == (attn_implementation,):
            why = "the model, or a tower of it, does not attend through transformers' attention interface"
        if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
            why = "transformers has no causal language model of this type"
        raise UnsupportedModel(f"{config.model_type}: {why}") from error
    rope.fix_frequencies(model, max_model_len)
    _keep_in_float32(model)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def auto_class(config: PretrainedConfig) -> Any:
    """The class that builds the model of `config` whose names a checkpoint has: of text alone, or with towers beside it.

    Several types have one of each; then the folder says which of them was saved (`architectures`).
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    saved = multimodal in (config.architectures or ())
    return AutoModelForMultimodalLM if multimodal and (saved or not causal and not own_code) else AutoModelForCausalLM


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Each parameter is moved to the meta device as it is registered; buffers are left alone."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _keep_in_float32(model: nn.Module) -> None:
    """Convert the tensors that the model's class wants in float32 whatever its dtype (router biases)."""
    wanted = getattr(model, "_keep_in_fp32_modules_strict", None)
    if not wanted:
        return
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in wanted))
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if pattern.search(path) and tensor.is_floating_point():
            tensor.data = tensor.data.float()
