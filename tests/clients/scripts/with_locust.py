"""locust over the example's file: streamed chats of two users, with rows for first tokens and gaps."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import BASE_URL, MODEL, case, main

FILE = Path(__file__).resolve().parents[3] / "examples" / "locustfile.py"
TOKENS = 12


def run(*more: str) -> tuple[int, dict[str, dict[str, float]]]:
    """(its status, its rows by type)."""
    with tempfile.TemporaryDirectory(prefix="locust-") as folder:
        command = [
            str(Path(sys.executable).with_name("locust")), "-f", str(FILE), "--headless", "--users", "2",
            "--spawn-rate", "2", "--run-time", "8s", "--stop-timeout", "30s", "--host", BASE_URL,
            "--json-file", f"{folder}/run", "--max-tokens", str(TOKENS), *more,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
        print(done.stdout[-3000:], done.stderr[-3000:])
        return done.returncode, {row["method"]: row for row in json.loads(Path(f"{folder}/run.json").read_text())}


@case("stream")
def chat_stream_with_first_tokens_and_gaps() -> None:
    status, rows = run("--chat-model", MODEL)
    assert status == 0, status
    posts, firsts, gaps = (rows[kind]["num_requests"] for kind in ("POST", "TTFT", "ITL"))
    assert posts > 0 and posts == firsts and rows["POST"]["num_failures"] == 0, rows
    assert firsts <= gaps <= firsts * (TOKENS - 1), rows
    whole, first, gap = (
        rows[kind]["total_response_time"] / rows[kind]["num_requests"] for kind in ("POST", "TTFT", "ITL")
    )
    assert abs(whole - first - gap * gaps / firsts) < 2, (whole, first, gap)


@case("stream")
def a_failure_counts() -> None:
    status, rows = run("--chat-model", "no-such-model")
    assert status == 1 and rows["POST"]["num_failures"] == rows["POST"]["num_requests"] > 0, rows


if __name__ == "__main__":
    main("locust")
