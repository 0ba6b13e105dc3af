"""Running totals of what the scheduler did and what steps brought; metrics read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagegraph.runtime.scheduler.commit import StepResult
from pagegraph.runtime.scheduler.draft_tokens import Verification


@dataclass(slots=True)
class Counters:
    """Running totals.

    Prefix counts are in tokens, of admissions, and leave those after a preemption out. `prompt_tokens` are those of
    prompts that were done, found in the cache or computed, each prompt once.
    """

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of `prompt_tokens`
    generated_tokens: int = 0
    drafts: int = 0  # times a slot had draft tokens in a step
    draft_tokens: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)  # accepted ones by their place in the draft, the first at 0
    saved_steps: int = 0  # tokens beyond the first of a sequence in one step
    mean_draft_tokens: float = 0.0  # in the last step that could have had any

    def count(self, result: StepResult) -> None:
        """Add a committed step."""
        self.generated_tokens += len(result.slots)
        for sequence in result.begun:
            self.prompt_tokens += sequence.num_prompt
            self.cached_tokens += sequence.cached_tokens
        if result.verification is not None:
            self._count_drafts(result.verification)

    def _count_drafts(self, found: Verification) -> None:
        saved = int(found.lengths.sum()) - len(found.lengths)
        self.generated_tokens += saved
        self.saved_steps += saved
        self.drafts += len(found.counts)
        self.draft_tokens += int(found.counts.sum())
        self.accepted += int(found.accepted.sum())
        most = int(found.accepted.max(initial=0))
        self.accepted_at += [0] * (most - len(self.accepted_at))
        for place in range(most):
            self.accepted_at[place] += int((found.accepted > place).sum())
