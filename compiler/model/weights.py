"""Give a model on the meta device its weights, tensor by tensor: quantised where the checkpoint is, or while loading.

An expert's tensor goes straight into its rows of a stacked parameter: beside the weights where they will be, the host holds a
tensor of the checkpoint at a time. Knows parameters and devices; does not know where a folder came from, how a checkpoint names
what, how the model attends, how quantised tensors are packed, or what later passes rewrite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from pagegraph.compiler.host.malloc import return_freed_memory
from pagegraph.compiler.model.checkpoint import (
    KV_SCALES,
    Contents,
    Piece,
    WeightsMismatch,
    contents_of,
    expected_tensors,
    refuse_differences,
    safetensors_files,
)
from pagegraph.compiler.model.conversion import Place
from pagegraph.compiler.model.experts import StackedSize, quantizable
from pagegraph.compiler.model.head import drop_missing_head
from pagegraph.compiler.quantization.config import Scheme
from pagegraph.compiler.quantization.linear import QuantExperts, QuantLinear
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.quantization.online import quantize
from pagegraph.compiler.quantization.packing import PACKED, STORED
from pagegraph.compiler.quantization.stacks import Stack
from pagegraph.compiler.tensor_parallel.quantized import share_of
from pagegraph.compiler.tensor_parallel.shards import Shard
from pagegraph.kernels.quant.reference import dequantize
from pagegraph.kernels.quant.weight import QuantWeight

log = logging.getLogger("pagegraph.quantization")

Read = Callable[[str], torch.Tensor]
ReadHeld = Callable[[str, Shard | None, Sequence[int]], torch.Tensor]
Stacked = dict[str, StackedSize]  # parameters of experts that may be quantised

DUMMY_STD = 0.02
# As the header of a safetensors file has them.
SAFETENSORS_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
# Linears that choose experts: small, and a wrong choice costs more than they weigh. And one of state space models, whose weight
# their mixers multiply by themselves.
NEVER_QUANTIZED = ("gate", "router", "shared_expert_gate", "dt_proj")
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
    shards: Mapping[str, Shard] = MappingProxyType({}),
) -> None:
    """Give every parameter of `model` (from `build_meta`) its values from `folder`, on `device`.

    `shards`: of parameters that `model` has a part of, which part; no more is read of a tensor that goes there as it is.

    `load_format` "dummy" draws random values from `seed` and reads nothing; every other format reads safetensors.
    `quantization` is the checkpoint's own scheme, or a method of `quantization.methods.ONLINE`: linears and experts are then
    quantised one by one as they come. Raises FileNotFoundError without safetensors files, WeightsMismatch where names
    or shapes differ from the model's, QuantizationError where a linear cannot be quantised so.
    """
    scheme = quantization if isinstance(quantization, Scheme) else None
    stacked = quantizable(model)
    online = _online(model, quantization, dtype, stacked) if isinstance(quantization, str) else {}
    if load_format == "dummy":
        if scheme is not None:
            raise QuantizationError(
                f"load_format=dummy draws unquantised weights, but the checkpoint is quantised by {scheme.method}; "
                "take the original model with quantization fp8, int8 or int4"
            )
        _init_dummy_weights(model, device, seed, online, stacked, shards)
    else:
        files = safetensors_files(folder)
        if any(KV_SCALES.search(name) for name in files):
            log.info(
                "quantization: the checkpoint's scales of keys and values are not used; kv_cache_dtype=fp8 holds them"
                " by a scale of 1"
            )
        contents = _contents(model, folder, files, scheme, stacked, shards)
        _stream(model, files, contents, device, progress, scheme, online, stacked, shards)
    model.tie_weights()
    if (tied := _tied_head(model)) is not None and f"{tied}.weight" in online:
        _place_quantized(model, tied, quantize(model.get_submodule(tied).weight, online[f"{tied}.weight"], tied))
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
    shards: Mapping[str, Shard] = MappingProxyType({}),
) -> None:
    """What `load_weights` makes of `model` on such a device, on the meta device: sizes and types without values.

    Reads names and shapes of the checkpoint and, where few bits are packed, one linear. Without files, an unquantised
    checkpoint is taken to hold exactly the model. Raises as `load_weights` does.
    """
    scheme = quantization if isinstance(quantization, Scheme) else None
    stacked = quantizable(model)
    online = _online(model, quantization, dtype, stacked) if isinstance(quantization, str) else {}
    has_files = any(folder.glob("*.safetensors"))
    if scheme is not None and not has_files:
        raise QuantizationError(
            f"{folder}: how a checkpoint quantised by {scheme.method} is packed stands in its safetensors files, which"
            " are not there; fetch them first, or name the original model with quantization fp8, int8 or int4"
        )
    if scheme is not None or load_format != "dummy" and has_files:
        files = safetensors_files(folder)
        contents = _contents(model, folder, files, scheme, stacked, shards)
        if scheme is not None:
            unpacked = _dequantised(model, contents, scheme, stacked)
            quantized = {name: one for name, one in contents.quantized.items() if name not in unpacked}
            _plan_packed(model, files, quantized, scheme, stacked, shards)
    model.tie_weights()
    planned: dict[tuple[object, ...], QuantWeight] = {}  # of a size: layers are alike
    for name, method in online.items():
        rows = model.get_parameter(name)
        if name in stacked:
            rows = torch.empty(stacked[name].rows, stacked[name].columns, device="meta")
        size = (method, rows.shape, rows.dtype)
        if size not in planned:
            planned[size] = quantize(rows, method, name.removesuffix(".weight"), device_type)
        _plan_quantized(model, name, planned[size].map(torch.empty_like), stacked)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to("meta"))


def _plan_packed(
    model: nn.Module,
    files: dict[str, Path],
    quantized: dict[str, list[Piece]],
    scheme: Scheme,
    stacked: Stacked,
    shards: Mapping[str, Shard],
) -> None:
    """Put linears and experts without values where the checkpoint's quantised ones go."""

    def read(name: str, values: bool) -> torch.Tensor:
        with safe_open(files[name], framework="pt") as file:
            if values:
                return file.get_tensor(name)
            part = file.get_slice(name)
            return torch.empty(part.get_shape(), dtype=SAFETENSORS_DTYPES[part.get_dtype()], device="meta")

    is_packed = scheme.layout in PACKED
    # Of packed linears the one of most inputs is read: what its values decide holds for all.
    sizes = {name: stacked[name][1:3] if name in stacked else model.get_parameter(name).shape for name in quantized}
    most = max(quantized, key=lambda target: sizes[target][1])
    kind = _read_quantized(scheme, quantized[most][0], lambda name: read(name, True)) if is_packed else None
    for target, (piece, *_) in quantized.items():
        shard = _of_quantized(shards.get(target), target, piece, stacked)
        if kind is None:
            weight = _read_quantized(scheme, piece, lambda name: read(name, False))
        else:
            weight = _same_kind(kind, *(sizes[target] if shard is None else shard.whole(sizes[target])))
        weight = share_of(weight, shard, piece.name)
        _plan_quantized(model, target, weight, stacked)


