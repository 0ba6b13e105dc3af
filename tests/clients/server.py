"""The server that clients are run against: `runtime serve` on a free loopback port, or one that is running already.

Knows how a server is started and ended; knows no client.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.paths import MODELS, ROOT

CONFIG = Path(__file__).with_name("server.yaml")
GGUF = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
START_S = 120
STOP_S = 60


class Server(NamedTuple):
    """What a client has to know of a server."""

    url: str  # without /v1
    model: str
    tokenizer: Path  # a folder with tokenizer.json
    ours: bool  # whether it was started here

    def environment(self) -> dict[str, str]:
        """The variables that scripts read."""
        return dict(CLIENTS_BASE_URL=self.url, CLIENTS_MODEL=self.model, CLIENTS_TOKENIZER=str(self.tokenizer))


def running_elsewhere() -> Server | None:
    """The server that the environment names, if it names one."""
    if (url := os.environ.get("CLIENTS_BASE_URL")) is None:
        return None
    return Server(url, os.environ["CLIENTS_MODEL"], Path(os.environ["CLIENTS_TOKENIZER"]), ours=False)


@contextmanager
def started(folder: Path) -> Iterator[Server]:
    """`runtime serve` with a log in `folder`, ready to answer; ended with the context."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "pagegraph.runtime.cli", "serve", str(CONFIG), "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        url = _url(process, log)
        yield Server(url, "smollm2", tokenizer_folder(), ours=True)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen, log: Path) -> str:
    """Where it answers; its banner says so once it is ready."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"the server did not come up:\n{log.read_text()}")


def tokenizer_folder() -> Path:
    """The folder that the model's file was converted into, as the server has it."""
    from pagegraph.compiler.build import model_folder
    from pagegraph.compiler.options import ModelOptions

    return model_folder(ModelOptions(model=str(GGUF)), None)
