"""guidellm against chat, completions, responses and embeddings with synthetic prompts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import BASE_URL, MODEL, TOKENIZER, case, main

REQUESTS = 6
WORDS = 12


def run(
    request_format: str, *more: str, profile: str = "kind=concurrent,streams=2", backend: str = ""
) -> dict[str, Any]:
    """Run it; the metrics of its only benchmark, after a look at whether every request was answered."""
    with tempfile.TemporaryDirectory(prefix="guidellm-") as folder:
        report = Path(folder) / "report.json"
        command = [
            str(Path(sys.executable).with_name("guidellm")), "run",
            "--backend", f"kind=openai_http,target={BASE_URL},model={MODEL},request_format={request_format}{backend}",
            "--profile", profile,
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}",
            "--data", f"kind=synthetic_text,prompt_tokens=40,output_tokens={WORDS}",
            "--output", f"kind=json,path={report}",
            "--disable-console-interactive",
            *more,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
        print(done.stdout[-3000:], done.stderr[-3000:])
        assert done.returncode == 0, f"it ended with status {done.returncode}"
        (found,) = json.loads(report.read_text())["benchmarks"]
    totals = found["metrics"]["request_totals"]
    assert totals["successful"] == REQUESTS and totals["errored"] == 0, totals
    return found["metrics"]


@case("plain")
def chat() -> None:
    run("/v1/chat/completions", backend=",stream=false")


@case("stream")
def chat_stream() -> None:
    assert run("/v1/chat/completions")["time_to_first_token_ms"]["successful"]["mean"] > 0


@case("stream")
def completions_stream() -> None:
    assert run("/v1/completions")["inter_token_latency_ms"]["successful"]["mean"] > 0


@case("stream")
def responses_stream() -> None:
    run("/v1/responses")


@case("embeddings")
def embeddings() -> None:
    run("/v1/embeddings")


if __name__ == "__main__":
    main("guidellm")
