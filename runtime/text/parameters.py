"""Arguments that a model writes as plain text, one by one, to the JSON text of an object.

What a value is, text or number or object, is said by the tool's schema alone: a value becomes JSON of its type where
it is that, else a string. Knows JSON Schema's types, as far as a value's kind depends on them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
_MOST_LITERAL = 1 << 16  # characters that are read as a Python literal
_DEPTH = 8  # of references and alternatives in a schema


def value_types(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """JSON Schema's types that a value may have; empty where the schema says nothing. `root` is what $ref refers to."""
    if not isinstance(schema, Mapping) or depth > _DEPTH:
        return frozenset()
    if isinstance(reference := schema.get("$ref"), str):
        return value_types(_referred(root, reference), root, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(one for one in kind if isinstance(one, str))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset(map(_type_of, values))
    types: frozenset[str] = frozenset()
    for name in ("anyOf", "oneOf", "allOf"):
        inner = schema.get(name)
        for one in inner if isinstance(inner, list) else ():
            types |= value_types(one, root, depth + 1)
    return types


def as_json(text: str, types: frozenset[str]) -> str:
    """The JSON text of a value that was written as `text`."""
    stripped = text.strip()
    word = _WORDS.get(stripped.lower())
    if word == "null" and ("null" in types or (types and "string" not in types)):
        return word
    if word in ("true", "false") and "boolean" in types:
        return word
    if types & {"number", "integer"} and _NUMBER.fullmatch(stripped):
        return stripped
    if types & {"object", "array"} and stripped[:1] in ("{", "["):
        try:
            json.loads(stripped)
        except (ValueError, RecursionError):
            return _of_literal(stripped) or json.dumps(text, ensure_ascii=False)
        return stripped
    return json.dumps(text, ensure_ascii=False)


class StringWriter:
    """A string's text, piece by piece, to JSON text without the quotes; without the line `breaks` around it."""

    def __init__(self, emit: Callable[[str], object], breaks: bool) -> None:
        self._emit = emit
        self._breaks = breaks
        self._begun = False
        self._break = ""

    def __call__(self, text: str) -> None:
        """More of it."""
        if self._breaks:
            text = self._break + (text if self._begun else text.removeprefix("\n"))
            self._begun = True
            self._break = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
        if text:
            self._emit(json.dumps(text, ensure_ascii=False)[1:-1])


def _referred(root: Any, reference: str) -> Any:
    if not reference.startswith("#"):
        return None
    for key in reference[1:].strip("/").split("/"):
        root = root.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def _type_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return names.get(type(value), "null")


def _of_literal(text: str) -> str | None:
    """The JSON text of a Python literal, which models write for objects and lists, too."""
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False) if len(text) <= _MOST_LITERAL else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
