"""`python -O` drops asserts: no check of what comes from outside may be one, and refusals stay refusals."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

PACKAGES = ("kernels", "compiler", "runtime", "web")
# Of advisories of servers like this one: bounds of sampling, forms of output, tools, bodies, keys.
REFUSALS = (
    "tests/web/test_schema.py::test_a_bad_value_is_a_400_that_names_it",
    "tests/web/test_structured.py",
    "tests/web/test_tools.py",
    "tests/web/test_request_reader.py",
    "tests/web/test_app.py::test_the_key_opens_and_health_is_open",
)


def test_refusals_need_no_asserts() -> None:
    environment = {**os.environ, "PYTHONOPTIMIZE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", *REFUSALS]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-1000:]
    canary = subprocess.run([sys.executable, "-c", "assert False"], env=environment)
    assert canary.returncode == 0  # they are dropped indeed


@pytest.mark.parametrize("package", PACKAGES)
def test_an_assert_tells_the_reader_a_type_and_nothing_else(package: str) -> None:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert) and not _is_of_a_type(node.test):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "raise an exception: " + "\n".join(found)


def _is_of_a_type(test: ast.expr) -> bool:
    """`x is not None`, `isinstance(x, ...)`, or several of them."""
    if isinstance(test, ast.BoolOp):
        return all(map(_is_of_a_type, test.values))
    if isinstance(test, ast.Call):
        return isinstance(test.func, ast.Name) and test.func.id == "isinstance"
    return isinstance(test, ast.Compare) and ast.unparse(test).endswith(" is not None")
