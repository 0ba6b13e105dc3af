"""Give a model on the meta device its weights, tensor by tensor: quantised where the checkpoint is, or while loading.

Knows parameters and devices; does not know where a folder came from, how the model attends, how quantised
tensors are packed, or what later passes rewrite.
"""

from __future__ import annotations

import copy
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from pagegraph.compiler.host.malloc import return_freed_memory
from pagegraph.compiler.model.checkpoint import (
    KV_SCALES,
    WeightsMismatch,
    expected_tensors,
    names_match,
    refuse_differences,
    refuse_names,
    safetensors_files,
)
from pagegraph.compiler.model.head import drop_missing_head
from pagegraph.compiler.quantization.config import Scheme
from pagegraph.compiler.quantization.linear import QuantLinear
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.quantization.online import quantize
from pagegraph.compiler.quantization.packing import PACKED
from pagegraph.kernels.quant.weight import QuantWeight

log = logging.getLogger("pagegraph.quantization")

DUMMY_STD = 0.02
# As the header of a safetensors file has them.
SAFETENSORS_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
# Linears that choose experts: small, and a wrong choice costs more than they weigh.
NEVER_QUANTIZED = ("gate", "router", "shared_expert_gate")
# Method -> that of the output head: its few bits would show in every probability.
HEAD_METHODS = {"int8": "int8", "int4": "int8", "fp8": None}


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str = "auto",
    quantization: Scheme | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> None:
    """Give every parameter of `model` (from `build_meta`) its values from `folder`, on `device`.

    `load_format` "dummy" draws random values from `seed` and reads nothing; every other format reads safetensors.
    `quantization` is the checkpoint's own scheme, or a method of `quantization.methods.ONLINE`: linears are then
    quantised one by one as they come. Raises FileNotFoundError without safetensors files, WeightsMismatch where names
    or shapes differ from the model's, QuantizationError where a linear cannot be quantised so.
    """
    scheme = quantization if isinstance(quantization, Scheme) else None
    online = _online(model, quantization, dtype) if isinstance(quantization, str) else {}
    if load_format == "dummy":
        if scheme is not None:
            raise QuantizationError(
                f"load_format=dummy draws unquantised weights, but the checkpoint is quantised by {scheme.method}; "
                "take the original model with quantization fp8, int8 or int4"
            )
        _init_dummy_weights(model, device, seed, online)
    else:
        files = safetensors_files(folder)
        packed = _packed_linears(model, files, scheme)
        headless = drop_missing_head(model, set(files)) if scheme is None else None
        if any(KV_SCALES.search(name) for name in files):
            log.info(
                "quantization: the checkpoint's scales of keys and values are not used; kv_cache_dtype=fp8 holds them"
                " by a scale of 1"
            )
        if names_match(model, set(files), packed):
            _stream(model, files, device, progress, packed, scheme, online)
        elif scheme is None:
            _load_converted(model, folder, device, dtype, online, headless)
        else:
            refuse_names(model, folder, set(files), packed)
    model.tie_weights()
    if (tied := _tied_head(model)) in online:
        _place_quantized(model, tied, quantize(model.get_submodule(tied).weight, online[tied], tied))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def plan_weights(
    model: nn.Module,
    folder: Path,
    *,
    device_type: str,
    dtype: torch.dtype,
    load_format: str = "auto",
    quantization: Scheme | str | None = None,
) -> None:
    """What `load_weights` makes of `model` on such a device, on the meta device: sizes and types without values.

    Reads names and shapes of the checkpoint and, where few bits are packed, one linear. Without files, an unquantised
    checkpoint is taken to hold exactly the model. Raises as `load_weights` does.
    """
    scheme = quantization if isinstance(quantization, Scheme) else None
    online = _online(model, quantization, dtype) if isinstance(quantization, str) else {}
    has_files = any(folder.glob("*.safetensors"))
    if scheme is not None and not has_files:
        raise QuantizationError(
            f"{folder}: how a checkpoint quantised by {scheme.method} is packed stands in its safetensors files, which"
            " are not there; fetch them first, or name the original model with quantization fp8, int8 or int4"
        )
    if scheme is not None or load_format != "dummy" and has_files:
        files = safetensors_files(folder)
        packed = _packed_linears(model, files, scheme)
        if scheme is None:
            drop_missing_head(model, set(files))
        elif not names_match(model, set(files), packed):
            refuse_names(model, folder, set(files), packed)
        if scheme is not None:
            _plan_packed(model, files, packed, scheme)
    model.tie_weights()
    for path, method in online.items():
        weight = model.get_submodule(path).weight
        _place_quantized(model, path, quantize(weight, method, path, device_type))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to("meta"))


