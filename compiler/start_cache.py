"""What a start leaves for the next one of the same model: compiled forwards, the measured memory of its steps, and the
order of its captures.

One folder a model, named by a hash of all that its content depends on, so that nothing in it can be out of date: what
the model's forward computes with (configuration, plain attributes of its modules, shapes of its weights, attention
layouts), the passes, the sources of this package, versions, the device. Values of weights are not in it. Every file
carries a hash of its content; one that is broken is taken for missing, with a warning. Files are replaced whole, so any
number of processes may share the folder. It keeps to `MAX_BYTES`: the folders that were not used for longest go.

Graphs are pickles: who can write to the folder can run code in the engine, as with Inductor's and Triton's folders
beside it. Knows files and hashes; knows nothing of what the bytes mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._inductor import config as inductor_config

import pagegraph
from pagegraph.compiler.model.paged import PagedModel

log = logging.getLogger("pagegraph.start")

FOLDER = "starts"  # below the cache folder
MAX_BYTES = 1 << 30
SOURCES = ("compiler", "kernels")
SUFFIXES = (".py", ".cpp")
NAMES = frozenset({"_name_or_path", "name_or_path"})  # attributes that say where a model lies, which changes nothing


class StartCache:
    """The folder of one key below the cache folder. Nothing is written before `write`."""

    def __init__(self, folder: Path, key: str) -> None:
        self._all = folder / FOLDER
        self._folder = self._all / key

    def has(self, name: str) -> bool:
        """Whether the file is there and whole."""
        return self.read(name) is not None

    def read(self, name: str) -> bytes | None:
        """What was written under this name, or None; a file that is broken is None, too."""
        path = self._folder / name
        try:
            content = path.read_bytes()
            _touch(self._folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s): the start does without it", path, error.strerror)
            return None
        digest, found = content[:32], content[32:]
        if hashlib.sha256(found).digest() != digest:
            log.warning("%s is broken: the start does without it and writes it anew", path)
            return None
        return found

    def write(self, name: str, content: bytes) -> None:
        """Keep `content`; where that is not possible, the next start does without it, and the log says so."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                try:
                    file.write(hashlib.sha256(content).digest() + content)
                    file.flush()
                    os.replace(file.name, self._folder / name)
                except OSError:  # no room: nothing is left of it
                    os.unlink(file.name)
                    raise
            self._make_room()
        except OSError as error:
            log.warning("%s cannot be written (%s): the next start will not be faster", self._folder, error.strerror)

    def _make_room(self) -> None:
        """Remove the folders that were not used for longest, but never this one."""
        folders = sorted(
            (one for one in self._all.iterdir() if one != self._folder), key=lambda one: one.stat().st_mtime
        )
        room = MAX_BYTES - _size(self._folder) - sum(map(_size, folders))
        for folder in folders:
            if room >= 0:
                return
            room += _size(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _touch(folder: Path) -> None:
    try:
        os.utime(folder)
    except OSError:
        pass  # a folder that is not ours keeps its time


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0  # another process has removed it


def start_key(models: Sequence[PagedModel], device: torch.device, more: dict[str, Any]) -> str:
    """A hash of all that compiled forwards of these models on this device depend on; `more`: what else, as JSON."""
    facts = {
        "models": [list(_facts(model)) for model in models],
        "device": _device_facts(device),
        "versions": [sys.version, torch.__version__, torch.version.git_version, transformers.__version__, _triton()],
        "inductor": inductor_config.get_hash().hex(),
        "sources": sources_digest(),
        **more,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _facts(paged_model: PagedModel) -> Iterator[Any]:
    """What a trace of the forward reads off the model, in a fixed order."""
    config = json.loads(paged_model.model.config.to_json_string(use_diff=False))
    yield {name: value for name, value in config.items() if name not in NAMES}
    yield [repr(layout) for layout in (*paged_model.layouts, *paged_model.states)]
    yield [paged_model.cache, paged_model.body]
    for path, module in paged_model.named_modules():
        kind = type(module)
        yield [path, kind.__module__, kind.__qualname__, len(module._forward_hooks)]
        yield sorted(
            (name, repr(value)) for name, value in vars(module).items() if _is_plain(value) and name not in NAMES
        )
    for name, tensor in [*paged_model.named_parameters(), *paged_model.named_buffers()]:
        yield [name, str(tensor.dtype), list(tensor.shape), list(tensor.stride()), str(tensor.device)]
    for kind in sorted({type(module).__module__ for module in paged_model.modules()}):
        if kind.startswith("transformers_modules."):  # code that came with the model
            file = getattr(sys.modules[kind], "__file__", None)
            yield [kind, hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _device_facts(device: torch.device) -> list[Any]:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return [
            found.name,
            found.major,
            found.minor,
            found.multi_processor_count,
            found.total_memory,
            torch.version.cuda,
        ]
    return [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


@cache
def sources_digest() -> str:
    """A hash of the files of this package that make or are called by compiled code."""
    digest = hashlib.sha256()
    root = Path(pagegraph.__file__).parent
    for folder in SOURCES:
        for path in sorted(path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
