"""C++ of ours for CPUs: built once by the toolchain that torch.compile uses, and kept in its cache. Knows no kernel.

C++ is used where neither PyTorch nor the compiler is fast: attention of decode tokens, int4 GEMV (as compiler loops
it is seven parallel loops), quantised experts of few tokens, the n-gram proposer, and what a step begins and ends with. Each is one function of
pointers without PyTorch's headers, built in seconds by torch.compile's own toolchain into its cache. Until then, and
where it does not build (which is logged), PyTorch and numpy do the same. Attention and GEMVs are called past the
dispatcher, which takes longer than the attention of one token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger("pagegraph.kernels")

# What torch.compile's own flags leave out: its loops come vectorised.
FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast")
REORDERED = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")  # sums too


def built(source: Path, arguments: Sequence[str], instead: str, *, reordered: bool = True) -> Callable | None:
    """`kernel` of a file, called with tensors for pointers; takes seconds, or nothing where the cache has it.

    reordered: whether the compiler may choose the order of sums. None, and a warning that says what is used `instead`, where it
    does not build.
    """
    try:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        flags = (*FLAGS, *REORDERED) if reordered else FLAGS
        return CppPythonBindingsCodeCache.load_pybinding(arguments, source.read_text(), extra_flags=flags)
    except Exception as error:  # whatever a compiler, or another version's private function, may raise
        log.warning("%s does not build here, %s: %s", source.name, instead, error)
        return None
