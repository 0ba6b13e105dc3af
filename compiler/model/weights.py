"""Build a transformers model without its weights, and stream the weights in afterwards, quantised where they are or shall be.

Knows parameter names, safetensors files and devices; does not know where a folder came from, how the
model attends, how quantised tensors are packed, or what later passes rewrite.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from pagegraph.compiler.host.malloc import return_freed_memory
from pagegraph.compiler.model import rope
from pagegraph.compiler.model.config_json import reason
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.compiler.model.source import lfs_pointer
from pagegraph.compiler.passes.modules.quant_linears import QuantLinear
from pagegraph.compiler.quantization.packing import OWN_FILES, PACKED, QuantizationError, Quantized, Scheme, quantize

log = logging.getLogger("pagegraph.quantization")

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DUMMY_STD = 0.02
# Linears that choose experts: small, and a wrong choice costs more than they weigh.
NEVER_QUANTIZED = ("gate", "router", "shared_expert_gate")
# Method -> that of the output head: its few bits would show in every probability.
HEAD_METHODS = {"int8": "int8", "int4": "int8", "fp8": None}
KV_SCALES = re.compile(r"\.(kv|[kvq]|attn|prob)(_proj)?\.?(output)?_scale$")


class WeightsMismatch(ValueError):
    """The checkpoint does not hold exactly the model's weights; the message names what differs."""


