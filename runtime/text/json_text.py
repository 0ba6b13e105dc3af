"""JSON that a model writes, passed on as it comes: where a value ends, found by brackets and quotes alone.

What is inside is not judged: a model's mistakes are its own. Time is linear. Knows no formats of calls.
"""

from __future__ import annotations

import re

# Inside a string: up to its end, a backslash always with what it escapes.
_INSIDE = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)


class JsonSpan:
    """Finds the end of an object, a list or a string whose text comes in pieces, or the word `stop` outside strings."""

    def __init__(self, stop: str = "") -> None:
        self.done = False  # the value has ended
        self.stopped = False  # `stop` comes where the value should go on
        self._stop = stop
        self._depth = 0
        self._in_string = False
        self._outside = re.compile(rf'"|[{{\[]+|[}}\]]+{"|" + re.escape(stop[0]) if stop else ""}')

    def scan(self, text: str, start: int) -> int:
        """How far `text` from `start` on belongs to the value; call again with what is left and more."""
        at = start
        while True:
            if self._in_string:
                found = _INSIDE.match(text, at)
                at = found.end() if found else at
                if at == len(text) or text[at] == "\\":
                    return at
                at += 1
                self._in_string = False
                if not self._depth:
                    self.done = True
                    return at
            found = self._outside.search(text, at)
            if found is None:
                return len(text)
            at, run = found.end(), found.group()
            if run == '"':
                self._in_string = True
            elif run[0] in "{[":
                self._depth += len(run)
            elif run[0] in "}]":
                self._depth -= len(run)
                if self._depth <= 0:
                    self.done = True
                    return at + self._depth
            elif self._stop.startswith(rest := text[found.start() : found.start() + len(self._stop)]):
                self.stopped = rest == self._stop
                return found.start()
