"""The text of an answer to its parts: reasoning, content, tool calls.

`ChatOutput` takes text as it comes, in any pieces, and gives the same parts however it was cut: joined, they are those
of the whole text. What looks like a call and is none is content, to the character. Knows the formats as rows of
`formats`; knows no tokens, no JSON shapes of answers and no HTTP.
"""

from __future__ import annotations

import math
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagegraph.runtime.text.call_reader import CallReader
from pagegraph.runtime.text.formats import ChatFormat, ReasoningFormat
from pagegraph.runtime.text.harmony import read_harmony
from pagegraph.runtime.text.incoming import Incoming, Reading, Words


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text that the model says."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins; `index` counts them from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments; that of one call is whole before the next begins."""

    index: int
    text: str


Part = Reasoning | Content | CallBegin | CallArguments


class ChatOutput:
    """The parts of one answer. `add` its text as it comes, then `finish`.

    `tools`: the parameters' schema of each tool by name; None: calls are not looked for. `opened`: the prompt ends
    inside reasoning. `hidden`: markers that are special tokens, which content does not show. `single`: calls after the
    first are left out. `held`: a grammar holds the answer to calls, so the beginning of one at which the text is cut
    short is none of content.
    """

    def __init__(
        self,
        format: ChatFormat,
        *,
        tools: Mapping[str, Any] | None = None,
        opened: bool = False,
        hidden: Sequence[str] = (),
        single: bool = False,
        held: bool = False,
    ) -> None:
        self._reading: Reading[None] | None = None
        calls = format.calls if tools is not None else None
        if calls is None and format.reasoning is None:
            return
        self._incoming = incoming = Incoming()
        self._held = held
        self._parts = parts = _Parts(hidden, trims=calls is not None, single=single, ids=calls.ids if calls else "call")
        if format.is_harmony:
            self._reading = read_harmony(incoming, parts, tools if calls else None, format.reasoning is not None)
        else:
            reader = None if calls is None else CallReader(incoming, parts, calls, tools or {})
            self._reading = _read(incoming, parts, format.reasoning, reader, opened)

    @property
    def num_calls(self) -> int:
        """Tool calls that have begun."""
        return 0 if self._reading is None else self._parts.num_calls

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of reasoning so far, where their `ends` were given."""
        return 0 if self._reading is None else self._parts.thought.num_tokens

    def add(self, text: str, ends: Sequence[int] = ()) -> list[Part]:
        """The parts that are certain now that `text` has come; `ends` as in `Piece`."""
        if self._reading is None:
            return [Content(text)] if text else []
        self._parts.thought.ends += ends
        self._incoming.add(text)
        next(self._reading, None)
        self._parts.thought.count(self._incoming.num_read)
        return self._parts.drain()

    def finish(self) -> list[Part]:
        """The last parts: the text has ended."""
        if self._reading is None:
            return []
        self._incoming.end()
        next(self._reading, None)
        self._parts.finish()
        self._parts.thought.count(math.inf)
        parts = self._parts.drain()
        return [part for part in parts if not isinstance(part, Content)] if self._held else parts


class _Thought:
    """How many tokens are reasoning: those whose text ends inside it."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.ends: deque[int] = deque()  # of tokens that are not counted yet
        self._spans: deque[tuple[int, float]] = deque()

    def begin(self, at: int) -> None:
        """Reasoning begins behind so many characters."""
        self._spans.append((at, math.inf))

    def end(self, at: int) -> None:
        """And it, with its last word, ends."""
        self._spans.append((self._spans.pop()[0], at))

    def count(self, num_read: float) -> None:
        """All is known of so many characters."""
        while self.ends and self.ends[0] <= num_read:
            begin, end = self._spans[0] if self._spans else (math.inf, math.inf)
            if self.ends[0] > end:
                self._spans.popleft()
            else:
                self.num_tokens += self.ends.popleft() > begin


