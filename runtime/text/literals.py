"""Values in words much like JSON's to JSON text, as they come: Python's literals, and Gemma's.

`LiteralReader` reads a bracket with all that is in it and gives on the same as JSON. It does not judge: what cannot
stand where it stands ends the value. Knows no formats of calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from pagegraph.runtime.text.incoming import Incoming, Reading, Words

_WORD = re.compile(r"[\w.+\-]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_BRACKETS = {"{": "{}", "[": "[]", "(": "[]"}  # and how JSON writes them
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_HEX = {"x": 2, "u": 4, "U": 8}
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # of surrogates, which JSON can only escape
# A backslash with all that belongs to it: of a number as many digits as it has to have, or fewer before what is none.
_DIGITS = "[0-9a-fA-F]"
_NUMBERS = "|".join(
    rf"\\{kind}(?:{_DIGITS}{{{most}}}|{_DIGITS}{{0,{most - 1}}}(?!{_DIGITS}|\Z))" for kind, most in _HEX.items()
)
_ESCAPED = re.compile(rf"\\(?:x{_DIGITS}{{0,2}}|u{_DIGITS}{{0,4}}|U{_DIGITS}{{0,8}}|.)", re.DOTALL)
_INSIDE = {mark: re.compile(rf"(?:[^{mark}\\]++|\\[^xuU]|{_NUMBERS})*+", re.DOTALL) for mark in "'\""}


class LiteralReader:
    """Reads one bracket and gives on JSON text.

    `quote` stands around strings in which nothing is escaped; without it they are Python's. A string between quotation
    marks is read as Python's with it, too. `named`: the outermost bracket holds `name=value`, as a call of Python does.
    """

    def __init__(self, incoming: Incoming, emit: Callable[[str], object], quote: str = "", named: bool = False) -> None:
        self._incoming = incoming
        self._emit = emit
        self._quote = quote
        self._named = named
        self._open: list[str] = []  # brackets that are, each as it was written
        self._first = True  # in the innermost of them, nothing stands yet
        self._key = False  # a key comes
        self._ready = True  # a value or a key may come

    def read(self) -> Reading[bool]:
        """Whether it is whole; else it ended early."""
        while True:
            yield from self._incoming.spaces()
            char = yield from self._incoming.peek()
            if char in _BRACKETS and self._ready and not self._key:
                self._before()
                self._push(self._incoming.take(1))
            elif self._open and char == _CLOSING[self._open[-1]]:
                self._incoming.take(1)
                self._pop()
                if not self._open:
                    return True
            elif char == "," and not self._ready:
                self._incoming.take(1)
                self._ready, self._key = True, self._has_keys()
            elif not char or not self._ready or not self._open or not (yield from self._scalar(char)):
                return False

    def _push(self, bracket: str) -> None:
        self._emit("{" if self._is_object(bracket) else _BRACKETS[bracket][0])
        self._open.append(bracket)
        self._first, self._ready, self._key = True, True, self._has_keys()

    def _pop(self) -> None:
        outermost = len(self._open) == 1
        bracket = self._open.pop()
        self._emit("}" if outermost and self._named else _BRACKETS[bracket][1])
        self._first, self._ready, self._key = False, False, False

    def _is_object(self, bracket: str) -> bool:
        return bracket == "{" or (self._named and not self._open)

    def _has_keys(self) -> bool:
        return self._open[-1] == "{" or (self._named and len(self._open) == 1)

    def _before(self) -> None:
        """What JSON has before a key, or before a value without one."""
        if self._open and not self._first and (self._key or not self._has_keys()):
            self._emit(", ")
        self._first = False

    def _scalar(self, char: str) -> Reading[bool]:
        """A string, a word or a number, which may be a key; False if there is none."""
        as_key = self._key
        if self._quote and (yield from self._incoming.comes(self._quote)):
            self._before()
            self._incoming.take(len(self._quote))
            self._emit('"')
            yield from self._incoming.until(Words((self._quote,)), self._text)
            self._emit('"')
        elif char in "'\"":
            self._before()
            self._emit('"')
            yield from self._python_string(self._incoming.take(1))
            self._emit('"')
        else:
            word = yield from self._incoming.run(_WORD)
            if not word:
                return False
            self._before()
            bare = not as_key and (word in _CONSTANTS or _NUMBER.fullmatch(word))
            self._emit(_CONSTANTS.get(word, word) if bare else json.dumps(word, ensure_ascii=False))
        if not as_key:
            self._ready = False
            return True
        yield from self._incoming.spaces()
        self._key = False
        if not (yield from self._incoming.skip("=" if self._named and len(self._open) == 1 else ":")):
            return False
        self._emit(": ")
        return True

    def _text(self, text: str) -> None:
        self._emit(_HALF_PAIR.sub(_as_escape, json.dumps(text, ensure_ascii=False)[1:-1]))

    def _python_string(self, mark: str) -> Reading[None]:
        """The rest of a string of Python behind its opening mark."""
        while True:
            yield from self._incoming.run(_INSIDE[mark], lambda text: self._text(_ESCAPED.sub(_unescaped, text)))
            char = yield from self._incoming.peek()
            if char != "\\":
                self._incoming.take(1)
                return
            if self._incoming.ended:  # inside an escape
                self._incoming.take(max(_HEX.values()) + 2)
                return
            yield


def _unescaped(found: re.Match[str]) -> str:
    kind, digits = found[0][1], found[0][2:]
    if kind in _HEX:
        code = int(digits, 16) if len(digits) == _HEX[kind] else 0x110000
        return chr(code) if code < 0x110000 else found[0]
    return _ESCAPES.get(kind, kind if kind in "'\"\\/" else found[0])


def _as_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
