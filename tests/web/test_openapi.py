"""The description of the API is true: its routes are the app's, its fields are those that the parsers take."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.web.anthropic import request as anthropic
from pagegraph.web.fields import UNSERVED, Fields
from pagegraph.web.openai_responses import request as openai_responses
from pagegraph.web.openapi import chat_like
from pagegraph.web.openapi import fields as described
from pagegraph.web.openapi.routes import ROUTES, Route

WITH_FIELDS = [route for route in ROUTES if route.fields]
# Bodies that take another way through the parser than the example.
VARIANTS: dict[str, list[dict[str, Any]]] = {"/tokenize": [{"content": "Hello"}]}
# Known fields that one route refuses and another one takes.
ELSEWHERE = {name for route in ROUTES for name in route.fields}


def test_the_table_has_the_routes_of_the_app(http: FlaskClient) -> None:
    served = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in http.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert {(route.method, route.path) for route in ROUTES} == served
    assert len(ROUTES) == len(served)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Fields, set[str]]]:
    """Each body that was read, in order, and the names that were taken of it."""
    bodies: list[tuple[Fields, set[str]]] = []
    take = Fields.take

    def recorded(self: Fields, name: str) -> Any:
        if not any(body is self for body, _ in bodies):
            bodies.append((self, set()))
        next(names for body, names in bodies if body is self).add(name)
        return take(self, name)

    monkeypatch.setattr(Fields, "take", recorded)
    return bodies


@pytest.mark.parametrize("route", WITH_FIELDS, ids=lambda route: route.path)
def test_fields_are_those_that_the_parser_takes(http: FlaskClient, taken, route: Route) -> None:
    names: set[str] = set()
    for body in (route.example, *VARIANTS.get(route.path, [])):
        taken.clear()
        answer = http.post(route.path, json=body)
        assert answer.status_code == 200, answer.json
        names |= taken[0][1]  # of another, that a parser wrote, the next is about
    if route.path == "/tokenize":
        names.add("messages")  # with them the body is a chat's: the next test
    assert set(route.fields) == names
    assert not names & UNSERVED.keys() - ELSEWHERE


@pytest.mark.parametrize("path", ["/tokenize", "/v1/responses", "/v1/messages"])
def test_what_is_read_as_a_chat_has_the_fields_of_a_chat(http: FlaskClient, taken, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    assert http.post(path, json={"input": "Hello"} if "responses" in path else body).status_code == 200
    assert taken[1][1] == described.CHAT.keys()


@pytest.mark.parametrize("surface", [openai_responses, anthropic])
def test_every_field_of_a_chat_is_taken_or_refused_by_surfaces_read_as_one(surface) -> None:
    own = chat_like.RESPONSES if surface is openai_responses else chat_like.MESSAGES
    known = described.CHAT.keys() | described.COMPLETION.keys()
    assert known <= own.keys() | surface._INSTEAD.keys() | UNSERVED.keys()
    assert not own.keys() & surface._INSTEAD.keys()


def named(error: dict[str, Any], name: str) -> bool:
    """Whether an error names the field at fault; Anthropic's shape has no place for it but the message."""
    return error["param"] == name if "param" in error else error["message"].startswith(name)


@pytest.mark.parametrize("route", WITH_FIELDS, ids=lambda route: route.path)
def test_bounds_defaults_and_null_are_as_described(http: FlaskClient, route: Route) -> None:
    for name, (schema, _) in route.fields.items():
        wrong = [schema[end] + step for end, step in (("minimum", -1), ("maximum", 1)) if end in schema]
        wrong += ["x"] if schema.get("type") in ("boolean", "integer", "number", "object", "array") else []
        wrong += [3] if schema.get("type") == "string" else []
        for value in wrong:
            answer = http.post(route.path, json={**route.example, name: value})
            assert answer.status_code == 400 and named(answer.json["error"], name), (name, value, answer.json)
        if "default" in schema:
            assert http.post(route.path, json={**route.example, name: schema["default"]}).status_code == 200, name
        if name not in route.required and name not in route.example:
            assert http.post(route.path, json={**route.example, name: None}).status_code == 200, name
    for name in route.required:
        answer = http.post(route.path, json={key: value for key, value in route.example.items() if key != name})
        assert answer.status_code == 400 and named(answer.json["error"], name)


def test_the_document_is_whole(http: FlaskClient) -> None:
    document = http.get("/openapi.json").json
    assert document["openapi"] == "3.1.0" and document["info"]["version"] == http.get("/version").json["version"]
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len(operations) == len(ROUTES)
    assert len({operation["operationId"] for operation in operations}) == len(ROUTES)
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    temperature = schema["properties"]["temperature"]
    assert (temperature["minimum"], temperature["maximum"], temperature["default"]) == (0, 2, 1.0)
    assert schema["required"] == ["messages"] and all(field["description"] for field in schema["properties"].values())
    error = http.post("/v1/chat/completions", json={}).json["error"]
    assert error.keys() == document["components"]["schemas"]["Error"]["properties"]["error"]["properties"].keys()


def test_refusals_are_described(make_app: Callable[..., Flask], fake_engine) -> None:
    """Each with the status of its route, and no route with all of them."""
    document = make_app().test_client().get("/openapi.json").json
    listed = {
        (method.upper(), path): set(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert listed["POST", "/v1/chat/completions"] == {
        "200", "400", "401", "404", "408", "413", "415", "429", "500", "503",
    }  # fmt: skip
    assert listed["GET", "/v1/responses/{id}"] == {"200", "401", "404", "400"}
    assert listed["GET", "/health"] == {"200", "503"} and listed["GET", "/docs"] == {"200"}
    client = make_app(api_key="s3cret", max_body_bytes=300).test_client()
    key = {"Authorization": "Bearer s3cret"}
    for route in WITH_FIELDS:
        met = {
            401: client.post(route.path, json={}),
            400: client.post(route.path, json={"model": 3}, headers=key),
            404: client.post(route.path, json={**route.example, "model": "nobody"}, headers=key),
            413: client.post(route.path, json={"model": "x" * 400}, headers=key),
            415: client.post(route.path, data="x", headers=key),
        }
        for status, answer in met.items():
            assert answer.status_code == status and str(status) in listed["POST", route.path], (route.path, status)


def test_the_page_asks_nobody_else(http: FlaskClient) -> None:
    answer = http.get("/docs")
    assert answer.mimetype == "text/html" and "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "//" not in re.sub(r"^\s*//.*", "", answer.text, flags=re.M)  # no address of another server
    assert re.findall(r'(?:src|href)="([^"]+)"', answer.text) == [".", "dashboard", "openapi.json"]


def test_routes_without_a_key_are_those_described(make_app: Callable[..., Flask]) -> None:
    client = make_app(api_key="s3cret").test_client()
    for route in ROUTES:
        status = client.open(route.path, method=route.method).status_code
        assert (status != 401) == route.open, route.path
