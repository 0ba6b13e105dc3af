"""malloc_trim: freed memory goes back to the system.

glibc keeps the holes between small tensors that stay, at times more than the unquantised model takes. So loading calls
this after each quantised weight. Knows the C library only.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Call malloc_trim, which takes about a millisecond; does nothing with a C library that lacks it."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
