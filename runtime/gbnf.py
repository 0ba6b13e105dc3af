"""GBNF, llama.cpp's grammars, to Lark as llguidance reads it.

A rule that refers to no rule that comes back to it becomes a terminal, which llguidance matches exactly; between
terminals it takes the longest match, so a grammar that is ambiguous there may allow less than in llama.cpp, never more.
Knows both syntaxes; compiles nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

MAX_RULES = 2048
MAX_DEPTH = 64  # of groups in each other, and of terminals in each other

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_REPEAT = re.compile(r"\{\s*(\d{1,6})\s*(?:(,)\s*(\d{1,6})?\s*)?\}")
_TOKEN = re.compile(r"<(?:\[\d+\]|[^<>\s\[\]]+)>")
_ESCAPES = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "\\": "\\",
    '"': '"',
    "[": "[",
    "]": "]",
    "-": "-",
    "/": "/",
    "'": "'",
    "^": "^",
}
_HEX = {"x": 2, "u": 4, "U": 8}


class GbnfError(ValueError):
    """A text that is not GBNF; the message has line and column."""


@dataclass(slots=True)
class _Rule:
    """A rule's right side."""

    pieces: list[str | tuple[str, int]] = field(default_factory=list)  # Lark, or a name and where it stands
    has_tokens: bool = False  # special ones, which no terminal holds


def to_lark(text: str) -> str:
    """The grammar as Lark; its rule `root` is `start`. Raises GbnfError."""
    reader = _Reader(text)
    rules = reader.rules()
    if "root" not in rules:
        raise GbnfError("there is no rule root")
    terminal = _terminals(rules, reader)
    names = {name: _lark_name(name, number, terminal[name]) for number, name in enumerate(rules)}
    lines = []
    for name, rule in rules.items():
        body = "".join(piece if isinstance(piece, str) else names[piece[0]] for piece in rule.pieces)
        lines.append(f"{names[name]}: {body}")
    if names["root"] != "start":
        lines.insert(0, f"start: {names['root']}")
    return "\n".join([*lines, ""])


def _lark_name(name: str, number: int, is_terminal: bool) -> str:
    clean = re.sub(r"[^A-Za-z]", "", name)
    if is_terminal:
        return f"T_{clean.upper()}_{number}"
    return "start" if name == "root" else f"r_{clean.lower()}_{number}"


