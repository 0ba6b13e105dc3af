"""When a loop that is not heard counts as late, and as hung."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagegraph.runtime.server import comeback, pulse
from pagegraph.runtime.server.pulse import Due, Pulse
from pagegraph.runtime.server.restarts import Restarts
from tests.paths import ROOT


@pytest.mark.parametrize(
    "predicted_s, limit_s, late_s, hung_s",
    [
        (0.0, 300.0, 7.5, 30.0),  # the quickest step may be held up
        (0.5, 300.0, 7.5, 30.0),
        (2.0, 300.0, 15.0, 60.0),
        (20.0, 300.0, 30.0, 300.0),  # nothing gets more than the limit
        (None, 300.0, 30.0, 300.0),  # nobody knows
        (0.0, 4.0, 1.0, 4.0),
        (0.0, 1000.0, 25.0, 100.0),  # whose machine pauses for longer raises the limit
    ],
)
def test_what_a_turn_is_given(
    tmp_path: Path, predicted_s: float | None, limit_s: float, late_s: float, hung_s: float
) -> None:
    path = tmp_path / "pulse"
    assert pulse.read(path) is None
    beating = Pulse(path, limit_s, clock=lambda: 1000.0)
    assert pulse.read(path) == Due(float("inf"), float("inf"))  # not before the loop begins
    beating.beat(predicted_s)
    assert pulse.read(path) == Due(1000.0 + late_s, 1000.0 + hung_s)


def test_restarts_are_counted_within_a_window() -> None:
    now = 0.0
    restarts = Restarts(2, 100.0, clock=lambda: now)
    assert restarts.take("died") and restarts.take("hung") and not restarts.take("died")
    now = 101.0
    assert restarts.num_recent == 0 and restarts.take("died")
    assert restarts.total == {"died": 2, "hung": 1}
    assert not Restarts(0, 100.0).take("died")


def test_a_comeback_is_told_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "comeback.json"
    assert comeback.seconds(path) is None and comeback.seconds(None) is None
    assert not comeback.is_started(path) and not comeback.is_started(None)
    path.write_text(comeback.text(True))
    assert comeback.seconds(path) == comeback.UNKNOWN_S and not comeback.is_started(path)
    path.write_text(comeback.text(True, 30.0))
    assert 29.0 < comeback.seconds(path) <= 30.0 and comeback.is_started(path)
    path.write_text(comeback.text(True, -5.0))  # overdue
    assert comeback.seconds(path) == 1.0
    path.write_text(comeback.text(False))
    assert comeback.seconds(path) is None


def test_whoever_reads_while_it_is_written_sees_times_that_were_written(tmp_path: Path) -> None:
    """From another process, as the supervisor does: never a moment at which it seems to hang."""
    path = tmp_path / pulse.FILE
    code = (
        "import sys; from pathlib import Path; from pagegraph.runtime.server.pulse import Pulse\n"
        "writer = Pulse(Path(sys.argv[1]), 300.0); writer.beat(0.0); print(flush=True)\n"
        "while True: writer.beat(0.0)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline()
            began = time.monotonic()
            seen = [pulse.read(path) for _ in range(50_000)]
        finally:
            writer.kill()
    assert all(due is not None and due.late > began and due.hung > began + 20 for due in seen)
