"""Opening GGUF files: metadata as Python values, tensors by name, and errors that name what is damaged.

Knows the container, and that a number may be given layer by layer; does not know what keys or tensors mean.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pagegraph.compiler.model.files import lfs_pointer

MAGIC = b"GGUF"
NOT_NUMBERS = {gguf.GGUFValueType.BOOL, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY}


class GgufError(ValueError):
    """A GGUF file is damaged or asks for what is not served; the message names the file, the key and what to do."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened file.

    metadata: key -> number, text, flag or a list of them. tensors: name -> the reader's tensor (dimensions reversed).
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def own(self) -> dict[str, Any]:
        """Metadata of the architecture, by what follows its name: `context_length` of `llama.context_length`."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    def values(self, tensor: str) -> np.ndarray:
        """The named tensor, dequantised to float32."""
        found = self.tensors[tensor]
        return gguf.dequantize(found.data, found.tensor_type)

    def refuse(self, key: str, value: Any, reason: str) -> GgufError:
        """The error for a key whose value is not applied."""
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        instead = "take another file of this model, or its safetensors checkpoint"
        return GgufError(f"{self.path.name}: {key} = {shown} {reason}; {instead}")


class PlainReader(gguf.GGUFReader):
    """Reads through a plain array: slices of a memmap cost several times more, and there are a million."""

    @property
    def data(self) -> np.ndarray:
        return self._plain

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._plain = mapped.view(np.ndarray)


def open_gguf(path: Path) -> GgufFile:
    """The file's metadata and tensors. Raises GgufError where it is no whole GGUF file of a model."""
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise GgufError(
            f"{path} is no GGUF file: {lfs_pointer(path) or f'it begins with {magic!r}; download it again'}"
        )
    try:
        reader = gguf.GGUFReader(path)
        _take_equal_layers_together(reader)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        size = os.path.getsize(path)
        reason = f"its {size:,} bytes are cut short or damaged ({error}); download it again"
        raise GgufError(f"{path} is no whole GGUF file: {reason}") from error
    found = GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    if (kind := metadata.get("general.type", "model")) != "model":
        adapter = "a LoRA adapter; merge it into its model and serve the result"
        raise GgufError(f"{path} is {adapter if kind == 'adapter' else f'of type {kind!r}; a model is served'}")
    if "general.architecture" not in metadata:
        raise GgufError(f"{path} names no general.architecture; download it again, or take another file of this model")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise GgufError(f"{path} is one of {parts} parts of a model; merge them into one file: gguf-split --merge")
    return found


def _take_equal_layers_together(reader: gguf.GGUFReader) -> None:
    """Replace lists of the architecture that hold the same number for every layer by that number, inside `reader`."""
    if "general.architecture" not in reader.fields:
        return
    prefix = f"{reader.fields['general.architecture'].contents()}."
    if (count := reader.fields.get(f"{prefix}block_count")) is None:
        return
    layers = count.contents()
    for key, field in reader.fields.items():
        if not key.startswith(prefix) or field.types[0] != gguf.GGUFValueType.ARRAY or len(field.data) != layers:
            continue
        values = field.contents()
        if field.types[-1] not in NOT_NUMBERS and values.count(values[0]) == layers:
            reader.fields[key] = field._replace(types=field.types[1:], data=field.data[-1:])


@contextmanager
def read_once() -> Iterator[None]:
    """Parse a GGUF file's metadata, and build its table of tensor names, only once inside this context.

    transformers asks for both again and again, and a vocabulary takes seconds to parse.
    """
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    once = functools.cache(PlainReader)
    gguf.GGUFReader = lambda path: once(str(path))
    gguf.get_tensor_name_map = functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
