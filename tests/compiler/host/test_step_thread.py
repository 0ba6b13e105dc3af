"""One thread runs what is submitted, in order, and OpenMP's threads end with the work of whoever started them."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from pagegraph.compiler.host import step_thread


def test_work_runs_in_order_on_one_thread() -> None:
    seen: list[tuple[int, int]] = []
    futures = [step_thread.submit(lambda n=n: seen.append((n, threading.get_ident()))) for n in range(20)]
    step_thread.rest()
    assert all(future.done() for future in futures)
    assert [n for n, _ in seen] == list(range(20))
    assert {thread for _, thread in seen} == {seen[0][1]} and seen[0][1] != threading.get_ident()


def test_an_error_is_the_futures_and_ends_nothing() -> None:
    with pytest.raises(ZeroDivisionError):
        step_thread.submit(lambda: 1 // 0).result()
    assert step_thread.submit(lambda: 1).result() == 1


TEAMS = """
import os
import torch
from pagegraph.compiler.host import step_thread

def threads():
    return len(os.listdir("/proc/self/task"))

def loop():
    torch.ones(1 << 20).add_(1)
    return threads()

torch.set_num_threads(2)
step_thread.submit(int).result()  # starts the thread itself
before = threads()
print(loop() - before, step_thread.submit(threads).result() - before, step_thread.submit(loop).result() - before)
step_thread.rest()
print(threads() - before)
"""


@pytest.mark.skipif(
    step_thread._pause is None or sys.platform != "linux", reason="no libgomp of PyTorch's own, or no /proc"
)
def test_teams_end_where_others_are_to_run() -> None:
    """The caller's when it submits, the step's when it rests: another thread, none, the step's one, none."""
    out = subprocess.run([sys.executable, "-c", TEAMS], check=True, capture_output=True, text=True).stdout
    assert out.split() == ["1", "0", "1", "0"]
