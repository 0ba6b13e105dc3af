"""The fields that ask for a form: every client's name for it, and refusals that name the place in the user's words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pagegraph.runtime.structured_output import StructuredOutputs
from pagegraph.web.errors import ApiError
from pagegraph.web.schema import GenerationRequest, parse_chat, parse_completion

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}}


def completion(**fields: Any) -> GenerationRequest:
    return parse_completion({"prompt": "Hello", **fields}, 100)


def chat(**fields: Any) -> GenerationRequest:
    return parse_chat({"messages": [{"role": "user", "content": "Hi"}], **fields}, 100)


def json_schema(schema: Any, **others: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **others}}


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"response_format": json_schema(SCHEMA, strict=True, description="d")}, {"json": SCHEMA}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, {"json": json.dumps(SCHEMA)}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
         {"json_object": True, "disable_any_whitespace": True}),
        ({"structured_outputs": {"regex": "a", "disable_fallback": True, "backend": "auto"}}, {"regex": "a"}),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"ebnf": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"json_schema": {}}, {"json": {}}),
    ],
)  # fmt: skip
def test_every_name_of_a_form(parse: Any, fields: dict, kinds: dict) -> None:
    request = parse(**fields)
    assert request.params.structured_outputs == StructuredOutputs(**kinds) and request.ignored == []


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": None}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"grammar": ""},
     {"structured_outputs": {"json": None}}, {"guided_json": None}],
)  # fmt: skip
def test_free_text(fields: dict) -> None:
    assert chat(**fields).params.structured_outputs is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be one of text, json_object, json_schema"),
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be an object"),
        ({"response_format": json_schema(None)}, "response_format.json_schema.schema", "must be a JSON schema"),
        ({"response_format": json_schema({}, name=5)}, "response_format.json_schema.name", "must be a string"),
        ({"response_format": json_schema({}, strict="yes")}, "response_format.json_schema.strict", "true or false"),
        ({"response_format": json_schema({"properties": {"age": {"type": "int"}}})},
         "response_format.json_schema.schema", "at /properties/age/type: must be one of"),
        ({"response_format": {"type": "json_object", "schema": {"not": {}}}}, "response_format.schema", "keyword not"),
        ({"structured_outputs": {"json": {"items": {"if": {}}}}}, "structured_outputs.json", "at /items: the keyword if"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not served"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}}, "structured_outputs.whitespace_pattern", "not"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "not served"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs", "exactly one"),
        ({"guided_json": "{"}, "guided_json", "is not JSON"),
        ({"guided_choice": "yes"}, "guided_choice", "must be a list"),
        ({"guided_regex": "a{"}, "guided_regex", "invalid regex"),
        ({"regex": 5}, "regex", "must be a string"),
        ({"grammar": "root ::= x"}, "grammar", "is not GBNF"),
        ({"ebnf": "hello"}, "ebnf", "must be Lark"),
        ({"json_schema": "[1]"}, "json_schema", "must be an object"),
        ({"guided_whitespace_pattern": "x"}, "guided_whitespace_pattern", "not served"),
        ({"grammar_lazy": True}, "grammar_lazy", "not served"),
        ({"regex": "a", "grammar": 'root ::= "a"'}, "grammar", "beside regex"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice", "beside response_format"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_and_the_place(fields: dict, param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith(param)


def test_unknown_keys_are_named_as_without_effect() -> None:
    request = chat(response_format={"type": "json_object", "x": 1})
    assert request.ignored == ["response_format.x"]
    assert chat(response_format=json_schema({}, y=1)).ignored == ["response_format.json_schema.y"]
