"""Values of settings: what a number, a size, a flag or a text says, in YAML as on the command line.

A parser takes what YAML or a flag gives and returns the value, or raises ValueError with the rest of the sentence
"<key>=<value> ...", which names a value that works. Knows no keys.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import Any

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "K": 1 << 10, "M": 1 << 20}
_BYTE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

Parser = Callable[[Any], Any]


def parse_whole(value: Any) -> int:
    """A whole number; as text also `8k` (8000) and `8K` (8192), likewise `m` and `M`."""
    if isinstance(value, bool):
        raise ValueError("is not a whole number")
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"(-?[0-9][0-9_]*)([kKmM]?)", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is not a whole number such as 4096, 8k (8000) or 8K (8192)")
    return int(match[1].replace("_", "")) * _POWERS[match[2]]


def parse_number(value: Any) -> float:
    """A finite number."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("is not a number")
    return number


def parse_target(value: Any) -> float | str:
    """`auto`, `none` (which null means too), or milliseconds above 0."""
    if value is None or (isinstance(value, str) and value.lower() in ("auto", "none")):
        return "none" if value is None else value.lower()
    try:
        return between(parse_number, 0, low_is_open=True)(value)
    except ValueError as error:
        raise ValueError(f"{error}; auto and none work too") from None


def parse_bytes(value: Any) -> int:
    """A size in bytes: a whole number, or text such as `512MiB`, `1.5GiB` or `2GB` (10^9)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", value.strip()) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise ValueError("is not a size such as 1GiB, 512MiB or 2GB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def parse_flag(value: Any) -> bool:
    """true or false; as text also yes/no, on/off, 1/0."""
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError("is neither true nor false")
    return text in _TRUE


def parse_compile(value: Any) -> bool | str:
    """true, false, or `required`."""
    if value == "required":
        return value
    try:
        return parse_flag(value)
    except ValueError:
        raise ValueError("is none of true, false and required") from None


def parse_text(value: Any) -> str:
    """Non-empty text without control characters."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; give a text, or leave it out")
    if not isinstance(value, str):
        raise ValueError("is not a text; quote it if it looks like a number")
    if not value.isprintable():
        raise ValueError("contains control characters")
    return value


def each(value: Any) -> list[Any]:
    """The entries of a list that has some, or one value as if it were a list."""
    if value == []:
        raise ValueError("is an empty list; give one, or leave it out")
    return value if isinstance(value, list) else [value]


def parse_lines(value: Any) -> list[str]:
    """Lines of a text that are not empty, of which there is one at least."""
    lines = [line.strip() for line in value.split("\n")] if isinstance(value, str) else [value]
    return [parse_text(line) for line in lines if line != ""] or [parse_text("")]


def parse_origins(value: Any) -> str:
    """Origins of web pages, as browsers send them, with spaces between; `*` alone is any."""
    origins = [one for text in each(value) for one in parse_text(text).split()]
    for origin in origins:
        if origin != "*" and not (origin.isascii() and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@*,\s]+", origin)):
            raise ValueError(
                f"has {origin!r}, which is no origin such as https://chat.example.org or http://localhost:3000"
            )
    if "*" in origins and len(origins) > 1:
        raise ValueError("has * beside other origins: it is all of them")
    return " ".join(dict.fromkeys(origins))


def parse_url(value: Any) -> str:
    """An address of http or https."""
    text = parse_text(value)
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", text):
        raise ValueError("is no address such as http://localhost:4318/v1/traces")
    return text


def one_of(*choices: str) -> Parser:
    """A parser of words."""

    def parse(value: Any) -> str:
        if value not in choices:
            hint = difflib.get_close_matches(str(value), choices, n=1)
            raise ValueError(
                f"is not known; known: {', '.join(choices)}" + (f"; did you mean {hint[0]}?" if hint else "")
            )
        return value

    return parse


def between(parse: Parser, low: float, high: float = math.inf, low_is_open: bool = False) -> Parser:
    """`parse`, of numbers from `low` (or above it, if open) to `high`."""

    def checked(value: Any) -> Any:
        number = parse(value)
        if number < low or number > high or (low_is_open and number == low):
            if high == math.inf:
                raise ValueError(f"is too small: it must be {'above' if low_is_open else 'at least'} {low}")
            raise ValueError(f"is outside {'(' if low_is_open else '['}{low}, {high}]")
        return number

    return checked


def parse_block_size(value: Any) -> int:
    """A power of two of at least 8."""
    size = parse_whole(value)
    if size < 8 or size & (size - 1):
        nearest = max(8, 1 << max(size, 1).bit_length() - 1)
        raise ValueError(f"is not a power of two of at least 8; {nearest} works")
    return size
