"""The table of a start, and how web processes are held back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from pagegraph.runtime.server.start_report import process_age, table
from pagegraph.runtime.server.web_gate import SETTINGS_VARIABLE
from tests.paths import ROOT


def test_phases_stand_in_order_with_their_parts_and_what_is_left() -> None:
    seconds = {"web": 1.0, "command": 0.5, "draft wrap": 0.25, "compile": 20.0}
    assert table(25.0, seconds, {"compile": {"Inductor": 15.0}}).splitlines() == [
        "ready after 25.0 s:",
        "     0.5 s  command line and settings",
        "    20.0 s  compiled forward",
        "        15.0 s  Inductor",
        "     1.0 s  web processes",
        "     0.2 s  draft wrap",
        "     3.2 s  between them",
    ]


def test_the_age_of_a_process_includes_its_first_imports() -> None:
    code = "import time; time.sleep(0.3); from pagegraph.runtime.server.start_report import process_age; print(process_age())"
    begin = time.perf_counter()
    age = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
    assert 0.25 < age <= time.perf_counter() - begin + 0.02
    assert process_age() > age or sys.platform != "linux"


def test_web_processes_wait_for_their_settings(tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    code = "from pagegraph.runtime.server.web_gate import wait_for_settings; wait_for_settings(); print('on')"
    environment = {**os.environ, SETTINGS_VARIABLE: str(settings)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as waiting:
        time.sleep(0.5)
        assert waiting.poll() is None
        settings.touch()
        assert waiting.communicate(timeout=20)[0] == b"on\n"
