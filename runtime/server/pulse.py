"""By when the engine's loop will have moved on: two times in a file, which it writes before each turn.

A loop that hangs writes nothing, so who reads them needs no answer of it. A step that is like recent ones has `STRETCH`
times what it is predicted to take, and a least time, for machines pause; whatever cannot be predicted (a first step, a
compilation, a capture) has the limit of the configuration. Knows no steps, no processes and no sockets. Imports no
torch.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FILE = "engine-pulse"
STRETCH = 30.0  # a step's bound over its prediction: on a busy machine four times is common, in a pause more
LEAST_S = 30.0  # of a bound: a loaded machine holds up the quickest step for seconds
LEAST_SHARE = 0.1  # of the limit, which raises it
LATE_SHARE = 0.25  # of the bound, after which new requests better go elsewhere
UNREADY_S = 30.0  # after which they do in any case
_TIMES = struct.Struct("=dd")


@dataclass(frozen=True)
class Due:
    """Seconds of the machine's monotonic clock after which the loop is late, and after which it hangs."""

    late: float
    hung: float


class Pulse:
    """The writing end. `limit_s`: for what cannot be predicted; nothing gets more."""

    def __init__(self, path: Path, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        path.write_bytes(_TIMES.pack(float("inf"), float("inf")))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _TIMES.size)
        self._limit_s = limit_s
        self._clock = clock

    def beat(self, predicted_s: float | None) -> None:
        """The loop does now what takes about so many seconds; None: nobody knows."""
        bound = self._limit_s
        if predicted_s is not None:
            bound = min(bound, max(LEAST_S, LEAST_SHARE * self._limit_s, STRETCH * predicted_s))
        now = self._clock()
        # Packed elsewhere and copied whole: `pack_into` makes it zeros first, which a reader would take for a loop that hangs.
        self._map[:] = _TIMES.pack(now + min(UNREADY_S, LATE_SHARE * bound), now + bound)


def read(path: Path) -> Due | None:
    """What the loop promised last; None before it began."""
    try:
        return Due(*_TIMES.unpack(path.read_bytes()))
    except (FileNotFoundError, struct.error):  # the engine is about to write it for the first time
        return None
