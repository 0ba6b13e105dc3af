"""N-gram proposals on a CPU in C++ (`cpp.cpp`): a few microseconds a step, by numpy's calls twenty times that.

Where it is not built, the reference does it. Knows no scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pagegraph.kernels import cpp_extension
from pagegraph.kernels.spec_decode import reference

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = ["int64_t*"] + ["int32_t*"] * 10 + ["int64_t"] * 6

_kernel: Callable | None = None


def build() -> None:
    """From here on `propose_ngram` runs it."""
    global _kernel
    _kernel = cpp_extension.built(SOURCE, ARGUMENTS, "the n-gram proposer stays numpy's, which takes longer")


def propose_ngram(
    ids: Tensor,
    token_ids: Tensor,
    slots: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
    history: Tensor,
    draft_tokens: Tensor,
    min_ngram: int,
    max_ngram: int,
) -> Tensor:
    """See `kernels.ops`."""
    step = ids, token_ids, slots, query_start, seq_lens, sampled, last_tokens, last_at, history, draft_tokens
    if _kernel is None:
        return reference.propose_ngram(*step, min_ngram, max_ngram)
    found = token_ids.new_empty(2, len(ids))
    _kernel(*step, found, len(ids), history.shape[1], draft_tokens.shape[1], min_ngram, max_ngram, reference.MAX_MATCH)
    return found