def _terminals(rules: dict[str, _Rule], reader: _Reader) -> dict[str, bool]:
    """Of each rule whether it is one: it refers to terminals alone, and holds no special token."""
    terminal: dict[str, bool] = {}
    depth: dict[str, int] = {}
    for first in rules:
        waiting = [first]
        open_rules: set[str] = set()
        while waiting:
            name = waiting[-1]
            if name in terminal:
                waiting.pop()
                continue
            refers = []
            for piece in rules[name].pieces:
                if isinstance(piece, tuple):
                    if piece[0] not in rules:
                        raise reader.error(piece[1], f"there is no rule {piece[0]}")
                    refers.append(piece[0])
            unknown = [one for one in refers if one not in terminal]
            if name in open_rules or not unknown:  # those still unknown come back to it
                depth[name] = 1 + max((depth.get(one, 0) for one in refers), default=0)
                whole = not unknown and all(terminal[one] for one in refers)
                terminal[name] = whole and not rules[name].has_tokens and depth[name] <= MAX_DEPTH
                waiting.pop()
            else:
                open_rules.add(name)
                waiting += unknown
    return terminal


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def rules(self) -> dict[str, _Rule]:
        """All rules by name, in order."""
        rules: dict[str, _Rule] = {}
        self._skip(lines=True)
        while self._at < len(self._text):
            begin, name = self._at, self._name()
            self._skip(lines=False)
            if not self._text.startswith("::=", self._at):
                raise self.error(self._at, "expected ::=")
            if name in rules:
                raise self.error(begin, f"the rule {name} is there already")
            if len(rules) == MAX_RULES:
                raise self.error(begin, f"there are more than {MAX_RULES} rules")
            self._at += 3
            rules[name] = self._right_side()
            self._skip(lines=True)
        return rules

    def error(self, at: int, problem: str) -> GbnfError:
        """`problem` with its place."""
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        return GbnfError(f"line {line}, column {column}: {problem}")

    def _right_side(self) -> _Rule:
        """Everything up to the next rule, or to a line that does not go on."""
        rule, groups = _Rule(), []  # where each open group began
        empty, last = True, -1  # whether the sequence so far is; the piece that a repetition is of
        starts: list[int] = []  # of each open group, its piece
        self._skip(lines=True)
        while True:
            char = self._text[self._at : self._at + 1]
            if not char or char in "\r\n":
                if groups:
                    raise self.error(groups[-1], "the group is not closed")
                if not char or not self._goes_on():
                    break
            elif char in "|)":
                if empty:
                    rule.pieces.append('""')
                self._at += 1
                empty = True
                if char == "|":
                    rule.pieces.append(" | ")
                    self._skip(lines=True)
                    continue
                if not groups:
                    raise self.error(self._at - 1, "there is no group to close")
                groups.pop()
                rule.pieces.append(")")
                last, empty = starts.pop(), False
            elif char == "(":
                if len(groups) == MAX_DEPTH:
                    raise self.error(self._at, f"groups are nested more than {MAX_DEPTH} deep")
                groups.append(self._at)
                starts.append(len(rule.pieces))
                rule.pieces.append(" (")
                self._at += 1
                empty = True
                self._skip(lines=True)
                continue
            elif char in "*+?{" and last >= 0 and not empty:
                rule.pieces[last] = f"{rule.pieces[last]}("
                rule.pieces += [")", self._repetition()]
            else:
                if self._at_rule():
                    break
                last, empty = len(rule.pieces), False
                rule.pieces += [" ", self._symbol(rule)]
            self._skip(lines=bool(groups))
        if empty:
            rule.pieces.append('""')
        return rule

    def _goes_on(self) -> bool:
        """Whether the next line begins with an alternative; it is skipped to then."""
        before = self._at
        self._skip(lines=True)
        if self._text.startswith("|", self._at):
            return True
        self._at = before
        return False

    def _at_rule(self) -> bool:
        found = _NAME.match(self._text, self._at)
        return found is not None and re.compile(r"[ \t]*::=").match(self._text, found.end()) is not None

    def _symbol(self, rule: _Rule) -> str | tuple[str, int]:
        """A literal, a class, any character, a special token or a name."""
        char, begin = self._text[self._at], self._at
        if char == '"':
            return self._literal()
        if char == "[":
            return self._class()
        if char == ".":
            self._at += 1
            return "/(?s:.)/"
        if char == "<" and (token := _TOKEN.match(self._text, self._at)):
            rule.has_tokens, self._at = True, token.end()
            return token[0]
        return self._name(), begin

    def _literal(self) -> str:
        begin, chars = self._at, []
        self._at += 1
        while not self._text.startswith('"', self._at):
            chars.append(self._char(begin, "the literal"))
        self._at += 1
        return json.dumps("".join(chars), ensure_ascii=False).replace("\x7f", "\\u007f")

    def _class(self) -> str:
        begin = self._at
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        parts = []
        while not self._text.startswith("]", self._at):
            low = high = self._char(begin, "the class")
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._char(begin, "the class")
            if high < low:
                raise self.error(begin, f"the range {low}-{high} is the wrong way round")
            parts.append(_escaped(low) if low == high else f"{_escaped(low)}-{_escaped(high)}")
        self._at += 1
        if not parts:
            raise self.error(begin, "the class is empty")
        return f"/[{'^' * negated}{''.join(parts)}]/"

    def _char(self, begin: int, what: str) -> str:
        """The next character of a literal or class that began there."""
        char = self._text[self._at : self._at + 1]
        if not char or char in "\r\n":
            raise self.error(begin, f"{what} is not closed")
        self._at += 1
        if char != "\\":
            return char
        kind = self._text[self._at : self._at + 1]
        self._at += 1
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        digits = self._text[self._at : self._at + _HEX.get(kind, 0)]
        if kind not in _HEX or not re.fullmatch(f"[0-9A-Fa-f]{{{_HEX[kind]}}}", digits):
            raise self.error(self._at - 2, f"\\{kind}{digits} is no escape sequence")
        self._at += len(digits)
        code = int(digits, 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self.error(self._at - 2 - len(digits), f"\\{kind}{digits} is no character")
        return chr(code)

    def _repetition(self) -> str:
        char = self._text[self._at]
        if char != "{":
            self._at += 1
            return char
        found = _REPEAT.match(self._text, self._at)
        if found is None:
            raise self.error(self._at, "expected a repetition, for example {2,5}")
        self._at = found.end()
        least, comma, most = found.groups()
        return f"{{{least}}}" if comma is None else f"{{{least},{most or ''}}}"

    def _name(self) -> str:
        found = _NAME.match(self._text, self._at)
        if found is None:
            raise self.error(self._at, f"unexpected {self._text[self._at]!r}")
        self._at = found.end()
        return found[0]

    def _skip(self, lines: bool) -> None:
        """Past space and comments; past line breaks too if `lines`."""
        found = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*" if lines else r"(?:[ \t]|#[^\r\n]*)*").match(
            self._text, self._at
        )
        assert found is not None
        self._at = found.end()


def _escaped(char: str) -> str:
    """A character inside a regex class."""
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):X}}}"
