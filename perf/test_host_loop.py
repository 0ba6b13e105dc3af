"""Python's share of a step at 256 sequences with the device left out, against a fixed Python loop of the same run."""

from __future__ import annotations

import argparse

from perf.gates import Gate
from perf.gpu import checks


class Rows(list):
    """What a report is to a section: its rows."""

    def row(self, **values: object) -> None:
        self.append(values)

    def fact(self, **values: object) -> None: ...


def test_python_of_a_step(benchmark, gate: Gate) -> None:
    def loops() -> float:
        rows = Rows()
        checks.host(rows, argparse.Namespace(device="cpu", no_compile=True, tiny=False, quantization=None), {})
        spent = {row["part"]: row for row in rows}
        outside = spent["turn"]["us"] - spent["stage"]["us"]
        benchmark.extra_info.update(outside_launch_us=outside, loop_us=spent["turn"]["us"] / spent["turn"]["loops"])
        return outside / benchmark.extra_info["loop_us"]

    ratio = benchmark.pedantic(loops, rounds=1, iterations=1)
    benchmark.extra_info["loops"] = ratio
    gate.check(ratio)
