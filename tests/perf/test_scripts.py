"""Every script of perf/ can at least be imported: most of them run where a GPU is, and only there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_script_can_be_imported() -> None:
    names = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "perf").rglob("*.py"))
    assert "perf.h200_quantized" in names
    code = f"import importlib; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
