"""CUDA graphs: one for each bucket, of its forwards, replayed with new metadata at the same addresses; and one of what
follows a bucket's forward where masks restrict its samples.

Knows buckets and streams; the forward it captures is any callable. CUDA only.

A server captures few sizes before it answers, each at least four times as large as the one below; the others are
captured as `compiler.step.capture_queue` says: when nothing runs, or when one was wanted often. Offline use captures all
at the start. A draft model's k steps are one graph; until it is captured, one launch replays the single step's graph k
times. The memory of draft graphs is set aside with that of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from pagegraph.compiler.step.bitmask import Bitmask
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.executor import Outputs, Sampled

T = TypeVar("T")


class GraphSet:
    """Captured buckets sharing one memory pool, so the largest decides the memory of all."""

    def __init__(self) -> None:
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def capture(
        self, buckets: Sequence[Bucket], forward_of: Callable[[Bucket], Callable[[], Outputs]], progress: bool
    ) -> None:
        """Capture largest first, so that smaller graphs fit in the pool the largest has made."""
        for bucket in tqdm(sorted(buckets, reverse=True), desc="capture", disable=not progress, unit="graph"):
            graph, outputs = _captured(forward_of(bucket), self._pool)
            logits, hidden = _borrowed(outputs.logits), outputs.hidden
            borrowed = outputs._replace(logits=logits, hidden=None if hidden is None else _borrowed(hidden))
            self._graphs[bucket] = (graph, borrowed)

    def __contains__(self, bucket: Bucket) -> bool:
        return bucket in self._graphs

    def holding(self, bucket: Bucket) -> Bucket | None:
        """The smallest captured bucket, no draft graph, that a step of this one fits in."""
        larger = [
            one
            for one in self._graphs
            if one.tokens >= bucket.tokens and one.seqs >= bucket.seqs and one.num_steps == 1
        ]
        return min(larger, default=None)

    def replay(self, bucket: Bucket) -> Outputs | None:
        """The bucket's outputs, valid until the next replay; None if it was not captured."""
        entry = self._graphs.get(bucket)
        if entry is None:
            return None
        entry[0].replay()
        return entry[1]

    def close(self) -> None:
        """Destroy the graphs, none of which runs: NCCL ends no group while a graph holds a call of it."""
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()


class MaskedSampling:
    """Graphs that sample by masks behind a bucket's forward, captured when they are first wanted.

    Beside the forwards' graphs, in memory of their own: a forward's logits lie in the pool that its next capture reuses.
    """

    def __init__(self) -> None:
        # of each bucket: where what it reads lies, the graph, what comes of it
        self._graphs: dict[Bucket, tuple[tuple[int, int], torch.cuda.CUDAGraph, Sampled]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, bucket: Bucket, outputs: Outputs, bitmask: Bitmask, sample: Callable[[], Sampled]) -> Sampled:
        """What `sample` gives, which may be called twice, of outputs and a bitmask that it reads where they lie now."""
        read = outputs.ids.data_ptr(), bitmask.words.data_ptr()
        if bucket not in self._graphs or self._graphs[bucket][0] != read:
            self._graphs[bucket] = (read, *_captured(sample, self._pool))
        _, graph, sampled = self._graphs[bucket]
        graph.replay()
        return sampled

    def close(self) -> None:
        """As `GraphSet.close`."""
        for _, graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()


def _captured(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles and warms the allocator outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph, result


class _Bytes:
    """Device memory as the CUDA array interface describes it (version 3)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _borrowed(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor that does not keep its memory alive, so that the graphs' pool may reuse it.

    Sound because graphs are replayed one after the other, and each one's logits and hidden states are read before the next
    replay.
    """
    if not tensor.is_contiguous():
        return tensor
    words = torch.as_tensor(_Bytes(tensor), device=tensor.device)
    return words.view(tensor.dtype).view(tensor.shape)