def _plan_quantized(model: nn.Module, name: str, weight: QuantWeight, stacked: Stacked) -> None:
    """Put a linear without values, or as many experts as the model has of one kind, where the named weight goes."""
    if name in stacked:
        _place_experts(model, name, _same_kind(weight, *stacked[name][:3]), stacked)
    else:
        _place_quantized(model, name.removesuffix(".weight"), weight)


def _read_quantized(scheme: Scheme, piece: Piece, read: Read) -> QuantWeight:
    return scheme.read({ending[1:]: read(piece.name + ending) for ending in piece.endings}, piece.name)


def _same_kind(kind: QuantWeight, *size: int) -> QuantWeight:
    """A weight [.., outputs, inputs] without values, quantised as `kind` is."""
    *outputs, inputs = size
    group = inputs if kind.group >= kind.in_size else kind.group
    meta = torch.device("meta")
    qweight = torch.empty(*outputs, inputs * kind.bits // 8, dtype=kind.qweight.dtype, device=meta)
    scale = torch.empty(*outputs, -(-inputs // group), dtype=kind.scale.dtype, device=meta)
    zero = None if kind.zero is None else torch.empty_like(scale, dtype=kind.zero.dtype)
    order = None if kind.g_idx_order is None else torch.empty(inputs, dtype=torch.int64, device=meta)
    return QuantWeight(qweight, scale, zero, None, group, outputs[-1], order)


def _online(model: nn.Module, method: str, dtype: torch.dtype, stacked: Stacked) -> dict[str, str]:
    """Weight of every linear, and of stacked experts, that is to be quantised while loading -> by which method."""
    head = model.get_output_embeddings()
    methods = {name: method for name in stacked if model.get_parameter(name).dtype == dtype}
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or module.weight.dtype != dtype or path.rpartition(".")[2] in NEVER_QUANTIZED:
            continue
        if wanted := HEAD_METHODS[method] if module is head else method:
            methods[f"{path}.weight"] = wanted
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    left = [name for name in sizes if model.get_parameter(name).dim() == 3 and name not in methods]
    if experts := sum(sizes[name] for name in left):
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


def _contents(
    model: nn.Module,
    folder: Path,
    files: dict[str, Path],
    scheme: Scheme | None,
    stacked: Stacked,
    shards: Mapping[str, Shard],
) -> Contents:
    """What the checkpoint holds; the head is dropped from a model whose checkpoint has none.

    Raises WeightsMismatch or QuantizationError where the checkpoint is not the model's.
    """
    contents = contents_of(model, files, scheme)
    drop_missing_head(model, contents.given)
    if scheme is not None:
        _check_quantized(model, folder, contents, scheme, stacked)
    spread = {name: len(model.get_parameter(name)) * one.of for name, one in shards.items() if one.dim == -3}
    refuse_differences(model, folder, contents, spread)
    return contents


def _check_quantized(model: nn.Module, folder: Path, contents: Contents, scheme: Scheme, stacked: Stacked) -> None:
    """Raise where what the checkpoint holds quantised is not what a quantised weight can stand for."""
    linears = {f"{path}.weight" for path, module in model.named_modules() if type(module) is nn.Linear}
    quantized = contents.quantized
    if not quantized:
        raise QuantizationError(
            f"quantization_config says {scheme.method}, but no linear of the model has {' or '.join(one[1:] for one in scheme.marks())}"
            " in the checkpoint"
        )
    unpacked = _dequantised(model, contents, scheme, stacked)
    if unpacked:
        log.warning(
            "quantization: the model multiplies its experts itself; %d stacks of them are held unquantised, as fast and as large as"
            " without",
            len(unpacked),
        )
    if others := sorted(quantized.keys() - linears - stacked.keys() - unpacked):
        if any(model.get_parameter(name).dim() == 3 for name in others):
            raise QuantizationError(
                f"{folder}: quantised experts of a mixture are served of models that leave them to a function of transformers, which"
                f" does not hold for {others[0]}; take the original checkpoint, whose linears quantization fp8, int8 or int4"
                " quantises while loading"
            )
        raise QuantizationError(f"{folder}: {others[0]} is quantised and of no linear; take the original checkpoint")
    names = list(stacked)
    for layer in zip(names[::2], names[1::2]):  # both products of a layer
        held = {bool(piece.endings) for name in layer for piece in contents.pieces.get(name, ())}
        if len(held) > 1:
            raise QuantizationError(
                f"{folder}: of {' and '.join(layer)} a part is quantised and a part is not; take a checkpoint that quantises all"
                " experts of a layer, or none"
            )
    log.info(
        "quantization: %d of %d linears and stacks of experts are quantised in the checkpoint (%s)",
        len(quantized),
        len(linears) + len(stacked),
        scheme.method,
    )


def _dequantised(model: nn.Module, contents: Contents, scheme: Scheme, stacked: Stacked) -> set[str]:
    """Experts of a GGUF file, which has no original checkpoint beside it, of a model that computes them itself."""
    names = contents.quantized.keys() - stacked.keys() if scheme.layout == STORED else set()
    return {name for name in names if model.get_parameter(name).dim() == 3}


def _stream(
    model: nn.Module,
    files: dict[str, Path],
    contents: Contents,
    device: torch.device,
    progress: bool,
    scheme: Scheme | None,
    online: dict[str, str],
    stacked: Stacked,
    shards: Mapping[str, Shard],
) -> None:
    def file_of(target: str) -> tuple[str, str]:
        piece = contents.pieces[target][0]
        return min(str(files[piece.name + ending]) for ending in piece.endings or ("",)), target

    with (
        ExitStack() as stack,
        tqdm(total=sum(map(len, contents.pieces.values())), desc="weights", unit="tensor", disable=not progress) as bar,
    ):
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(set(files.values()))}

        def read(name: str) -> torch.Tensor:
            bar.update()
            return opened[files[name]].get_tensor(name)

        def read_held(name: str, shard: Shard | None, held: Sequence[int]) -> torch.Tensor:
            """Of a tensor of the checkpoint what goes where `held` is the shape."""
            if shard is None:
                return read(name)
            bar.update()
            part = opened[files[name]].get_slice(name)
            _refuse_shape(name, part.get_shape(), shard.whole(held))
            return shard.read(part, part.get_shape())

        for target in sorted(contents.pieces, key=file_of):
            pieces = contents.pieces[target]
            shard = shards.get(target)
            if (
                shard is not None and shard.dim == -3 and pieces[0].place.expert is not None
            ):  # of whole experts the rank's
                bar.update(len(pieces))
                pieces, shard = _of_rank(pieces, shard), None
                bar.update(-len(pieces))
            places = {piece.name: piece.place for piece in pieces}
            if target in stacked and pieces[0].place.expert is not None and (pieces[0].endings or target in online):
                _load_quantized_experts(
                    model, target, pieces, read, read_held, device, scheme, online.get(target), stacked, shard
                )
            elif target in stacked and pieces[0].endings:
                assert scheme is not None
                weight = _read_quantized(scheme, pieces[0], read)
                weight = share_of(weight, _of_quantized(shard, target, pieces[0], stacked), target)
                _place_experts(model, target, weight.map(lambda one: one.to(device, copy=True)), stacked)
            elif pieces[0].endings and model.get_parameter(target).dim() == 3:
                assert scheme is not None
                _load_dequantised(model, target, _read_quantized(scheme, pieces[0], read), device, shard)
            elif pieces[0].endings:
                assert scheme is not None
                path = pieces[0].name
                _refuse_lost_bias(model, target, f"{path}.bias", files, read)
                # On the CPU: bits are shuffled once, and the device takes only the result.
                weight = share_of(_read_quantized(scheme, pieces[0], read), shard, path)
                _place_quantized(model, target.removesuffix(".weight"), weight, device)
            elif pieces[0].place.rule is not None:
                for name, values in contents.conversion.convert(places, read).items():
                    _load_tensor(model, name, _held(name, values, model, shards), device, online, stacked)
            elif pieces[0].place.expert is not None:
                _load_experts(model, target, places, read_held, device, shard)
            else:
                held = model.get_parameter(target).shape if shard is not None else ()
                _load_tensor(model, target, read_held(pieces[0].name, shard, held), device, online, stacked)


def _of_rank(pieces: list[Piece], shard: Shard) -> list[Piece]:
    """Pieces of the experts that the rank has, numbered as it has them."""
    experts = 1 + max(piece.place.expert or 0 for piece in pieces)
    [run] = shard.runs(experts)
    found = []
    for piece in pieces:
        assert piece.place.expert is not None
        if run.start <= piece.place.expert < run.stop:
            found.append(piece._replace(place=piece.place._replace(expert=piece.place.expert - run.start)))
    return found


def _of_quantized(shard: Shard | None, target: str, piece: Piece, stacked: Stacked) -> Shard | None:
    """Of a quantised weight, in which inputs come last: what is held of the parameter, or of a piece that is one expert's."""
    if shard is None or target not in stacked:
        return shard
    if piece.place.expert is None:
        return shard.transposed() if stacked[target].transposed else shard
    return None if shard.dim == -3 else shard.of_part()


def _held(name: str, values: torch.Tensor, model: nn.Module, shards: Mapping[str, Shard]) -> torch.Tensor:
    """Of a whole parameter what the model has of it."""
    if (shard := shards.get(name)) is None:
        return values
    _refuse_shape(name, values.shape, shard.whole(model.get_parameter(name).shape))
    return shard.cut(values)


def _refuse_lost_bias(model: nn.Module, target: str, bias: str, files: dict[str, Path], read: Read) -> None:
    path = target.rpartition(".")[0]
    if model.get_submodule(path).bias is None and bias in files and bool(read(bias).any()):
        raise WeightsMismatch(f"{bias}: the checkpoint has a bias that is not zero, the model has none")


def _load_tensor(
    model: nn.Module, name: str, values: torch.Tensor, device: torch.device, online: dict[str, str], stacked: Stacked
) -> None:
    """Place the named tensor, or its quantised form; the unquantised weight is freed then."""
    if name not in online:
        _place(model, name, values, device)
        return
    dtype = model.get_parameter(name).dtype
    if name not in stacked:
        path = name.removesuffix(".weight")
        _place_quantized(model, path, quantize(values.to(device, dtype), online[name], path), device)
        return
    size, rows = stacked[name], slice(0, stacked[name].rows)
    _refuse_shape(name, values.shape, model.get_parameter(name).shape)
    stack = Stack(size.experts, size.rows, device)
    for expert, one in enumerate(values):
        part = one.t() if size.transposed else one
        stack.put(expert, rows, quantize(part.to(device, dtype), online[name], name), name)
    _place_experts(model, name, stack.weight(), stacked)


def _load_quantized_experts(
    model: nn.Module,
    name: str,
    pieces: list[Piece],
    read: Read,
    read_held: ReadHeld,
    device: torch.device,
    scheme: Scheme | None,
    method: str | None,
    stacked: Stacked,
    shard: Shard | None,
) -> None:
    """Fill a stacked weight, an expert's tensor after another: quantised in the checkpoint by `scheme`, or now by `method`."""
    size, dtype = stacked[name], model.get_parameter(name).dtype
    stack = Stack(size.experts, size.rows, device)
    for piece in pieces:
        rows = piece.place.rows(size.rows)
        if method is not None:
            of_part = None if shard is None else shard.of_part()
            values = read_held(piece.name, of_part, (rows.stop - rows.start, size.columns))
            part = quantize(values.to(device, dtype), method, piece.name)
        else:
            assert scheme is not None
            part = share_of(
                _read_quantized(scheme, piece, read), _of_quantized(shard, name, piece, stacked), piece.name
            )
        _refuse_shape(piece.name, (part.out_size, part.in_size), (rows.stop - rows.start, size.columns))
        assert piece.place.expert is not None
        stack.put(piece.place.expert, rows, part, piece.name)
    _place_experts(model, name, stack.weight(), stacked)


def _load_dequantised(
    model: nn.Module, name: str, weight: QuantWeight, device: torch.device, shard: Shard | None
) -> None:
    """Fill a stacked parameter with what the quantised experts stand for, one after another."""
    module, leaf = _owner(model, name)
    old = getattr(module, leaf)
    whole = (*weight.qweight.shape[:2], weight.in_size)
    _refuse_shape(name, whole, old.shape if shard is None else shard.whole(old.shape))
    tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
    for expert, one in enumerate(tensor):
        zero = None if weight.zero is None else weight.zero[expert]
        values = dequantize(weight.qweight[expert], weight.scale[expert], zero, weight.group)
        one.copy_(values if shard is None else shard.cut(values))
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def _place_experts(model: nn.Module, name: str, weight: QuantWeight, stacked: Stacked) -> None:
    """Put a module of quantised experts where their parameter stood."""
    module, leaf = _owner(model, name)
    _refuse_shape(name, (*weight.qweight.shape[:2], weight.in_size), stacked[name][:3])
    dtype = getattr(module, leaf).dtype
    delattr(module, leaf)
    module.add_module(leaf, QuantExperts(weight, dtype))
    return_freed_memory()


def _refuse_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise WeightsMismatch(f"{name}: the checkpoint has shape {list(found)}, the model {list(wanted)}")


def _load_experts(
    model: nn.Module,
    name: str,
    places: dict[str, Place],
    read_held: ReadHeld,
    device: torch.device,
    shard: Shard | None,
) -> None:
    """Fill a stacked parameter, an expert's tensor after another."""
    module, leaf = _owner(model, name)
    old = getattr(module, leaf)
    tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
    for source, place in places.items():
        part = tensor[place.expert, place.rows(tensor.shape[1])]
        values = read_held(source, None if shard is None else shard.of_part(), part.shape)
        _refuse_shape(source, values.shape, part.shape)
        part.copy_(values)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the named parameter or buffer, and the name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


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
    module, leaf = _owner(model, name)
    old = getattr(module, leaf)
    _refuse_shape(name, values.shape, old.shape)
    # A copy always: tensors read from a file are views of its mapping.
    tensor = torch.empty(old.shape, dtype=old.dtype, device=device).copy_(values)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)


def _init_dummy_weights(
    model: nn.Module,
    device: torch.device,
    seed: int,
    online: dict[str, str],
    stacked: Stacked,
    shards: Mapping[str, Shard],
) -> None:
    """Normal values of standard deviation 0.02, ones for norm weights; the same for the same seed and device.

    Of a parameter that the model has a part of, the whole is drawn: ranks together have the weights of one.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, old in expected_tensors(model).items():
        module, leaf = _owner(model, name)
        if not isinstance(getattr(module, leaf), nn.Parameter):
            continue
        shard = shards.get(name)
        shape = old.shape if shard is None else shard.whole(old.shape)
        tensor = torch.empty(shape, dtype=old.dtype, device=device)
        if old.dim() == 1 and leaf == "weight":
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=DUMMY_STD, generator=generator)
        if shard is not None:
            tensor = shard.cut(tensor).clone(memory_format=torch.contiguous_format)
        if name in online:
            _load_tensor(model, name, tensor, device, online, stacked)
        else:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
