"""Two engines of one thread beside one of two on the same cores: tokens a second, and how much of prompts is cached.

    python -m perf.data_parallel --out perf/results/cpu-DAY-data-parallel.json

`runtime bench serve` asks a server of SmolLM2 with conversations, whose turns bring all that was said, and with prompts that
share nothing. Two engines are chosen among as `runtime serve` does, or in turns whatever they cache. Runs alternate. Knows
the server by its command line and HTTP, and the chooser by its name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from pagegraph.runtime.doctor.rules import Metrics
from pagegraph.runtime.ipc.routing import Engine, Route
from perf.compare import record
from perf.gpu.serve import ROOT, SERVE, Server

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
IN_TURNS = ("-m", "perf.data_parallel", "serve")
WAYS: dict[str, tuple[Sequence[str], int, int]] = {  # command, engines, threads of each
    "1 engine of 2 threads": (SERVE, 1, 2),
    "2 engines of 1 thread": (SERVE, 2, 1),
    "2 engines of 1 thread, in turns": (IN_TURNS, 2, 1),
}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", default=MODEL)
    p.add_argument("--conversations", type=int, default=8)
    p.add_argument("--turns", type=int, default=5)
    p.add_argument("--strangers", type=int, default=16)
    p.add_argument("--input-len", type=int, default=96)
    p.add_argument("--output-len", type=int, default=32)
    p.add_argument("--streams", type=int, default=4)
    p.add_argument("--times", type=int, default=1)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    rows = [one for _ in range(args.times) for way in WAYS for one in measured_all(way, args)]
    print("| | work | tokens/s | TTFT, ms | TPOT, ms | cached | requests of each engine |")
    for one in rows:
        print(
            "| {way} | {work} | {tok_s:.1f} | {ttft_ms:.0f} | {tpot_ms:.1f} | {cached:.1%} | {of_each} |".format(**one),
            f"load {one['load']:.1f}",
        )
    if args.out:
        args.out.write_text(json.dumps(record(args, rows=rows), indent=1) + "\n")


def measured_all(way: str, args: argparse.Namespace) -> list[dict]:
    """Conversations on a server of its own, and strangers on another."""
    command, engines, threads = WAYS[way]
    found = []
    with tempfile.TemporaryDirectory(prefix="pagegraph-dp-") as folder:
        settings = dict(
            model=str(Path(args.model).resolve()), served_model_name="m", device="cpu", dtype="bfloat16", compile=False,
            max_num_seqs=16, max_num_batched_tokens=512, kv_cache_memory="256MiB", data_parallel_size=engines,
            num_threads=threads, workers=1,
        )  # fmt: skip
        server = Server(settings, Path(folder), command)
        try:
            for work in ("strangers", "conversations"):
                found.append(measured(server, work, args, Path(folder)))
        finally:
            server.stop()
    return [dict(way=way, **one) for one in found]


def measured(server: Server, work: str, args: argparse.Namespace, folder: Path) -> dict:
    """What the client and the server's metrics say of one piece of work."""
    turns = args.turns if work == "conversations" else 1
    requests = args.conversations * turns if work == "conversations" else args.strangers
    given = dict(
        base_url=f"http://{server.address}", model="m", max_concurrency=args.streams, num_prompts=requests, seed=len(work),
        input_len=args.input_len, output_len=args.output_len, vocab_size=10_000, result_dir=folder, result_filename="found.json",
        dataset_name="conversation" if work == "conversations" else "random",
        **(dict(num_turns=turns) if turns > 1 else {}),
    )  # fmt: skip
    flags = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    before = metrics(server)
    command = [
        sys.executable,
        "-m",
        "pagegraph.runtime.cli",
        "bench",
        "serve",
        *flags,
        "--save-result",
        "--disable-tqdm",
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after, client = metrics(server), json.loads((folder / "found.json").read_text())

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    return dict(
        work=work, requests=requests, failed=client["failed"], tok_s=client["output_throughput"],
        ttft_ms=client["mean_ttft_ms"], tpot_ms=client["mean_tpot_ms"],
        cached=grown("prompt_tokens_cached_total") / grown("prompt_tokens_total"),
        of_each=[int(grown("e2e_request_latency_seconds_count", engine=str(rank))) for rank in range(2)],
        load=os.getloadavg()[0],
    )  # fmt: skip


def metrics(server: Server) -> Metrics:
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=30) as answer:
        return Metrics(answer.read().decode())


def serve(config: str) -> None:
    """A server as `runtime serve` starts it, whose web process takes engines in turns."""
    from pagegraph.runtime.config import load_config
    from pagegraph.runtime.server import logs
    from pagegraph.runtime.server.supervisor import Supervisor

    logs.configure("info", "text", "supervisor")
    web = [sys.executable, "-m", "perf.data_parallel", "web"]
    sys.exit(Supervisor(load_config(config).config, web_command=web).run())


def web() -> None:
    """gunicorn, with another chooser in its processes."""
    from gunicorn.app.wsgiapp import run

    from pagegraph.runtime.ipc import replicas

    turns = count()

    def in_turns(engines: Sequence[Engine], route: Route, among: Iterable[int]) -> int:
        there = list(among)
        return there[next(turns) % len(there)]

    replicas.choose = in_turns
    del sys.argv[1]
    run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    elif sys.argv[1:2] == ["web"]:
        web()
    else:
        main()
