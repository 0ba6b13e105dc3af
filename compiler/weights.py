"""A model's modules and their weights: built without memory, then filled from safetensors, or at random.

Knows files and parameter names; knows no architecture. Weights kept in pickles are never read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from compiler.capture import UnsupportedModel


class BadCheckpoint(ValueError):
    """The weights in a folder do not fit the model, or cannot be read; the message names them."""


def build_meta(
    config: Any, dtype: torch.dtype, attn_implementation: str, *, max_model_len: int, trust_remote_code: bool = False
) -> nn.Module:
    """The model of `config` with parameters on the meta device and buffers (rotary tables) real, on the CPU."""
    config = copy.deepcopy(config)
    try:
        with _parameters_on_meta(), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attn_implementation, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except KeyError as error:
        if error.args != (attn_implementation,):
            raise
        raise UnsupportedModel(
            f"{config.model_type}: its attention does not go through transformers' attention interface"
        ) from error
    _settle_rope(model, max_model_len)
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as they are registered; buffers are computed and kept."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            meta = nn.Parameter(parameter.to("meta"), requires_grad=False)
            meta.__dict__.update(parameter.__dict__)
            module._parameters[name] = meta

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _settle_rope(model: nn.Module, max_model_len: int) -> None:
    """Rope kinds that switch tables with the length of the input take the table of `max_model_len` for good."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind not in ("dynamic", "longrope"):
            continue
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), seq_len=max_model_len)
        module.inv_freq = inv_freq
        module.original_inv_freq = inv_freq
        module.attention_scaling = scaling
        module.rope_type = "default"  # its update looks at the kind, and does nothing for this one


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
    """Fill `model` (from `build_meta`) on `device` in `dtype`; raises BadCheckpoint naming what does not fit."""
    if load_format == "dummy":
        _fill(model, device, seed)
    else:
        files = checkpoint_files(folder)
        if _names(files).keys() >= _wanted(model):
            _stream(model, files, device, dtype, progress)
        else:
            _convert(model, folder, device, dtype)
    _move_buffers(model, device)
    model.tie_weights()
    if left := [name for name, p in model.named_parameters() if p.device.type == "meta"]:
        raise BadCheckpoint(f"{folder}: no weights for {_some(left)}")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise BadCheckpoint(f"{folder}: the index names files that are not there: {_some(missing)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {_some(pickles)} would run code on loading: convert to safetensors" if pickles else ""
        raise BadCheckpoint(f"{folder}: no safetensors files{hint}")
    return files


def _wanted(model: nn.Module) -> set[str]:
    """Names a checkpoint must have: every parameter and persistent buffer but those tied to another."""
    return set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", None) or ())


def _names(files: list[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for file in files:
        with _opened(file) as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


@contextmanager
def _opened(file: Path, device: str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            yield tensors
    except SafetensorError as error:
        raise BadCheckpoint(f"{file}: not a whole safetensors file ({error}); fetch it again") from error


def _stream(model: nn.Module, files: list[Path], device: torch.device, dtype: torch.dtype, progress: bool) -> None:
    """One tensor at a time straight from the file into its place."""
    wanted = set(model.state_dict())
    for file in tqdm(files, desc="weights", unit="file", disable=not progress):
        with _opened(file, str(device)) as tensors:
            for name in tensors.keys():
                if name in wanted:
                    _assign(model, name, tensors.get_tensor(name), dtype)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if tensor.is_floating_point() and leaf in module._parameters:
        tensor = tensor.to(dtype)
    place = module._parameters if leaf in module._parameters else module._buffers
    if place[leaf].shape != tensor.shape:
        raise BadCheckpoint(f"{name}: the file has shape {tuple(tensor.shape)}, the model {tuple(place[leaf].shape)}")
    place[leaf] = nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor


def _convert(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Checkpoints laid out otherwise than the modules (experts, renamed keys): transformers knows how to turn them."""
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadCheckpoint(f"{folder}: no weights for {_some(missing)}")
    for name, parameter in loaded.state_dict().items():
        _assign(model, name, parameter.to(device), dtype)


def _fill(model: nn.Module, device: torch.device, seed: int) -> None:
    """Seeded normal weights of standard deviation 0.02; one-dimensional ones (norm gains) are 1."""
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                filled.fill_(1.0) if parameter.dim() == 1 else filled.normal_(0.0, 0.02, generator=generator)
                module._parameters[leaf] = nn.Parameter(filled, requires_grad=False)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
