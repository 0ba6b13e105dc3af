"""Sums through memory that ranks share: by processes of the interpreter, whose counts and parts lie in files."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_get_the_same_sum(tmp_path: Path, ranks: int) -> None:
    """Several calls in a row, of several sizes: each half of the memory is used more than once."""
    for rank in range(ranks):
        (tmp_path / f"memory-{rank}").write_bytes(bytes(ranks_of.memory(ranks)))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-W", "ignore", ranks_of.__file__, str(rank), str(ranks), str(tmp_path)], env=environment)
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        assert [one.wait(120) for one in started] == [0] * ranks
    finally:
        for one in started:
            one.kill()
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
    (tmp_path / "memory-0").write_bytes(bytes(ranks_of.memory(2)))
    (tmp_path / "memory-1").write_bytes(bytes(ranks_of.memory(2)))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", ranks_of.__file__, "0", "2", str(tmp_path), "stopped"]
    assert subprocess.run(command, env=environment, timeout=120).returncode == 0
