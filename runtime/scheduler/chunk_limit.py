"""The rule for how many prompt tokens a step may take beside decodes.

A step beside prompts may last `STRETCH` times as long as its decodes alone would: streams are not slowed by more than
that, and prompts have the rest of the device. A chunk of `LEAST_TOKENS` is always allowed: smaller ones take a GPU
nearly as long, most of all deep in a long prompt.

Prompts behind the first one raise the limit, because where they come faster than they are computed, or all at once,
throughput decides when everyone is done. They are to be computed within `DRAIN_STEPS` steps, and within fewer where
there are many of them to a stream: a long step holds up each stream, a short one each prompt (`PATIENCE`).

A target in milliseconds is kept whatever waits, down to chunks of a block. Knows counts and predicted times alone; who
gets the tokens, `runtime.scheduler.prefill_budget` decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pagegraph.runtime.scheduler.step_time import StepTime

STRETCH = 3  # at 2 and 2.5, 30 prompts a second to an 8B (H200) had TTFT of 59 and 32 ms, p99 between tokens 16 and 19
LEAST_TOKENS = {"cuda": 256, "cpu": 16}  # multiplying takes as long as reading the weights (H200: 184), rounded up
DRAIN_STEPS = 32  # at 16 a second long prompt in the queue doubled the steps
PATIENCE = 4  # as many steps for each stream to a prompt; at 8 a job that comes at once loses half as much again
LIMITS = ("target", "backlog", "budget")  # what a step's prompt tokens were limited by


@dataclass(frozen=True, slots=True)
class Backlog:
    """Prompts behind the first in line, those that run too, and the tokens still to be computed of them."""

    prompts: int = 0
    tokens: int = 0

    def per_step(self, streams: int) -> int:
        """Tokens a step that compute it in time."""
        steps = min(DRAIN_STEPS, PATIENCE * streams // max(self.prompts, 1))
        return -(-self.tokens // max(steps, 1))


@dataclass(slots=True)
class ChunkCounts:
    """What the rule decided; metrics read it."""

    target_ms: float = 0.0  # of the last step that had decodes while prompts waited
    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))  # such steps by limit


class ChunkLimit:
    """`target_ms`: what a step beside decodes may last; None: as the rule says. `least`: tokens that are always allowed."""

    def __init__(self, step_time: StepTime, target_ms: float | None = None, *, least: int) -> None:
        self.step_time = step_time
        self.target_ms = target_ms
        self.least = least
        self.counts = ChunkCounts()

    def prompt_tokens(self, budget: int, decodes: int, depth: int, backlog: Backlog) -> int:
        """Of the `budget`, the prompt tokens that a step with `decodes` decode tokens, at least 1, may take.

        depth: tokens computed of the prompt that is first in line.
        """
        alone = self.step_time.decode_ms(decodes)
        if alone is None:
            return budget
        target, drain = self.target_ms, 0
        if target is None:
            target, drain = STRETCH * alone, backlog.per_step(decodes)
        tokens = max(self.step_time.prompt_tokens_in(target - alone, depth), self.least)
        limit = "budget" if max(tokens, drain) >= budget else "backlog" if drain > tokens else "target"
        self.counts.target_ms = target
        self.counts.steps[limit] += 1
        return min(max(tokens, drain), budget)
