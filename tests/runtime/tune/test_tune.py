"""`runtime tune` from its flags to its file: what is refused, and runs of a tiny and of a real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pagegraph.runtime.cli import main
from pagegraph.runtime.config import FIELDS, flag_of, load_config
from tests.paths import ROOT

SMOLLM2 = str(ROOT / "configs" / "smollm2-cpu.yaml")
SMALL = (
    "--load-format", "dummy", "--device", "cpu", "--compile", "false", "--max-num-seqs", "4", "--max-num-batched-tokens", "32",
    "--kv-cache-memory", "1MiB", "--num-threads", "1", "--input-len", "12", "--output-len", "3", "--num-prompts", "6", "--repeats", "2",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_other_models")


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", *arguments])


def test_every_key_is_a_flag() -> None:
    result = tune("--help")
    assert result.exit_code == 0 and all(flag_of(key) in result.output for key in FIELDS)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--slo", "tfft=200"], "did you mean ttft?"),
        (["--slo", "ttft=200,p99=3"], "'p99' is none of ttft, tpot, itl, e2el"),
        (["--slo", "ttft"], "ttft needs milliseconds above 0, as ttft=500"),
        (["--slo", "itl=-1"], "itl needs milliseconds above 0"),
        (["--budget", "soon"], "such as 90s, 10m or 1h"),
        (["--dataset-name", "sharegpt"], "needs a --dataset-path"),
        (["--workload", SMOLLM2, "--dataset-path", SMOLLM2], "give one of them"),
        (["--max-num-seqs", "x"], "max_num_seqs"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(arguments: list[str], told: str) -> None:
    result = tune(SMOLLM2, *arguments)
    assert result.exit_code in (1, 2) and told in " ".join(result.output.split()), result.output


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--slo", "ttft=0.001"], "--slo ttft=0.001 is missed by one request alone: the shortest, of 12 tokens, takes"),
        (["--input-len", "300"], "the workload does not fit: request 0 of it has 300 tokens"),
        (["--budget", "0.1s"], "was over before the baseline had run 2 times"),
    ],
)
def test_what_cannot_be_met(folder: str, tmp_path: Path, arguments: list[str], told: str) -> None:
    result = tune(folder, *SMALL, *arguments, "--output", str(tmp_path / "t.yaml"))
    assert result.exit_code == 1 and told in " ".join(result.output.split()), result.output
    assert not (tmp_path / "t.yaml").exists()


def test_a_tiny_model(folder: str, tmp_path: Path) -> None:
    """To a file that loads, whatever this machine finds better, and to figures of every run."""
    output, figures = tmp_path / "t.yaml", tmp_path / "t.json"
    result = tune(
        folder,
        *SMALL,
        "--slo",
        "ttft=60000,itl=60000",
        "--budget",
        "12s",
        "--output",
        str(output),
        "--json",
        str(figures),
    )
    assert result.exit_code == 0, result.output
    config, found = load_config(str(output)).config, json.loads(figures.read_text())
    assert config.model == folder and config.compile is False and output.read_text().startswith("# runtime tune, ")
    assert {key: getattr(config, key) for key in found["changes"]} == {
        key: one["after"] for key, one in found["changes"].items()
    }
    assert found["baseline"]["completed"] == 6 and found["baseline"]["total_output_tokens"] == 18
    assert found["baseline"]["request_goodput"] == found["baseline"]["request_throughput"]
    reached = {one["key"] for one in found["tried"] + found["left_out"]} | set(found["not_reached"])
    assert {"max_num_seqs", "kv_cache_memory", "speculative_method", "num_threads"} <= reached
    for words in ("before", "goodput, requests/s", "ITL p99, ms", "weights and KV, MiB"):
        assert words in result.output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model(tmp_path: Path) -> None:
    """Of real prompts, with another model built on the way: one sequence at a time is less than several."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Count from {n} to 20: ", "output_tokens": 12}) + "\n" for n in range(8))
    )
    output, figures = tmp_path / "t.yaml", tmp_path / "t.json"
    result = tune(
        SMOLLM2, "--compile", "false", "--num-threads", "1", "--max-num-seqs", "1", "--workload", str(prompts), "--num-prompts", "8",
        "--repeats", "2", "--budget", "90s", "--output", str(output), "--json", str(figures),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert load_config(str(output)).config.max_num_seqs > 1, result.output
    assert found["tuned"]["output_throughput"] > found["baseline"]["output_throughput"]
    assert "max_num_seqs was 1: output tokens/s" in output.read_text()
