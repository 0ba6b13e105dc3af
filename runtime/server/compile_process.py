"""Compilation beside a serving engine: first in a process of its own, whose artefacts the engine then loads.

Compiling in the serving process would hold Python's lock for a minute and starve the streams; loading what the cache
holds takes seconds. Run as `python -m pagegraph.runtime.server.compile_process SETTINGS.json` the compiling process
ends when its parent does. It gives way to the streams, but not for ever: added niceness leaves it a quarter of a CPU
beside a busy thread of the engine. (An unprivileged process cannot take niceness back later.) Knows the cache's folder
and what its content depends on; knows nothing of requests.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers

import pagegraph
from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.compiler.inductor.cache import cache_folder
from pagegraph.compiler.options import PassOptions
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.server.child import child_environment, module_command
from pagegraph.runtime.server.engine_settings import EngineSettings

log = logging.getLogger("pagegraph.engine")

# added: by Linux's weights 335 to an engine thread's 1024; with 10, 110, a busy machine compiled for more than 8
# minutes
NICENESS = 5
REPORT_S = 60.0  # between two lines that say that it is still compiling
FOLDERS = [Path(pagegraph.__file__).parent / folder for folder in ("compiler", "kernels")]
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*") if path.suffix in (".py", ".cpp"))

# Settings that artefacts depend on: the model, the sizes of what is constant in a graph (weights, blocks), the passes
# and threads. Steps of any number of sequences and tokens run one graph, so no setting of scheduling is among them.
ARTEFACT_SETTINGS = (
    "model", "gguf_file", "revision", "dtype", "device", "load_format", "quantization", "trust_remote_code",
    "max_model_len", "block_size", "num_blocks", "kv_cache_memory", "kv_cache_dtype", "gpu_memory_utilization",
    "speculative_method", "speculative_model", "num_threads", *(field.name for field in fields(PassOptions)),
)  # fmt: skip


def fill_cache(config: Config, built: BuiltModel, settings: Path) -> None:
    """Compile `config` in another process unless its artefacts are known to be there; waits for it.

    `built` is what `config` became, `settings` the engine process's file. Raises RuntimeError with the end of its
    output where it fails.
    """
    done = _stamp(config, built)
    if done.exists():
        return
    command = module_command("pagegraph.runtime.server.compile_process", str(settings))
    start = time.monotonic()
    # The child watches its standard input, which ends with this process.
    watched, held = os.pipe()
    with subprocess.Popen(
        command, stdin=watched, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=child_environment()
    ) as child:
        os.close(watched)
        try:
            while child.returncode is None:
                try:
                    output, _ = child.communicate(timeout=REPORT_S)
                except subprocess.TimeoutExpired:
                    _report(time.monotonic() - start)
        finally:
            os.close(held)
    if child.returncode:
        raise RuntimeError(
            f"the compiling process ended with status {child.returncode}: {output.decode(errors='replace')[-2000:]}"
        )
    done.touch()


def _report(seconds: float) -> None:
    log.info(
        "still compiling after %d min, uncompiled steps serve meanwhile; %.1f processes want these %d CPUs",
        seconds / 60,
        os.getloadavg()[0],
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )


def _stamp(config: Config, built: BuiltModel) -> Path:
    """A file that exists once the artefacts of `config` do. Wrongly there, it costs time and nothing else."""
    settings = {name: getattr(config, name) for name in ARTEFACT_SETTINGS}
    machine = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    versions = [sys.version, torch.__version__, transformers.__version__]
    configs: list[Any] = [step.paged_model.model.config for step in built.steps]
    models = [config.to_json_string(use_diff=False) for config in configs]
    digest = hashlib.sha256(
        json.dumps([settings, built.num_blocks, machine, versions, models], sort_keys=True).encode()
    )
    for path in SOURCES:
        digest.update(path.read_bytes())
    return cache_folder(config.compile_cache_dir) / "inductor" / f"compiled-{digest.hexdigest()[:16]}"


def main(path: str) -> None:
    """Build and compile what the settings' `config` says, then end; nothing is served."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICENESS)
    config = EngineSettings.load(Path(path)).config
    build_compiled(compiler_options(config), progress=False).close()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
