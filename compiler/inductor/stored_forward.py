"""A compiled forward in the start cache: stored once it has run, taken up by a later process without Dynamo or Inductor.

Knows what may go wrong with a stored one, which is then compiled anew; knows nothing of what it is keyed by.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagegraph.compiler.inductor.compile import Took, built_cpp, load_graph, save_graph, untold
from pagegraph.compiler.inductor.guard_free import Forward, NotStorable
from pagegraph.compiler.start_cache import StartCache

log = logging.getLogger("pagegraph.start")


@dataclass(frozen=True, slots=True)
class ForwardStore:
    """Where one forward is stored. `any_blocks`: what is stored serves caches of any number of blocks."""

    cache: StartCache
    name: str
    any_blocks: bool
    took: Took = untold

    @property
    def is_filled(self) -> bool:
        return self.cache.has(self.name)

    def restore(self, forward: Forward, caches: Sequence[list[torch.Tensor]]) -> bool:
        """Give `forward` the stored graphs, if there are any that fit -> whether it has them."""
        start = time.perf_counter()
        content = self.cache.read(self.name)
        if content is None:
            return False
        try:
            built, graphs = pickle.loads(content)
            if built != built_cpp():  # C++ functions that could be built then, or only now
                return False
            if next(one for caches_of in caches for one in caches_of).device.type == "cpu":
                from pagegraph.compiler.inductor.cpu_lowerings import lower_attention

                lower_attention()  # which names the functions that the graphs call
            forward.restore(graphs, load_graph, caches)
        except Exception as error:
            log.warning("the stored forward is of no use (%s: %s): compiling anew", type(error).__name__, error)
            return False
        self.took("load", time.perf_counter() - start)
        return True

    def store(self, forward: Forward) -> None:
        """Store the graphs of `forward`; where that is not possible, the next start compiles again."""
        start = time.perf_counter()
        try:
            content = pickle.dumps((built_cpp(), forward.stored(save_graph, self.any_blocks)))
        except Exception as error:
            level = logging.INFO if isinstance(error, NotStorable) else logging.WARNING
            log.log(level, "the compiled forward cannot be stored for the next start: %s", error)
            return
        self.cache.write(self.name, content)
        self.took("store", time.perf_counter() - start)
