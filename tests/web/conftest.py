"""A Flask test client over the fake engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from pagegraph.web.app import create_app


@pytest.fixture
def make_app(fake_engine, tokenizer_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Flask]]:
    """An app from a settings file, as gunicorn would make it; keyword arguments override settings."""
    apps = []

    def make(**settings: Any) -> Flask:
        values = {
            "engine_addresses": [fake_engine.address],
            "model": str(tokenizer_folder),
            "served_model_name": "tiny",
            "threads": 80,
            "enough_threads": 80,
            "silence_s": 2.0,
            **settings,
        }
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(values))
        apps.append(create_app(str(path)))
        return apps[-1]

    yield make
    for app in apps:
        app.extensions["pagegraph"].engine.close()


@pytest.fixture
def http(make_app: Callable[..., Flask]) -> FlaskClient:
    return make_app().test_client()
