"""Who asks: a name that tells keys apart, what each key may ask for, and how a line of a key file says so.

Knows no HTTP and no engine. Limits are counted by the engine, through which the requests of all web processes come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from pagegraph.runtime.config_values import between, each, parse_lines, parse_whole

LIMITS = ("requests_per_minute", "tokens_per_minute", "max_parallel_requests")  # fields of Asker and keys of a line
_EXAMPLE = "sk-1234 requests_per_minute=60"
_parse_limit = between(parse_whole, 1)


class Asker(msgspec.Struct, frozen=True, array_like=True):
    """`name` is told to nobody; "" where all share one key, or none is asked. A limit of None is none."""

    name: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    max_parallel_requests: int | None = None  # that run or wait, each sequence counted

    @property
    def is_limited(self) -> bool:
        """Whether any limit is set."""
        return any(getattr(self, name) is not None for name in LIMITS)


KEY_SHARE = 8  # times what is left of something shared that one of several keys may hold
NOBODY = Asker()  # in particular, and without limits


def has_share(name: str, own: int, left: int) -> bool:
    """Whether an asker that holds `own` of something shared, of which `left` is left, may have more of it.

    What one of several keys must leave is for others whenever they come: 1/9 where they have nothing.
    """
    return left > 0 and (not name or own < KEY_SHARE * left)


def read_line(line: str) -> tuple[str, dict[str, int]]:
    """`KEY`, or `KEY limit=number ...`, as the key and its own limits.

    A key may hold spaces; words behind it that hold a `=` are limits. Raises ValueError with the rest of a sentence about
    the line, without the key.
    """
    words = line.split(" ")
    count = next((at for at in range(len(words) - 1) if "=" not in words[-1 - at]), len(words) - 1)
    limits: dict[str, int] = {}
    for word in words[len(words) - count :]:
        name, _, value = word.partition("=")
        if name not in LIMITS or name in limits:
            raise ValueError(
                f"has a key with a word after it that is no limit; a limit is one of {', '.join(LIMITS)}, each once, as in"
                f" {_EXAMPLE}"
            )
        try:
            limits[name] = _parse_limit(value)
        except ValueError as error:
            raise ValueError(f"has {word}, which {error}; {_EXAMPLE} works") from None
    return " ".join(words[: len(words) - count]).rstrip(), limits


def parse_keys(value: Any) -> str:
    """Keys as a text with one a line, of such a text or a list of them; lines are those of `read_line`."""
    lines = [line for one in each(value) for line in parse_lines(one)]
    if len({read_line(line)[0] for line in lines}) < len(lines):
        raise ValueError("holds a key twice")
    if not all(line.isascii() and line.isprintable() for line in lines):
        raise ValueError(
            "holds characters that clients cannot send in a header; a key is printable ASCII, for example sk-1234"
        )
    return "\n".join(lines)


def askers(lines: str, of_each: Mapping[str, int | None]) -> dict[str, Asker]:
    """By key, of lines that `read_line` takes. `of_each`: limits of keys whose line says nothing of them."""
    read = dict(map(read_line, lines.splitlines()))
    named = len(read) > 1
    return {key: Asker(_name(key) if named else "", **{**of_each, **own}) for key, own in read.items()}


def _name(key: str) -> str:
    return hashlib.sha256(b"asker" + key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
