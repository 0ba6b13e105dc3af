"""Compilation beside a serving engine: first in a process of its own, whose artefacts the engine then loads.

Compiling in the serving process would hold Python's lock for a minute and starve the streams; loading what the cache
holds takes seconds. Run as `python -m pagegraph.runtime.server.compile_process SETTINGS.json` the compiling process
ends when its parent does. It gives way to the streams, but not for ever: added niceness leaves it a quarter of a CPU
beside a busy thread of the engine. (An unprivileged process cannot take niceness back later.) Knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.server.child import child_environment, module_command
from pagegraph.runtime.server.engine_settings import EngineSettings

log = logging.getLogger("pagegraph.engine")

# added: by Linux's weights 335 to an engine thread's 1024; with 10, 110, a busy machine compiled for more than 8
# minutes
NICENESS = 5
REPORT_S = 60.0  # between two lines that say that it is still compiling


@contextlib.contextmanager
def lock(path: Path | None) -> Iterator[None]:
    """Held by one engine of a server at a time, whatever ends the others; None: there is but one."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fill_cache(built: BuiltModel, settings: Path, locked: Path | None = None) -> None:
    """Compile in another process what `built` needs, unless an earlier start, or who held `locked` before, has; waits for it.

    `settings`: the engine process's file. Raises RuntimeError with the end of its output where it fails.
    """
    with lock(locked):
        if not built.is_stored:
            _compile(settings)


def _compile(settings: Path) -> None:
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


def _report(seconds: float) -> None:
    log.info(
        "still compiling after %d min, uncompiled steps serve meanwhile; %.1f processes want these %d CPUs",
        seconds / 60,
        os.getloadavg()[0],
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )


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
