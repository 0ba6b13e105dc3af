"""Build a transformers model without its weights, and stream the weights in afterwards.

Knows parameter names, safetensors files and devices; does not know where a folder came from, how the
model attends, or what later passes rewrite.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compiler.capture import UnsupportedModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SETTLED_ROPE = "settled"
DUMMY_STD = 0.02


class WeightsMismatch(ValueError):
    """The checkpoint does not hold exactly the model's weights; the message names what differs."""


def build_meta(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str,
    *,
    max_model_len: int,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The causal language model of `config` with parameters on the meta device and real buffers on the CPU.

    `config` is not changed. Rotary embeddings that would pick their frequencies by sequence length (rope
    types `dynamic` and `longrope`) are settled for `max_model_len` tokens. Raises UnsupportedModel where the
    model's class does not know attention implementations.
    """
    config = copy.deepcopy(config)
    _settle_rope(config, max_model_len)
    try:
        with no_init_weights(), _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except KeyError as error:
        if error.args != (attn_implementation,):
            raise
        raise UnsupportedModel(
            f"{config.model_type}: the model does not attend through transformers' attention interface"
        ) from error
    _keep_in_float32(model)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str = "auto",
    progress: bool = True,
    seed: int = 0,
) -> None:
    """Give every parameter of `model` (from `build_meta`) its values from `folder`, on `device`.

    `load_format` "dummy" draws random values from `seed` and reads nothing; every other format reads
    safetensors. Raises FileNotFoundError without safetensors files, WeightsMismatch where names or shapes
    differ from the model's.
    """
    if load_format == "dummy":
        _fill_randomly(model, device, seed)
    else:
        files = _safetensors_files(folder)
        if _names_match(model, set(files)):
            _stream(model, files, device, progress)
        else:
            _load_converted(model, folder, device, dtype)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


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


def _settle_rope(config: PretrainedConfig, max_model_len: int) -> None:
    """Fix the sequence length of data-dependent rope types, so that the forward has no branch on data.

    It is done on the configuration: whatever is built from it, the probe's shadow included, is settled.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for parameters in [rope] if "rope_type" in rope else rope.values():
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            parameters["settled_type"] = parameters["rope_type"]
            parameters["settled_length"] = max_model_len
            parameters["rope_type"] = SETTLED_ROPE


def _settled_frequencies(
    config: PretrainedConfig,
    device: torch.device | None = None,
    seq_len: int | None = None,
    layer_type: str | None = None,
) -> tuple[torch.Tensor, float]:
    """transformers' rope init signature: inverse frequencies float32 [head_size / 2], attention factor."""
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    settled = ROPE_INIT_FUNCTIONS[parameters["settled_type"]]
    return settled(config, device, seq_len=parameters["settled_length"], layer_type=layer_type)


ROPE_INIT_FUNCTIONS[SETTLED_ROPE] = _settled_frequencies


def _keep_in_float32(model: nn.Module) -> None:
    """Widen the tensors that the model's class wants in float32 whatever its dtype (router biases)."""
    wanted = getattr(model, "_keep_in_fp32_modules_strict", None)
    if not wanted:
        return
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in wanted))
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if pattern.search(path) and tensor.is_floating_point():
            tensor.data = tensor.data.float()


def _safetensors_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if (index := folder / INDEX_FILE).is_file():
        shards = json.loads(index.read_text())["weight_map"]
        return {name: folder / shard for name, shard in shards.items()}
    if (single := folder / SINGLE_FILE).is_file():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    found = f"it holds {', '.join(pickled[:3])}, and pickled weights are not loaded; " if pickled else ""
    raise FileNotFoundError(f"{folder}: no {SINGLE_FILE} or {INDEX_FILE}; {found}convert the model to safetensors")


def _wanted(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of what a checkpoint must hold: parameters once where tied, and persistent buffers."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _names_match(model: nn.Module, names: set[str]) -> bool:
    """Whether the checkpoint's names are the model's own, apart from tied copies and ignorable leftovers."""
    if _wanted(model).keys() - names:
        return False
    leftovers = names - model.state_dict().keys()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return all(any(re.search(pattern, name) for pattern in ignored) for name in leftovers)


def _stream(model: nn.Module, files: dict[str, Path], device: torch.device, progress: bool) -> None:
    wanted = _wanted(model)
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(files[name], []).append(name)
    with tqdm(total=len(wanted), desc="weights", unit="tensor", disable=not progress) as bar:
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    _place(model, name, file.get_tensor(name), device)
                    bar.update()


def _place(model: nn.Module, name: str, values: torch.Tensor, device: torch.device) -> None:
    """Copy `values` into the named parameter or buffer, in that tensor's own dtype."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape != values.shape:
        raise WeightsMismatch(f"{name}: the checkpoint has shape {list(values.shape)}, the model {list(old.shape)}")
    # A copy always: tensors read from a file are views of its mapping.
    tensor = torch.empty(old.shape, dtype=old.dtype, device=device).copy_(values)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)


def _load_converted(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Load through transformers, which renames and merges (stacked experts); then move tensor by tensor."""
    loaded, info = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        attn_implementation=model.config._attn_implementation,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    _refuse_differences(folder, info)
    for name in _wanted(model):
        path, _, leaf = name.rpartition(".")
        owner = loaded.get_submodule(path)
        _place(model, name, getattr(owner, leaf).detach(), device)
        delattr(owner, leaf)  # so that at most one copy of the whole is held


def _refuse_differences(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise WeightsMismatch(f"{folder}: {kind.replace('_keys', '')} weights: {', '.join(names[:8])}{more}")
    if errors := info.get("error_msgs"):
        raise WeightsMismatch(f"{folder}: {errors if isinstance(errors, str) else '; '.join(errors)}")


def _fill_randomly(model: nn.Module, device: torch.device, seed: int) -> None:
    """Normal values of standard deviation 0.02, ones for norm weights; the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, old in _wanted(model).items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(getattr(module, leaf), nn.Parameter):
            continue
        tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
        if old.dim() == 1 and leaf == "weight":
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=DUMMY_STD, generator=generator)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
