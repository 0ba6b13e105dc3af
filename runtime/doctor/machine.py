"""What a server needs of this machine, each a check: a name, whether it is fine, and what to do where it is not.

Knows the configuration's keys; imports torch in the one check that asks for the GPU.
"""

from __future__ import annotations

import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pagegraph.runtime.config import Config, ConfigError, require_local_files

LEAST_PYTHON = (3, 11)
LEAST_FREE = 2 << 30  # bytes for compiled code and converted models
FILES_A_WORKER = 1024  # open files: connections, and what Python and the model hold


def checks(config: Config | None) -> dict[str, Callable[[], str]]:
    """Name -> what says that all is well, or raises ValueError with what to do. Without a configuration, of defaults."""
    settings = config or Config(model="")
    found = {
        "python": _python,
        "torch": _torch,
        "g++": _compiler,
        "port": lambda: _port(settings),
        "open files": lambda: _files(settings),
        "cache": lambda: _cache(settings),
    }
    if config is not None:
        found["model"] = lambda: _model(config)
    return found


def _python() -> str:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < LEAST_PYTHON:
        raise ValueError(f"{found}; install Python {'.'.join(map(str, LEAST_PYTHON))} or later")
    return found


def _torch() -> str:
    import torch

    found = f"{torch.__version__}, CPU"
    if torch.cuda.is_available():
        try:
            triton = version("triton")
        except PackageNotFoundError:
            raise ValueError("there is a GPU and no triton; pip install triton") from None
        found = f"{torch.__version__}, triton {triton}, {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    elif shutil.which("nvidia-smi"):
        raise ValueError(
            f"torch {torch.__version__} sees no GPU although there is nvidia-smi; install a torch for CUDA that the driver"
            " can run (nvidia-smi names the newest)"
        )
    return found


def _compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise ValueError("no g++ in PATH: the compiler of a CPU and Triton need one; apt-get install g++")
    told = subprocess.run([found, "-dumpfullversion"], capture_output=True, text=True)
    return f"{found} {told.stdout.strip()}"


def _port(settings: Config) -> str:
    if settings.port == 0:
        return "any free one"
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((settings.host, settings.port))
        except OSError as error:
            raise ValueError(
                f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}); end who does, or set port to 0"
            ) from error
    return f"{settings.host}:{settings.port} is free"


def _files(settings: Config) -> str:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(FILES_A_WORKER, settings.web_threads + FILES_A_WORKER // 2)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        raise ValueError(f"{limit} for a process; `ulimit -n {wanted}` before the server is started (at most {most})")
    return f"{limit} for a process"


def _cache(settings: Config) -> str:
    folder = Path(settings.compile_cache_dir or "~/.cache/pagegraph").expanduser()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE:
        raise ValueError(f"{folder}: {free >> 20} MiB are free; set compile_cache_dir to a disk with 2 GiB")
    return f"{folder}, {free >> 30} GiB free"


def _model(config: Config) -> str:
    try:
        require_local_files(config)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    path = Path(config.model).expanduser()
    if not path.exists():
        return f"{config.model}, of the Hugging Face hub"
    try:
        for one in [path] if path.is_file() else path.iterdir():
            if one.is_file():
                one.open("rb").close()
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}); change its owner or mode") from error
    return f"{path} can be read"
