"""The cases of a client's script: each is a function of one feature, run alone, and reported by name.

A script is told by the environment which server to talk to, so it runs against any:

    CLIENTS_BASE_URL   where the server is, without /v1
    CLIENTS_MODEL      the model's name there
    CLIENTS_TOKENIZER  a folder that holds the model's tokenizer.json, for clients that count tokens themselves
    CLIENTS_REPORT     the file that gets the report; without it the report is printed

Runs in the environment of the client, so it uses the standard library alone. Knows no client and no endpoint.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

BASE_URL = os.environ["CLIENTS_BASE_URL"].rstrip("/")
API_URL = f"{BASE_URL}/v1"
MODEL = os.environ["CLIENTS_MODEL"]
TOKENIZER = os.environ["CLIENTS_TOKENIZER"]
KEY = "none"  # clients want one; the server asks for none
TIMEOUT = 120.0  # seconds, of a request
FEATURES = ("plain", "stream", "tools", "structured", "embeddings")

Case = Callable[[], Any]
_cases: list[tuple[str, str, Case]] = []
_notes: list[str] = []
_loop = asyncio.Runner()  # one for all: clients keep connections


def case(feature: str, name: str = "") -> Callable[[Case], Case]:
    """Registers a function, sync or async, as a case of one of FEATURES. It passes unless it raises."""
    assert feature in FEATURES

    def register(function: Case) -> Case:
        _cases.append((feature, name or function.__name__.replace("_", " "), function))
        return function

    return register


def note(text: str) -> None:
    """A word on this client for the table."""
    _notes.append(text)


def _run(function: Case) -> str:
    """Run one case; the beginning of what it raised, or nothing."""
    try:
        outcome = function()
        if inspect.iscoroutine(outcome):
            _loop.run(outcome)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a client may end the process where a case should merely fail
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ""


def main(*packages: str) -> None:
    """Run the cases named on the command line, or all; `packages` are those whose versions are told, the first counts."""
    asked = set(sys.argv[1:])
    cases = []
    for feature, name, function in _cases:
        if asked and name not in asked:
            continue
        print(f"-- {feature}: {name}", file=sys.stderr, flush=True)
        error = _run(function)
        cases.append(dict(feature=feature, name=name, ok=not error, error=error))
    report = dict(versions={package: metadata.version(package) for package in packages}, cases=cases, notes=_notes)
    text = json.dumps(report, indent=1)
    if path := os.environ.get("CLIENTS_REPORT"):
        Path(path).write_text(text)
    else:
        print(text)
    # Threads that a client left behind shall not keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(any(not found["ok"] for found in cases))
