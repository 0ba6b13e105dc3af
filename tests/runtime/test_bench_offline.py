"""`runtime bench throughput` and `latency`: flags of the configuration, what is refused, and a run of a real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pagegraph.runtime.cli import main
from pagegraph.runtime.config import FIELDS, flag_of
from tests.paths import ROOT

SMOLLM2 = str(ROOT / "configs" / "smollm2-cpu.yaml")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


@pytest.mark.parametrize("command", ["throughput", "latency", "startup"])
def test_every_key_is_a_flag(command: str) -> None:
    result = bench(command, "--help")
    assert result.exit_code == 0 and all(flag_of(key) in result.output for key in FIELDS)


def test_the_group_names_its_commands() -> None:
    result = bench("--help")
    assert all(name in result.output for name in ("serve", "throughput", "latency", "startup"))
    assert "did you mean latency?" in bench("latencie").output


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["throughput"], "name a model"),
        (["throughput", SMOLLM2, "--dataset-name", "sharegpt"], "needs a --dataset-path"),
        (["throughput", SMOLLM2, "--num-turns", "2"], "conversation"),
        (["latency", SMOLLM2, "--batch-size", "0"], "x>=1"),
        (["latency", SMOLLM2, "--max-num-seqs", "x"], "max_num_seqs"),
        (["startup", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_what_is_refused(arguments: list[str], told: str) -> None:
    result = bench(*arguments)
    assert result.exit_code in (1, 2) and told in " ".join(result.output.split()), result.output


@pytest.mark.slow
def test_a_real_model(tmp_path: Path) -> None:
    """Uncompiled, few tokens: every command to its file."""
    small = (SMOLLM2, "--compile", "false", "--input-len", "16", "--output-len", "4")
    path = tmp_path / "throughput.json"
    result = bench("throughput", *small, "--num-prompts", "6", "--output-json", str(path))
    assert result.exit_code == 0 and "Throughput: " in result.output, result.output
    found = json.loads(path.read_text())
    assert found["num_requests"] == 6 and found["total_num_tokens"] == 6 * 20
    path = tmp_path / "latency.json"
    result = bench("latency", *small, "--batch-size", "2", "--num-iters-warmup", "1", "--num-iters", "3", "--output-json", str(path))  # fmt: skip
    assert result.exit_code == 0 and "Avg latency: " in result.output, result.output
    assert len(json.loads(path.read_text())["latencies"]) == 3
    path = tmp_path / "startup.json"
    result = bench("startup", SMOLLM2, "--compile", "false", "--num-iters-cold", "1", "--num-iters-warm", "2", "--num-iters-warmup", "0", "--output-json", str(path))  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert len(found["cold_startup_times"]) == 1 and len(found["warm_startup_times"]) == 2
    assert found["avg_cold_startup_time"] > 0 and set(found["warm_phases"][0]) >= {"memory", "weights"}
