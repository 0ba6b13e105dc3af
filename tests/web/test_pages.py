"""The pages for people: served whole, without a key, and with nothing from elsewhere. What they do, `make clients` tries."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.web.pages import PAGES
from tests.paths import ROOT

STATIC = ROOT / "web" / "static"
OWN = sorted(path for path in STATIC.iterdir() if path.suffix in (".html", ".js", ".css"))


@pytest.mark.parametrize("path", PAGES)
def test_a_page_and_all_that_it_loads_are_served(http: FlaskClient, path: str) -> None:
    page = http.get(path)
    assert (page.status_code, page.mimetype) == (200, "text/html")
    loaded = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert loaded
    for name in loaded:
        answer = http.get("/" + name)
        assert answer.status_code == 200, name
        assert answer.mimetype == ("text/css" if name.endswith(".css") else "text/javascript")
        for imported in re.findall(r'from "\./([^"]+)"', answer.text) if "/vendor/" not in name else ():
            assert http.get(f"/static/{imported}").status_code == 200, imported


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    found = set(re.findall(r"https?://[^\"'`\s)]+", path.read_text()))
    assert found <= {"http://www.w3.org/2000/svg"}  # the name of a language, which nobody asks for


@pytest.mark.parametrize("path", [*PAGES, "/static/chat.js"])
def test_the_policy_lets_pages_ask_this_server_alone(http: FlaskClient, path: str) -> None:
    policy = http.get(path).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy and "img-src data:;" in policy


def test_scripts_find_their_elements() -> None:
    for page in ("chat", "dashboard"):
        html, script = (STATIC / f"{page}.{kind}" for kind in ("html", "js"))
        ids = set(re.findall(r'id="(\w+)"', html.read_text()))
        assert set(re.findall(r'\bat\("(\w+)"\)', script.read_text())) <= ids


def test_an_unchanged_file_is_not_sent_again(http: FlaskClient) -> None:
    tag = http.get("/static/style.css").headers["ETag"]
    assert http.get("/static/style.css", headers={"If-None-Match": tag}).status_code == 304
    assert http.get("/static/style.css", headers={"If-None-Match": '"another"'}).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "../app.py", "%2e%2e/app.py", "vendor", "vendor/", "..%2fapp.py"])
def test_other_files_are_not_served(http: FlaskClient, name: str) -> None:
    answer = http.get(f"/static/{name}")
    assert answer.status_code == 404 and answer.json["error"]["message"]


def test_pages_are_open_and_nothing_else_is_through_them(make_app: Callable[..., Flask]) -> None:
    client = make_app(api_key="s3cret").test_client()
    for path in (*PAGES, "/static/style.css"):
        assert client.get(path).status_code == 200
        assert client.post(path).status_code == 405
    for path in ("/static/../v1/models", "/static/%2e%2e/v1/models", "/static//v1/models"):
        assert client.get(path).status_code == 404
    assert client.get("/dashboard/").status_code == 401
