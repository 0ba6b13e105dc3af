"""Does `runtime bench serve` measure what independent load clients measure: the same server, the same work, in turns.

    make client-environments CLIENT=guidellm && make client-environments CLIENT=aiperf
    python -m perf.agreement --url http://127.0.0.1:8000 --model smollm2 --tokenizer FOLDER --out perf/results/cpu-DAY-agreement.json

The server runs already, has compiled and has prefix caching off: clients make up prompts of their own, of as many tokens.
Each client runs once before the clock, then `--rounds` times; rows are medians over the rounds. Knows the clients' commands
and what they call their figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from perf.compare import record

ROOT = Path(__file__).resolve().parents[1]
KEYS = (
    "ttft_ms",
    "tpot_ms",
    "out_tok_s",
    "req_s",
)  # means of a run; tpot: of what most clients call inter-token latency


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--url", default="http://127.0.0.1:8000")
    p.add_argument("--model", required=True, help="its served name")
    p.add_argument("--tokenizer", type=Path, required=True, help="a folder with tokenizer.json")
    p.add_argument("--requests", type=int, default=32)
    p.add_argument("--concurrency", type=int, default=4)
    p.add_argument("--input-len", type=int, default=128)
    p.add_argument("--output-len", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--clients", default=",".join(CLIENTS))
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    clients = args.clients.split(",")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
    for turn in range(1 + args.rounds):
        for name in clients:
            with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
                figures = CLIENTS[name](args, Path(folder), turn)
            if turn:
                found[name].append(figures)
                print(f"{name:10}", {key: round(figures[key], 2) for key in KEYS}, flush=True)
    rows = [
        dict(client=name, **{key: statistics.median(run[key] for run in runs) for key in KEYS}, runs=runs)
        for name, runs in found.items()
    ]
    print("| client | " + " | ".join(KEYS) + " |")
    for row in rows:
        print(
            f"| {row['client']} | "
            + " | ".join(f"{row[key]:.2f} ({row[key] / rows[0][key]:.3f})" for key in KEYS)
            + " |"
        )
    if args.out:
        args.out.write_text(json.dumps(record(args, rows=rows), indent=1) + "\n")


def _run(command: list[object], **environment: str) -> None:
    done = subprocess.run(
        [str(one) for one in command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")


def bench_serve(args: argparse.Namespace, folder: Path, turn: int) -> dict[str, float]:
    _run([
        sys.executable, "-m", "pagegraph.runtime.cli", "bench", "serve", "--base-url", args.url, "--model", args.model,
        "--num-prompts", args.requests, "--max-concurrency", args.concurrency, "--input-len", args.input_len,
        "--output-len", args.output_len, "--seed", turn, "--save-result", "--result-dir", folder, "--result-filename", "run.json",
    ])  # fmt: skip
    found = json.loads((folder / "run.json").read_text())
    return dict(
        ttft_ms=found["mean_ttft_ms"], tpot_ms=found["mean_tpot_ms"], out_tok_s=found["output_throughput"],
        req_s=found["request_throughput"],
    )  # fmt: skip


def guidellm(args: argparse.Namespace, folder: Path, turn: int) -> dict[str, float]:
    _run([
        ROOT / ".clients/guidellm/bin/guidellm", "run", "--disable-console-interactive",
        "--backend", f"kind=openai_http,target={args.url},model={args.model},request_format=/v1/completions",
        "--profile", f"kind=concurrent,streams={args.concurrency}",
        "--constraint", f"kind=max_requests,count={args.requests}",
        "--tokenizer", f"kind=huggingface_auto,model={args.tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens={args.input_len},output_tokens={args.output_len}",
        "--output", f"kind=json,path={folder / 'run.json'}",
    ])  # fmt: skip
    (run,) = json.loads((folder / "run.json").read_text())["benchmarks"]
    names = dict(
        ttft_ms="time_to_first_token_ms", tpot_ms="inter_token_latency_ms", out_tok_s="output_tokens_per_second",
        req_s="requests_per_second",
    )  # fmt: skip
    return {key: run["metrics"][name]["successful"]["mean"] for key, name in names.items()}


def aiperf(args: argparse.Namespace, folder: Path, turn: int) -> dict[str, float]:
    _run([
        ROOT / ".clients/aiperf/bin/aiperf", "profile", "--model", args.model, "--url", args.url, "--tokenizer", args.tokenizer,
        "--endpoint-type", "completions", "--streaming", "--use-server-token-count", "--request-count", args.requests,
        "--concurrency", args.concurrency, "--random-seed", 1 + turn, "--synthetic-input-tokens-mean", args.input_len,
        "--synthetic-input-tokens-stddev", 0, "--output-tokens-mean", args.output_len, "--extra-inputs", "ignore_eos:true",
        "--ui", "none", "--no-gpu-telemetry", "--artifact-dir", folder,
    ])  # fmt: skip
    found = json.loads(next(folder.rglob("profile_export_aiperf.json")).read_text())
    return dict(
        ttft_ms=found["time_to_first_token"]["avg"], tpot_ms=found["inter_token_latency"]["avg"],
        out_tok_s=found["output_token_throughput"]["avg"], req_s=found["request_throughput"]["avg"],
    )  # fmt: skip


CLIENTS: dict[str, Callable[[argparse.Namespace, Path, int], dict[str, float]]] = {
    "bench serve": bench_serve, "guidellm": guidellm, "aiperf": aiperf,
}  # fmt: skip


if __name__ == "__main__":
    main()
