"""Memory profiling: what steps take on a CUDA device beside weights and KV cache, measured by running the largest ones.

They run in the null block. Plain modules are run, which hold more at a time than their compiled form does. Knows no
requests.

The KV cache is sized from this peak: a largest step with all that sampling and the reading of prompts offer, and two
captured graphs. Logits in
captured graphs are not kept, so all graphs share the memory of the largest.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.dummy import dummy_step, everything, masked, read_whole
from pagegraph.compiler.step.step import CompiledStep

SAMPLES = 5  # graphs measured one by one


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Bytes beside weights and blocks: of the largest step, and of all CUDA graphs."""

    step: int
    graphs: int


@torch.inference_mode()
def profile_memory(step: CompiledStep, largest: Bucket, max_model_len: int, draft_forwards: int = 0) -> MemoryProfile:
    """Run steps of `largest` through `step`, whose state has the null block only; `step` is of no use afterwards.

    `draft_forwards`: forwards that draft graphs will hold beside those of the capture sizes.
    """
    device = step.staging.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
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
    return MemoryProfile(peak, _graphs(step, draft_forwards))


def _graphs(step: CompiledStep, draft_forwards: int) -> int:
    """Bytes of all graphs: they share one pool, which the largest fills, and each has memory of the driver's besides.

    The median of a few: free memory is the whole device's, and what another process takes meanwhile would be
    multiplied.
    """
    buckets = step.runner.capture_sizes.buckets()
    first = _taken(lambda: step.runner.capture_graphs(buckets[-1:], progress=False))
    each = statistics.median(
        _taken(lambda: step.runner.capture_graphs([bucket], progress=False)) for bucket in buckets[:SAMPLES]
    )
    return first + int(each) * (len(buckets) - 1 + draft_forwards)


def _taken(act: Callable[[], None]) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    act()
    torch.cuda.empty_cache()
    return free - torch.cuda.mem_get_info()[0]
