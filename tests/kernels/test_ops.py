"""The table of ops: what it names is there, and it imports no Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pagegraph.kernels import ops
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


def test_the_function_for_cuda_gets_what_the_op_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """By place and by name, as a graph calls it."""
    given = []
    module = SimpleNamespace(function=lambda *arguments, **named: given.append((arguments, named)))
    monkeypatch.setattr(ops, "import_module", lambda name: module)
    ops._on_cuda("some.module:function")(1, 2, residual=3)
    assert given == [((1, 2), {"residual": 3})]


def test_the_table_imports_no_triton() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import pagegraph.kernels.ops; print(before, 'triton' in sys.modules)"
    before, after = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert before == after
