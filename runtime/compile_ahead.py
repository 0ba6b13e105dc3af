"""Compilation beside a serving engine: first in a process of its own, whose artefacts the engine then loads.

Compiling in the serving process would hold Python's lock for a minute and starve the streams; loading what the
cache holds takes seconds. Run as `python -m runtime.compile_ahead SETTINGS.json` the compiling process ends when
its parent does. Knows the cache's folder and what its content depends on; knows nothing of requests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
import transformers

from compiler import build as builder
from compiler import lower
from runtime.child import child_environment, module_command
from runtime.config import Config, config_from_dict

PRIORITY = 10  # added to the niceness: streams go first
SOURCES = [path for package in ("compiler", "kernels") for path in Path(__file__).parents[1].glob(f"{package}/**/*.py")]


def fill_cache(config: Config, settings: Path) -> None:
    """Compile `config` in another process unless its artefacts are known to be there; waits for it.

    `settings` is the engine process's file. Raises RuntimeError with the end of its output where it fails.
    """
    done = _stamp(config)
    if done.exists():
        return
    command = module_command("runtime.compile_ahead", str(settings))
    # The child watches its standard input, which ends with this process.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, env=child_environment()) as child:
        output = child.stdout.read().decode(errors="replace")
    if child.returncode:
        raise RuntimeError(f"the compiling process ended with status {child.returncode}: {output[-2000:]}")
    done.touch()


def _stamp(config: Config) -> Path:
    """A file that exists once the artefacts of `config` do. Wrongly there, it costs time and nothing else."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    for path in sorted(SOURCES):
        digest.update(path.read_bytes())
    return lower.cache_folder(config.compile_cache_dir) / "inductor" / f"compiled-{digest.hexdigest()[:16]}"


def main(path: str) -> None:
    """Build and compile what the settings' `config` says, then end; nothing is served."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(PRIORITY)
    config = config_from_dict(json.loads(Path(path).read_text())["config"])
    builder.ready(config, progress=False).close()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
