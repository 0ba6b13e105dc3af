"""Where a model's files are: a folder, a hub name, or a GGUF file converted once into a safetensors folder.

Gives back a local folder in Hugging Face layout. Importing it, and finding a converted model again, needs no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
GGUF_MAGIC = b"GGUF"
CONVERSION = 1  # raise it when the conversion changes: older results are then made again


class ModelNotFound(ValueError):
    """No model at the given place; the message says what was looked for."""


def resolve(
    model: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    cache_dir: Path,
    trust_remote_code: bool = False,
) -> Path:
    """Local folder of `model`: a folder (with `gguf_file`: of that file in it), a .gguf file, or a hub name."""
    path = Path(model).expanduser()
    if gguf_file is not None and path.is_dir():
        path = path / gguf_file
    if path.suffix == ".gguf":
        return _converted(path, cache_dir)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"model: {path} has no config.json; name a folder in Hugging Face layout or a .gguf file")
        return path
    if model.startswith(("/", ".", "~")):
        raise ModelNotFound(f"model: {path} does not exist; name a folder, a .gguf file or a hub name such as org/name")
    return _downloaded(model, gguf_file, revision, cache_dir)


def _downloaded(model: str, gguf_file: str | None, revision: str | None, cache_dir: Path) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [gguf_file, "*.json"] if gguf_file else HUB_PATTERNS
    folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    return _converted(folder / gguf_file, cache_dir) if gguf_file else folder


def _converted(source: Path, cache_dir: Path) -> Path:
    _check_gguf(source)
    facts = source.stat()
    identity = f"{CONVERSION}:{source.resolve()}:{facts.st_size}:{facts.st_mtime_ns}"
    folder = cache_dir / "models" / f"{source.stem}-{hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f"{source.stem}-", dir=folder.parent))
            try:
                _convert(source, partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_gguf(source: Path) -> None:
    if not source.is_file():
        raise ModelNotFound(f"model: {source} does not exist")
    with source.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise ModelNotFound(f"model: {source} is not a GGUF file: it does not begin with {GGUF_MAGIC.decode()}")


def _convert(source: Path, folder: Path) -> None:
    """Dequantise with transformers into float32 safetensors; the tokenizer is rebuilt from the file too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The weights are plain numbers from here on: nothing may take them for quantised ones.
    for holder, mark in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(holder, mark):
            delattr(holder, mark)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The file's tokenizer section may name another end token than its model section, which the model was trained with.
    generation = {"eos_token_id": model.config.eos_token_id, "bos_token_id": model.config.bos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process converts, the others wait for its result."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file closes, however the process ends
        yield
