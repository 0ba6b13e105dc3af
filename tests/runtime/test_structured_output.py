"""What a request may ask of its output's form, and how refusals name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from pagegraph.runtime.bad_parameter import BadParameter
from pagegraph.runtime.json_schema import MAX_DEPTH, MAX_ENUM, MAX_OPTIONAL, MAX_SCHEMAS
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.structured_output import (
    MAX_ALTERNATIVES,
    MAX_CHARS,
    MAX_CHOICES,
    StructuredOutputs,
    check_grammar,
    grammar_text,
    limits,
    rule_body,
)


@pytest.fixture(scope="module")
def tokens(tokenizer_folder: Path) -> LLTokenizer:
    return LLTokenizer((tokenizer_folder / "tokenizer.json").read_text(), eos_token=0)


def accepts(tokens: LLTokenizer, structured: StructuredOutputs, text: str) -> bool:
    matcher = LLMatcher(tokens, grammar_text(structured))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokens.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def wide(optional: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(optional)}}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, '{"a": 1}', "{}"),
        ({"json": '{"enum": ["x", "y"]}'}, '"x"', "x"),
        ({"json_object": True}, '{"a": [1, "b"]}', "[1]"),
        ({"json_object": True, "disable_any_whitespace": True}, '{"a":1}', '{"a": 1}'),
        ({"json_object": True}, '{\n  "a": 1\n}', '{\n\n\n"a": 1}'),  # white space is bounded
        ({"json": {"enum": [2**53, 10**22, 0.25]}}, "10000000000000000000000", "10000000000000000000001"),
        ({"json": {"type": "number"}}, "-6.022e+23", "1.e5"),
        ({"regex": r"\d{3}/[a-z]"}, "123/a", "12/a"),
        ({"regex": "^a|b$"}, "b", "c"),
        ({"choice": ['say "hi"', "é/\n"]}, 'say "hi"', "say"),
        ({"choice": ['say "hi"', "é/\n"]}, "é/\n", ""),
        ({"grammar": 'start: "a" b\nb: /[0-9]+/'}, "a12", "a"),
        ({"grammar": 'root ::= "a" num\nnum ::= [0-9]+'}, "a12", "a"),
    ],
)
def test_a_grammar_takes_what_was_asked_for(tokens: LLTokenizer, fields: dict, good: str, bad: str) -> None:
    structured = StructuredOutputs(**fields)
    check_grammar(structured)
    assert accepts(tokens, structured, good)
    assert not accepts(tokens, structured, bad)


@pytest.mark.parametrize(
    "fields", [{"json": {"type": "null"}}, {"regex": "null"}, {"choice": ["null"]}, {"grammar": 'start: "null"'}]
)
def test_each_kind_is_a_rule_of_a_larger_grammar(tokens: LLTokenizer, fields: dict) -> None:
    larger = f'start: "<" inner ">"\ninner: {rule_body(StructuredOutputs(**fields))}\n'
    assert accepts(tokens, StructuredOutputs(grammar=larger), "<null>")
    assert not accepts(tokens, StructuredOutputs(grammar=larger), "<>")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"json_object": 1}, "true or false"),
        ({"regex": 5}, "must be a string"),
        ({"regex": ""}, "empty"),
        ({"regex": "a" * (MAX_CHARS + 1)}, "at most"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"choice": []}, "1 to"),
        ({"choice": "ab"}, "must be a list"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": ["a", 1]}, "strings"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "1 to"),
        ({"choice": ["a" * MAX_CHARS, "b"]}, "at most"),
        ({"json": 5}, "an object or JSON text"),
        ({"json": False}, "an object or JSON text"),
        ({"json": {"const": float("nan")}}, "is not JSON"),
        ({"json": nested(30_000)}, "nested too deeply"),
    ],
)
def test_form_and_size_are_checked_where_one_is_built(fields: dict, problem: str) -> None:
    with pytest.raises(BadParameter, match=problem):
        StructuredOutputs(**fields)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"json": "{"}, "json is not JSON"),
        ({"json": "[]"}, "must be an object"),
        ({"json": '{"a": 1, "a": 2}'}, "twice"),
        ({"json": '{"items":' * 30_000 + "{}" + "}" * 30_000}, "json has"),
        ({"json": '{"items":' * 10_000 + "{}" + "}" * 10_000}, "nested too deeply"),
        ({"json": nested(MAX_DEPTH + 1)}, f"nested more than {MAX_DEPTH} deep"),
        ({"json": {"$defs": {str(n): {} for n in range(MAX_SCHEMAS)}}}, f"more than {MAX_SCHEMAS}"),
        ({"json": {"items": wide(MAX_OPTIONAL + 1)}}, f"at /items: has {MAX_OPTIONAL + 1} .* at most {MAX_OPTIONAL}"),
        ({"json": {"enum": list(range(MAX_ENUM + 1))}}, f"at /enum: .*{MAX_ENUM}"),
        ({"json": {"items": {"multipleOf": 123456789}}}, "at /items/multipleOf: takes 123456789 remainders, tens"),
        (
            {"json": {"anyOf": [{"multipleOf": 4093}, {"multipleOf": 0.07}]}},
            "at /anyOf/1/multipleOf: takes with others",
        ),
        ({"json": {"allOf": [{"multipleOf": 65}, {"multipleOf": 64}]}}, "at /allOf/1/multipleOf: .* 4160 remainders"),
        ({"grammar": 'start: "a" %json\n{"items": {"multipleOf": 99991}}'}, "at /items/multipleOf: takes 99991"),
        ({"json": {"properties": {"age": {"type": "integr"}}}}, "at /properties/age/type: must be one of"),
        ({"json": {"properties": {"age": {"not": {}}}}}, "at /properties/age: the keyword not"),
        ({"json": {"items": {"uniqueItems": True}}}, "at /items: the keyword uniqueItems"),
        ({"json": {"x-guidance": {"lenient": True}}}, "keyword x-guidance"),
        (
            {"json": {"properties": {"a/b": {"pattern": "("}}}},
            "at /properties/a~1b/pattern: invalid regex: unclosed group",
        ),
        ({"json": {"anyOf": [{}, {"$ref": "#/$defs/x"}]}}, "at /anyOf/1/\\$ref: names #/\\$defs/x, which is nowhere"),
        ({"json": {"$ref": "http://x.org/a.json"}}, "at /\\$ref: must stay within"),
        ({"json": {"allOf": {}}}, "at /allOf: must be a list"),
        ({"json": {"properties": []}}, "at /properties: must be an object of schemas"),
        ({"json": {"properties": {"a": 1}}}, "at /properties/a: must be a schema"),
        ({"json": {"items": {"format": "zip"}}}, "at /items/format: is not supported"),
        ({"json": {"required": "a"}}, "at /required: must be a list"),
        ({"json": {"maxItems": 10**9}}, "at /maxItems"),
        ({"json": {"minLength": -1}}, "at /minLength"),
        ({"json": {"maximum": 1e300}}, "at /maximum"),
        ({"json": {"multipleOf": 0}}, "at /multipleOf"),
        ({"json": {"items": {"enum": [1, [2**53 + 1]]}}}, "at /items/enum: a whole number beyond 9007199254740992"),
        ({"json": {"const": 10**400}}, "at /const: a whole number beyond"),
        ({"json": {"items": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}}, "at /items: oneOf"),
        ({"regex": "("}, "invalid regex: unclosed group"),
        ({"regex": "(?=a)"}, "look-around"),
        ({"regex": "(" * 30_000 + ")" * 30_000}, "nested parentheses"),
        ({"grammar": "hello"}, "must be Lark with a rule start"),
        ({"grammar": "start: x"}, 'line 1, column 8: unknown name: "x"'),
        ({"grammar": "root ::= x"}, "is not GBNF: line 1, column 10: there is no rule x"),
        ({"grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000}, "groups are nested more than 64 deep"),
        ({"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}, "nested"),
        ({"grammar": 'start[max_tokens=5]: "a"'}, "max_tokens="),
    ],
)
def test_a_refusal_names_the_place(fields: dict, problem: str) -> None:
    with pytest.raises(BadParameter, match=problem) as caught:
        check_grammar(StructuredOutputs(**fields))
    assert caught.value.field == f"structured_outputs.{next(iter(fields))}"
    assert len(str(caught.value)) < 600


def test_a_refusal_has_the_users_name_of_the_field() -> None:
    with pytest.raises(BadParameter, match="^response_format.json_schema.schema cannot be served: at /items"):
        check_grammar(StructuredOutputs(json={"items": {"not": {}}}), "response_format.json_schema.schema")


def test_it_travels_as_a_sampling_parameter() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs(json={"type": "object"}))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert again == params
    assert again.structured_outputs is not None and json.loads(str(again.structured_outputs.json)) == {"type": "object"}
    with pytest.raises(BadParameter, match="structured_outputs must be"):
        SamplingParams(structured_outputs={"json": {}})  # pyright: ignore[reportArgumentType]


def test_as_many_choices_as_are_taken_can_be_answered(tokens: LLTokenizer) -> None:
    odd = [
        *(chr(code) + "x" for code in range(256)),
        "a|b",
        "(c",
        "d\\",
        "#e",
        "f g",
        "h\nh\r\t",
        "\U0001f600",
        "i",
        "ii",
        "/j/",
    ]
    for count in (MAX_ALTERNATIVES, MAX_ALTERNATIVES + 1, MAX_CHOICES):
        choices = [*odd, *(f"number {n} " for n in range(count - len(odd)))]
        structured = StructuredOutputs(choice=choices)
        check_grammar(structured)
        start = LLMatcher(tokens, grammar_text(structured), limits=limits())
        for one in [*odd, choices[-1]]:
            matcher, ids = start.deep_copy(), tokens.tokenize_str(one)
            assert matcher.consume_tokens(ids) and matcher.is_accepting(), (count, one, matcher.get_error())
        for other in ("number", "numbers", "ax", "i|", "f  g", "hn"):
            matcher, ids = start.deep_copy(), tokens.tokenize_str(other)
            assert other in choices or matcher.try_consume_tokens(ids) < len(ids) or not matcher.is_accepting(), other


def test_as_many_optional_properties_as_are_taken_can_be_answered(tokens: LLTokenizer) -> None:
    """Deep within others, too, where more than they may follow."""
    schema: dict[str, Any] = wide(MAX_OPTIONAL)
    for _ in range(MAX_DEPTH // 2 - 1):
        schema = {"type": "object", "properties": {"b": {"type": "array", "items": schema}}}
    structured = StructuredOutputs(json=schema)
    check_grammar(structured)
    matcher = LLMatcher(tokens, grammar_text(structured), limits=limits())
    text = '{"b":[' * (MAX_DEPTH // 2 - 1) + f'{{"p0":"","p{MAX_OPTIONAL - 1}":""}}'
    for token in tokens.tokenize_str(text):
        matcher.compute_bitmask()
        assert matcher.consume_token(token), matcher.get_error()
