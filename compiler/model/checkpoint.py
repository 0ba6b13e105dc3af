"""The checkpoint of a model folder: which safetensors file holds which tensor, and what of it goes to which parameter.

Knows names, files and the index; does not know devices, how tensors become weights, or transformers' rules for names
(`compiler.model.conversion`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pagegraph.compiler.model.conversion import Conversion, Place
from pagegraph.compiler.model.files import lfs_pointer
from pagegraph.compiler.quantization.config import OWN_FILES, Scheme
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.quantization.packing import PACKED

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
KV_SCALES = re.compile(r"\.(kv|[kvq]|attn|prob)(_proj)?\.?(output)?_scale$")
# Buffers that models compute, which older checkpoints hold.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")


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


class Piece(NamedTuple):
    """A tensor of the checkpoint, or a quantised weight of several whose names begin with `name`, and where it goes."""

    name: str
    place: Place
    endings: frozenset[str] = frozenset()  # of the names of a quantised weight's tensors


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds of a model: the pieces of each parameter and buffer, and names that nothing takes."""

    conversion: Conversion
    pieces: dict[str, list[Piece]]
    leftovers: set[str]

    @property
    def given(self) -> set[str]:
        """Names of the model that something of the checkpoint goes to."""
        converted = {name for pieces in self.pieces.values() for piece in pieces for name in piece.place.others}
        return self.pieces.keys() | converted

    @property
    def quantized(self) -> dict[str, list[Piece]]:
        """Of parameters that are held quantised."""
        return {target: pieces for target, pieces in self.pieces.items() if pieces[0].endings}


def contents_of(model: nn.Module, names: Collection[str], scheme: Scheme | None) -> Contents:
    """Sort the names of a checkpoint quantised by `scheme`, or by none, under the model's."""
    conversion = Conversion(model)
    pieces: dict[str, list[Piece]] = defaultdict(list)
    leftovers, taken = set(), set()
    if scheme is not None:
        marked = {name.removesuffix(mark) for mark in scheme.marks() for name in names if name.endswith(mark)}
        for path in sorted(marked):
            endings = frozenset(ending for ending in scheme.tensors() if path + ending in names)
            if (place := conversion.place(f"{path}.weight") or conversion.place(path)) is not None:
                pieces[place.target].append(Piece(path, place, endings))
                taken |= {path + ending for ending in endings}
    for name in sorted(set(names) - taken):
        if (place := conversion.place(name)) is not None:
            pieces[place.target].append(Piece(name, place))
        elif not conversion.leaves_out(name):
            leftovers.add(name)
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if tied in pieces and not pieces[tied][0].endings:
            copies = pieces.pop(tied)
            pieces.setdefault(source, copies)
    return Contents(conversion, dict(pieces), leftovers)


def refuse_differences(
    model: nn.Module, folder: Path, contents: Contents, spread: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Raise WeightsMismatch where the checkpoint lacks what the model has, or holds what nothing takes or ignores.

    spread: of stacks of which the model has some experts, how many there are.
    """
    expected = expected_tensors(model)
    optional = [re.compile(one) for one in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = {
        name
        for name in expected.keys() - contents.given
        if expected[name].is_meta or not any(pattern.search(name) for pattern in optional)
    }
    too_many = set()
    for target, pieces in contents.pieces.items():
        if pieces[0].place.expert is not None:
            places, experts = {piece.place[1:3]: piece for piece in pieces}, spread.get(target, len(expected[target]))
            wanted = {(expert, part) for expert in range(experts) for part in range(pieces[0].place.parts)}
            missing |= {f"{target} of expert {expert}" for expert, _ in wanted - places.keys()}
            too_many |= {places[place].name for place in places.keys() - wanted}
    # Some quantisers write a bias of zeros beside every linear.
    paths = {piece.name for pieces in contents.quantized.values() for piece in pieces}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = [*map(re.compile, ignored), KV_SCALES, COMPUTED]
    unexpected = too_many | {
        name
        for name in contents.leftovers
        if name.removesuffix(".bias") not in paths and not any(pattern.search(name) for pattern in patterns)
    }
    for kind, found in dict(missing=missing, unexpected=unexpected).items():
        if names := sorted(found):
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise WeightsMismatch(f"{folder}: {kind} weights: {', '.join(names[:8])}{more}")
