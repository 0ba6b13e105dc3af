"""The checkpoint of a model folder: which safetensors file holds which tensor, and whether names match the model's.

Knows names, files and the index; does not know devices or how tensors become weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pagegraph.compiler.model.files import lfs_pointer
from pagegraph.compiler.quantization.config import OWN_FILES
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.quantization.packing import PACKED

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
KV_SCALES = re.compile(r"\.(kv|[kvq]|attn|prob)(_proj)?\.?(output)?_scale$")


class WeightsMismatch(ValueError):
    """The checkpoint does not hold exactly the model's weights; the message names what differs."""


class BrokenFile(ValueError):
    """A file of the checkpoint is missing, cut short or not what its name says; the message names it and what to do."""


def safetensors_files(folder: Path) -> dict[str, Path]:
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
            f"{index.parent}: {INDEX_FILE} names {', '.join(gone[:4])} ({len(gone)} files), not there; download the"
            " rest"
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


def sidecar_quantization(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` that a quantiser left in a file of its own, if weights are packed as it packs them."""
    for name, method in OWN_FILES.items():
        if (file := folder / name).is_file() and any(
            one.endswith(f".{PACKED[method].qweight}") for one in safetensors_files(folder)
        ):
            try:
                return {"quant_method": method, **json.loads(file.read_text())}
            except ValueError as error:
                raise QuantizationError(f"{file} is no JSON: {error}") from error
    return None


def expected_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of what a checkpoint must hold: parameters once where tied, and persistent buffers."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def names_match(model: nn.Module, names: set[str], packed: dict[str, set[str]]) -> bool:
    """Whether the checkpoint's names are the model's own, apart from tied copies and ignorable leftovers."""
    missing, leftovers = _differences(model, names, packed)
    return not missing and not leftovers


def _differences(model: nn.Module, names: set[str], packed: dict[str, set[str]]) -> tuple[set[str], set[str]]:
    """Names that the checkpoint lacks, and those that nothing in the model takes or ignores."""
    missing = expected_tensors(model).keys() - names - {f"{path}.weight" for path in packed}
    leftovers = (
        names - model.state_dict().keys() - {f"{path}.{leaf}" for path, leaves in packed.items() for leaf in leaves}
    )
    # Some quantisers write a bias of zeros beside every linear.
    leftovers -= {f"{path}.bias" for path in packed}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = [*map(re.compile, ignored), KV_SCALES]
    return missing, {name for name in leftovers if not any(pattern.search(name) for pattern in patterns)}


def refuse_names(model: nn.Module, folder: Path, names: set[str], packed: dict[str, set[str]]) -> None:
    missing, unexpected = _differences(model, names, packed)
    if any(".experts." in name for name in missing):
        raise QuantizationError(
            f"{folder}: quantised experts of a mixture are not served; take the original checkpoint, whose other"
            " linears "
            "quantization fp8, int8 or int4 quantises while loading"
        )
    refuse_differences(folder, dict(missing_keys=missing, unexpected_keys=unexpected))


def refuse_differences(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise WeightsMismatch(f"{folder}: {kind.replace('_keys', '')} weights: {', '.join(names[:8])}{more}")
    if errors := info.get("error_msgs"):
        raise WeightsMismatch(f"{folder}: {errors if isinstance(errors, str) else '; '.join(errors)}")
