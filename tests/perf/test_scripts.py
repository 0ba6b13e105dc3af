"""Every script of perf/ can at least be imported: most of them run where a GPU is, and only there."""

from __future__ import annotations

import subprocess
import sys

from tests.paths import ROOT


def test_every_script_can_be_imported() -> None:
    names = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "perf").rglob("*.py"))
    assert "perf.gpu.quantized" in names
    code = f"import importlib; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_section_has_a_function() -> None:
    from perf.gpu import run

    for name in (*run.SECTIONS, "start"):
        assert callable(run.section(name)), name
