"""Stored runs read back: kinds, names, what each request took, which axis a load stands on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pagegraph.runtime.bench import measures, runs
from pagegraph.runtime.bench.outcome import Outcome
from tests.runtime.bench.stored import LATENCY, STARTUP, THROUGHPUT, serve_figures


def write(folder: Path, name: str, value: object) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_every_kind_is_known_and_named_by_its_file(tmp_path: Path) -> None:
    values = {"s": serve_figures(2.0), "t": THROUGHPUT, "l": LATENCY, "u": STARTUP}
    found = runs.read([write(tmp_path, f"{name}.json", value) for name, value in values.items()])
    assert [(run.name, run.kind) for run in found] == [
        ("s", "serve"),
        ("t", "throughput"),
        ("l", "latency"),
        ("u", "startup"),
    ]


def test_two_files_of_a_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / folder, "a.json", THROUGHPUT) for folder in ("x", "y", "z")]
    assert [run.name for run in runs.read(paths)] == ["a", "a (2)", "a (3)"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"duration": 1}', "no file of runtime bench"),
        ('{"duration": 1, "completed": 1, "output_throughput": 1, "ttfts": [1], "itls": []}', "1 ttfts and 0 itls"),
    ],
)
def test_what_is_no_run_is_refused_by_its_file(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path, "a.json", text)
    with pytest.raises(ValueError, match=rf"a\.json: .*{told}"):
        runs.read([path])
    with pytest.raises(ValueError, match=r"gone\.json: No such file"):
        runs.read([tmp_path / "gone.json"])


def test_what_each_request_took_is_what_the_figures_were_made_of() -> None:
    figures = serve_figures(4.0)
    run = runs.of_figures(figures, "a")
    for metric in measures.METRICS:
        assert 1e3 * run.seconds(metric).mean() == pytest.approx(figures[f"mean_{metric}_ms"])
    answers = run.answers()
    assert len(answers) == figures["completed"] and answers[0].start == pytest.approx(answers[0].queued)
    assert all(one.start <= other.start for one, other in zip(answers, answers[1:]))
    assert np.diff(answers[0].events) == pytest.approx(answers[0].gaps)


def test_failed_requests_are_left_out() -> None:
    good, bad = Outcome(5.0, 0.1, [0.1], 0.2, output_tokens=2), Outcome(error="gone")
    run = runs.of_figures(measures.figures([bad, good], 1.0) | measures.detail([bad, good]), "a")
    assert len(run.answers()) == 1 and run.seconds("ttft") == pytest.approx([0.1])


def test_the_axis_of_a_load() -> None:
    def axis(*given: dict) -> object:
        return runs.load_axis([runs.of_figures({**serve_figures(1.0), **one}, "a") for one in given])

    assert axis({"request_rate": 1.0}, {"request_rate": 4.0}) == ("request rate (requests/s)", [1.0, 4.0])
    several = ({"request_rate": "inf", "max_concurrency": 1}, {"request_rate": "inf", "max_concurrency": 8})
    assert axis(*several) == ("requests at once", [1.0, 8.0])
    assert axis({"request_rate": 1.0}, {"request_rate": 1.0}) is None
    assert axis({"request_rate": "inf"}, {"request_rate": 1.0}) is None


def test_statistics_that_all_runs_hold() -> None:
    one, other = (
        runs.of_figures(measures.figures([Outcome(0, 0.1, [0.1], 0.2)], 1.0, percentiles=at), "a")
        for at in ((50, 90, 99), (99, 99.9))
    )
    assert runs.statistics_of([one], "ttft") == ["p50", "p90", "p99"]
    assert runs.statistics_of([one, other], "ttft") == ["median", "p99"]
    assert runs.metrics_of([one, other]) == list(measures.METRICS)