def _plan_packed(model: nn.Module, files: dict[str, Path], packed: dict[str, set[str]], scheme: Scheme) -> None:
    """Put linears without values where the checkpoint's quantised ones go."""

    def read(path: str, leaf: str, values: bool) -> torch.Tensor:
        with safe_open(files[f"{path}.{leaf}"], framework="pt") as file:
            if values:
                return file.get_tensor(f"{path}.{leaf}")
            part = file.get_slice(f"{path}.{leaf}")
            return torch.empty(part.get_shape(), dtype=SAFETENSORS_DTYPES[part.get_dtype()], device="meta")

    is_packed = scheme.layout in PACKED
    # Of packed linears the one of most inputs is read: what its values decide holds for all.
    most = max(packed, key=lambda path: model.get_parameter(f"{path}.weight").shape[1])
    kind = scheme.read({leaf: read(most, leaf, True) for leaf in packed[most]}, most) if is_packed else None
    for path, leaves in packed.items():
        if kind is None:
            weight = scheme.read({leaf: read(path, leaf, False) for leaf in leaves}, path)
        else:
            weight = _same_kind(kind, *model.get_parameter(f"{path}.weight").shape)
        _place_quantized(model, path, weight)


def _same_kind(kind: QuantWeight, outputs: int, inputs: int) -> QuantWeight:
    """A weight [outputs, inputs] without values, quantised as `kind` is."""
    group = inputs if kind.group >= kind.in_size else kind.group
    meta = torch.device("meta")
    qweight = torch.empty(outputs, inputs * kind.bits // 8, dtype=kind.qweight.dtype, device=meta)
    scale = torch.empty(outputs, -(-inputs // group), dtype=kind.scale.dtype, device=meta)
    zero = None if kind.zero is None else torch.empty_like(scale, dtype=kind.zero.dtype)
    order = None if kind.g_idx_order is None else torch.empty(inputs, dtype=torch.int64, device=meta)
    return QuantWeight(qweight, scale, zero, None, group, outputs, order)


def _online(model: nn.Module, method: str, dtype: torch.dtype) -> dict[str, str]:
    """Path of every linear that is to be quantised while loading -> by which method."""
    head = model.get_output_embeddings()
    methods = {}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or module.weight.dtype != dtype or path.rpartition(".")[2] in NEVER_QUANTIZED:
            continue
        if wanted := HEAD_METHODS[method] if module is head else method:
            methods[path] = wanted
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if experts := sum(size for name, size in sizes.items() if model.get_parameter(name).dim() == 3):
        log.warning(
            "quantization=%s: the experts of a mixture are not quantised; they stay as they are, %d %% of the weights",
            method,
            100 * experts / sum(sizes.values()),
        )
    return methods


def _tied_head(model: nn.Module) -> str | None:
    """Path of the output head where its weight is another module's, and so not in the checkpoint."""
    names = [name for name in getattr(model, "all_tied_weights_keys", None) or () if name.endswith(".weight")]
    head = model.get_output_embeddings()
    return next(
        (name.removesuffix(".weight") for name in names if model.get_submodule(name.rpartition(".")[0]) is head), None
    )


def _packed_linears(model: nn.Module, files: dict[str, Path], scheme: Scheme | None) -> dict[str, set[str]]:
    """Path of every linear that the checkpoint holds quantised -> the last names of its tensors."""
    if scheme is None:
        return {}
    packed, marks = {}, scheme.marks()
    linears = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    for path in linears:
        if any(f"{path}.{mark}" in files for mark in marks):
            packed[path] = {name for name in scheme.tensors() if f"{path}.{name}" in files}
    if not packed:
        raise QuantizationError(
            f"quantization_config says {scheme.method}, but no linear of the model has {' or '.join(marks)} in the"
            " checkpoint"
        )
    log.info(
        "quantization: %d of %d linears are quantised in the checkpoint (%s)", len(packed), len(linears), scheme.method
    )
    return packed


def _stream(
    model: nn.Module,
    files: dict[str, Path],
    device: torch.device,
    progress: bool,
    packed: dict[str, set[str]],
    scheme: Scheme | None,
    online: dict[str, str],
) -> None:
    wanted = [name for name in expected_tensors(model) if not _is_weight_of(name, packed)]
    with (
        ExitStack() as stack,
        tqdm(total=len(wanted) + len(packed), desc="weights", unit="tensor", disable=not progress) as bar,
    ):
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(set(files.values()))}

        def read(name: str) -> torch.Tensor:
            return opened[files[name]].get_tensor(name)

        for path, leaves in packed.items():
            assert scheme is not None
            _refuse_lost_bias(model, path, files, read)
            # On the CPU: bits are shuffled once, and the device takes only the result.
            _place_quantized(model, path, scheme.read({leaf: read(f"{path}.{leaf}") for leaf in leaves}, path), device)
            bar.update()
        for name in sorted(wanted, key=lambda name: (str(files[name]), name)):
            _load_tensor(model, name, read(name), device, online)
            bar.update()


def _is_weight_of(name: str, paths: dict[str, Any]) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and path in paths


def _refuse_lost_bias(model: nn.Module, path: str, files: dict[str, Path], read: Any) -> None:
    if model.get_submodule(path).bias is None and f"{path}.bias" in files and bool(read(f"{path}.bias").any()):
        raise WeightsMismatch(f"{path}.bias: the checkpoint has a bias that is not zero, the model has none")


def _load_tensor(
    model: nn.Module, name: str, values: torch.Tensor, device: torch.device, online: dict[str, str]
) -> None:
    """Place the named tensor, or its quantised form; the unquantised weight is freed then."""
    path = name.rpartition(".")[0]
    if not _is_weight_of(name, online):
        _place(model, name, values, device)
        return
    dtype = model.get_submodule(path).weight.dtype
    _place_quantized(model, path, quantize(values.to(device, dtype), online[path], path), device)


def _place_quantized(model: nn.Module, path: str, quantized: QuantWeight, device: torch.device | None = None) -> None:
    """Put a QuantLinear of `quantized` where a linear stood; its bias, loaded or not yet, stays."""
    old = model.get_submodule(path)
    quantized = quantized.map(lambda one: one.to(device or one.device, copy=one.device.type == "cpu"))
    new = QuantLinear(quantized, old.weight.dtype)
    new.bias = old.bias
    if (new.out_features, new.in_features) != tuple(old.weight.shape):
        raise WeightsMismatch(
            f"{path}: the checkpoint has a quantised shape {[new.out_features, new.in_features]}, the model"
            f" {list(old.weight.shape)}"
        )
    model.set_submodule(path, new)
    return_freed_memory()


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


def _load_converted(
    model: nn.Module,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    online: dict[str, str],
    headless: str | None,
) -> None:
    """Load through transformers, which renames and merges (stacked experts); then move tensor by tensor.

    headless: path of the head that the checkpoint does not have.
    """
    loaded, info = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        attn_implementation=model.config._attn_implementation,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    if headless is not None:
        info["missing_keys"] = {name for name in info["missing_keys"] if not name.startswith(f"{headless}.")}
    refuse_differences(folder, info)
    for name in expected_tensors(model):
        path, _, leaf = name.rpartition(".")
        owner = loaded.get_submodule(path)
        _load_tensor(model, name, getattr(owner, leaf).detach(), device, online)
        delattr(owner, leaf)  # at most one copy of the model is held


def _init_dummy_weights(model: nn.Module, device: torch.device, seed: int, online: dict[str, str]) -> None:
    """Normal values of standard deviation 0.02, ones for norm weights; the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, old in expected_tensors(model).items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(getattr(module, leaf), nn.Parameter):
            continue
        tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
        if old.dim() == 1 and leaf == "weight":
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=DUMMY_STD, generator=generator)
        if _is_weight_of(name, online):
            _place_quantized(model, path, quantize(tensor, online[path], path))
        else:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
