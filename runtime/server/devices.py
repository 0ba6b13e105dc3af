"""Which GPUs each engine of a server sees, where there are several.

Asks the CUDA driver how many there are; imports no torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from pagegraph.runtime.config import Config
from pagegraph.runtime.server.listen import Unserved

VISIBLE = "CUDA_VISIBLE_DEVICES"  # of the environment: the devices that a process sees, by number or name


def variables_of(rank: int, size: int, environment: Mapping[str, str]) -> dict[str, str | None]:
    """Of the environment of engine `rank` of engines with `size` devices each: it sees those, of what this process sees."""
    wanted = range(rank * size, (rank + 1) * size)
    if VISIBLE not in environment:
        return {VISIBLE: ",".join(map(str, wanted))}
    seen = [one.strip() for one in environment[VISIBLE].split(",")]
    return {VISIBLE: ",".join(seen[at] for at in wanted if at < len(seen))}


def count() -> int:
    """CUDA devices that this process sees; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int()
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(found)) else found.value


def require_one_each(config: Config) -> None:
    """Raise Unserved where there are GPUs, but fewer than engines: those without would be computed on the CPU unasked."""
    if config.data_parallel_size == 1 or config.device == "cpu":
        return
    found, size = count(), config.tensor_parallel_size
    if 0 < found < config.data_parallel_size * size:
        each = "a GPU" if size == 1 else f"{size} GPUs (tensor_parallel_size)"
        raise Unserved(
            f"data_parallel_size={config.data_parallel_size} needs {each} for each engine, and there are {found}; set it to"
            f" {max(found // size, 1)}, or device to cpu"
        )
