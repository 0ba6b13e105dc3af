"""Arguments written as plain text to JSON of the types that a schema names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pagegraph.runtime.text.parameters import as_json, value_types

ROOT = {"$defs": {"size": {"enum": [1, 2.5, None]}, "loop": {"$ref": "#/$defs/loop"}, "a/b": {"type": "array"}}}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"enum": ["a", "b"]}, {"string"}),
        ({"const": True}, {"boolean"}),
        ({"$ref": "#/$defs/size"}, {"integer", "number", "null"}),
        ({"$ref": "#/$defs/a~1b"}, {"array"}),
        ({"$ref": "#/$defs/loop"}, set()),
        ({"$ref": "#/$defs/nothing"}, set()),
        ({"$ref": "https://example.com"}, set()),
        ({"anyOf": [{"type": "object"}, {"oneOf": [{"type": "null"}]}]}, {"object", "null"}),
        ({}, set()), (None, set()), (True, set()), ({"type": 5, "anyOf": 3}, set()),
    ],
)  # fmt: skip
def test_types_that_a_schema_allows(schema: Any, types: set[str]) -> None:
    assert value_types(schema, ROOT) == types


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("5", {"integer"}, 5), ("-1.5e3", {"number"}, -1500.0), ("5", {"string"}, "5"), ("5", set(), "5"),
        ("five", {"integer"}, "five"), ("007", {"integer"}, "007"), ("True", {"boolean"}, True), ("no", {"boolean"}, "no"),
        ("null", {"string", "null"}, None), ("None", {"integer"}, None), ("null", {"string"}, "null"), ("null", set(), "null"),
        (' {"a": [1]} ', {"object"}, {"a": [1]}), ("[1, 2]", {"array", "string"}, [1, 2]),
        ("{'a': (1, True)}", {"object"}, {"a": [1, True]}), ("{1: 2", {"object"}, "{1: 2"), ("{", {"object"}, "{"),
        ("[" * 100000, {"array"}, "[" * 100000), ("a\n\"b\"", {"integer"}, 'a\n"b"'), ("12", {"integer", "string"}, 12),
    ],
)  # fmt: skip
def test_text_becomes_a_value_of_its_type(text: str, types: set[str], value: Any) -> None:
    assert json.loads(as_json(text, frozenset(types))) == value
