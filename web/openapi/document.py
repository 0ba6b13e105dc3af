"""/openapi.json, made of the tables of routes and fields, and /docs, a page that reads it.

The page needs nothing from elsewhere: a policy header forbids it to ask. Knows no parser.
"""

from __future__ import annotations

import functools
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from flask import Blueprint, Response

from pagegraph.runtime.server import health
from pagegraph.web.errors import json_response
from pagegraph.web.openapi.routes import ERRORS, ROUTES, Route

_PAGE = Path(__file__).parent.parent / "static" / "docs.html"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

blueprint = Blueprint("openapi", __name__)


@blueprint.get("/openapi.json")
def openapi() -> Response:
    """What is served, for programs."""
    return json_response(document())


@blueprint.get("/docs")
def docs() -> Response:
    """What is served, for people."""
    return Response(_PAGE.read_bytes(), mimetype="text/html", headers={"Content-Security-Policy": _POLICY})


@functools.cache
def document() -> dict[str, Any]:
    """The whole description, as OpenAPI 3.1 has it."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "pagegraph", "version": metadata.version("pagegraph")},
        "paths": paths,
        "components": {
            "schemas": {"Error": _error()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    media: dict[str, Any] = {route.media: {}}
    if route.streams:
        media["text/event-stream"] = {}
    errors = {str(status): _refused(status, route) for status in route.errors}
    name = re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_")
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": name,
        "responses": {"200": {"description": "The answer", "content": media}, **errors},
    }
    if names := re.findall(r"\{(\w+)\}", route.path):
        place = {"in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [{"name": name, **place} for name in names]
    if not route.open:
        operation["security"] = [{"key": []}, {}]
    if route.fields:
        body = {"schema": _body(route), "example": route.example}
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return operation


def _body(route: Route) -> dict[str, Any]:
    """Null counts as absent, and fields that are not listed are taken: harmless ones have no effect."""
    properties = {name: {**schema, "description": help} for name, (schema, help) in route.fields.items()}
    required = {"required": list(route.required)} if route.required else {}
    return {"type": "object", "properties": properties, **required}


def _refused(status: int, route: Route) -> dict[str, Any]:
    """Probes are told a status, all others an error."""
    schema = {"type": "object"} if route.path in health.PATHS else _reference("Error")
    return {"description": ERRORS[status], "content": {"application/json": {"schema": schema}}}


def _error() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    error = {"type": "object", "properties": {"message": {"type": "string"}, "type": text, "param": text, "code": text}}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
