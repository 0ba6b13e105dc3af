"""The scheduler: which tokens of which sequences the next step computes, and what its results mean for who runs.

There are no phases: a sequence has `computed` tokens chasing `total`, and one ragged step mixes prefill chunks and
decodes. Scheduling uses counts only, so a step can be planned while those before it are still running. Blocks are freed
at once even then: the device runs steps in order. Running sequences are handled as columns of
`runtime.scheduler.input_batch`; only sequences that start, end, are in their prompt or lack blocks are handled one by
one. Knows no clock, device, text or socket; which blocks hold what, `runtime.scheduler.block_tables` knows.
"""

from __future__ import annotations

from collections import Counter
from itertools import count

import numpy as np

from pagegraph.compiler.step.inputs import StepOutput
from pagegraph.runtime.sampling_params import check_length
from pagegraph.runtime.scheduler.block_pool import BlockPool, require
from pagegraph.runtime.scheduler.block_tables import BlockTables
from pagegraph.runtime.scheduler.chunk_limit import Backlog, ChunkLimit
from pagegraph.runtime.scheduler.commit import StepResult, append
from pagegraph.runtime.scheduler.counters import Counters
from pagegraph.runtime.scheduler.draft_tokens import DraftTokens, as_queries
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.plan import Columns, Plan, joined
from pagegraph.runtime.scheduler.prefill_budget import PrefillBudget
from pagegraph.runtime.scheduler.running import Running
from pagegraph.runtime.scheduler.sequence import Sequence, State, place_of
from pagegraph.runtime.scheduler.sizes import check_sizes
from pagegraph.runtime.scheduler.state_snapshots import StateSnapshots
from pagegraph.runtime.scheduler.waiting import Waiting

LOOK_AHEAD = 8  # decode steps for which a sequence takes blocks at once, while there are plenty
LOOK_PAST = 16  # waiting prompts that admission passes over to find one that ends in the step
HASH_PAST = 256  # blocks of such a prompt that are hashed to learn how much of it the prefix cache holds


