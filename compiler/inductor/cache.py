"""The folder that compiled code and converted models are kept in.

Knows the libraries' variables and what a full disk raises; knows nothing of what is kept.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors

log = logging.getLogger("pagegraph.start")

DEFAULT_CACHE = "~/.cache/pagegraph"


def cache_folder(asked: str | None) -> Path:
    """The folder of compiled code and converted models; `asked`: the configured folder, None for the default."""
    return Path(asked or DEFAULT_CACHE).expanduser()


@contextmanager
def naming_the_cache(folder: Path) -> Iterator[None]:
    """Turn errors of writing below `folder`, as on a full or read-only disk, into OSErrors that name the setting."""
    try:
        yield
    except Exception as error:
        at = Path(error.filename).absolute() if isinstance(error, OSError) and error.filename is not None else None
        # A parent may be what cannot be made.
        inside = at is not None and (at.is_relative_to(folder.absolute()) or folder.absolute().is_relative_to(at))
        full = isinstance(error, safetensors.SafetensorError) and os.strerror(errno.ENOSPC) in str(error)
        if not (inside or full):
            raise
        reason = error.strerror if inside else os.strerror(errno.ENOSPC)
        raise OSError(
            f"compile_cache_dir={folder} cannot be written to: {reason}; name a folder that has room for compiled"
            " code and converted models"
        ) from error


def use_cache(folder: Path) -> None:
    """Keep Inductor's and Triton's artefacts under `folder`; call before the first compilation.

    They write where they read, so beside a folder that is read-only they get one that goes with the process.
    """
    with naming_the_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        log.warning("compile_cache_dir=%s is read-only: this start uses what is stored there and keeps nothing", folder)
        folder = Path(tempfile.mkdtemp(prefix="pagegraph-cache-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Inductor and Triton read nothing else.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
