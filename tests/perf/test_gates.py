"""Gates of benchmarks: every one says what it compares and why, and fails beyond its threshold."""

from __future__ import annotations

import ast

import pytest

from perf.gates import Gate, gates
from tests.paths import ROOT


def test_every_gate_belongs_to_a_benchmark_and_every_benchmark_that_asks_has_one() -> None:
    named = {name.partition("[")[0] for name in gates()}
    asking = {
        function.name
        for path in (ROOT / "perf").glob("test_*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and "gate" in [one.arg for one in function.args.args]
    }
    assert named == {name for name in asking if name.startswith("test_")}
    assert all(len(one.of) > 5 and len(one.why) > 15 for one in gates().values())


@pytest.mark.parametrize(("bound", "good", "bad"), [({"least": 1.5}, 1.5, 1.49), ({"most": 3}, 3.0, 3.01)])
def test_a_gate_fails_beyond_its_threshold_and_says_why(bound: dict[str, float], good: float, bad: float) -> None:
    one = Gate("test_it", "the other side", "because", **bound)
    one.check(good)
    with pytest.raises(AssertionError, match=rf"test_it: {bad:.3f} x the other side, must be at .*: because"):
        one.check(bad)
    with pytest.raises(ValueError, match="least or most"):
        Gate("test_it", "the other side", "because")
