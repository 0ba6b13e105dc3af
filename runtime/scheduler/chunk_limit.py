"""The rule for how many prompt tokens a step may take beside decodes.

A step beside prompts may last `STRETCH` times as long as its decodes alone would: streams are not slowed by more than
that, and prompts have the rest of the device. Prompts behind the first one raise the limit: they are to be computed
within `DRAIN_STEPS` steps, because where prompts come faster than they are computed, or all at once, throughput decides
when everyone is done. A target in milliseconds is kept whatever waits. Knows counts and predicted times alone; who gets
the tokens, `runtime.scheduler.prefill_budget` decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pagegraph.runtime.scheduler.step_time import StepTime

STRETCH = 2.5  # at 2 small batches lose throughput: their chunks are too short to keep a GPU's tensor cores busy
DRAIN_STEPS = (
    32  # at 16 a second long prompt in the queue doubles the steps; at 64 a job of short prompts waits for slots
)
LIMITS = ("target", "backlog", "budget")  # what a step's prompt tokens were limited by


@dataclass(slots=True)
class ChunkCounts:
    """What the rule decided; metrics read it."""

    target_ms: float = 0.0  # of the last step that had decodes while prompts waited
    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))  # such steps by limit


class ChunkLimit:
    """`target_ms`: what a step beside decodes may last; None: as the rule says."""

    def __init__(self, step_time: StepTime, target_ms: float | None = None) -> None:
        self.step_time = step_time
        self.target_ms = target_ms
        self.counts = ChunkCounts()

    def prompt_tokens(self, budget: int, decodes: int, *, depth: int, backlog: int, least: int) -> int:
        """Of the `budget`, the prompt tokens that a step with `decodes` decode tokens, at least 1, may take.

        depth: tokens computed of the prompt that is first in line; backlog: tokens of those behind it; least: always
        allowed, so that prompts get on.
        """
        alone = self.step_time.decode_ms(decodes)
        if alone is None:
            return budget
        target, drain = self.target_ms, 0
        if target is None:
            target, drain = STRETCH * alone, -(-backlog // DRAIN_STEPS)
        tokens = max(self.step_time.prompt_tokens_in(target - alone, depth), least)
        limit = "budget" if max(tokens, drain) >= budget else "backlog" if drain > tokens else "target"
        self.counts.target_ms = target
        self.counts.steps[limit] += 1
        return min(max(tokens, drain), budget)
