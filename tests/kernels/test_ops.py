"""The table of ops: what it names is there, and it imports no Triton."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch

from pagegraph.kernels.ops import OPS, SAME, Op
from tests.paths import ROOT


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.schema.partition("(")[0])
def test_a_row_names_what_is_there(op: Op) -> None:
    """The function for CUDA, by its file's text: importing it would import Triton."""
    name = op.schema.partition("(")[0]
    assert hasattr(torch.ops.pagegraph, name) and callable(op.cpu)
    if op.cuda in (SAME, None):
        return
    module, _, function = op.cuda.partition(":")
    tree = ast.parse((ROOT / "kernels" / f"{module.replace('.', '/')}.py").read_text())
    assert function in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}


def test_the_table_imports_no_triton() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import pagegraph.kernels.ops; print(before, 'triton' in sys.modules)"
    before, after = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert before == after
