"""Compiles grammars beside the engine's loop, within limits of time and size, and keeps the last ones.

llguidance gives up Python's lock while it compiles, so a thread is enough: the loop goes on, and only the sequences of
that grammar wait. Matchers of one grammar are copies of one that share what they find out about it, which makes a mask
a look-up for whoever comes to a state second; but they take turns, so no more than `MATCHERS_A_COPY` share it, and a
grammar of many sequences is compiled several times, for as many threads as compute masks. Knows no sequences.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from pagegraph.runtime.bad_parameter import BadParameter
from pagegraph.runtime.deep_stack import on_deep_stack
from pagegraph.runtime.grammar.long_numbers import LongNumbers
from pagegraph.runtime.grammar.workers import NUM_THREADS
from pagegraph.runtime.json_schema import SchemaProblem
from pagegraph.runtime.structured_output import StructuredOutputs, field_of, grammar_text, in_words, limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMARS = 128  # kept for who asks for the same again, copies counted
MAX_KEPT_BYTES = 4 << 20  # of what they were asked with
# Of work at their tokens, in all: what they find out by it stays in memory, up to 30 MB a second.
MAX_KEPT_WORK_S = 10.0
THREADS = 2
MATCHERS_A_COPY = 8


@dataclass(slots=True, eq=False)
class Grammar:
    """A compiled grammar. Its matchers learn from each other."""

    key: bytes
    matcher: LLMatcher  # stays at the beginning
    has_json: bool = False
    work_s: float = 0.0  # that its matchers' tokens took

    def start(self) -> LLMatcher:
        """A matcher that has seen nothing yet."""
        return self.matcher.deep_copy()


@dataclass(slots=True)
class _Copies:
    """One grammar, compiled as often as those who asked for it need."""

    asked: int = 0
    compiled: list[Future[Grammar]] = field(default_factory=list)


class GrammarCompiler:
    """`vocabulary` is called once, by whoever needs it first."""

    def __init__(self, vocabulary: Callable[[], LLTokenizer]) -> None:
        self._load = vocabulary
        self._vocabulary: LLTokenizer | None = None
        self.numbers: LongNumbers | None = None  # from the first grammar with JSON on
        self._lock = threading.Lock()
        self._idle_time_used = False
        self._kept: OrderedDict[bytes, _Copies] = OrderedDict()
        self._begun: dict[int, float] = {}  # by thread: since when it compiles
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")

    def compile(self, structured: StructuredOutputs) -> Future[Grammar]:
        """The grammar, once it is compiled; the future's exception is a ValueError where it is the request's fault."""
        key = msgspec.msgpack.encode(structured)
        while self._kept_work_s() > MAX_KEPT_WORK_S:
            self._kept.popitem(last=False)
        copies = self._kept.setdefault(key, _Copies())
        self._kept.move_to_end(key)
        index = copies.asked // MATCHERS_A_COPY % NUM_THREADS
        copies.asked += 1
        if index == len(copies.compiled):
            copies.compiled.append(self._threads.submit(self._compiled, key, structured))
            while len(self._kept) > 1 and self._is_full():
                self._kept.popitem(last=False)
        return copies.compiled[index]

    def forget(self, grammar: Grammar) -> None:
        """One that ran out of its limits: who begins now would find them used up."""
        self._kept.pop(grammar.key, None)

    @property
    def running_s(self) -> float:
        """For how long the longest of the compilations that run has run; 0 if none does."""
        return max((time.monotonic() - begun for begun in tuple(self._begun.values())), default=0.0)

    def use_idle_time(self) -> bool:
        """Load the vocabulary, unless it is -> whether that was to be done."""
        if self._idle_time_used or self._vocabulary is not None:
            return False
        self._idle_time_used = True
        self._threads.submit(self.vocabulary).exception()  # whoever compiles a grammar is told of it
        return True

    def vocabulary(self) -> LLTokenizer:
        """The model's; loads it at the first call. Any thread."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary

    def _is_full(self) -> bool:
        num_compiled = sum(len(copies.compiled) for copies in self._kept.values())
        return num_compiled > MAX_GRAMMARS or sum(map(len, self._kept)) > MAX_KEPT_BYTES

    def _kept_work_s(self) -> float:
        compiled = [one for copies in self._kept.values() for one in copies.compiled]
        done = [one for one in compiled if one.done() and one.exception() is None]
        return sum(kept.result().work_s for kept in done)

    def _compiled(self, key: bytes, structured: StructuredOutputs) -> Grammar:
        """Raises BadParameter. The first mask is computed here too: it is the dearest, and may be beyond the limits."""
        from llguidance import LLMatcher

        vocabulary, thread = self.vocabulary(), threading.get_ident()
        self._begun[thread] = time.monotonic()
        try:
            text = grammar_text(structured)
            matcher = on_deep_stack(LLMatcher, vocabulary, text, log_level=0, limits=limits())
            if not matcher.is_error():
                matcher.compute_bitmask()
        except SchemaProblem as error:
            raise BadParameter(field_of("json"), f"cannot be served: {error}") from None
        finally:
            del self._begun[thread]
        if matcher.is_error():
            problem = f"cannot be served: {in_words(matcher.get_error())}"
            raise BadParameter(field_of(structured.kind), problem)
        has_json = "%json" in text
        if has_json and self.numbers is None:
            self.numbers = LongNumbers(self.vocabulary())
        return Grammar(key, matcher, has_json)
