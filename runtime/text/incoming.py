"""Text that comes in pieces, for readers that are generators: where one needs more text, it yields.

However the text is cut into pieces, a reader does the same. Each character is looked at a bounded number of times: what
a reader may have to give back is recorded, never read again. Knows no formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

_T = TypeVar("_T")
Reading = Generator[None, None, _T]

_SPACES = re.compile(r"\s*")


class Span(Protocol):
    """Finds where something ends whose text comes in pieces."""

    done: bool  # it has ended
    stopped: bool  # it ends early

    def scan(self, text: str, start: int) -> int:
        """How far `text` from `start` on belongs to it; asked again with what is left and more."""
        ...


class Words:
    """Words that are looked for together; none may begin another."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        self._pattern = re.compile("|".join(map(re.escape, words)) or r"(?!)")

    def find(self, text: str, start: int) -> re.Match[str] | None:
        """The first of them in `text` from `start` on."""
        return self._pattern.search(text, start)

    def overlap(self, text: str) -> int:
        """Length of the longest end of `text` with which one of them may begin."""
        return max((overlap(text, word) for word in self._words), default=0)


class Incoming:
    """The text that has come and was not read yet. Methods that may have to wait are generators."""

    def __init__(self) -> None:
        self.ended = False
        self.num_read = 0  # characters so far
        self._text = ""
        self._at = 0
        self._record: list[str] | None = None

    def add(self, text: str) -> None:
        """More text has come."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """No more will come."""
        self.ended = True

    def record(self, *already: str) -> None:
        """Keep what is read from now on, after what was read already."""
        self._record = list(already)

    def recorded(self) -> str:
        """What was read since `record`, which ends."""
        record, self._record = self._record, None
        return "".join(record or ())

    def take(self, count: int) -> str:
        """Read so many characters of those that are there."""
        text = self._text[self._at : self._at + count]
        self._at += len(text)
        self.num_read += len(text)
        if self._record is not None and text:
            self._record.append(text)
        return text

    def run(self, pattern: re.Pattern[str], emit: Callable[[str], object] | None = None) -> Reading[str]:
        """Read all that `pattern`, a repeated class of characters, matches; it is returned, or `emit` gets it."""
        parts: list[str] = []
        emit = emit or parts.append
        while True:
            match = pattern.match(self._text, self._at)
            text = self.take(len(match.group())) if match else ""
            if text:
                emit(text)
            if self._at < len(self._text) or self.ended:
                return "".join(parts)
            yield

    def spaces(self) -> Reading[str]:
        """Read white space."""
        return self.run(_SPACES)

    def peek(self) -> Reading[str]:
        """The next character, "" at the end; it is not read."""
        while self._at >= len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def comes(self, word: str) -> Reading[bool]:
        """Whether the text goes on with `word`; it is not read."""
        while True:
            have = self._text[self._at : self._at + len(word)]
            if have == word:
                return True
            if self.ended or not word.startswith(have):
                return False
            yield

    def skip(self, word: str) -> Reading[bool]:
        """Read `word` if it comes; whether it did."""
        if not (yield from self.comes(word)):
            return False
        self.take(len(word))
        return True

    def until(self, words: Words, emit: Callable[[str], object], *, read: bool = True) -> Reading[str]:
        """Read up to the first of `words`, which is returned and, if `read`, read; "" at the end.

        `emit` gets the text before it.
        """
        while True:
            found = words.find(self._text, self._at)
            if found:
                if found.start() > self._at:
                    emit(self.take(found.start() - self._at))
                return self.take(len(found.group())) if read else found.group()
            rest = self._text[self._at :]
            if sure := rest if self.ended else rest[: len(rest) - words.overlap(rest)]:
                emit(self.take(len(sure)))
            if self.ended:
                return ""
            yield

    def passing(self, span: Span, emit: Callable[[str], object]) -> Reading[bool]:
        """Read what belongs to `span`; whether it is whole. `emit` gets it."""
        while True:
            end = span.scan(self._text, self._at)
            if self.ended and not span.stopped and not span.done:
                end = len(self._text)
            if end > self._at:
                emit(self.take(end - self._at))
            if self.ended or span.stopped or span.done:
                return span.done
            yield

    def some(self, pattern: re.Pattern[str], emit: Callable[[str], object]) -> Reading[str]:
        """Read up to the first character that `pattern`, a class, matches; it is returned unread, "" at the end."""
        while True:
            found = pattern.search(self._text, self._at)
            end = found.start() if found else len(self._text)
            if end > self._at:
                emit(self.take(end - self._at))
            if found:
                return found.group()
            if self.ended:
                return ""
            yield


def overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `word`."""
    at = text.find(word[0], max(len(text) - len(word) + 1, 0))
    while at >= 0:
        if word.startswith(text[at:]):
            return len(text) - at
        at = text.find(word[0], at + 1)
    return 0
