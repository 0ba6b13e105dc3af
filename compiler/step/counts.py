"""What has been launched so far, in running totals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

# Why a step on a GPU replayed no CUDA graph: it is larger than every capture size, or neither the graph of its size nor
# a larger one is captured.
GraphMiss = Literal["too_many_tokens", "not_captured"]


@dataclass(slots=True)
class StepCounts:
    """Totals over launched steps; `padding`: tokens that buckets added to `tokens`."""

    steps: int = 0
    graphed: int = 0  # replayed as a CUDA graph
    tokens: int = 0
    padding: int = 0
    graph_misses: dict[GraphMiss, int] = field(default_factory=lambda: dict.fromkeys(get_args(GraphMiss), 0))

    def launched(self, tokens: int, padded: int, graphed: bool) -> None:
        self.steps += 1
        self.graphed += graphed
        self.tokens += tokens
        self.padding += padded - tokens

    def missed_graph(self, why: GraphMiss) -> None:
        self.graph_misses[why] += 1
