"""The largest numbers of the 8-bit types that kernels write. Imports nothing."""

from __future__ import annotations

INT8_MAX, FP8_MAX = 127.0, 448.0
