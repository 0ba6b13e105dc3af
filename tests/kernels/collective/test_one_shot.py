"""Sums through memory that ranks share: by processes of the interpreter, whose counts and parts lie in files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from pagegraph.kernels.collective import groups
from tests.kernels.collective import rank as ranks_of
from tests.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments: object) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", ranks_of.__file__, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert process.wait(120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # ranks that wait for one that has failed
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_get_the_same_sum(tmp_path: Path, ranks: int) -> None:
    """Several calls in a row, of several sizes: each half of the memory is used more than once."""
    run(ranks, tmp_path)
    sums = [torch.load(tmp_path / f"sums-{rank}") for rank in range(ranks)]
    for call, of_first in enumerate(sums[0]):
        brought = [ranks_of.given(rank, call) for rank in range(ranks)]
        expected = reduce(torch.add, (one.float() for one in brought)).to(brought[0].dtype)
        torch.testing.assert_close(of_first, expected, atol=1e-6, rtol=2**-7)  # the interpreter cuts where a GPU rounds
        assert all(torch.equal(of_first, others[call]) for others in sums)


def test_a_machine_without_a_way_to_other_memory_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Here there is no CUDA runtime at all; sums go on as they did."""
    store = HashStore()
    group = groups.connect(store, 0, 1, torch.device("cpu"), 10.0)
    groups.register("", group)
    try:
        group.share_memory(store, 0, 1, torch.device("cpu"))
        assert group.one_shot is None and "all go by NCCL: this PyTorch has no CUDA runtime" in caplog.text
        assert groups.all_reduce(torch.ones(3), "").tolist() == [1, 1, 1]
    finally:
        groups.forget("")


def test_who_waits_for_a_rank_that_has_ended_is_let_go(tmp_path: Path) -> None:
    """The other rank never comes; the sum that is given up holds what was there, and nothing hangs."""
    run(2, tmp_path, "stopped")
