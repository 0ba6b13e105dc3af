"""The one thread that runs CPU steps of all models, and while it works the only one with OpenMP threads.

PyTorch's OpenMP (libgomp) keeps a team of threads for each thread that has run a parallel loop. Once the teams together
have more threads than there are CPUs, libgomp lets threads sleep between two loops, and waking one costs 50 us; a step
has over a hundred loops. So models share this thread, and a thread that submits work ends its own team first.
Knows nothing of steps. Other OpenMP libraries are left alone; what they do is not known.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

OMP_PAUSE_SOFT = 1

_thread = ThreadPoolExecutor(1, thread_name_prefix="step")


def submit(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
    """Run `function` on the step thread after what was submitted before; any thread may call."""
    give_up_team()
    return _thread.submit(function, *args, **kwargs)


def rest() -> None:
    """Wait for all that was submitted, then end the step thread's OpenMP team."""
    _thread.submit(give_up_team).result()


def give_up_team() -> None:
    """End the calling thread's OpenMP team; its next parallel loop starts a new one. Takes 0.2 us if it has none."""
    if _pause is not None:
        _pause(OMP_PAUSE_SOFT)


def _find_pause() -> Callable[[int], int] | None:
    """Of the libgomp that PyTorch brings along: another copy would know nothing of its threads."""
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        with suppress(OSError, AttributeError):
            return ctypes.CDLL(str(library)).omp_pause_resource_all
    return None


_pause = _find_pause()
