"""The description of the API is true: its routes are the app's, its fields are those that the parsers take."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.web.fields import UNSERVED, Fields
from pagegraph.web.openapi import fields as described
from pagegraph.web.openapi.routes import ROUTES, Route

WITH_FIELDS = [route for route in ROUTES if route.fields]
# Bodies that take another way through the parser than the example.
VARIANTS: dict[str, list[dict[str, Any]]] = {"/tokenize": [{"content": "Hello"}]}


def of(path: str) -> Route:
    (route,) = (route for route in ROUTES if (route.path, route.method) == (path, "POST"))
    return route


def test_the_table_has_the_routes_of_the_app(http: FlaskClient) -> None:
    served = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in http.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert {(route.method, route.path) for route in ROUTES} == served
    assert len(ROUTES) == len(served)


@pytest.mark.parametrize("route", WITH_FIELDS, ids=lambda route: route.path)
def test_fields_are_those_that_the_parser_takes(
    http: FlaskClient, monkeypatch: pytest.MonkeyPatch, route: Route
) -> None:
    taken: set[str] = set()
    take = Fields.take
    monkeypatch.setattr(Fields, "take", lambda self, name: (taken.add(name), take(self, name))[1])
    for body in (route.example, *VARIANTS.get(route.path, [])):
        answer = http.post(route.path, json=body)
        assert answer.status_code == 200, answer.json
    if route.path == "/tokenize":
        taken.add("messages")  # with them the body is a chat's: the next test
    assert set(route.fields) == taken
    assert not taken & UNSERVED.keys() - described.COMPLETION.keys() - described.CHAT.keys()


def test_a_chat_to_tokenize_has_the_fields_of_a_chat(http: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: set[str] = set()
    take = Fields.take
    monkeypatch.setattr(Fields, "take", lambda self, name: (taken.add(name), take(self, name))[1])
    assert http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hello"}]}).status_code == 200
    assert taken == described.CHAT.keys() | {"return_token_strs"}


@pytest.mark.parametrize("route", WITH_FIELDS, ids=lambda route: route.path)
def test_bounds_defaults_and_null_are_as_described(http: FlaskClient, route: Route) -> None:
    for name, (schema, _) in route.fields.items():
        wrong = [schema[end] + step for end, step in (("minimum", -1), ("maximum", 1)) if end in schema]
        wrong += ["x"] if schema.get("type") in ("boolean", "integer", "number") else []
        for value in wrong:
            answer = http.post(route.path, json={**route.example, name: value})
            assert (answer.status_code, answer.json["error"]["param"]) == (400, name), value
        if "default" in schema:
            assert http.post(route.path, json={**route.example, name: schema["default"]}).status_code == 200, name
        if name not in route.required and name not in route.example:
            assert http.post(route.path, json={**route.example, name: None}).status_code == 200, name
    for name in route.required:
        answer = http.post(route.path, json={key: value for key, value in route.example.items() if key != name})
        assert (answer.status_code, answer.json["error"]["param"]) == (400, name)


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


def test_the_page_asks_nobody_else(http: FlaskClient) -> None:
    answer = http.get("/docs")
    assert answer.mimetype == "text/html" and "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "//" not in re.sub(r"^\s*//.*", "", answer.text, flags=re.M)  # no address of another server
    assert re.findall(r'(?:src|href)="([^"]+)"', answer.text) == ["openapi.json"]


def test_routes_without_a_key_are_those_described(make_app: Callable[..., Flask]) -> None:
    client = make_app(api_key="s3cret").test_client()
    for route in ROUTES:
        status = client.open(route.path, method=route.method).status_code
        assert (status != 401) == route.open, route.path
