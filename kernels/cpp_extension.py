"""C++ of ours for CPUs: built once by the toolchain that torch.compile uses, and kept in its cache. Knows no kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger("pagegraph.kernels")

# What torch.compile's own flags leave out: its loops come vectorised. Sums may be reordered.
FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")


def built(source: Path, arguments: Sequence[str], instead: str) -> Callable | None:
    """`kernel` of a file, called with tensors for pointers; takes seconds, or nothing where the cache has it.

    None, and a warning that says what is used `instead`, where it does not build.
    """
    try:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        return CppPythonBindingsCodeCache.load_pybinding(arguments, source.read_text(), extra_flags=FLAGS)
    except Exception as error:  # whatever a compiler, or another version's private function, may raise
        log.warning("%s does not build here, %s: %s", source.name, instead, error)
        return None
