"""Every script of perf/ can at least be imported: most of them run where a GPU is, and only there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_script_can_be_imported() -> None:
    names = sorted(path.stem for path in (ROOT / "perf").glob("*.py"))
    assert "h200_quantized" in names
    paths = [str(ROOT / part) for part in ("perf", ".", "tests", "tests/kernels")]
    code = f"import sys; sys.path[:0] = {paths}; [__import__(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
