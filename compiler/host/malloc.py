"""What was freed goes back to the system: glibc would keep it, at times more than the model takes unquantised.

Knows the C library only.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Takes about a millisecond; nothing happens with a C library that has no such call."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
