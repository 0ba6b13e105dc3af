"""Starts the CUDA driver in a thread when it is imported: a second or more that Python's imports need not wait for.

The driver's call gives up Python's lock, which PyTorch's own start does not. What it makes is the device's primary
context, which PyTorch then takes. Only where the settings that this process was given ask for CUDA; where there is no
driver or no device, nothing happens, and PyTorch will say so. Knows no PyTorch.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from pathlib import Path

DEVICE = 0  # "cuda" is the first that the driver shows


def is_wanted(settings: Path) -> bool:
    """Whether a file of EngineSettings asks for CUDA, or for it if there is one."""
    try:
        return json.loads(settings.read_text())["config"]["device"] in ("auto", "cuda")
    except (OSError, ValueError, KeyError, TypeError):
        return False  # who reads the settings will say what is wrong


def start() -> bool:
    """Make the device's primary context -> whether there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    return not (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(handle), DEVICE)
        or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    )


if len(sys.argv) == 2 and is_wanted(Path(sys.argv[1])):
    threading.Thread(target=start, name="driver", daemon=True).start()
