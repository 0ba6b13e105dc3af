"""aiperf profiling chat, completions, responses, messages and embeddings with a few requests each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import BASE_URL, MODEL, TOKENIZER, case, main

REQUESTS = 6
# Offline it looks for a name in the hub's cache; a folder it takes only when it may, but need not, ask the hub.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
COMMAND = [
    str(Path(sys.executable).with_name("aiperf")), "profile", "--model", MODEL, "--url", BASE_URL,
    "--tokenizer", TOKENIZER, "--request-count", str(REQUESTS), "--concurrency", "3", "--random-seed", "1",
    "--synthetic-input-tokens-mean", "40", "--synthetic-input-tokens-stddev", "0", "--ui", "none",
    "--no-gpu-telemetry",
]  # fmt: skip


def profile(*more: str) -> dict[str, dict[str, float]]:
    """Run it; the metrics that it exported, after a look at whether every request was answered."""
    with tempfile.TemporaryDirectory(prefix="aiperf-") as folder:
        command = [*COMMAND, "--artifact-dir", folder, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=ENVIRONMENT)
        print(done.stdout[-3000:], done.stderr[-3000:])
        assert done.returncode == 0, f"it ended with status {done.returncode}"
        found = json.loads(next(Path(folder).rglob("profile_export_aiperf.json")).read_text())
    assert not found.get("error_summary"), found["error_summary"]
    assert found["request_count"]["avg"] == REQUESTS, found["request_count"]
    return found


TEXT = ("--output-tokens-mean", "12", "--extra-inputs", "ignore_eos:true")


@case("plain")
def chat() -> None:
    assert profile("--endpoint-type", "chat", *TEXT)["output_sequence_length"]["avg"] > 0


@case("stream")
def chat_stream_with_usage_in_every_chunk() -> None:
    usage = ("--use-server-token-count", "--per-chunk-usage")
    found = profile("--endpoint-type", "chat", "--streaming", *usage, *TEXT)
    assert found["output_sequence_length"]["avg"] == 12, found["output_sequence_length"]
    assert found["time_to_first_token"]["avg"] > 0 and found["inter_token_latency"]["avg"] > 0


@case("stream")
def completions_stream() -> None:
    assert profile("--endpoint-type", "completions", "--streaming", *TEXT)["time_to_first_token"]["avg"] > 0


@case("stream")
def responses_stream() -> None:
    found = profile("--endpoint-type", "responses", "--streaming", "--output-tokens-mean", "12")
    assert found["time_to_first_token"]["avg"] > 0


@case("stream")
def messages_stream() -> None:
    found = profile("--endpoint-type", "messages", "--streaming", "--output-tokens-mean", "12")
    assert found["time_to_first_token"]["avg"] > 0


@case("embeddings")
def embeddings() -> None:
    assert profile("--endpoint-type", "embeddings")["request_latency"]["avg"] > 0


if __name__ == "__main__":
    main("aiperf")
