"""Memory profiling: what steps take on a CUDA device beside weights and KV cache, measured by running the largest ones.

They run in the null block. Plain modules are run, which hold more at a time than their compiled form does. Knows no
requests.

The KV cache is sized from this peak: a largest step with all that sampling and the reading of prompts offer, and two
captured graphs. Logits in
captured graphs are not kept, so all graphs share the memory of the largest. What was measured serves later starts of the
same model, device and sizes of steps: it is what they would measure, less the kernels that they have not loaded yet.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pagegraph.compiler.start_cache import StartCache
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.dummy import dummy_step, everything, masked, read_whole
from pagegraph.compiler.step.step import CompiledStep

log = logging.getLogger("pagegraph.memory")

SAMPLES = 5  # graphs measured one by one


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Bytes beside weights and blocks: of the largest step, of all CUDA graphs, and of the kernels that steps loaded."""

    step: int
    graphs: int
    kernels: int


class StoredProfiles:
    """The profiles of a build's models in its start cache, for these sizes of steps (plain values)."""

    def __init__(self, cache: StartCache, sizes: dict[str, Any]) -> None:
        self._cache = cache
        self._name = f"memory-{hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]}"

    def read(self) -> list[MemoryProfile] | None:
        """What an earlier start has measured."""
        content = self._cache.read(self._name)
        if content is None:
            return None
        try:
            profiles = [MemoryProfile(**one) for one in json.loads(content)]
        except (ValueError, TypeError) as error:
            log.warning("the stored memory profile is of no use (%s): measuring anew", error)
            return None
        log.info("memory: what steps take was measured by an earlier start")
        return profiles

    def write(self, profiles: Sequence[MemoryProfile]) -> None:
        """For later starts."""
        self._cache.write(self._name, json.dumps([asdict(one) for one in profiles]).encode())


@torch.inference_mode()
def profile_memory(
    step: CompiledStep,
    largest: Bucket,
    max_model_len: int,
    draft_forwards: int = 0,
) -> MemoryProfile:
    """Run steps of `largest` through `step`, whose state has the null block only; `step` is of no use afterwards.

    `draft_forwards`: forwards that draft graphs will hold beside those of the capture sizes.
    """
    device = step.staging.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, outside = torch.cuda.memory_reserved(device), _outside(device)
    tokens = min(largest.tokens, largest.seqs * max_model_len)
    lengths = np.full(largest.seqs, tokens // largest.seqs)
    lengths[: tokens % largest.seqs] += 1
    prompt = read_whole(lengths.tolist()) if step.paged_model.body else None
    for sampling in (everything(largest.seqs), masked(largest.seqs)):  # which launches each kernel once, too
        launched = step.launch(dummy_step(lengths, step.state.dummy_slot, sampling, prompt))
        assert launched.masks is not None
        launched.masks.fill(-1)
        launched.sample()
        launched.wait()
    peak = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    kernels = max(_outside(device) - outside, 0)
    return MemoryProfile(peak, _graphs(step, draft_forwards), kernels)


def _outside(device: torch.device) -> int:
    """Bytes in use that PyTorch has not allocated: the context's, kernels', other processes'."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _graphs(step: CompiledStep, draft_forwards: int) -> int:
    """Bytes of all graphs: they share one pool, which the largest fills, and each has memory of the driver's besides.

    The median of a few that are captured next, so that their kernels are wanted anyway: free memory is the whole device's, and what another process takes meanwhile would be
    multiplied.
    """
    sizes = step.runner.capture_sizes
    buckets = sizes.buckets()
    first = _taken(lambda: step.runner.capture_graphs(buckets[-1:], progress=False))
    each = statistics.median(
        _taken(lambda: step.runner.capture_graphs([bucket], progress=False)) for bucket in sizes.first()[:SAMPLES]
    )
    return first + int(each) * (len(buckets) - 1 + draft_forwards)


def _taken(act: Callable[[], None]) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    act()
    torch.cuda.empty_cache()
    return free - torch.cuda.mem_get_info()[0]
