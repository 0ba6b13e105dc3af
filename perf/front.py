"""What the way from a step to the client costs: tokens a second through 1, 2 and 4 web processes, CPU time of each token.

    python -m perf.front --out perf/results/cpu-DAY-front.json

A real server whose steps compute nothing: they take `--step-ms` and give made-up ids. `runtime bench serve` reads as many
streams from processes of its own on the same machine, so tokens a second are of a machine that all of them share; CPU time is
each process's own, of all that it did for a token, from detokenising to the socket. Knows the server by its command line,
HTTP and /proc, and the engine by its step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pagegraph.compiler.step.inputs import Deferred, StepInput, StepOutput
from pagegraph.compiler.step.step import CompiledStep, Ticket
from perf.compare import record
from perf.floors import MODELS
from perf.tiny import processes, tiny_server

STEP_S = "PAGEGRAPH_FRONT_STEP_S"  # a variable of the environment
TICKS = os.sysconf("SC_CLK_TCK")  # of /proc, a second


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    p.add_argument("--streams", type=int, default=128)
    p.add_argument("--requests", type=int, default=512)
    p.add_argument("--output-len", type=int, default=256)
    p.add_argument("--step-ms", type=float, default=10.0)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    rows = [row(workers, args) for workers in args.workers]
    print("| web processes | tokens/s | tokens an event | CPU us a token, web | engine |")
    for one in rows:
        print("| {workers} | {out_tok_s:,.0f} | {tokens_an_event:.2f} | {web_us:.1f} | {engine_us:.1f} |".format(**one))
    if args.out:
        args.out.write_text(json.dumps(record(args, rows=rows), indent=1) + "\n")


def row(workers: int, args: argparse.Namespace) -> dict[str, float]:
    """Of one server."""
    os.environ[STEP_S] = str(args.step_ms / 1000)
    with tempfile.TemporaryDirectory(prefix="pagegraph-front-") as folder:
        server = tiny_server(
            Path(folder), command=("-m", "perf.front", "serve"), workers=workers, max_model_len=2048, max_num_seqs=args.streams,
            kv_cache_memory=1 << 30, enable_prefix_caching=False, inter_token_target_ms="none", log_stats_interval_s=0,
        )  # fmt: skip
        try:
            server.load("tiny", args.streams, args.streams, 16, seed=1)
            before = cpu_s(server.pid)
            found = server.load("tiny", args.streams, args.requests, args.output_len, seed=0)
            spent = {name: seconds - before[name] for name, seconds in cpu_s(server.pid).items()}
        finally:
            server.stop()
    tokens = found["out_tokens"]
    web = sum(seconds for name, seconds in spent.items() if name.startswith("web "))
    return dict(
        workers=workers, web_us=1e6 * web / tokens, engine_us=1e6 * spent["engine"] / tokens,
        offered_tok_s=args.streams / (args.step_ms / 1000), **found,
    )  # fmt: skip


def cpu_s(supervisor: int) -> dict[str, float]:
    """Seconds of CPU time of each process of a server, by what it is."""
    fields = {
        name: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        for name, pid in processes(supervisor).items()
    }
    return {name: (int(each[11]) + int(each[12])) / TICKS for name, each in fields.items()}


def launch(self: CompiledStep, step: StepInput, *rest: object) -> Ticket:
    """A step that takes its time and gives ids that are text."""
    ends = time.monotonic() + float(os.environ[STEP_S])
    ids = np.random.default_rng().integers(300, MODELS["tiny"]["vocab_size"], step.num_seqs, dtype=np.int32)

    def wait() -> StepOutput:
        time.sleep(max(ends - time.monotonic(), 0.0))
        return StepOutput(ids)

    return Ticket(Deferred(wait))


def serve(config: str) -> None:
    """A server as `runtime serve` starts it, with an engine of such steps."""
    from pagegraph.runtime.config import load_config
    from pagegraph.runtime.server import logs
    from pagegraph.runtime.server.supervisor import Supervisor

    logs.configure("info", "text", "supervisor")
    sys.exit(Supervisor(load_config(config).config, [sys.executable, "-m", "perf.front", "engine"]).run())


def engine(settings: str) -> None:
    """The engine process of such a server."""
    from pagegraph.runtime.server import engine_process

    CompiledStep.launch = launch
    engine_process.main(settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    elif sys.argv[1:2] == ["engine"]:
        engine(sys.argv[2])
    else:
        main()