class BrokenFile(ValueError):
    """A file of the checkpoint is missing, cut short or not what its name says; the message names it and what to do."""


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
    types `dynamic` and `longrope`) are settled for `max_model_len` tokens. Raises UnsupportedModel where transformers
    has no causal language model of the type or cannot build it, or its class does not know attention implementations;
    ValueError for an unknown rope type.
    """
    config = copy.deepcopy(config)
    rope.parameters_of(config)  # refuses types that nothing computes
    try:
        with no_init_weights(), _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except (ImportError, OSError):
        raise
    except Exception as error:
        why = f"transformers builds no model by this config.json ({reason(error)})"
        if isinstance(error, KeyError) and error.args == (attn_implementation,):
            why = "the model does not attend through transformers' attention interface"
        if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
            why = "transformers has no causal language model of this type; only text models are served"
        raise UnsupportedModel(f"{config.model_type}: {why}") from error
    rope.settle(model, max_model_len)
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
    quantization: Scheme | str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> None:
    """Give every parameter of `model` (from `build_meta`) its values from `folder`, on `device`.

    `load_format` "dummy" draws random values from `seed` and reads nothing; every other format reads
    safetensors. `quantization` is the checkpoint's own scheme, or a method of `quant_formats.ONLINE`: linears are then
    quantised one by one as they come. Raises FileNotFoundError without safetensors files, WeightsMismatch where names or
    shapes differ from the model's, QuantizationError where a linear cannot be quantised so.
    """
    scheme = quantization if isinstance(quantization, Scheme) else None
    online = _online(model, quantization, dtype) if isinstance(quantization, str) else {}
    if load_format == "dummy":
        if scheme is not None:
            raise QuantizationError(
                f"load_format=dummy draws unquantised weights, but the checkpoint is quantised by {scheme.method}; "
                "take the original model with quantization fp8, int8 or int4"
            )
        _fill_randomly(model, device, seed, online)
    else:
        files = _safetensors_files(folder)
        packed = _packed_linears(model, files, scheme)
        if any(KV_SCALES.search(name) for name in files):
            log.info(
                "quantization: the checkpoint's scales of keys and values are not used; kv_cache_dtype=fp8 holds them by a scale of 1"
            )
        if _names_match(model, set(files), packed):
            _stream(model, files, device, progress, packed, scheme, online)
        elif scheme is None:
            _load_converted(model, folder, device, dtype, online)
        else:
            _refuse_names(model, folder, set(files), packed)
    model.tie_weights()
    if (tied := _tied_head(model)) in online:
        _place_quantized(model, tied, quantize(model.get_submodule(tied).weight, online[tied], tied))
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
    """Tensor name -> the file that holds it, for every tensor that is there and, with an index, named in it.

    Raises BrokenFile where a file is not whole, or lacks what the index says it holds.
    """
    if (index := folder / INDEX_FILE).is_file():
        return _indexed_files(index)
    # Quantisers give the one file other names.
    singles = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else list(folder.glob("*.safetensors"))
    if len(singles) == 1:
        return dict.fromkeys(_tensor_names(singles[0]), singles[0])
    pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    found = f"it holds {', '.join(pickled[:3])}, and pickled weights are not loaded; " if pickled else ""
    found = f"it holds {len(singles)} safetensors files and no index of them; " if singles else found
    raise FileNotFoundError(f"{folder}: no {SINGLE_FILE} or {INDEX_FILE}; {found}convert the model to safetensors")


def _indexed_files(index: Path) -> dict[str, Path]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / shard for name, shard in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFile(
            f"{index} is no index of safetensors files ({lfs_pointer(index) or error}); download it again"
        ) from error
    if gone := sorted({path.name for path in files.values() if not path.is_file()}):
        raise BrokenFile(
            f"{index.parent}: {INDEX_FILE} names {', '.join(gone[:4])} ({len(gone)} files), not there; download the rest"
        )
    for path in sorted(set(files.values())):
        lacking = sorted({name for name, one in files.items() if one == path} - _tensor_names(path))
        if lacking:
            raise BrokenFile(
                f"{path} lacks {', '.join(lacking[:4])} ({len(lacking)} tensors) that {INDEX_FILE} says it holds; "
                "download both again: they are of different versions of the model"
            )
    return files


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        reason = (
            lfs_pointer(path)
            or f"{path.stat().st_size:,} bytes that are cut short or damaged ({error}); download it again"
        )
        raise BrokenFile(f"{path} is no whole safetensors file: {reason}") from error


def words_beside(folder: Path) -> dict[str, Any] | None:
    """What stands for `quantization_config` where a quantiser left a file of its own, and weights packed as it packs them."""
    for name, method in OWN_FILES.items():
        if (file := folder / name).is_file() and any(
            one.endswith(f".{PACKED[method].codes}") for one in _safetensors_files(folder)
        ):
            try:
                return {"quant_method": method, **json.loads(file.read_text())}
            except ValueError as error:
                raise QuantizationError(f"{file} is no JSON: {error}") from error
    return None


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
            f"quantization_config says {scheme.method}, but no linear of the model has {' or '.join(marks)} in the checkpoint"
        )
    log.info(
        "quantization: %d of %d linears are quantised in the checkpoint (%s)", len(packed), len(linears), scheme.method
    )
    return packed


def _wanted(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of what a checkpoint must hold: parameters once where tied, and persistent buffers."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _names_match(model: nn.Module, names: set[str], packed: dict[str, set[str]]) -> bool:
    """Whether the checkpoint's names are the model's own, apart from tied copies and ignorable leftovers."""
    missing, leftovers = _differences(model, names, packed)
    return not missing and not leftovers


def _differences(model: nn.Module, names: set[str], packed: dict[str, set[str]]) -> tuple[set[str], set[str]]:
    """Names that the checkpoint lacks, and those that nothing in the model takes or ignores."""
    missing = _wanted(model).keys() - names - {f"{path}.weight" for path in packed}
    leftovers = (
        names - model.state_dict().keys() - {f"{path}.{leaf}" for path, leaves in packed.items() for leaf in leaves}
    )
    # Some quantisers write a bias of zeros beside every linear.
    leftovers -= {f"{path}.bias" for path in packed}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = [*map(re.compile, ignored), KV_SCALES]
    return missing, {name for name in leftovers if not any(pattern.search(name) for pattern in patterns)}


def _refuse_names(model: nn.Module, folder: Path, names: set[str], packed: dict[str, set[str]]) -> None:
    missing, unexpected = _differences(model, names, packed)
    if any(".experts." in name for name in missing):
        raise QuantizationError(
            f"{folder}: quantised experts of a mixture are not served; take the original checkpoint, whose other linears "
            "quantization fp8, int8 or int4 quantises while loading"
        )
    _refuse_differences(folder, dict(missing_keys=missing, unexpected_keys=unexpected))


def _stream(
    model: nn.Module,
    files: dict[str, Path],
    device: torch.device,
    progress: bool,
    packed: dict[str, set[str]],
    scheme: Scheme | None,
    online: dict[str, str],
) -> None:
    wanted = [name for name in _wanted(model) if not _is_weight_of(name, packed)]
    with (
        ExitStack() as stack,
        tqdm(total=len(wanted) + len(packed), desc="weights", unit="tensor", disable=not progress) as bar,
    ):
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(set(files.values()))}

        def read(name: str) -> torch.Tensor:
            return opened[files[name]].get_tensor(name)

        for path, leaves in packed.items():
            _refuse_lost_bias(model, path, files, read)
            # On the CPU: bits are shuffled once, and the device takes only the result.
            _place_quantized(model, path, scheme.read({leaf: read(f"{path}.{leaf}") for leaf in leaves}, path), device)
            bar.update()
        for name in sorted(wanted, key=lambda name: (str(files[name]), name)):
            _settle(model, name, read(name), device, online)
            bar.update()


def _is_weight_of(name: str, paths: dict[str, Any]) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and path in paths


def _refuse_lost_bias(model: nn.Module, path: str, files: dict[str, Path], read: Any) -> None:
    if model.get_submodule(path).bias is None and f"{path}.bias" in files and bool(read(f"{path}.bias").any()):
        raise WeightsMismatch(f"{path}.bias: the checkpoint has a bias that is not zero, the model has none")


def _settle(model: nn.Module, name: str, values: torch.Tensor, device: torch.device, online: dict[str, str]) -> None:
    """Place the named tensor, or its quantised form: of a weight to be quantised no other copy stays."""
    path = name.rpartition(".")[0]
    if not _is_weight_of(name, online):
        _place(model, name, values, device)
        return
    dtype = model.get_submodule(path).weight.dtype
    _place_quantized(model, path, quantize(values.to(device, dtype), online[path], path), device)


def _place_quantized(model: nn.Module, path: str, quantized: Quantized, device: torch.device | None = None) -> None:
    """Put a QuantLinear of `quantized` where a linear stood; its bias, loaded or not yet, stays."""
    old = model.get_submodule(path)
    for name, tensor in quantized.tensors().items():
        setattr(quantized, name, tensor.to(device or tensor.device, copy=tensor.device.type == "cpu"))
    new = QuantLinear(quantized, None, old.weight.dtype)
    new.bias = old.bias
    if (new.out_features, new.in_features) != tuple(old.weight.shape):
        raise WeightsMismatch(
            f"{path}: the checkpoint has a quantised shape {[new.out_features, new.in_features]}, the model {list(old.weight.shape)}"
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
    model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype, online: dict[str, str]
) -> None:
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
        _settle(model, name, getattr(owner, leaf).detach(), device, online)
        delattr(owner, leaf)  # so that at most one copy of the whole is held


def _refuse_differences(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise WeightsMismatch(f"{folder}: {kind.replace('_keys', '')} weights: {', '.join(names[:8])}{more}")
    if errors := info.get("error_msgs"):
        raise WeightsMismatch(f"{folder}: {errors if isinstance(errors, str) else '; '.join(errors)}")


def _fill_randomly(model: nn.Module, device: torch.device, seed: int, online: dict[str, str]) -> None:
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
        if _is_weight_of(name, online):
            _place_quantized(model, path, quantize(tensor, online[path], path))
        else:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
