"""Lines of the log: JSON objects or text, also with exceptions and line ends in a message."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from pagegraph.runtime.server.logs import FIELDS, JsonFormatter
from tests.paths import ROOT

SCRIPT = """
import logging, sys
from pagegraph.runtime.server.logs import configure
configure("info", sys.argv[1], "engine")
log = logging.getLogger("pagegraph.test")
log.debug("left out")
log.info("one\\ntwo %s", "three")
logging.getLogger("gunicorn.error").info("from gunicorn")
try:
    raise ValueError("bad")
except ValueError:
    log.exception("failed")
"""


def written(format: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, format], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_an_object_a_line() -> None:
    lines = [json.loads(line) for line in written("json")]
    assert [(line["level"], line["logger"], line["message"]) for line in lines] == [
        ("info", "pagegraph.test", "one\ntwo three"),
        ("info", "gunicorn.error", "from gunicorn"),
        ("error", "pagegraph.test", "failed"),
    ]
    assert all(line["process"] == "engine" and line["time"].endswith("Z") and line["pid"] > 0 for line in lines)
    assert "ValueError: bad" in lines[2]["exception"] and "exception" not in lines[0]


def test_text_is_text() -> None:
    lines = written("text")
    assert lines[0].endswith("pagegraph.test one") and lines[1] == "two three"
    assert lines[2].endswith("gunicorn.error from gunicorn") and "ValueError: bad" in lines[-1]


@pytest.mark.parametrize("value", ["text", 3, {"a": 1}, object()])
def test_fields_of_a_record_are_keys(value: object) -> None:
    record = logging.LogRecord("name", logging.INFO, "file", 1, "said", (), None)
    setattr(record, FIELDS, {"field": value})
    found = json.loads(JsonFormatter("web").format(record))
    assert found["field"] == (value if type(value) is not object else str(value)) and found["message"] == "said"
