"""Which tokens of which sequences the next step computes, and what its results mean.

There are no phases: a sequence has `computed` tokens chasing `total`, and one ragged step mixes prefill chunks
and decodes. Scheduling uses counts only, so a step can be planned while those before it are still running.
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
    """Running totals.

    Prefix counts are in tokens and leave re-admissions after preemption out; `prompt_tokens` counts what was
    computed, so hits are not in it and tokens computed again after a preemption are.
    """

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Counters:
        return replace(self, finished=dict(self.finished))


class Scheduler:
    """Owns the queue, the running set and the rows. Both lists are kept in the order of `Sequence.place`."""

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
        _check_sizes(pool, max_num_seqs, max_num_batched_tokens, max_model_len, enable_chunked_prefill)
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.pace = pace
        self.counters = Counters()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._live: dict[str, Sequence] = {}  # waiting and running, by request id
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._order = count()
        # Room kept for running sequences to grow when a new one is admitted beside them.
        self._watermark = max(1, pool.num_blocks // 100)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError if the pool could never hold it or its id is in use."""
        if sequence.request_id in self._live:
            raise ValueError(f"request id {sequence.request_id} is already in use")
        if sequence.max_model_len > self.max_model_len:
            raise ValueError(
                f"the sequence may grow to {sequence.max_model_len} tokens, past max_model_len {self.max_model_len}; "
                f"the KV cache holds {_capacity(self.pool)} (num_blocks {self.pool.num_blocks} x block_size "
                f"{self.pool.block_size}, block 0 being scrap): raise num_blocks or kv_cache_memory"
            )
        if not sequence.tokens or len(sequence.tokens) >= sequence.max_model_len:
            raise ValueError(
                f"the prompt has {len(sequence.tokens)} tokens; it needs 1 to {sequence.max_model_len - 1} "
                f"(max_model_len {sequence.max_model_len})"
            )
        sequence.order = next(self._order)
        self._live[sequence.request_id] = sequence
        insort(self._waiting, sequence, key=_place)

    def abort(self, request_id: str, reason: str = "abort") -> bool:
        """End a live sequence and free its pages; False if there is none of that id."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, reason)
        return True

    def fail(self, plan: Plan, reason: str = "error") -> list[str]:
        """End what a failed step touched -> the ids ended. Its KV is unknown: the prefix cache is emptied too."""
        touched = {sequence.request_id for sequence in self._running}
        touched |= {entry.sequence.request_id for entry in plan if entry.sequence.state is not State.FINISHED}
        for request_id in touched:
            self.abort(request_id, reason)
        self.pool.forget_all()
        return sorted(touched)

    def schedule(self, now: float) -> Plan | None:
        """The next step, or None if no sequence can take one. `now` is kept for policies that need it."""
        plan: Plan = []
        budget = self.max_num_batched_tokens
        prefill_budget = self._prefill_budget()
        preemptions = self.counters.preemptions
        for sequence in list(self._running):
            if sequence.state is not State.RUNNING or sequence.at_length_limit:
                continue
            decodes = sequence.is_decode
            tokens = 1 if decodes else self._chunk(sequence.total - sequence.computed, min(budget, prefill_budget))
            if not tokens or not self._grow(sequence, sequence.computed + tokens):
                continue
            budget -= tokens
            prefill_budget -= 0 if decodes else tokens
            plan.append(self._entry(sequence, tokens))
        if self.counters.preemptions == preemptions:
            self._admit(plan, min(budget, prefill_budget))
        return plan or None

    def commit(self, plan: Plan, output: StepOutput) -> list[TokenDelta]:
        """Append what a step sampled; sequences that stop free their pages. Deltas in the order of the plan.

        Plans are committed in the order they were scheduled. A sample past a stop is dropped here.
        """
        deltas = []
        ids = output.token_ids.tolist()
        for index, entry in enumerate(plan):
            sequence = entry.sequence
            if not entry.sampled or sequence.state is State.FINISHED:
                continue
            sequence.in_flight -= 1
            token = ids[index]
            reason = sequence.append(token)
            self.counters.generated_tokens += 1
            if reason:
                self._finish(sequence, reason)
            elif sequence.state is State.RUNNING:
                self._register(sequence)
            logprobs = _logprobs(sequence, index, token, output.logprobs)
            deltas.append(
                TokenDelta(
                    sequence.request_id, [token], reason, sequence.stop_reason, sequence.cached_tokens, logprobs
                )
            )
        return deltas

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, rows, states and the prefix cache fit together."""
        self.pool.check_integrity([sequence.blocks for sequence in self._running])
        rows = [sequence.row for sequence in self._running]
        _require(sorted(rows + self._rows) == list(range(self.max_num_seqs)), "rows are lost or held twice")
        for queue in (self._waiting, self._running):
            _require(queue == sorted(queue, key=_place), "a queue is out of order")
        _require(self._live == {s.request_id: s for s in [*self._running, *self._waiting]}, "a sequence is lost")
        for sequence in self._waiting:
            holds = len(sequence.blocks) or sequence.row >= 0 or sequence.computed
            _require(sequence.state in (State.WAITING, State.PREEMPTED) and not holds, "a waiting sequence holds pages")
        for sequence in self._running:
            self._check_running(sequence)

    def _prefill_budget(self) -> int:
        """Prompt tokens the step may take: what decodes leave, less where a chunk beside them would slow them."""
        decodes = sum(s.is_decode and not s.at_length_limit for s in self._running)
        left = self.max_num_batched_tokens - decodes
        if self.pace is None or not decodes or not self.enable_chunked_prefill:
            return left
        beside = self.pace.prefill_tokens_beside(decodes)
        # A page at least: prompts always get on.
        return left if beside is None else min(left, max(beside, self.pool.block_size))

    def _chunk(self, wanted: int, limit: int) -> int:
        """Of `wanted` tokens those that fit the limit; all or none where prompts are not split."""
        if wanted <= limit:
            return wanted
        return max(limit, 0) if self.enable_chunked_prefill else 0

    def _entry(self, sequence: Sequence, tokens: int, restarts: bool = False) -> Entry:
        start = sequence.computed
        end = start + tokens
        sampled = end == sequence.total
        if start < sequence.num_prompt:
            self.counters.prompt_tokens += min(end, sequence.num_prompt) - start
        sequence.computed = end
        sequence.in_flight += sampled
        # A later step, or a later sequence of this one, reads these pages after they are written.
        self._register(sequence)
        return Entry(sequence, start, tokens, sampled, restarts)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the running sequence pages for `tokens` tokens, preempting the last running ones if need be.

        False if it was itself the last. Victims stand behind it, so none of them is in the plan yet.
        """
        missing = self._pages(tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self.pool.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(self.pool.take(missing))
        return True

    def _admit(self, plan: Plan, budget: int) -> None:
        """Start waiting sequences in order while budget, rows and pages for their whole prompts last.

        The first that does not fit ends it: nothing overtakes a long prompt, so none starves.
        """
        while self._waiting and self._rows and budget > 0:
            sequence = self._waiting[0]
            if sequence.in_flight:  # its samples from before a preemption are still to come
                return
            hits = self._hits(sequence)
            needed = self._pages(sequence.total) - len(hits)
            reserve = self._watermark if self._running else 0
            tokens = self._chunk(sequence.total - len(hits) * self.pool.block_size, budget)
            if not tokens or needed + reserve > self.pool.num_free - self.pool.num_free_among(hits):
                return
            self._start(sequence, hits, needed)
            plan.append(self._entry(sequence, tokens, restarts=True))
            budget -= tokens

    def _start(self, sequence: Sequence, hits: list[int], needed: int) -> None:
        del self._waiting[0]
        self.pool.share(hits)
        sequence.blocks.extend(hits)
        sequence.blocks.extend(self.pool.take(needed))
        sequence.computed = len(hits) * self.pool.block_size
        sequence.num_registered = len(hits)
        sequence.row = self._rows.pop()
        if sequence.state is State.WAITING:
            sequence.cached_tokens = sequence.computed
            if self.pool.enable_caching:
                self.counters.prefix_queries += sequence.num_prompt
                self.counters.prefix_hits += sequence.computed
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_place)

    def _hits(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix; one token at least is left to compute."""
        if not self.pool.enable_caching:
            return []
        full = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_hashes(sequence, full)
        return self.pool.lookup(sequence.hashes[:full])

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        size, hashes = self.pool.block_size, sequence.hashes
        for block in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else self.pool.root_hash(sequence.cache_salt)
            hashes.append(self.pool.hash_block(parent, sequence.tokens[block * size : (block + 1) * size]))

    def _register(self, sequence: Sequence) -> None:
        """Publish blocks that are full of known tokens whose KV is computed or under way."""
        full = min(len(sequence.tokens), sequence.computed) // self.pool.block_size
        if full <= sequence.num_registered or not self.pool.enable_caching:
            return
        self._extend_hashes(sequence, full)
        for block in range(sequence.num_registered, full):
            self.pool.register(sequence.blocks[block], sequence.hashes[block])
        sequence.num_registered = full

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with its outputs as prompt; what is in flight still arrives."""
        self._leave_running(sequence)
        sequence.state = State.PREEMPTED
        self.counters.preemptions += 1
        insort(self._waiting, sequence, key=_place)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.state is State.RUNNING:
            self._leave_running(sequence)
        else:
            self._waiting.remove(sequence)
        del self._live[sequence.request_id]
        sequence.state = State.FINISHED
        sequence.finish_reason = reason
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _leave_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.pool.release(sequence.blocks)
        del sequence.blocks[:]
        sequence.computed = sequence.num_registered = 0
        self._rows.append(sequence.row)
        sequence.row = -1

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def _check_running(self, sequence: Sequence) -> None:
        _require(sequence.state is State.RUNNING and sequence.in_flight >= 0, "a running sequence is in another state")
        _require(sequence.computed <= sequence.total <= sequence.max_len, "a sequence runs past its end")
        _require(len(sequence.blocks) >= self._pages(sequence.computed), "tokens were computed without a page")
        _require(sequence.num_registered * self.pool.block_size <= sequence.computed, "unwritten pages are published")
        for index, block in enumerate(sequence.blocks):
            published = self.pool.hash_of(block)
            rightly = index < sequence.num_registered and published == sequence.hashes[index]
            _require(not published or rightly, f"block {block} is published as content that it does not hold")


def _check_sizes(
    pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, enable_chunked_prefill: bool
) -> None:
    """Raise ValueError for sizes under which some sequence could never run."""
    capacity = _capacity(pool)
    if max_model_len > capacity:
        raise ValueError(
            f"max_model_len {max_model_len} exceeds the KV cache of {pool.num_blocks - 1} pages x {pool.block_size} "
            f"tokens = {capacity}; set max_model_len to at most {capacity} or raise num_blocks or kv_cache_memory"
        )
    if max_num_seqs > max_num_batched_tokens:
        raise ValueError(
            f"max_num_seqs {max_num_seqs} exceeds max_num_batched_tokens {max_num_batched_tokens}: a step could not "
            f"hold one token of each; set max_num_seqs to at most {max_num_batched_tokens}"
        )
    if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
        raise ValueError(
            f"max_num_batched_tokens {max_num_batched_tokens} is below max_model_len {max_model_len} with "
            f"enable_chunked_prefill off; set it to at least {max_model_len}, or turn chunked prefill on"
        )


def _capacity(pool: BlockPool) -> int:
    """Tokens that the pool's pages hold, the scrap page left out."""
    return (pool.num_blocks - 1) * pool.block_size


def _place(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.place


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


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
