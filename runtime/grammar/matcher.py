"""Where one sequence stands in its grammar: a function of the tokens it has generated.

So it is made anew from them whenever it is in doubt: after a failed step, after an exception of its own. What is asked
of it about draft tokens is charged here; the calls of a step are by `workers`. Knows no slots and no steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pagegraph.runtime.grammar.workers import SHARE_S

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from pagegraph.runtime.grammar.compiler import Grammar


class TokenMatcher:
    """`num_tokens` generated tokens were taken; `overdrawn_s` is what they cost beyond their share, as far as timed."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.matcher: LLMatcher = grammar.start()
        self.num_tokens = 0
        self.overdrawn_s = 0.0

    def replay(self, tokens: Sequence[int]) -> bool:
        """Begin anew and take these -> whether the grammar has them all."""
        self.matcher = self.grammar.start()
        self.num_tokens = len(tokens)
        return not tokens or self.matcher.consume_tokens(list(tokens))

    def take(self, tokens: Sequence[int]) -> bool:
        """Take these too -> whether the grammar has them."""
        self.num_tokens += len(tokens)
        return self.matcher.consume_tokens(list(tokens))

    def admits(self, tokens: Sequence[int]) -> int:
        """How many of these may follow, one after the other, without the text being at its end after them.

        A text that can only end gets no token that says so, so none may be drafted behind it.
        """
        begun = time.thread_time()
        try:
            count = self.matcher.validate_tokens(list(tokens))
            while count:
                after = self.matcher.deep_copy()
                if after.consume_tokens(list(tokens[:count])) and not after.is_stopped():
                    break
                count -= 1
            return count
        finally:
            self._charge(time.thread_time() - begun)

    def forced(self) -> list[int]:
        """Tokens that have to follow: the mask of each allows that one alone."""
        begun = time.thread_time()
        try:
            return self.matcher.compute_ff_tokens()
        finally:
            self._charge(time.thread_time() - begun)

    @property
    def can_only_end(self) -> bool:
        """No token may follow but one that ends the text."""
        return self.matcher.is_stopped()

    def _charge(self, spent_s: float) -> None:
        """A call has the share of a step's call."""
        self.grammar.work_s += spent_s
        self.overdrawn_s += max(0.0, spent_s - SHARE_S / 2)