class Scheduler:
    """Owns the queue, the running set, their slots and blocks.

    A preempted sequence stays in its slot, without blocks, until the samples in flight have arrived.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
        chunk_limit: ChunkLimit | None = None,
        max_decode_tokens: int | None = None,
        snapshots: StateSnapshots | None = None,
    ) -> None:
        """`chunk_limit`: of prompts beside decodes; None: there is none. `max_decode_tokens`: sequences and draft tokens in
        one step; None: `max_num_seqs`. `snapshots`: of recurrent states, if the model's layers keep such.
        """
        check_sizes(pool, max_num_seqs, max_num_batched_tokens, max_model_len, enable_chunked_prefill)
        self.max_num_seqs = max_num_seqs
        self.max_decode_tokens = max_decode_tokens or max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.chunk_limit = chunk_limit
        self.counters = Counters()
        self.batch = InputBatch(max_num_seqs, max_model_len, pool.block_size)
        self.snapshots = snapshots
        self.block_tables = BlockTables(pool, self.batch, snapshots)
        self._running = Running(self.batch)
        self._waiting = Waiting(self._running.by_asker)
        self._live: dict[tuple[int, str], Sequence] = {}  # waiting and running, by key
        self._draining: set[int] = set()  # slots of preempted sequences
        self._order = count()
        self._starting: Sequence | None = None  # on its way from the queue into a slot
        self.alone: Sequence | None = None  # if given, nobody else starts

    @property
    def live(self) -> list[Sequence]:
        """All that wait or run, in order."""
        return sorted(self._live.values(), key=place_of)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Of their prompts, what the prefix cache may hold of them too."""
        return self._waiting.num_tokens

    def waiting_of(self, asker: str) -> tuple[int, int]:
        """Sequences of one asker that wait, and the tokens of their prompts."""
        return self._waiting.of(asker)

    def num_generated(self, sequence: Sequence) -> int:
        """Tokens that a sequence has generated so far, wherever it is."""
        return (
            sequence.num_generated if sequence.slot < 0 else int(self.batch.known[sequence.slot]) - sequence.num_prompt
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError if the pool could never hold it or its id is in use."""
        if sequence.key in self._live:
            raise ValueError(f"request id {sequence.request_id} is already in use")
        if sequence.max_model_len > self.max_model_len:
            pool = self.block_tables.pool
            raise ValueError(
                f"the sequence may grow to {sequence.max_model_len} tokens, past max_model_len {self.max_model_len}; "
                f"the KV cache holds {pool.capacity} (num_blocks {pool.num_blocks} x block_size "
                f"{pool.block_size}, block 0 being the null block): raise num_blocks or kv_cache_memory"
            )
        no_output = 0 if sequence.params.max_tokens == 0 else None
        check_length(len(sequence.tokens), sequence.max_model_len, max_tokens=no_output)
        sequence.order = next(self._order)
        self._waiting.join(sequence)
        self._live[sequence.key] = sequence

    def abort(self, key: tuple[int, str], reason: str = "abort") -> Sequence | None:
        """End a live sequence and free its blocks -> the sequence; None if there is none of that key."""
        sequence = self._live.get(key)
        if sequence is not None:
            sequence.finish_reason = reason
            self._finish(sequence)
        return sequence

    def room_for_drafts(
        self, most: int, lag: int | None = 0, takes_blocks: bool = True
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """(slots that may be given draft tokens, at most how many each, how many in all), with blocks taken for them.

        They decode, ask for no penalties (penalty counts include accepted tokens only) and are past min_tokens (which the
        host enforces). At most `lag` of their tokens are not on the host yet. None: however many; the device proposes,
        the host need not know the tokens, and so no grammar could check them. The draft tokens go to the next
        `schedule`; without `takes_blocks` this only looks ahead.
        """
        batch, slots = self.batch, self._running.fixed().slots
        known, total = batch.known[slots], batch.total[slots]
        ready = (
            (batch.computed[slots] == total - 1)
            & (known >= batch.min_len[slots])
            & (batch.computed[slots] >= batch.num_prompt[slots])
        )
        if lag is not None:
            ready &= known >= total - lag
        else:
            ready &= ~batch.sampling.has_grammar[slots]
        slots = slots[ready & ~batch.sampling.has_penalties[slots]]
        limits = np.minimum(batch.max_len[slots] - batch.total[slots] - 1, most)
        slots, limits = slots[limits > 0], limits[limits > 0]
        # Those that wait may join the step, and prompts get half of what it may compute.
        budget = self.max_decode_tokens - min(self.max_num_seqs, len(self._running) + len(self._waiting))
        budget = min(budget, (self.max_num_batched_tokens - len(self._running)) // 2)
        if not self.enable_chunked_prefill and self._waiting:
            budget = 0
        if budget <= 0 or not len(slots) or not takes_blocks:
            return slots, limits, max(budget, 0)
        if not self.block_tables.extend(
            slots, batch.total[slots] + limits, spare=len(slots) + self.block_tables.watermark
        ):
            limits = np.minimum(limits, batch.num_blocks[slots] * batch.block_size - batch.total[slots])
            slots, limits = slots[limits > 0], limits[limits > 0]
        return slots, limits, budget

    def schedule(self, draft_tokens: DraftTokens | None = None) -> Plan | None:
        """The next step, or None if no sequence can take one.

        The step verifies `draft_tokens`, which are within what `room_for_drafts` has just said. Until it is committed, the
        counts of their slots take all of them for accepted.
        """
        self._vacate_drained()
        if self.snapshots is not None:
            self.snapshots.begin_step()
        preemptions = self.counters.preemptions
        columns, budget = self._continue(draft_tokens)
        parts = [columns] if len(columns[0]) else []
        started: list[Sequence] = []
        if self._waiting and self.counters.preemptions == preemptions:
            self._admit(parts, started, budget)
            self._starting = None
        if budget.long >= 0:
            self._fill_up(parts, budget)
        drafts = None
        if draft_tokens is not None and len(columns[0]):
            parts[0], drafts = as_queries(columns, draft_tokens)
        if not parts:
            return None
        return joined(parts, started, drafts, () if self.snapshots is None else self.snapshots.take_copies())

    def commit(self, plan: Plan, output: StepOutput) -> StepResult:
        """Append what a step sampled; plans come in the order they were scheduled.

        Those that ended by it keep their slots and blocks until `finish`. If it raises, nothing was appended.
        """
        result = append(self.batch, self._running, plan, output)
        self.counters.count(result)
        return result

    def finish(self, result: StepResult) -> None:
        """Free the slots and blocks of those that ended."""
        for sequence in result.ended:
            if sequence.state is not State.FINISHED:
                self._finish(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue with its outputs as prompt; what is in flight still arrives."""
        self._leave_running(sequence)
        sequence.state = State.PREEMPTED
        sequence.num_preemptions += 1
        self.counters.preemptions += 1
        self._waiting.join(sequence)
        self._draining.add(sequence.slot)

    def restart(self) -> list[Sequence]:
        """Begin anew after an exception, in whatever state it left this -> those it may have to do with, in order.

        Everyone waits, with the tokens that were committed, but for those that have their finish reason: they have
        ended. Slots and blocks are empty, and so is the prefix cache, for what a failed step wrote nobody knows. What
        is in flight must not be committed any more.
        """
        touched = [s for s in self.live if s.slot >= 0 or s is self._starting]
        for sequence in touched:
            if sequence.slot >= 0:
                self.counters.preemptions += sequence.state is State.RUNNING
                sequence.num_preemptions += sequence.state is State.RUNNING
                sequence.state = State.PREEMPTED
                self.batch.leave(sequence.slot)
            sequence.prefix.num_registered = 0
        for sequence in self._live.values():
            if sequence.finish_reason:
                sequence.state = State.FINISHED
        self._live = {key: sequence for key, sequence in self._live.items() if not sequence.finish_reason}
        self._running = Running(self.batch)
        self._waiting = Waiting(self._running.by_asker, self.live)
        self._draining.clear()
        self._starting = self.alone = None
        self.batch.clear()
        self.block_tables.pool.clear()
        if self.snapshots is not None:
            self.snapshots.clear()
        return touched

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, slots, states and the prefix cache fit together."""
        batch, running = self.batch, list(self._running)
        self.block_tables.check_integrity(running)
        held = sorted([sequence.slot for sequence in running] + list(self._draining))
        require(held == np.flatnonzero(batch.epoch).tolist(), "slots are lost or held twice")
        require(len(held) + batch.num_free == self.max_num_seqs, "slots are lost")
        for queue in (*self._waiting.lines, running):
            require(queue == sorted(queue, key=place_of), "a queue is out of order")
        require(
            +self._running.by_asker == Counter(s.asker for s in running), "askers' running sequences are miscounted"
        )
        require(self._live == {s.key: s for s in [*running, *self._waiting]}, "a sequence is lost")
        for sequence in self._waiting:
            require(sequence.state in (State.WAITING, State.PREEMPTED), "a waiting sequence is in another state")
            require(sequence.slot < 0 or sequence.slot in self._draining, "a waiting sequence holds a slot")
        for slot in self._draining:
            require(not batch.num_blocks[slot], "a draining slot holds blocks")
        for sequence in running:
            slot = sequence.slot
            require(
                sequence.state is State.RUNNING and batch.sequences[slot] is sequence,
                "a running sequence is in another state",
            )
            require(sequence.num_prompt <= batch.known[slot] <= batch.total[slot], "tokens are lost")
            require(batch.computed[slot] <= batch.total[slot] <= sequence.max_len, "a sequence runs past its end")

    def _continue(self, draft_tokens: DraftTokens | None) -> tuple[Columns, PrefillBudget]:
        """What the running sequences get, draft tokens too, and the prompt tokens left for others."""
        if draft_tokens is None and (plain := self._continue_all()) is not None:
            return plain, self._prefill_budget(len(plain[0]), plain[0][:0])
        num_draft_tokens = None if draft_tokens is None else draft_tokens.of_slots(self.max_num_seqs)
        slots, counts, budget = self._wanted(num_draft_tokens)
        slots, counts = self._grow(slots, counts)
        return self._advance(slots, counts, num_draft_tokens), budget

    def _continue_all(self) -> Columns | None:
        """The commonest step, a token of every running sequence, all with room for it; else None.

        What `_wanted`, `_grow` and `_advance` would come to, with fewer looks.
        """
        batch, fixed = self.batch, self._running.fixed()
        slots = fixed.slots
        starts, total = batch.computed[slots], batch.total[slots]
        ends = starts + 1
        plain = (ends == total) & (total < fixed.max_len) & (starts >= fixed.num_prompt)
        if not len(slots) or not (plain & (ends <= batch.num_blocks[slots] * batch.block_size)).all():
            return None
        batch.computed[slots] = ends
        batch.total[slots] = ends + 1
        return slots, fixed.epochs, starts, self._running.ones, self._running.trues

    def _wanted(self, num_draft_tokens: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, PrefillBudget]:
        """Slots of the running and how many tokens each may compute, draft tokens too, and the prompt tokens left for
        others.

        num_draft_tokens: int32, by slot.
        """
        batch, fixed = self.batch, self._running.fixed()
        slots = fixed.slots
        # A sequence that may end within the draft tokens in flight waits for their verification; one without output
        # ends with its prompt.
        growing = (batch.total[slots] < fixed.max_len) | (fixed.max_len == fixed.num_prompt)
        if not growing.all():
            slots = slots[growing]
        counts = batch.total[slots] - batch.computed[slots]
        prefills = np.flatnonzero(counts > 1)
        decodes = len(slots) - len(prefills) + (0 if num_draft_tokens is None else int(num_draft_tokens.sum()))
        budget = self._prefill_budget(decodes, slots[prefills])
        for i in prefills.tolist():
            wanted = self._up_to_border(batch.sequences[slots[i]], int(batch.computed[slots[i]]), int(counts[i]))
            counts[i] = tokens = budget.offer(wanted)
            budget.take(int(slots[i]), wanted, tokens)
        if num_draft_tokens is not None:
            counts += num_draft_tokens[slots]
        return (slots[counts > 0], counts[counts > 0], budget) if counts.min(initial=1) < 1 else (slots, counts, budget)

    def _up_to_border(self, sequence: Sequence, computed: int, wanted: int) -> int:
        """Of `wanted` tokens behind the computed ones, those that a chunk may hold: it ends where a state is to be kept."""
        if self.snapshots is None or not self.enable_chunked_prefill:
            return wanted
        return self.snapshots.wanted(sequence, computed, wanted)

    def _publish(self, sequence: Sequence) -> None:
        """A chunk of its prompt is planned."""
        self.block_tables.publish(sequence)
        if self.snapshots is not None:
            self.snapshots.advanced(sequence, int(self.batch.computed[sequence.slot]))

    def _prefill_budget(self, decodes: int, prefills: np.ndarray) -> PrefillBudget:
        """Prompt tokens the step may take: what decodes leave, less where a chunk beside them would slow them.

        prefills: slots of prompts that run, in order.
        """
        batch, left = self.batch, max(self.max_num_batched_tokens - decodes, 0)
        if (
            self.chunk_limit is not None
            and decodes
            and self.enable_chunked_prefill
            and (len(prefills) or self._waiting)
        ):
            wanted = batch.total[prefills] - batch.computed[prefills]
            first = int(wanted[0]) if len(prefills) else self._waiting.first(1)[0].num_prompt
            depth = int(batch.computed[prefills[0]]) if len(prefills) else 0
            tokens = int(wanted.sum()) + self._waiting.num_tokens - first
            backlog = Backlog(len(prefills) + len(self._waiting) - 1, tokens)
            left = self.chunk_limit.prompt_tokens(left, decodes, depth, backlog)
        return PrefillBudget(left, self.enable_chunked_prefill)

    def _grow(self, slots: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give running slots blocks for `counts` more tokens, preempting the last running ones until they suffice.

        Returns the slots that are left, all with the blocks they need.
        """
        batch = self.batch
        ends = batch.computed[slots] + counts
        if (ends <= batch.num_blocks[slots] * batch.block_size).all():
            return slots, counts
        ahead = np.minimum(ends + LOOK_AHEAD, batch.max_len[slots])
        if self.block_tables.extend(slots, ahead, spare=len(slots) + self.block_tables.watermark):
            return slots, counts
        while not self.block_tables.extend(slots, batch.computed[slots] + counts):
            victim = self._running.last
            left = slots != victim.slot
            slots, counts = slots[left], counts[left]
            self.preempt(victim)
        return slots, counts

    def _advance(self, slots: np.ndarray, counts: np.ndarray, num_draft_tokens: np.ndarray | None = None) -> Columns:
        """Count the tokens as computed and publish full blocks -> the columns of a plan."""
        batch = self.batch
        starts = batch.computed[slots]
        ends = starts + counts
        batch.computed[slots] = ends
        draft_tokens = 0 if num_draft_tokens is None else num_draft_tokens[slots]
        sampled = (ends == batch.total[slots] + draft_tokens) & (batch.total[slots] < batch.max_len[slots])
        batch.total[slots] += np.where(sampled, draft_tokens + 1, 0)
        for slot in slots[starts < batch.num_prompt[slots]].tolist():
            self._publish(batch.sequences[slot])
        return slots, batch.epoch[slots], starts, counts, sampled

    def _admit(self, parts: list[Columns], started: list[Sequence], budget: PrefillBudget) -> None:
        """Start waiting sequences in order while prompt tokens, slots and blocks for their whole prompts last.

        Behind a long prompt those start that end within what it leaves. The first that lacks blocks ends it, though:
        blocks that others took would come back only when they end, so the one that needs many would starve.
        """
        passed = 0
        for sequence in self._next_in_line():
            if not self.batch.num_free or not budget.tokens or passed == LOOK_PAST:
                return
            if sequence.slot >= 0:  # its samples from before a preemption are still to come
                return
            self._starting, tokens = sequence, 0
            if not passed or self._may_end(sequence, budget):
                found = self.block_tables.find(sequence)
                computed = len(found) * self.batch.block_size
                wanted = self._up_to_border(sequence, computed, len(sequence.tokens) - computed)
                tokens = budget.offer(wanted)
            if not tokens:
                if not self.enable_chunked_prefill:
                    return
                passed += 1
                continue
            blocks = self.block_tables.claim(sequence, found, self.block_tables.watermark if len(self._running) else 0)
            if blocks is None:
                return
            slot = self._start(sequence, blocks, computed)
            parts.append(self._advance(np.array([slot], np.int32), np.array([tokens], np.int32)))
            started.append(sequence)
            budget.take(slot, wanted, tokens)

    def _next_in_line(self) -> list[Sequence]:
        """Those of the queue who may start in the next step, as far as it can get."""
        if self.alone is None:
            return self._waiting.first(self.batch.num_free + LOOK_PAST)
        return [] if self.alone.state is State.RUNNING else [self.alone]

    def _may_end(self, sequence: Sequence, budget: PrefillBudget) -> bool:
        """Whether a waiting prompt is worth a look in the cache for whether it ends within what is left."""
        unhashed = len(sequence.tokens) // self.batch.block_size - len(sequence.prefix.hashes)
        return budget.long < 0 or len(sequence.tokens) <= budget.tokens or unhashed <= HASH_PAST

    def _fill_up(self, parts: list[Columns], budget: PrefillBudget) -> None:
        """The long prompt of the step gets what nobody behind it took; it does not end by that either."""
        for slots, _, _, counts, _ in parts:
            for i in np.flatnonzero(slots == budget.long).tolist():
                counts[i] += budget.tokens
                self.batch.computed[budget.long] += budget.tokens
                self._publish(self.batch.sequences[budget.long])

    def _start(self, sequence: Sequence, blocks: list[int], computed: int) -> int:
        """Move a sequence of the queue into a slot, with `computed` tokens in its blocks already -> the slot."""
        slot = self.batch.enter(sequence, blocks, computed)
        if self.snapshots is not None:
            self.snapshots.entered(sequence, computed)
        self._waiting.leave(sequence)
        if sequence.state is State.WAITING:
            sequence.cached_tokens = computed
            sequence.cache_miss = self.block_tables.miss(sequence, computed, self._running)
            if self.block_tables.pool.enable_caching and not sequence.skip_reading_prefix_cache:
                self.counters.prefix_queries += sequence.num_prompt
                self.counters.prefix_hits += computed
        sequence.state = State.RUNNING
        self._running.join(sequence)
        return slot

    def _vacate_drained(self) -> None:
        for slot in [slot for slot in self._draining if self.batch.known[slot] == self.batch.total[slot]]:
            self._draining.remove(slot)
            self.batch.leave(slot)

    def _finish(self, sequence: Sequence) -> None:
        """It ends, for its `finish_reason`."""
        if sequence.state is State.RUNNING:
            self._leave_running(sequence)
        else:
            self._waiting.leave(sequence)
        if sequence.slot >= 0:
            self._draining.discard(sequence.slot)
            self.batch.leave(sequence.slot)
        del self._live[sequence.key]
        sequence.state = State.FINISHED

    def _leave_running(self, sequence: Sequence) -> None:
        self._running.leave(sequence)
        self.block_tables.release(sequence)
