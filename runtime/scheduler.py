"""Which tokens of which sequences the next step computes, and what its results mean.

There are no phases: a sequence has `computed` tokens chasing `total`, and one ragged step mixes prefill chunks
and decodes. Scheduling uses counts only, so a step can be planned while those before it are still running.
Pages are freed at once even then: the device runs steps in order. Running sequences are handled as columns of
`runtime.rows`; only what starts, ends, fills a prompt or lacks pages is looked at one by one.
Knows no clock, device, text or socket.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from compiler.step_input import StepLogprobs, StepOutput
from runtime.blocks import BlockPool
from runtime.pace import Pace
from runtime.protocol import TokenDelta, TokenLogprob
from runtime.request import Sequence, State
from runtime.rows import Fixed, Rows
from runtime.verify import Guessed, Guesses, Verdict, entries, verdict


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: tokens [starts[i], starts[i] + counts[i]) of the sequence in row rows[i]; arrays [S], int32 unless said.

    A row with guesses has an entry for each of them (`runtime.verify`); any other row has one.
    """

    rows: np.ndarray
    stays: np.ndarray  # int64, of the row's sequence: another may be there when the step is done
    starts: np.ndarray
    counts: np.ndarray
    sampled: np.ndarray  # bool, whether the last of the tokens yields a new one
    started: list[Sequence]  # those that entered their row for this step
    guessed: Guessed | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


@dataclass(slots=True)
class Arrived:
    """What a step brought: token_ids[i], of several the last, to the sequence that was in row rows[i]; arrays [n]."""

    rows: np.ndarray  # int32
    token_ids: np.ndarray  # int32
    owners: np.ndarray  # int32
    request_ids: np.ndarray  # object: str
    deltas: dict[int, TokenDelta]  # by index, for those with more to tell than the token
    ended: list[Sequence]
    verdict: Verdict | None = None  # of the step's guesses


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
    drafts: int = 0  # times a row had guesses in a step
    guesses: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)  # accepted guesses by their place in the row, the first at 0
    saved_steps: int = 0  # tokens beyond the first of a sequence in one step
    guesses_a_row: float = 0.0  # in the last step that could have had any
    finished: dict[str, int] = field(default_factory=dict)


LOOK_AHEAD = 8  # steps of decoding for which pages are taken at once, while there are plenty


