"""The plan of a step: which tokens of which slots it computes. The scheduler makes it; packer, commit, stats and
drafters read it.

Knows no tokens and no blocks: those stand in `runtime.scheduler.input_batch`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from pagegraph.runtime.scheduler.draft_tokens import Columns, ScheduledDrafts
from pagegraph.runtime.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: tokens [starts[i], starts[i] + counts[i]) of the sequence in slot slots[i]; arrays [S], int32 unless
    said.

    A slot with draft tokens has a query for each of them (`runtime.scheduler.draft_tokens`); any other slot has one.
    """

    slots: np.ndarray
    epochs: np.ndarray  # int64, of the slot's sequence: another may be there when the step is done
    starts: np.ndarray
    counts: np.ndarray
    sampled: np.ndarray  # bool, whether the last of the tokens yields a new one
    started: list[Sequence]  # those that entered their slot for this step; its last queries
    drafts: ScheduledDrafts | None = None
    state_copies: Collection[tuple[int, int]] = ()  # rows of recurrent state, as `StepInput` has them

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


def joined(
    parts: list[Columns],
    started: list[Sequence],
    drafts: ScheduledDrafts | None,
    state_copies: Collection[tuple[int, int]] = (),
) -> Plan:
    """One plan of its parts, draft tokens in the first alone."""
    if len(parts) == 1:
        return Plan(*parts[0], started, drafts, state_copies)
    slots, epochs, starts, counts, sampled = (np.concatenate(column) for column in zip(*parts))
    if drafts is not None:
        more = np.ones(len(slots) - len(drafts.others), bool)
        drafts = replace(drafts, others=np.concatenate([drafts.others, more]))
    return Plan(slots, epochs, starts, counts, sampled, started, drafts, state_copies)
