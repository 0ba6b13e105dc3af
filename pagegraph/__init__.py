"""pagegraph: an LLM inference engine. `from pagegraph import LLM, SamplingParams` is the offline API.

The subpackages kernels, compiler, runtime and web are links to the folders of those names at the top of the repository.
What is named here is imported when it is first asked for, so that a command's --help need not load PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagegraph.runtime.llm import LLM as LLM
    from pagegraph.runtime.sampling_params import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from pagegraph.runtime.llm import LLM

        return LLM
    if name == "SamplingParams":
        from pagegraph.runtime.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'pagegraph' has no attribute {name!r}")
