"""Work for offline runs: what is drawn, and what is taken from a peer's files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from perf import workloads
from tests.paths import ROOT

USUAL = """
CASES = ["latency"]

def make(case, vocab, seed, scale):
    return {"prompts": [[seed, vocab]], "out_lens": [2], "repeat": 3, "warm": {"prompts": [[7]], "out_lens": [1]}}
"""
MORE = """
def jobs(case, vocab):
    return [([[1, 2], [3]], [4, 5]), ([[1, 2, 6]], [7])]

def warm(case, vocab):
    return [([[9]], [1])]
"""


@pytest.mark.parametrize("case", workloads.CASES)
def test_same_arguments_same_work_and_others_to_warm_up_on(case: str) -> None:
    work = workloads.make(case, 1000, 0.01)
    assert work == workloads.make(case, 1000, 0.01)
    assert work.requests == (
        workloads.CASES[case][0] if case in workloads.FIXED_SIZE else max(1, round(workloads.CASES[case][0] * 0.01))
    )
    ((prompts, lengths),) = work.rounds
    assert work.prompt_tokens == sum(map(len, prompts)) and work.output_tokens == sum(lengths)
    assert not {tuple(prompt) for prompt in prompts} & {tuple(prompt) for made, _ in work.warm for prompt in made}


def test_a_peers_files_give_its_work(tmp_path: Path) -> None:
    (tmp_path / "workloads.py").write_text(USUAL)
    (tmp_path / "workloads_more.py").write_text(MORE)
    make = workloads.of_peer(tmp_path)
    assert make("latency", 50) == workloads.Work([([[0, 50]], [2])], [([[7]], [1])], 3)
    assert make("batch8", 500) == workloads.make("batch8", 500)
    conversations = make("conversations", 50)
    assert conversations.rounds == [([[1, 2], [3]], [4, 5]), ([[1, 2, 6]], [7])]
    assert (conversations.requests, conversations.prompt_tokens, conversations.output_tokens) == (3, 6, 16)


def test_the_work_can_be_drawn_where_no_engine_is_installed() -> None:
    code = "import sys, perf.workloads; sys.exit(bool({'torch', 'msgspec', 'zmq', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tokens_that_sequences_share_are_told() -> None:
    assert workloads.distinct([[1, 2, 3], [4, 2, 3]]) == (1 + 0.5 + 0.5) / 3
    assert workloads.distinct([[1, 2], [1]]) == (0.5 + 1) / 2
    assert workloads.distinct([]) == 0
