"""A draft model: the same steps over the same blocks, with keys and values of its own.

It draws with the request's temperature and filters and with the noise that the target will draw with at that position:
both take the largest of their logits plus the same noise, so they agree nearly as often as two draws can (Gumbel-max
coupling), and what the target draws is not changed at all. Keys and values of rejected draft tokens, and of tokens that
it has not seen yet, are computed before the next draft token. All draft tokens are one launch of several steps, or two
where a slot lacks more than its last token. Knows no acceptance and no scheduling.

It shares block tables and block numbers with the target. A prefix found in the cache is computed again, for its own
keys may not be there; wrong keys would cost acceptance only. Sequences that want fewer draft tokens go on with the
others as far as their blocks reach, because on a GPU a launch costs more than a slot; on a CPU they leave. Sequences
with penalties get none: their counts know committed tokens alone.
"""

from __future__ import annotations

import numpy as np

from pagegraph.compiler.step.inputs import StepInput
from pagegraph.compiler.step.step import CompiledStep
from pagegraph.runtime.scheduler.input_batch import InputBatch


class DraftModel:
    """`step` shares its block tables with the target's; it takes `max_tokens` tokens, `max_decode_tokens` of them
    sampled.

    `together`: slots that want fewer draft tokens go on with the others as far as their blocks reach, because a launch
    costs more than a slot.
    """

    def __init__(
        self, step: CompiledStep, batch: InputBatch, max_tokens: int, max_decode_tokens: int, together: bool = False
    ) -> None:
        self.step = step
        self.batch = batch
        self.max_tokens = max_tokens
        self.max_decode_tokens = max_decode_tokens
        self.together = together
        num_slots = len(batch.epoch)
        self._epoch = np.zeros(num_slots, np.int64)
        self._computed = np.zeros(num_slots, np.int32)  # leading tokens of the slot whose keys and values are right
        self._drafted: dict[int, np.ndarray] = {}  # by slot: drafted behind these, and computed too
        self._last = np.zeros(0, np.int64)  # of the queries of the last catching up, the sampled ones

    def propose(self, at: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """counts[i] >= 1 tokens for slot at[i], int32 [R] -> int32 [R, K]; every token of the slots is known.

        The slots have blocks for their draft tokens; there are at most `max_decode_tokens` of them.
        """
        self._accept(at)
        known, ends = self.batch.known[at], self._ends(at, counts)
        first = self._catch_up(at)
        done = int(ends.min()) if first.num_seqs == len(at) == first.num_tokens else 1
        tickets = [(slice(0, done), np.arange(len(at)), self.step.launch(first, done))]
        for end in np.unique(ends[ends > done]).tolist():
            which = np.flatnonzero(ends >= end)
            ticket = self.step.launch(self._next(at[which], known[which] + np.int32(done - 1)), end - done)
            tickets.append((slice(done, end), which, ticket))
            done = end
        self._computed[at] = known
        tokens = np.zeros((len(at), done), np.int32)
        for places, which, ticket in tickets:
            sampled = ticket.wait().token_ids
            tokens[which, places] = (sampled if places.start else sampled[self._last]).reshape(len(which), -1)
        for slot, drafted, end in zip(at.tolist(), tokens, ends.tolist()):
            self._drafted[slot] = drafted[: end - 1]
        return tokens

    def _ends(self, at: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How many tokens each slot makes: its own count, or with the others as many as any, where its blocks will do."""
        if not self.together:
            return counts
        batch = self.batch
        room = np.minimum(batch.num_blocks[at] * batch.block_size, batch.max_len[at]) - batch.known[at]
        return np.maximum(counts, np.minimum(counts.max(), room + 1))  # the last is not computed

    def _next(self, at: np.ndarray, starts: np.ndarray) -> StepInput:
        """A token more for each slot, behind the one that it has just sampled."""
        batch, seqs = self.batch, len(at)
        return StepInput(
            np.full(seqs, -1, np.int32), at, np.arange(seqs + 1, dtype=np.int32), starts, np.ones(seqs, bool), _NO_BLOCKS,
            batch.sampling.of(at, penalties=False),
        )  # fmt: skip

    def _accept(self, at: np.ndarray) -> None:
        """Keep what was computed for accepted draft tokens."""
        batch = self.batch
        new = at[self._epoch[at] != batch.epoch[at]]
        self._epoch[at], self._computed[new] = batch.epoch[at], 0
        for slot in new.tolist():
            self._drafted.pop(slot, None)
        for slot in at.tolist():
            if (drafted := self._drafted.pop(slot, None)) is not None:
                computed = int(self._computed[slot])
                came = batch.tokens[slot, computed : min(int(batch.known[slot]), computed + len(drafted))]
                differs = np.flatnonzero(came != drafted[: len(came)])
                self._computed[slot] = computed + (differs[0] if len(differs) else len(came))
        # The last token is computed again where need be: its logits are wanted.
        self._computed[at] = np.minimum(self._computed[at], batch.known[at] - 1)

    def _catch_up(self, at: np.ndarray) -> StepInput:
        """The step that samples behind the last known token of each slot, after those that it takes to get there."""
        batch = self.batch
        while (missing := batch.known[at] - self._computed[at]).sum() > self.max_tokens:
            # All but the last token of some slots, as many as a step takes.
            wanted = np.minimum(missing - 1, np.maximum(self.max_tokens - np.cumsum(missing - 1) + missing - 1, 0))
            part = wanted > 0
            self.step.launch(self._chunk(at[part], wanted[part], sampled=False))
            self._computed[at[part]] += wanted[part]
        return self._chunk(at, missing, sampled=True)

    def _chunk(self, at: np.ndarray, counts: np.ndarray, sampled: bool) -> StepInput:
        """The next counts[i] tokens of the slots; a few as queries of one token, which steps of draft tokens are made
        of too.
        """
        batch = self.batch
        total = int(counts.sum())
        if total <= self.max_decode_tokens:
            index = np.repeat(np.arange(len(at)), counts)
            last = np.cumsum(counts) - 1
            starts = self._computed[at][index] + np.arange(total) - (last - counts + 1)[index]
            query_start, draws = np.arange(total + 1), np.zeros(total, bool)
        else:
            index, last, starts = np.arange(len(at)), np.arange(len(at)), self._computed[at]
            query_start, draws = np.concatenate([[0], np.cumsum(counts)]), np.zeros(len(at), bool)
        draws[last] = sampled
        self._last = last
        query_slots = at[index]
        token_slots = np.repeat(at, counts)
        positions = (
            np.repeat(self._computed[at], counts) + np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        )
        return StepInput(
            batch.tokens[token_slots, positions], query_slots, query_start.astype(np.int32), starts.astype(np.int32), draws,
            batch.take_new_blocks(),
            batch.sampling.of(query_slots, filters=sampled, penalties=False),
        )  # fmt: skip


_NO_BLOCKS = np.empty((0, 3), np.int32)
