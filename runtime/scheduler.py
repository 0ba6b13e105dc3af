"""Which tokens of which sequences the next step computes, and what its results mean.

There are no phases: a sequence has `computed` tokens chasing `total`, and one ragged step mixes prefill chunks
and decodes. Scheduling uses counts only, so a step can be planned while the one before is still running.
Pages are freed at once even then: the device runs steps in order. Knows no clock, device, text or socket.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field, replace
from itertools import count

from compiler.step_input import StepLogprobs, StepOutput
from runtime.blocks import BlockPool
from runtime.pace import Pace
from runtime.protocol import TokenDelta, TokenLogprob
from runtime.request import Sequence, State


@dataclass(frozen=True, slots=True)
class Entry:
    """Tokens [start, start + count) of a sequence in a step; `sampled` if the last of them yields a new token."""

    sequence: Sequence
    start: int
    count: int
    sampled: bool
    restarts: bool  # the first entry of a sequence in its row


Plan = list[Entry]


@dataclass(slots=True)
class Counters:
    """Running totals. Prefix counts are in tokens and leave re-admissions after preemption out."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Counters:
        return replace(self, finished=dict(self.finished))


class Scheduler:
    """Owns the queue, the running set and the rows."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
        pace: Pace | None = None,
    ) -> None:
        capacity = (pool.num_blocks - 1) * pool.block_size
        if max_model_len > capacity:
            raise ValueError(
                f"max_model_len {max_model_len} exceeds the KV cache of {pool.num_blocks - 1} pages x {pool.block_size} "
                f"tokens = {capacity}; set max_model_len to at most {capacity} or raise num_blocks or kv_cache_memory"
            )
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens {max_num_batched_tokens} is below max_model_len {max_model_len} with "
                f"enable_chunked_prefill off; set it to at least {max_model_len}, or turn chunked prefill on"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.pace = pace
        self.counters = Counters()
        self._waiting: list[tuple[int, float, int, Sequence]] = []  # by (priority, arrival, order of addition)
        self._running: list[tuple[int, float, int, Sequence]] = []
        self._places: dict[str, tuple[int, float, int, Sequence]] = {}  # every live sequence by id
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._order = count()
        # Room kept for running sequences to grow when a new one is admitted beside them.
        self._watermark = max(1, pool.num_blocks // 100)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError if the pool could never hold it or its id is in use."""
        if sequence.request_id in self._places:
            raise ValueError(f"request id {sequence.request_id} is already in use")
        if not sequence.tokens or len(sequence.tokens) >= sequence.max_model_len:
            raise ValueError(
                f"the prompt has {len(sequence.tokens)} tokens; it needs 1 to {sequence.max_model_len - 1} "
                f"(max_model_len {sequence.max_model_len})"
            )
        place = (sequence.priority, sequence.arrival, next(self._order), sequence)
        self._places[sequence.request_id] = place
        insort(self._waiting, place)

    def abort(self, request_id: str, reason: str = "abort") -> bool:
        """End a live sequence and free its pages; False if there is none of that id."""
        place = self._places.get(request_id)
        if place is None:
            return False
        self._finish(place[3], reason)
        return True

    def fail(self, plan: Plan, reason: str = "error") -> list[str]:
        """End what a failed step touched -> the ids ended. Its KV is unknown: the prefix cache is emptied too."""
        touched = {place[3].request_id for place in self._running}
        touched |= {entry.sequence.request_id for entry in plan if entry.sequence.state is not State.FINISHED}
        for request_id in touched:
            self.abort(request_id, reason)
        self.pool.forget_all()
        return sorted(touched)

    def schedule(self, now: float) -> Plan | None:
        """The next step, or None if no sequence can take one. `now` is kept for policies that need it."""
        plan: Plan = []
        budget = self.max_num_batched_tokens
        decodes = sum(self._is_decode(place[3]) for place in self._running)
        prefill_budget = self._prefill_budget(decodes)
        preempted_before = self.counters.preemptions
        for place in list(self._running):
            sequence = place[3]
            if sequence.state is not State.RUNNING or sequence.at_length_limit:
                continue
            limit = budget if self._is_decode(sequence) else min(budget, prefill_budget)
            tokens = self._chunk(sequence, limit)
            if not tokens or not self._grow(sequence, sequence.computed + tokens):
                continue
            if not self._is_decode(sequence):
                prefill_budget -= tokens
            budget -= tokens
            plan.append(self._take(sequence, tokens))
        if self.counters.preemptions == preempted_before:
            self._admit(plan, budget, prefill_budget)
        return plan or None

    def commit(self, plan: Plan, output: StepOutput) -> list[TokenDelta]:
        """Append what a step sampled; sequences that stop free their pages. Deltas in the order of the plan."""
        deltas = []
        for index, entry in enumerate(plan):
            sequence = entry.sequence
            if not entry.sampled or sequence.state is State.FINISHED:
                continue
            sequence.in_flight -= 1
            token = int(output.token_ids[index])
            reason = sequence.append(token)
            self.counters.generated_tokens += 1
            delta = TokenDelta(
                sequence.request_id,
                [token],
                reason,
                sequence.stop_reason,
                sequence.cached_tokens,
                _logprobs(sequence, index, token, output.logprobs),
            )
            if reason:
                self._finish(sequence, reason)
            elif sequence.state is State.RUNNING:
                self._register(sequence)
            deltas.append(delta)
        return deltas

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, rows and states fit together."""
        running = [place[3] for place in self._running]
        self.pool.check_integrity([sequence.blocks for sequence in running])
        rows = [sequence.row for sequence in running]
        assert sorted(rows + self._rows) == list(range(self.max_num_seqs)), "rows are lost or held twice"
        assert all(s.state is State.RUNNING and s.in_flight >= 0 for s in running)
        for place in self._waiting:
            sequence = place[3]
            assert sequence.state in (State.WAITING, State.PREEMPTED) and not sequence.blocks and sequence.row < 0
        for sequence in running:
            assert sequence.computed <= sequence.total
            assert len(sequence.blocks) * self.pool.block_size >= sequence.computed
        assert self._places.keys() == {place[3].request_id for place in [*self._running, *self._waiting]}

    @staticmethod
    def _is_decode(sequence: Sequence) -> bool:
        return sequence.total - sequence.computed == 1

    def _prefill_budget(self, decodes: int) -> int:
        if self.pace is None or not decodes:
            return self.max_num_batched_tokens
        beside = self.pace.prefill_tokens_beside(decodes)
        if beside is None:
            return self.max_num_batched_tokens
        return max(beside, self.pool.block_size)  # a page at least: prompts always get on

    def _chunk(self, sequence: Sequence, limit: int) -> int:
        """Tokens of the sequence that fit the limit; all or none where prompts are not split."""
        wanted = sequence.total - sequence.computed
        if not self.enable_chunked_prefill and wanted > limit:
            return 0
        return max(min(wanted, limit), 0)

    def _take(self, sequence: Sequence, tokens: int, restarts: bool = False) -> Entry:
        start = sequence.computed
        sampled = start + tokens == sequence.total
        entry = Entry(sequence, start, tokens, sampled, restarts)
        self.counters.prompt_tokens += max(min(start + tokens, sequence.num_prompt) - start, 0)
        sequence.computed += tokens
        sequence.in_flight += sampled
        # A later step, or a later sequence of this one, reads these pages after they are written.
        self._register(sequence)
        return entry

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the running sequence pages for `tokens` tokens, preempting the last running ones if need be."""
        missing = self._pages(tokens) - len(sequence.blocks)
        while missing > self.pool.num_free:
            victim = self._running[-1][3]
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.blocks += self.pool.take(missing)
        return True

    def _admit(self, plan: Plan, budget: int, prefill_budget: int) -> None:
        """Start waiting sequences in order while budget, rows and pages for their whole prompts last."""
        while self._waiting and self._rows and budget > 0 and prefill_budget > 0:
            place = self._waiting[0]
            sequence = place[3]
            if sequence.in_flight:  # its last sample before preemption is still to come
                return
            hits = self._hits(sequence)
            needed = self._pages(sequence.total) - len(hits)
            reserve = self._watermark if self._running else 0
            if needed + reserve > self.pool.num_free - self.pool.num_free_among(hits):
                return
            cached = len(hits) * self.pool.block_size
            limit = min(budget, prefill_budget)
            wanted = sequence.total - cached
            if not self.enable_chunked_prefill and wanted > limit and plan:
                return
            tokens = min(wanted, limit) if self.enable_chunked_prefill else wanted
            self._start(place, hits, needed)
            plan.append(self._take(sequence, tokens, restarts=True))
            budget -= tokens
            prefill_budget -= tokens

    def _start(self, place: tuple[int, float, int, Sequence], hits: list[int], needed: int) -> None:
        sequence = place[3]
        self._waiting.pop(0)
        self.pool.share(hits)
        sequence.blocks = hits + self.pool.take(needed)
        sequence.computed = len(hits) * self.pool.block_size
        sequence.num_registered = len(hits)
        sequence.row = self._rows.pop()
        if sequence.state is State.WAITING:
            if self.pool.enable_caching:
                self.counters.prefix_queries += sequence.num_prompt
                self.counters.prefix_hits += sequence.computed
            sequence.cached_tokens = sequence.computed
        sequence.state = State.RUNNING
        insort(self._running, place)

    def _hits(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix; one token at least is left to compute."""
        if not self.pool.enable_caching:
            return []
        full = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_hashes(sequence, full)
        return self.pool.lookup(sequence.hashes[:full])

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        size = self.pool.block_size
        for block in range(len(sequence.hashes), num_blocks):
            parent = sequence.hashes[-1] if sequence.hashes else b""
            salt = "" if block else sequence.cache_salt
            tokens = sequence.tokens[block * size : (block + 1) * size]
            sequence.hashes.append(self.pool.hash_block(parent, tokens, salt))

    def _register(self, sequence: Sequence) -> None:
        """Publish blocks that are full of known tokens whose KV is computed or under way."""
        if not self.pool.enable_caching:
            return
        full = min(len(sequence.tokens), sequence.computed) // self.pool.block_size
        if full > sequence.num_registered:
            self._extend_hashes(sequence, full)
            for block in range(sequence.num_registered, full):
                self.pool.register(sequence.blocks[block], sequence.hashes[block])
            sequence.num_registered = full

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with its outputs as prompt; what is in flight still arrives."""
        place = self._places[sequence.request_id]
        self._leave_running(sequence)
        sequence.state = State.PREEMPTED
        sequence.computed = 0
        self.counters.preemptions += 1
        insort(self._waiting, place)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.state is State.RUNNING:
            self._leave_running(sequence)
        else:
            self._waiting.remove(self._places[sequence.request_id])
        del self._places[sequence.request_id]
        sequence.state = State.FINISHED
        sequence.finish_reason = reason
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _leave_running(self, sequence: Sequence) -> None:
        self._running.remove(self._places[sequence.request_id])
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_registered = 0
        self._rows.append(sequence.row)
        sequence.row = -1

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)


def _logprobs(sequence: Sequence, index: int, token: int, step: StepLogprobs | None) -> list[TokenLogprob] | None:
    wanted = sequence.params.logprobs
    if wanted is None or step is None:
        return None
    return [
        TokenLogprob(
            token,
            float(step.chosen[index]),
            int(step.ranks[index]),
            step.top_ids[index, :wanted].tolist(),
            step.top_values[index, :wanted].tolist(),
        )
    ]
