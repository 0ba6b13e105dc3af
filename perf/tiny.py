"""A server of a tiny random model, uncompiled, for scripts that try the server and not the model.

Knows `runtime serve` by its settings.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from perf.floors import MODELS, write_model
from perf.gpu.serve import SERVE, Server, write_tokenizer

WORKERS = 2  # web processes


def tiny_server(folder: Path, command: Sequence[str] = SERVE, **settings: object) -> Server:
    """`runtime serve` on a CPU with two web processes, served as `m`; its files are in `folder`, its caller stops it."""
    model = write_model("tiny", folder / "model")
    write_tokenizer(folder, MODELS["tiny"]["vocab_size"])
    given = dict(
        model=str(model), tokenizer=str(folder), served_model_name="m", load_format="dummy", dtype="float32", device="cpu",
        compile=False, num_threads=1, workers=WORKERS,
    )  # fmt: skip
    server = Server({**given, **settings}, folder, command)
    while f"web {settings.get('workers', WORKERS)}" not in processes(server.pid):
        time.sleep(0.1)
    return server


def processes(supervisor: int) -> dict[str, int]:
    """The pid of each process of a server, by what it is."""
    found = {"supervisor": supervisor}
    for child in _children(supervisor):
        if b"gunicorn" in Path(f"/proc/{child}/cmdline").read_bytes():
            found["web parent"] = child
            for number, worker in enumerate(sorted(_children(child)), 1):
                found[f"web {number}"] = worker
        else:
            found["engine"] = child
    return found


def resident(supervisor: int) -> dict[str, int]:
    """KiB of each process of a server, by what it is."""
    return _status(supervisor, "VmRSS")


def num_threads(supervisor: int) -> dict[str, int]:
    """Of each process of a server, by what it is."""
    return _status(supervisor, "Threads")


def _status(supervisor: int, line: str) -> dict[str, int]:
    status = {name: Path(f"/proc/{pid}/status").read_text() for name, pid in processes(supervisor).items()}
    return {name: int(re.findall(rf"^{line}:\s+(\d+)", text, re.M)[0]) for name, text in status.items()}


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
