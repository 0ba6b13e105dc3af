"""What comes under a schema's masks is valid: schemas and walks at random, and places where a grammar could be too wide."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from pagegraph.runtime.bad_parameter import BadParameter
from perf.schemas import byte_vocabulary, compiled, is_valid, random_schema, takes, walk

WALKS = 3


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return byte_vocabulary()


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_random_walks_are_valid_json(vocabulary: LLTokenizer, seed: int) -> None:
    schema = random_schema(random.Random(seed))
    try:
        matcher = compiled(vocabulary, schema)
    except BadParameter as error:
        assert "cannot be served" in str(error)
        return
    validator = jsonschema.Draft202012Validator(schema)
    for number in range(WALKS):
        text = walk(matcher, np.random.default_rng(seed + number))
        assert text is None or is_valid(validator, text), (schema, text)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "number", "maximum": 1.5, "exclusiveMinimum": 1}, [1.25, 1.5], [1, 1.0, 1.51]),
        ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, [-1.5, -1.25], [-1, -1.0, -0.5]),
        ({"allOf": [{"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.5}]}, [0.5, 0.125], [0, 0.75]),
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 2.5}, [1, 2], [0, 3]),
        ({"type": "string", "format": "date"}, ["2024-02-29", "2023-02-28", "2000-02-29"], ["2023-02-29", "1900-02-29", "2024-02-30", "2024-13-01", "2024-04-31"]),
        ({"type": "string", "format": "date-time"}, ["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-01-01 12:00"]),
        ({"type": "string", "format": "hostname"}, ["a.example"], ["-a", "a..b", ".".join(["a" * 60] * 5)]),
        ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["256.0.0.1", "1.2.3"]),
        ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
        ({"properties": {"a": {"type": "integer"}}, "required": ["a"], "minProperties": 1, "type": "object"}, [{"a": 1}], [{}]),
        ({"enum": [1, "a"]}, [1, "a"], [True, "1", 2]),
        ({"const": True}, [True], [1, "true"]),
        ({"type": "string", "maxLength": 2}, ["é😀"], ["abc"]),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, [[1], []], [[1, 2], ["a"]]),
        ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False}, [{"ab": 1}], [{"b": 1}, {"a": "x"}]),
        ({"format": "date"}, [5, "2024-01-01"], ["x"]),
        ({"format": "time"}, ["23:59:59Z"], ["22:59:60Z", "23:58:60Z"]),
        ({"format": "date-time"}, ["1998-12-31T23:58:59Z"], ["1998-12-31T23:58:60Z", "1998-12-31T22:59:60Z"]),
        ({"type": "string", "pattern": r"^\S$"}, ["a", "\x01", "–"], ["\ufeff", "\u2003", " "]),
        ({"type": "string", "pattern": r"^[\s,]$"}, ["\ufeff", ","], ["\x85", "x"]),
        ({"type": "string", "pattern": r"^\<a[\>]$"}, ["<a>"], ["a", "a>"]),
        ({"type": "string", "pattern": "^.$"}, ["a"], ["\r", "\u2028"]),
        ({"type": "string", "pattern": "^[^a&&b]$"}, ["c"], ["a", "&"]),
        ({"type": "string", "pattern": "^[[:al]$"}, ["[", "a"], ["b"]),
        ({"type": "string", "pattern": "^[+--]$"}, ["+", ",", "-"], [".", "*"]),
        ({"patternProperties": {r"^\S+$": {"type": "null"}}}, [{"a": None}], [{"a": 1}, {"\ufeff": 1}]),
        ({"allOf": [{"items": [{"type": "integer"}, {"type": "string"}]}], "items": [{"type": "integer"}],
          "additionalItems": {"type": "boolean"}}, [[1]], [[1, "a"], [1, True]]),
        ({"minItems": 1.0, "maxItems": 2.0, "type": "array"}, [[1], [1, 2]], [[], [1, 2, 3]]),
        ({"properties": {"a": {"type": "null"}}, "unevaluatedProperties": False}, [{"a": None}], [{"b": 1}, {"a": 1}]),
        ({"prefixItems": [{"type": "null"}], "unevaluatedItems": {"type": "integer"}}, [[None, 1]], [[None, "a"], [1]]),
        ({"uniqueItems": False, "propertyNames": {"type": "string"}, "type": "array"}, [[1, 1]], [{}]),
        ({"$ref": "#/x/y", "x": {"y": {"type": "string", "pattern": r"^\S$"}}}, ["a"], ["\ufeff", 1]),
        ({"$id": "urn:x:y", "$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, [None], [1]),
        ({"patternProperties": {"^x": {"type": "null"}}, "required": ["a"]}, [{"a": 1, "x": None}], [{"x": None}, {"a": 1, "x": 1}]),
    ],
)  # fmt: skip
def test_only_what_a_schema_allows(vocabulary: LLTokenizer, schema: dict, good: list[Any], bad: list[Any]) -> None:
    matcher = compiled(vocabulary, schema)
    for one in good:
        assert takes(matcher, json.dumps(one, ensure_ascii=False)), one
    for one in bad:
        assert not takes(matcher, json.dumps(one, ensure_ascii=False)), one


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "null"}, "é": {"type": "null"}, "😀": {"type": "null"}}},
        {"patternProperties": {"^[aé😀]": {"type": "null"}}},
        {"additionalProperties": {"type": "integer"}, "properties": {"a": {"type": "null"}}, "required": ["é", "😀"]},
        {"allOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"é": {"type": "null"}}}], "required": ["😀"]},
        {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": False, "é": False, "😀": False}}}},
    ],
)  # fmt: skip
def test_a_key_has_one_spelling(vocabulary: LLTokenizer, schema: dict) -> None:
    """Else one that has a schema could come as one that has none."""
    matcher = compiled(vocabulary, schema)
    for key in (r"\u0061", r"\u00e9", r"\u00E9", r"\ud83d\ude00", r"b\u0061"):
        assert not takes(matcher, f'{{"{key}": "x"}}'), key


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"minProperties": 2}, "at /minProperties: above 1"),
        ({"patternProperties": {"^x": False}}, "at /patternProperties/\\^x: false"),
        ({"patternProperties": {"^x": {"type": "array", "minItems": 3, "maxItems": 1}}}, "at /patternProperties/\\^x"),
        ({"allOf": [{"patternProperties": {"^x": {"type": "string"}}}, {"patternProperties": {"^x": {"type": "null"}}}]},
         "several patternProperties"),
        ({"minimum": 1.5, "exclusiveMaximum": 1e9}, "at /exclusiveMaximum"),
        ({"properties": {"a": {"uniqueItems": True}}}, "at /properties/a: the keyword uniqueItems"),
        ({"properties": {"a": {"contains": {}}}}, "at /properties/a: the keyword contains"),
        ({"if": {}, "then": {}}, "the keyword if"),
        ({"dependentRequired": {}}, "the keyword dependentRequired"),
        ({"propertyNames": {"maxLength": 3}}, "the keyword propertyNames"),
        ({"unevaluatedProperties": False, "allOf": [{}]}, "the keyword unevaluatedProperties is not supported beside allOf"),
        ({"items": [{}], "unevaluatedItems": False}, "the keyword unevaluatedItems is not supported beside"),
        ({"properties": {"a": {"contains": False}}}, "at /properties/a: the keyword contains"),
        ({"$ref": "other.json"}, "at /\\$ref: must stay within"),
        ({"$ref": "#no", "$anchor": "yes"}, "at /\\$ref: names #no, which is nowhere"),
        ({"allOf": [{"$id": "http://x.org/", "$ref": "#/allOf/0"}]}, "at /allOf/0/\\$ref: is not supported below an \\$id"),
        ({"$ref": "#/x", "x": {"not": {}}}, "at /x: the keyword not"),
        ({"items": {"pattern": "[]a]"}}, "at /items/pattern: has a class that begins with ]"),
        ({"items": {"pattern": r"\bfoo"}}, r"at /items/pattern: invalid regex: .*, \\b and \\B nowhere"),
        ({"items": {"pattern": "a$b"}}, r"at /items/pattern: invalid regex: \^ and \$ are served at its ends"),
        ({"items": {"patternProperties": {"(": {}}}}, "at /items: .*unclosed group"),
        ({"patternProperties": {"[&]": {}, r"[\&]": {}}}, "at /patternProperties: has two names of one meaning"),
        ({"properties": {"a\nb": {}}}, r"at /properties/a\\u000ab: has control characters"),
        ({"prefixItems": [{}], "items": [{}], "allOf": [{}]}, "at /items: must be a schema beside prefixItems"),
        ({"allOf": [{"properties": {"a": {}}}, {"patternProperties": {"^b": {"type": "null"}}}]},
         "patternProperties are not supported in a schema that holds together"),
    ],
)  # fmt: skip
def test_what_would_be_taken_too_widely_is_refused_by_name(vocabulary: LLTokenizer, schema: dict, words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        compiled(vocabulary, schema)
