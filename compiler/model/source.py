"""From the name of a model to a local folder of configuration, tokenizer and safetensors.

A name is a folder, a GGUF file, or a repository of the Hugging Face hub. A GGUF file is converted once, into
the cache. Knows files and formats; does not know devices, dtypes of serving or what the model computes.
torch and transformers are imported only when a conversion has to be done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pagegraph.compiler.model.files import json_object

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]
CONVERSION = 6  # counts up when a conversion would write something else, so that old ones are not reused
DIGEST = re.compile(rb"[0-9a-f]{16}")  # of a file's content
SETTLED_NS = 2_000_000_000  # a file that changed later than this ago may change again without its times showing it


def resolve_model(
    model: str,
    *,
    gguf_file: str | None = None,
    keep_quantized: bool = False,
    revision: str | None = None,
    cache_dir: Path,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Path:
    """The folder that holds `model`: config.json, tokenizer.json, safetensors and chat template, as far as given.

    `gguf_file` names a file in the folder or repository, and `keep_quantized` leaves its linears in its few bits.
    `revision` applies to the hub alone, and without `weights` no safetensors are fetched from there. Raises FileNotFoundError where there is no such model, ValueError for a GGUF
    file that cannot be converted, for an adapter, or where config.json is none.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{model}: a model is a folder, a .gguf file or a hub name; this is another kind of file")
        return _converted(path, cache_dir, keep_quantized)
    if not path.is_dir():
        path = _downloaded(model, gguf_file, revision, trust_remote_code, weights)
    if gguf_file is not None:
        return _converted(_existing(path / gguf_file), cache_dir, keep_quantized)
    _refuse_adapter(path)
    if (path / "config.json").is_file():
        json_object(path / "config.json")  # whatever reads it later would name it less well
        return path
    return _converted(_only_gguf(path), cache_dir, keep_quantized)


def _refuse_adapter(folder: Path) -> None:
    """Raise ValueError for a LoRA adapter without its model."""
    path = folder / "adapter_config.json"
    if not path.is_file() or any(folder.glob("model*.safetensors")):
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = "the model it was trained on"
    raise ValueError(
        f"{folder} holds a LoRA adapter and no model; adapters are not served: merge it into {base} and serve the"
        " result"
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _only_gguf(folder: Path) -> Path:
    """The one GGUF file of a folder without config.json."""
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{folder}: no config.json and no .gguf file")
    if len(files) > 1:
        raise ValueError(f"{folder}: several GGUF files ({', '.join(f.name for f in files)}); choose one by gguf_file")
    return files[0]


def _downloaded(
    model: str, gguf_file: str | None, revision: str | None, trust_remote_code: bool, weights: bool = True
) -> Path:
    """A snapshot of the hub repository `model`, only the files that serving reads."""
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") > 1:
        raise FileNotFoundError(f"{model}: no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [gguf_file] if gguf_file is not None else HUB_PATTERNS + ["*.py"] * trust_remote_code
    ignored = HUB_IGNORED + ["*.safetensors"] * (not weights)
    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{model}: no local file or folder of that name, and the hub does not give it ({error})"
        ) from error
    return Path(folder)


def _converted(gguf: Path, cache_dir: Path, keep_quantized: bool) -> Path:
    """The folder of the converted file, converted now if it is not there; one process converts, others wait.

    Raises ValueError if the file changes before all of it is converted: the folder's name would be of other content.
    """
    models, read = cache_dir / "models", _identity(gguf)
    folder = models / f"{gguf.stem}-{_key(gguf, read, models / 'digests')}{'-quantized' if keep_quantized else ''}"
    if folder.is_dir():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _convert(gguf, unfinished, keep_quantized)
            if _identity(gguf) != read:
                shutil.rmtree(unfinished)
                raise _changing(gguf)
            os.rename(unfinished, folder)
    return folder


def _key(path: Path, identity: str, digests: Path) -> str:
    """A digest of the whole content: a moved or touched file is not converted again, and a replaced one always is.

    Reading takes about a second a GB, so `digests` stores the digest by `identity`. Nobody can set an inode's change
    time, so content replaced in place, with name, size and modification time as before, is read again. A stored file
    that is no digest, as a crash of the machine leaves it, is written anew. Raises ValueError if the file is no longer
    the one of `identity` after reading.
    """
    known = digests / identity
    with suppress(OSError):
        if DIGEST.fullmatch(found := known.read_bytes()):
            return found.decode()
    with path.open("rb") as file:
        content = hashlib.file_digest(file, lambda: hashlib.sha256(f"{CONVERSION} ".encode())).hexdigest()[:16]
    if _identity(path) != identity:
        raise _changing(path)
    if time.time_ns() - path.stat().st_ctime_ns > SETTLED_NS:
        with suppress(OSError):  # a cache that cannot be written to may hold the conversion all the same
            digests.mkdir(parents=True, exist_ok=True)
            unfinished = known.with_name(f"{known.name}.{os.getpid()}")
            with unfinished.open("w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, known)
    return content


def _changing(path: Path) -> ValueError:
    return ValueError(f"{path} changes while it is read; start again when it is whole")


def _identity(path: Path) -> str:
    """Inode, size and times of a file: it differs once the file is written to, replaced or moved."""
    stat = path.stat()
    return f"{CONVERSION}-{stat.st_dev}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel frees it if the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(gguf: Path, folder: Path, keep_quantized: bool) -> None:
    from pagegraph.compiler.gguf.convert import convert  # loads torch and transformers, only where a conversion is due

    convert(gguf, folder, keep_quantized)