class _Parts:
    """Parts as readers find them; adjacent ones of a kind are one. White space around reasoning and calls is dropped."""

    def __init__(self, hidden: Sequence[str], trims: bool, single: bool, ids: str) -> None:
        self.num_calls = 0
        self.thought = _Thought()
        self.hidden = tuple(hidden)
        self._trims = trims
        self._single = single
        self._ids = ids
        self._parts: list[Part] = []
        self._spaces: list[str] = []  # of content or reasoning, held back until more of it comes
        self._said = False  # there is content
        self._fresh = False  # content begins behind something: white space is dropped

    def begin_reasoning(self, at: int) -> None:
        """What comes behind so many characters is reasoning."""
        self.thought.begin(at)
        self._spaces, self._fresh = [], True

    def reasoning(self, text: str) -> None:
        """More reasoning."""
        self._say(Reasoning, text)

    def end_reasoning(self, at: int) -> None:
        """What comes behind so many characters is no reasoning."""
        self.thought.end(at)
        self._spaces, self._fresh = [], True

    def content(self, text: str) -> None:
        """More content."""
        for marker in self.hidden:
            if marker in text:
                text = text.replace(marker, "")
        if not self._single or not self.num_calls:
            self._say(Content, text)

    def begin(self, name: str) -> None:
        """A call begins."""
        self.num_calls += 1
        self._spaces, self._fresh = self._spaces if self._said else [], True
        if not self._dropped:
            id = uuid.uuid4().hex
            self._parts.append(CallBegin(self.num_calls - 1, id[:9] if self._ids == "nine" else f"call_{id}", name))

    def arguments(self, text: str) -> None:
        """More of its arguments."""
        if text and not self._dropped:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    def finish(self) -> None:
        """All has been read: white space at the end of an answer without calls is part of it."""
        if self._spaces and not self.num_calls:
            self._parts.append(Content("".join(self._spaces)))
        self._spaces = []

    def drain(self) -> list[Part]:
        """The parts since the last time."""
        if len(self._parts) < 2:
            parts, self._parts = self._parts, []
            return parts
        merged: list[Part] = []
        texts: list[str] = []
        for part, following in zip(self._parts, [*self._parts[1:], None]):
            if isinstance(part, CallBegin):
                merged.append(part)
                continue
            texts.append(part.text)
            if type(part) is not type(following) or getattr(part, "index", 0) != getattr(following, "index", 0):
                joined = "".join(texts)
                texts = []
                merged.append(
                    CallArguments(part.index, joined) if isinstance(part, CallArguments) else type(part)(joined)
                )
        self._parts = []
        return merged

    @property
    def _dropped(self) -> bool:
        return self._single and self.num_calls > 1

    def _say(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        if kind is Content and not self._trims:
            if text:
                self._parts.append(Content(text))
            return
        body = text.rstrip()
        if body:
            self._parts.append(kind("".join([*self._spaces, body])))
            self._spaces = []
            self._said = self._said or kind is Content
        if len(body) < len(text):
            self._spaces.append(text[len(body) :])


def _read(
    incoming: Incoming, parts: _Parts, reasoning: ReasoningFormat | None, calls: CallReader | None, opened: bool
) -> Reading[None]:
    """Reasoning, then content and calls."""
    if reasoning is not None:
        yield from _read_reasoning(incoming, parts, reasoning, opened)
    if calls is not None:
        yield from calls.read_bare()
    words = Words((*calls.triggers, *parts.hidden) if calls is not None else parts.hidden)
    while word := (yield from incoming.until(words, parts.content)):
        if calls is not None and word in calls.triggers:
            yield from calls.read(word)


def _read_reasoning(incoming: Incoming, parts: _Parts, format: ReasoningFormat, opened: bool) -> Reading[None]:
    """The reasoning that the answer begins with, if it does."""
    incoming.record()
    yield from incoming.spaces()
    begins = 0 if opened else incoming.num_read
    opened = (yield from incoming.skip(format.begin)) or opened
    spaces = incoming.recorded()
    if not opened:
        parts.content(spaces)
        return
    parts.begin_reasoning(begins)
    yield from incoming.until(Words((format.end,)), parts.reasoning)
    parts.end_reasoning(incoming.num_read)