class Scheduler:
    """Owns the queue, the running set and the rows. Both lists are kept in the order of `Sequence.place`.

    A preempted sequence stays in its row, without pages, until the samples in flight have arrived.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
        pace: Pace | None = None,
        max_entries: int | None = None,
    ) -> None:
        """`max_entries`: sequences and guesses in one step; None: `max_num_seqs`."""
        _check_sizes(pool, max_num_seqs, max_num_batched_tokens, max_model_len, enable_chunked_prefill)
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_entries = max_entries or max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.pace = pace
        self.counters = Counters()
        self.rows = Rows(max_num_seqs, max_model_len, pool.block_size)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._fixed: Fixed | None = None  # of `_running`, while that does not change
        self._ones, self._trues = np.zeros(0, np.int32), np.zeros(0, bool)
        self._live: dict[tuple[int, str], Sequence] = {}  # waiting and running, by key
        self._draining: set[int] = set()  # rows of preempted sequences
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
        if sequence.key in self._live:
            raise ValueError(f"request id {sequence.request_id} is already in use")
        if sequence.max_model_len > self.max_model_len:
            raise ValueError(
                f"the sequence may grow to {sequence.max_model_len} tokens, past max_model_len {self.max_model_len}; "
                f"the KV cache holds {_capacity(self.pool)} (num_blocks {self.pool.num_blocks} x block_size "
                f"{self.pool.block_size}, block 0 being scrap): raise num_blocks or kv_cache_memory"
            )
        if not 0 < len(sequence.tokens) < sequence.max_model_len:
            raise ValueError(
                f"the prompt has {len(sequence.tokens)} tokens; it needs 1 to {sequence.max_model_len - 1} "
                f"(max_model_len {sequence.max_model_len})"
            )
        sequence.order = next(self._order)
        self._live[sequence.key] = sequence
        insort(self._waiting, sequence, key=_place)

    def abort(self, key: tuple[int, str], reason: str = "abort") -> Sequence | None:
        """End a live sequence and free its pages -> the sequence; None if there is none of that key."""
        sequence = self._live.get(key)
        if sequence is not None:
            self._finish(sequence, reason)
        return sequence

    def fail(self, plan: Plan, reason: str = "error") -> list[Sequence]:
        """End what a failed step touched -> the ended. Its KV is unknown: the prefix cache is emptied too."""
        still_there = plan.rows[self.rows.stay[plan.rows] == plan.stays]
        touched = sorted({*self._running, *self.rows.sequences[still_there].tolist()}, key=_place)
        for sequence in touched:
            self._finish(sequence, reason)
        self.pool.forget_all()
        return touched

    def room_for_guesses(self, most: int, lag: int | None = 0) -> tuple[np.ndarray, np.ndarray, int]:
        """(rows that may be given guesses, at most how many each, how many in all), with pages taken for them.

        They generate, ask for no penalties, whose counts know confirmed tokens only, are past min_tokens, which the host
        looks after, and all but `lag` of their tokens are on the host: with 0 they can be given to the next `schedule`; with
        more nothing is taken, it is a look ahead. None: the device knows the tokens, and the host need not.
        """
        r, rows = self.rows, self._running_fixed().rows
        known, total = r.known[rows], r.total[rows]
        ready = (r.computed[rows] == total - 1) & (known >= r.min_len[rows]) & (r.computed[rows] >= r.num_prompt[rows])
        if lag is not None:
            ready &= known >= total - lag
        rows = rows[ready & ~r.has_penalties[rows]]
        limits = np.minimum(r.max_len[rows] - r.total[rows] - 1, most)
        rows, limits = rows[limits > 0], limits[limits > 0]
        # Those that wait may join the step, and prompts get half of what it may compute.
        budget = self.max_entries - min(self.max_num_seqs, len(self._running) + len(self._waiting))
        budget = min(budget, (self.max_num_batched_tokens - len(self._running)) // 2)
        if not self.enable_chunked_prefill and self._waiting:
            budget = 0
        if budget <= 0 or not len(rows) or lag:
            return rows, limits, max(budget, 0)
        missing = self._missing(rows, r.total[rows] + limits)
        if wanted := int(missing.sum()):
            if wanted + len(rows) + self._watermark <= self.pool.num_free:
                short = np.flatnonzero(missing)
                r.add_blocks(rows[short], missing[short], self.pool.take(wanted))
            else:
                limits = np.minimum(limits, r.num_blocks[rows] * r.block_size - r.total[rows])
                rows, limits = rows[limits > 0], limits[limits > 0]
        return rows, limits, budget

    def schedule(self, now: float, guesses: Guesses | None = None) -> Plan | None:
        """The next step, or None if no sequence can take one. `now` is kept for policies that need it.

        `guesses` within what `room_for_guesses` has just said are verified in it. Until it is committed their rows count as
        if all of them held.
        """
        self._vacate_drained()
        preemptions = self.counters.preemptions
        guessed = None
        part = self._continue_all() if guesses is None else None
        if part is not None:
            parts, prefill_budget = [part], self._prefill_budget(len(part[0]))
        else:
            num_guesses = None if guesses is None else guesses.of_rows(self.max_num_seqs)
            rows, counts, prefill_budget = self._wanted(num_guesses)
            rows, counts = self._grow(rows, counts)
            parts = [self._advance(rows, counts, num_guesses)] if len(rows) else []
            if guesses is not None and parts:
                parts[0], guessed = entries(parts[0], guesses)
        started: list[Sequence] = []
        if self._waiting and self.counters.preemptions == preemptions:
            self._admit(parts, started, prefill_budget)
        if not parts:
            return None
        columns = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts)]
        if guessed is not None and len(parts) > 1:
            more = np.ones(len(columns[0]) - len(guessed.others), bool)
            guessed = replace(guessed, others=np.concatenate([guessed.others, more]))
        return Plan(*columns, started, guessed if guessed is not None and len(guessed.rows) else None)

    def commit(self, plan: Plan, output: StepOutput) -> Arrived:
        """Append what a step sampled; sequences that stop free their pages. In the order of the plan.

        Plans are committed in the order they were scheduled. Length is looked at before stop ids: a stop id that
        is also the last token allowed ends the sequence with "length". A sample past an end is dropped here.
        """
        r = self.rows
        rows, ids, index = plan.rows, output.token_ids, None
        wanted = plan.sampled & (r.stay[rows] == plan.stays)
        if plan.guessed is not None:
            wanted &= plan.guessed.others
        if not wanted.all():
            index = np.flatnonzero(wanted)
            rows, ids = rows[index], ids[index]
        fixed = self._fixed if self._fixed is not None and rows is self._fixed.rows else r.fixed(rows)
        known = r.known[rows] + 1
        r.tokens[rows, known - 1] = ids
        r.known[rows] = known
        self.counters.generated_tokens += len(rows)
        full = known >= fixed.max_len
        stopped = (fixed.stop_ids == ids[:, None]).any(axis=1) & (known > fixed.min_len) & ~full
        arrived = Arrived(rows, ids, fixed.owners, fixed.request_ids, {}, [])
        more = full | stopped | (known == fixed.num_prompt + 1)
        if output.logprobs is not None:
            more |= r.has_extras[rows]
        for i in np.flatnonzero(more).tolist():
            sequence = r.sequences[rows[i]]
            token = int(ids[i])
            if stopped[i]:
                sequence.stop_reason = token
            if full[i] or stopped[i]:
                self._finish(sequence, "length" if full[i] else "stop")
                arrived.ended.append(sequence)
            arrived.deltas[i] = TokenDelta(
                sequence.request_id,
                [token],
                sequence.finish_reason,
                sequence.stop_reason,
                sequence.cached_tokens,
                _logprobs(sequence, [i if index is None else int(index[i])], [token], output.logprobs),
            )
        if plan.guessed is not None:
            self._commit_guessed(plan, output, arrived)
        return arrived

    def _commit_guessed(self, plan: Plan, output: StepOutput, arrived: Arrived) -> None:
        """Append what was sampled behind guesses that hold, up to an end, and add it to `arrived`; the rest is taken back."""
        r = self.rows
        guessed = plan.guessed.among(r.stay[plan.guessed.rows] == plan.stays[plan.guessed.first])
        rows, fed = guessed.rows, None if output.lookup is None else output.lookup.fed
        known = r.known[rows]
        found = verdict(guessed, output.token_ids, guessed.fed(fed), known, r.max_len[rows], r.min_len[rows], r.stop_ids[rows])
        inside = np.arange(found.tokens.shape[1]) < found.lengths[:, None]
        r.tokens[np.repeat(rows, found.lengths), (known[:, None] + np.arange(found.tokens.shape[1]))[inside]] = found.tokens[inside]
        r.known[rows] = known + found.lengths
        surplus = found.counts + 1 - found.lengths
        r.total[rows] -= surplus
        # Without pages the row was preempted meanwhile: nothing of it is computed.
        r.computed[rows] -= np.where(r.num_blocks[rows] > 0, surplus, 0)
        self._count(found)
        begin = len(arrived.rows)
        arrived.rows = np.concatenate([arrived.rows, rows])
        arrived.token_ids = np.concatenate([arrived.token_ids, found.tokens[np.arange(len(rows)), found.lengths - 1]])
        arrived.owners = np.concatenate([arrived.owners, r.owner[rows]])
        arrived.request_ids = np.concatenate([arrived.request_ids, r.request_ids[rows]])
        arrived.verdict = found
        full = known + found.lengths >= r.max_len[rows]
        for i, row in enumerate(rows.tolist()):
            sequence, tokens = r.sequences[row], found.tokens[i, : found.lengths[i]].tolist()
            first, accepted = int(guessed.first[i]), int(found.accepted[i])
            sequence.accepted += accepted
            sequence.rejected += int(found.counts[i]) - accepted
            if found.stopped[i]:
                sequence.stop_reason = tokens[-1]
            if full[i] or found.stopped[i]:
                self._finish(sequence, "length" if full[i] else "stop")
                arrived.ended.append(sequence)
            arrived.deltas[begin + i] = TokenDelta(
                sequence.request_id, tokens, sequence.finish_reason, sequence.stop_reason, sequence.cached_tokens,
                _logprobs(sequence, range(first, first + len(tokens)), tokens, output.logprobs),
                sequence.accepted, sequence.rejected,
            )  # fmt: skip

    def _count(self, found: Verdict) -> None:
        counters = self.counters
        counters.generated_tokens += int(found.lengths.sum())
        counters.saved_steps += int(found.lengths.sum()) - len(found.lengths)
        counters.drafts += len(found.counts)
        counters.guesses += int(found.counts.sum())
        counters.accepted += int(found.accepted.sum())
        most = int(found.accepted.max(initial=0))
        counters.accepted_at += [0] * (most - len(counters.accepted_at))
        for place in range(most):
            counters.accepted_at[place] += int((found.accepted > place).sum())

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, rows, states and the prefix cache fit together."""
        r = self.rows
        self.pool.check_integrity([r.blocks_of(sequence.row) for sequence in self._running])
        held = sorted([sequence.row for sequence in self._running] + list(self._draining))
        _require(held == np.flatnonzero(r.stay).tolist(), "rows are lost or held twice")
        _require(len(held) + r.num_free == self.max_num_seqs, "rows are lost")
        for queue in (self._waiting, self._running):
            _require(queue == sorted(queue, key=_place), "a queue is out of order")
        _require(self._live == {s.key: s for s in [*self._running, *self._waiting]}, "a sequence is lost")
        for sequence in self._waiting:
            _require(sequence.state in (State.WAITING, State.PREEMPTED), "a waiting sequence is in another state")
            _require(sequence.row < 0 or sequence.row in self._draining, "a waiting sequence holds a row")
        for row in self._draining:
            _require(not r.num_blocks[row], "a draining row holds pages")
        for sequence in self._running:
            self._check_running(sequence)

    def _running_fixed(self) -> Fixed:
        if self._fixed is None:
            rows = np.fromiter((sequence.row for sequence in self._running), np.int32, len(self._running))
            self._fixed = self.rows.fixed(rows)
            self._ones, self._trues = np.ones(len(rows), np.int32), np.ones(len(rows), bool)
        return self._fixed

    def _continue_all(self) -> tuple[np.ndarray, ...] | None:
        """The columns of the commonest step, a token of every running sequence, all with room for it; else None.

        What `_wanted`, `_grow` and `_advance` would come to, with fewer looks.
        """
        r, fixed = self.rows, self._running_fixed()
        rows = fixed.rows
        starts, total = r.computed[rows], r.total[rows]
        ends = starts + 1
        plain = (ends == total) & (total < fixed.max_len) & (starts >= fixed.num_prompt)
        if not len(rows) or not (plain & (ends <= r.num_blocks[rows] * r.block_size)).all():
            return None
        r.computed[rows] = ends
        r.total[rows] = ends + 1
        return rows, fixed.stays, starts, self._ones, self._trues

    def _wanted(self, num_guesses: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows of the running and how many tokens each may compute, guesses too, and the prompt tokens left for others.

        num_guesses: int32, by row.
        """
        r, fixed = self.rows, self._running_fixed()
        rows = fixed.rows
        # Whatever is in flight turns out to be, more may be sampled; where guesses in flight may end it, they are waited for.
        growing = r.total[rows] < fixed.max_len
        if not growing.all():
            rows = rows[growing]
        counts = r.total[rows] - r.computed[rows]
        prefills = np.flatnonzero(counts > 1)
        budget = self._prefill_budget(len(rows) - len(prefills) + (0 if num_guesses is None else int(num_guesses.sum())))
        for i in prefills.tolist():
            counts[i] = tokens = self._chunk(int(counts[i]), budget)
            budget -= tokens
        if num_guesses is not None:
            counts += num_guesses[rows]
        return (rows[counts > 0], counts[counts > 0], budget) if counts.min(initial=1) < 1 else (rows, counts, budget)

    def _prefill_budget(self, decodes: int) -> int:
        """Prompt tokens the step may take: what decodes leave, less where a chunk beside them would slow them."""
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

    def _grow(self, rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give running rows pages for `counts` more tokens, preempting the last running ones until they suffice.

        Returns the rows that are left, all with the pages they need.
        """
        r = self.rows
        ends = r.computed[rows] + counts
        if (ends <= r.num_blocks[rows] * r.block_size).all():
            return rows, counts
        missing = self._missing(rows, ends)
        ahead = self._missing(rows, np.minimum(ends + LOOK_AHEAD, r.max_len[rows]))
        if ahead.sum() + len(rows) + self._watermark <= self.pool.num_free:
            missing = ahead
        while (wanted := int(missing.sum())) > self.pool.num_free:
            victim = self._running[-1]
            stays = rows != victim.row
            rows, counts, missing = rows[stays], counts[stays], missing[stays]
            self._preempt(victim)
        short = np.flatnonzero(missing)
        r.add_blocks(rows[short], missing[short], self.pool.take(wanted))
        return rows, counts

    def _missing(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Pages that the rows lack to hold so many tokens."""
        return np.maximum(-(-lengths // self.rows.block_size) - self.rows.num_blocks[rows], 0)

    def _advance(self, rows: np.ndarray, counts: np.ndarray, num_guesses: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Count the tokens as computed -> the first five columns of a plan."""
        r = self.rows
        starts = r.computed[rows]
        ends = starts + counts
        r.computed[rows] = ends
        guesses = 0 if num_guesses is None else num_guesses[rows]
        sampled = ends == r.total[rows] + guesses
        r.total[rows] += np.where(sampled, guesses + 1, 0)
        for i in np.flatnonzero(starts < r.num_prompt[rows]).tolist():
            sequence = r.sequences[rows[i]]
            self.counters.prompt_tokens += min(int(ends[i]), sequence.num_prompt) - int(starts[i])
            # A later step, or a later sequence of this one, reads these pages after they are written.
            self._register(sequence)
        return rows, r.stay[rows], starts, counts, sampled

    def _admit(self, parts: list[tuple[np.ndarray, ...]], started: list[Sequence], budget: int) -> None:
        """Start waiting sequences in order while budget, rows and pages for their whole prompts last.

        The first that does not fit ends it: nothing overtakes a long prompt, so none starves.
        """
        while self._waiting and self.rows.num_free and budget > 0:
            sequence = self._waiting[0]
            if sequence.row >= 0:  # its samples from before a preemption are still to come
                return
            hits = self._hits(sequence)
            total = len(sequence.tokens)
            needed = self._pages(total) - len(hits)
            reserve = self._watermark if self._running else 0
            tokens = self._chunk(total - len(hits) * self.pool.block_size, budget)
            if not tokens or needed + reserve > self.pool.num_free - self.pool.num_free_among(hits):
                return
            row = self._start(sequence, hits, needed)
            parts.append(self._advance(np.array([row], np.int32), np.array([tokens], np.int32)))
            started.append(sequence)
            budget -= tokens

    def _start(self, sequence: Sequence, hits: list[int], needed: int) -> int:
        del self._waiting[0]
        self.pool.share(hits)
        computed = len(hits) * self.pool.block_size
        sequence.num_registered = len(hits)
        if sequence.state is State.WAITING:
            sequence.cached_tokens = computed
            if self.pool.enable_caching:
                self.counters.prefix_queries += sequence.num_prompt
                self.counters.prefix_hits += computed
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_place)
        self._fixed = None
        return self.rows.enter(sequence, hits + self.pool.take(needed), computed)

    def _hits(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix; one token at least is left to compute."""
        if not self.pool.enable_caching:
            return []
        full = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_hashes(sequence, sequence.tokens, full)
        return self.pool.lookup(sequence.hashes[:full])

    def _extend_hashes(self, sequence: Sequence, tokens: np.ndarray, num_blocks: int) -> None:
        size, hashes = self.pool.block_size, sequence.hashes
        for block in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else self.pool.root_hash(sequence.cache_salt)
            hashes.append(self.pool.hash_block(parent, tokens[block * size : (block + 1) * size]))

    def _register(self, sequence: Sequence) -> None:
        """Publish blocks that are full of known tokens whose KV is computed or under way."""
        r, row = self.rows, sequence.row
        full = min(int(r.known[row]), int(r.computed[row])) // self.pool.block_size
        if full <= sequence.num_registered or not self.pool.enable_caching:
            return
        self._extend_hashes(sequence, r.tokens[row], full)
        for block in range(sequence.num_registered, full):
            self.pool.register(int(r.blocks[row, block]), sequence.hashes[block])
        sequence.num_registered = full

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with its outputs as prompt; what is in flight still arrives."""
        self._leave_running(sequence)
        sequence.state = State.PREEMPTED
        sequence.num_preemptions += 1
        self.counters.preemptions += 1
        insort(self._waiting, sequence, key=_place)
        self._draining.add(sequence.row)

    def _vacate_drained(self) -> None:
        for row in [row for row in self._draining if self.rows.known[row] == self.rows.total[row]]:
            self._draining.remove(row)
            self.rows.leave(row)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.state is State.RUNNING:
            self._leave_running(sequence)
        else:
            self._waiting.remove(sequence)
        if sequence.row >= 0:
            self._draining.discard(sequence.row)
            self.rows.leave(sequence.row)
        del self._live[sequence.key]
        sequence.state = State.FINISHED
        sequence.finish_reason = reason
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _leave_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._fixed = None
        self._register(sequence)  # what it generated as well
        self.pool.release(self.rows.take_blocks(sequence.row))
        sequence.num_registered = 0

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def _check_running(self, sequence: Sequence) -> None:
        r, row = self.rows, sequence.row
        blocks = r.blocks_of(row)
        _require(sequence.state is State.RUNNING and r.sequences[row] is sequence, "a running sequence is in another state")
        _require(sequence.num_prompt <= r.known[row] <= r.total[row], "tokens are lost")
        _require(r.computed[row] <= r.total[row] <= sequence.max_len, "a sequence runs past its end")
        _require(len(blocks) >= self._pages(int(r.computed[row])), "tokens were computed without a page")
        _require(not r.blocks[row, len(blocks) :].any(), "a page is listed beyond a table's end")
        _require(sequence.num_registered * self.pool.block_size <= r.computed[row], "unwritten pages are published")
        for index, block in enumerate(blocks):
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


def _logprobs(
    sequence: Sequence, indices: Iterable[int], tokens: list[int], step: StepLogprobs | None
) -> list[TokenLogprob] | None:
    """Of the tokens, sampled by the entries `indices` of the step."""
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
        for index, token in zip(indices, tokens, strict=True)
    ]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
