"""Patterns of JSON schemas are ECMA-262's; here they are written for Rust's `regex`, which reads some otherwise.

White space, the dot and what stands in a class mean something else there, and a grammar would be wider than its schema.
What both read alike is left alone. Knows no schema.
"""

from __future__ import annotations

import re

_SPACE = r"\t\n\v\f\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_LINE_END = r"\n\r\x{2028}\x{2029}"
_DOT_IS_ALL = re.compile(r"\(\?[a-zA-Z]*s[a-zA-Z]*[-:)]")  # a flag that ECMA-262 does not write so
_ESCAPES = {
    r"\s": f"[{_SPACE}]",
    r"\S": f"[^{_SPACE}]",
    r"\<": "<",
    r"\>": ">",
}  # the last two are edges of words there
# An escape; the beginning of a class; anything else.
_PART = re.compile(r"\\.|\[\^?|.", re.DOTALL)
_IN_CLASS = {"[": r"\[", "&": r"\&", "~": r"\~"}  # Rust nests, intersects and subtracts classes


class EcmaProblem(ValueError):
    """A pattern that cannot be said in Rust's regex; the message is for the user."""


def to_rust(pattern: str) -> str:
    """The pattern in the syntax of Rust's regex, no wider than ECMA-262 has it. Raises EcmaProblem."""
    dot = "." if _DOT_IS_ALL.search(pattern) else f"[^{_LINE_END}]"
    written: list[str] = []
    in_class = False
    for part in _PART.findall(pattern):
        if part in _ESCAPES:
            written.append(_ESCAPES[part])
        elif part.startswith("\\"):
            written.append(part)
        elif not in_class:
            in_class = part.startswith("[")
            written.append(dot if part == "." else part)
        elif part == "]":
            if written[-1] in ("[", "[^"):
                raise EcmaProblem(r"has a class that begins with ], which is read in two ways; write \]")
            in_class = False
            written.append(part)
        elif part == "-" and written[-1] in ("-", r"\-", "[", "[^"):
            written.append(r"\-")
        else:
            written.append("".join(_IN_CLASS.get(one, one) for one in part))
    return "".join(written)
