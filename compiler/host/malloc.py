"""What was freed goes back to the system: glibc would keep it, at times more than the model takes unquantised.

Knows the C library only.

Loading calls it after each quantised weight, because glibc kept the holes between the small tensors that stay.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Takes about a millisecond; nothing happens with a C library that has no such call."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
