"""llguidance's calls for the matchers of a step, and what each matcher has cost.

Those calls run in the middle of a step. Most masks take less time than a thread takes to wake, so the loop's own thread
computes them, until those of a step take long: then threads share the next ones, those of one compiled grammar in one
thread, for they take turns in it. A grammar of dear tokens holds up every stream, and what is dear no limit of the
compiler says, as the time of a row of Earley items grows with its square. So while a step's calls are slow each is timed
by itself, in processor time, which a busy machine does not change, and a matcher that keeps taking more than its share
`is_too_dear`. What drafters ask of a matcher it charges itself. Knows matchers; knows no sequences and no slots.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLExecutor

    from pagegraph.runtime.grammar.matcher import TokenMatcher

NUM_THREADS = min(max((os.cpu_count() or 1) // 2, 1), 8)
SHARED_S = 0.004  # of all masks of a step, from which on threads share those of the next
SLOW_S = 0.05  # of all calls of a step, from which on those of the next are timed
SHARE_S = 0.01  # processor time of a token that any grammar may take
CREDIT_S = 0.5  # that it may take beyond that, in all

T = TypeVar("T")
Job = tuple["TokenMatcher", Callable[[], T]]


class GrammarWorkers:
    """The threads for one engine."""

    def __init__(self) -> None:
        self.is_timing = False
        self.is_sharing = False

    def consume(self, taking: Sequence[tuple[TokenMatcher, list[int]]]) -> list[bool]:
        """Each takes its tokens -> whether its grammar has them."""
        if self.is_timing:
            return self._timed([(matcher, lambda m=matcher, t=tokens: m.take(t)) for matcher, tokens in taking])
        begun = time.perf_counter()
        taken = [matcher.take(tokens) for matcher, tokens in taking]
        self._note(begun, [matcher for matcher, _ in taking])
        return taken

    def compute(self, asked: Sequence[tuple[TokenMatcher, int, list[int]]], masks: np.ndarray) -> None:
        """Of each the mask of its next token at its index of int32 [R, words], and behind it those of its draft tokens."""
        address, row_bytes = masks.ctypes.data, masks.shape[1] * 4

        def one(matcher: TokenMatcher, index: int, drafts: list[int]) -> None:
            state: Any = matcher.matcher  # its stub does not know the call for draft tokens
            at = address + index * row_bytes
            if drafts:
                state.unsafe_compute_mask_ptr_with_draft_token(at, row_bytes, drafts)
            else:
                state.unsafe_compute_mask_ptr(at, row_bytes)

        if self.is_timing:
            self._timed([(each[0], lambda each=each: one(*each)) for each in asked])
            return
        begun = time.perf_counter()
        if self.is_sharing:
            self._share(asked, masks)
        else:
            for matcher, index, drafts in asked:
                one(matcher, index, drafts)
        spent = self._note(begun, [matcher for matcher, _, _ in asked])
        # Threads go on until they, who are several, take a fraction of what they began at.
        self.is_sharing = NUM_THREADS > 1 and spent > (SHARED_S / NUM_THREADS if self.is_sharing else SHARED_S)

    def _share(self, asked: Sequence[tuple[TokenMatcher, int, list[int]]], masks: np.ndarray) -> None:
        """`compute` by llguidance's threads."""
        rows: Any = masks.ctypes.data, masks.shape[1] * 4, len(masks)
        asked = sorted(asked, key=lambda one: id(one[0].grammar))
        plain = [(matcher.matcher, index) for matcher, index, drafts in asked if not drafts]
        drafting = [(matcher.matcher, index, drafts) for matcher, index, drafts in asked if drafts]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *rows)
        if drafting:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafting, *rows)

    def _timed(self, jobs: list[Job[T]]) -> list[T]:
        """Each job by itself, in a thread that is timed; raises what the first of them raised, once all are done."""
        begun = time.perf_counter()

        def run(job: Job[T]) -> tuple[T | None, Exception | None]:
            matcher, call = job
            at = time.thread_time()
            try:
                return call(), None
            except Exception as error:
                return None, error
            finally:
                matcher.overdrawn_s = max(0.0, matcher.overdrawn_s + time.thread_time() - at - SHARE_S / 2)

        done = list(self._threads.map(run, jobs))
        self._note(begun, [matcher for matcher, _ in jobs])
        for _, error in done:
            if error is not None:
                raise error
        return [result for result, _ in done]  # type: ignore[misc]

    def _note(self, begun: float, matchers: list[TokenMatcher]) -> float:
        """Seconds since `begun`, which the matchers' grammars share."""
        spent = time.perf_counter() - begun
        self.is_timing = spent > SLOW_S
        for matcher in matchers:
            matcher.grammar.work_s += spent / len(matchers)
        return spent

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(NUM_THREADS)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar step")


def is_too_dear(matcher: TokenMatcher) -> bool:
    """Whether it took more than its share for too long."""
    return matcher.overdrawn_s > CREDIT_S
