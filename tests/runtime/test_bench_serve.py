"""`runtime bench serve` against a scripted server: what it sends, prints and writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pagegraph.runtime.cli import main
from tests.paths import ROOT
from tests.runtime.bench.fake_server import FakeServer, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def bench(server: FakeServer, *flags: str) -> Result:
    return CliRunner().invoke(main, ["bench", "serve", "--base-url", server.url, *flags])


def saved(server: FakeServer, tmp_path: Path, *flags: str) -> dict:
    result = bench(
        server, *flags, "--save-result", "--result-dir", str(tmp_path / "new"), "--result-filename", "a.json"
    )
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "new" / "a.json").read_text())


KEYS = (
    "date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration"
    " completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput"
    " total_token_throughput max_output_tokens_per_s max_concurrent_requests"
).split()


def test_the_json_has_the_fields_names(server: FakeServer, tmp_path: Path) -> None:
    server.gap = 0.002
    found = saved(server, tmp_path, "--num-prompts", "6", "--input-len", "9", "--output-len", "4",
                  "--goodput", "ttft:60000", "tpot:60000", "--metadata", "a=1", "b=x=y", "--request-rate", "500")  # fmt: skip
    assert set(KEYS) <= set(found)
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert all(isinstance(found[f"{what}_{metric}_ms"], float) for what in ("mean", "median", "p90", "p99"))
        assert found[f"mean_{metric}_ms"] > 0
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"]) == (6, 54, 24)
    assert found["request_goodput"] == found["request_throughput"] and found["model_id"] == "fake"
    assert (found["a"], found["b"], found["request_rate"]) == ("1", "x=y", 500.0)
    assert "ttfts" not in found
    detailed = saved(server, tmp_path, "--num-prompts", "2", "--output-len", "3", "--save-detailed")
    assert detailed["output_lens"] == [3, 3] and [len(gaps) for gaps in detailed["itls"]] == [2, 2]
    assert detailed["request_rate"] == "inf" and detailed["request_goodput"] is None


def test_what_is_sent(server: FakeServer) -> None:
    result = bench(server, "--num-prompts", "3", "--input-tokens", "7", "--output-tokens", "2", "--num-warmups", "2",
                   "--header", "x-one=1", "--extra-body", '{"top_k": 5}', "--model", "mine")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(server.bodies) == 1 + 2 + 3
    assert all(len(body["prompt"]) == 7 and body["max_tokens"] == 2 and body["top_k"] == 5 for body in server.bodies)
    assert all(body["ignore_eos"] is True and body["model"] == "mine" for body in server.bodies)
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 6  # what warms up has other tokens
    assert all(headers["x-one"] == "1" for headers in server.headers)
    for label in (
        "Successful requests",
        "Request throughput (req/s)",
        "Mean TTFT (ms)",
        "P99 ITL (ms)",
        "P90 E2EL (ms)",
    ):
        assert f"{label}:" in result.output


def test_chats_prefixes_and_conversations(server: FakeServer) -> None:
    flags = ("--num-prompts", "4", "--input-len", "5", "--output-len", "2")
    assert bench(server, "--backend", "openai-chat", *flags).exit_code == 0
    assert all(len(body["messages"][0]["content"].split()) == 5 for body in server.bodies)
    server.bodies.clear()
    assert bench(server, "--dataset-name", "prefix", "--num-prefixes", "2", "--prefix-len", "8", *flags).exit_code == 0
    assert len({tuple(body["prompt"][:8]) for body in server.bodies[1:]}) == 2
    server.bodies.clear()
    assert bench(server, "--dataset-name", "conversation", "--num-turns", "2", *flags).exit_code == 0
    assert sorted(len(body["prompt"].split()) for body in server.bodies[1:]) == [5, 5, 12, 12]


def test_files(server: FakeServer, tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "hello world", "output_tokens": 3}\n')
    result = bench(server, "--dataset-name", "custom", "--dataset-path", str(lines), "--num-prompts", "2")
    assert result.exit_code == 0, result.output
    assert [(body["prompt"], body["max_tokens"]) for body in server.bodies] == [("hello world", 3)] * 3
    assert not any("ignore_eos" in body for body in server.bodies)
    talk = tmp_path / "talk.json"
    turns = [
        {"from": "human", "value": "hello world and more"},
        {"from": "gpt", "value": "the end of the world is near"},
    ]
    talk.write_text(json.dumps([{"conversations": turns}]))
    flags = ("--dataset-name", "sharegpt", "--dataset-path", str(talk), "--num-prompts", "1")
    assert "--tokenizer" in bench(server, *flags).output
    assert bench(server, *flags, "--tokenizer", str(tokenizer_folder)).exit_code == 0
    assert server.bodies[-1]["max_tokens"] >= 4


def test_failures_are_told(server: FakeServer) -> None:
    server.fails = lambda body: len(server.bodies) in (3, 4)
    result = bench(server, "--num-prompts", "4", "--output-len", "1", "--max-concurrency", "1")
    assert result.exit_code == 0 and "failed: HTTP 500" in result.output
    server.fails = lambda body: True
    result = bench(server, "--num-prompts", "4")
    assert result.exit_code == 1 and "did not answer the first request: HTTP 500" in result.output


def test_a_server_that_is_not_there() -> None:
    result = CliRunner().invoke(main, ["bench", "serve", "--port", "1"])
    assert result.exit_code == 1 and "is the server there?" in result.output


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--goodput", "speed:3"], "ttft:200"),
        (["--goodput", "ttft:x"], "ttft:200"),
        (["--header", "x"], "KEY=VALUE"),
        (["--metric-percentiles", "101"], "50,90,99"),
        (["--percentile-metrics", "ttft,x"], "x is none of ttft"),
        (["--extra-body", "[]"], "JSON object"),
        (["--request-rate", "0"], "x>0"),
        (["--burstiness", "nan"], "nan is not a number in the range x>0"),
        (["--random-range-ratio", "nan"], "nan is not a number in the range 0<=x<1"),
        (["--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "0", "--ramp-up-end-rps", "2"], "above 0"),
        (["--dataset-name", "custom"], "needs a --dataset-path"),
        (["--num-turns", "3"], "conversation"),
        (["--base-url", "nowhere"], "no address"),
        (["stray"], "unexpected extra argument"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], told: str) -> None:
    result = CliRunner().invoke(main, ["bench", "serve", "--port", "1", *flags])
    assert result.exit_code == 2 and told in " ".join(result.output.split()), result.output


def test_it_imports_no_torch() -> None:
    code = "import sys; from pagegraph.runtime.commands import bench_serve; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
