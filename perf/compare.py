"""This engine against transformers on the same work: requests and tokens a second, time to first token, memory.

    python -m perf.compare --model models/SmolLM2-135M-Instruct.Q4_1.gguf --out perf/results/cpu-DAY-compare.json
    python -m perf.compare --shape 8b --device cuda --out perf/results/h200-DAY-8b-compare.json

Each way runs in a process of its own, in turns, `--rounds` times; rows are medians over the rounds. All requests are there at
once, prompts and answers of mixed lengths. Memory is what the process holds at most while it answers: of the device on
CUDA, else resident. Knows the ways by name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pagegraph.runtime.bench.work import Shape, made_up
from perf.floors import MODELS, write_model

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("engine", "one by one", "static batches", "continuous batching")
KEYS = ("req_s", "out_tok_s", "ttft_ms", "memory_mib")
BLOCK = 16
WARM = 8  # requests with other tokens before the clock starts, of a quarter of the answers' length


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a GGUF file, a model folder or a hub name")
    which.add_argument("--shape", choices=list(MODELS), help="random weights of this shape")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--requests", type=int, default=32)
    p.add_argument("--input-len", type=int, default=128)
    p.add_argument("--output-len", type=int, default=64)
    p.add_argument("--range-ratio", type=float, default=0.5)
    p.add_argument("--max-num-seqs", type=int, default=32, help="requests at once, of the engine and of a static batch")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--ways", default=",".join(WAYS), help="the engine comes first")
    p.add_argument("--out", type=Path)
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args)), flush=True)
        return
    ways = args.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        p.error(f"--ways: {unknown[0]} is none of {', '.join(WAYS)}")
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            found[way].append(_in_child(way))
            print(f"{way:20}", {key: round(found[way][-1][key], 1) for key in KEYS}, flush=True)
    result = record(args, args.device, rows=[row(way, runs) for way, runs in found.items()])
    for line in lines(result["rows"]):
        print(line)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def row(way: str, runs: Sequence[dict]) -> dict:
    """Medians of the runs, and the runs."""
    return dict(way=way, **{key: statistics.median(run[key] for run in runs) for key in KEYS}, runs=list(runs))


def over(ours: dict, other: dict) -> list[float]:
    """Ours over the other's requests and tokens a second, the other's over our TTFT and memory: above one is better."""
    rates = [ours[name] / other[name] for name in ("req_s", "out_tok_s")]
    return rates + [other[name] / ours[name] for name in ("ttft_ms", "memory_mib")]


def lines(rows: Sequence[dict]) -> list[str]:
    """The table of a result: ours, and each peer with our figures over its own, memory the other way round."""
    ours = rows[0]
    table = ["| way | requests/s | output tokens/s | mean TTFT, ms | memory, MiB |", "|---|---|---|---|---|"]
    for one in rows:
        ratios = [""] * 4
        if one is not ours:
            ratios = [f" ({ratio:.2f} x)" for ratio in over(ours, one)]
        values = (
            f"{one['req_s']:.2f}",
            f"{one['out_tok_s']:,.1f}",
            f"{one['ttft_ms']:,.0f}",
            f"{one['memory_mib']:,.0f}",
        )
        name = "this engine" if one["way"] == "engine" else f"transformers, {one['way']}"
        table.append(f"| {name} | " + " | ".join(map("".join, zip(values, ratios))) + " |")
    return table


def machine(device: str) -> dict:
    import torch
    import transformers

    return dict(
        gpu=torch.cuda.get_device_name() if device == "cuda" else "none", cpus=os.cpu_count(), load=os.getloadavg()[0],
        system=f"{platform.system()} {platform.machine()}", torch=torch.__version__, transformers=transformers.__version__,
    )  # fmt: skip


def record(args: argparse.Namespace, device: str = "cpu", **found: object) -> dict:
    """What a file of results holds: the machine, a script's arguments, and what it found."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return dict(machine=machine(device), given=given, **found)


def measure(way: str, args: argparse.Namespace) -> dict:
    """One way in this process: figures of all requests after a warm-up."""
    folder, answer = _engine(args) if way == "engine" else _peer(way, args)
    from transformers import AutoConfig

    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    shape = Shape(args.input_len, args.output_len, range_ratio=args.range_ratio)
    work, warm = (
        made_up(count, shape, seed=seed, vocab_size=vocab_size) for count, seed in ((args.requests, 0), (WARM, 1))
    )
    prompts, lengths = [one.prompt for one in work], [one.output_len for one in work]
    answer([one.prompt for one in warm], [max(2, one.output_len // 4) for one in warm])
    memory = _Memory(args.device)
    seconds, first_token_s = answer(prompts, lengths)
    return dict(
        seconds=seconds, req_s=len(work) / seconds, out_tok_s=sum(lengths) / seconds, memory_mib=memory.most() / 2**20,
        ttft_ms=1e3 * statistics.mean(first_token_s), ttft_p99_ms=1e3 * float(np.percentile(first_token_s, 99)),
    )  # fmt: skip


def _engine(args: argparse.Namespace):
    """(folder of the model, what answers prompts) of this engine."""
    from pagegraph.compiler.build import build_compiled
    from pagegraph.runtime.config import load_config
    from pagegraph.runtime.engine.compiler_options import compiler_options
    from perf.gpu.offline import Offline

    settings = dict(
        device=args.device, dtype=args.dtype, max_num_seqs=args.max_num_seqs, enable_prefix_caching=False, inter_token_target_ms="none",
        max_model_len=2048, compile=not args.no_compile, num_blocks=_blocks(args), max_queue=100_000,
    )  # fmt: skip
    if args.shape:
        settings["load_format"] = "dummy"
    config = load_config(args.model or str(_dummy(args.shape)), settings).config
    built = build_compiled(compiler_options(config), progress=False)
    offline = Offline(config, built)

    def answer(prompts: list[list[int]], lengths: list[int]) -> tuple[float, list[float]]:
        run = offline.run(prompts, lengths)
        return run.seconds, run.first_token_s

    return built.folder, answer


def _blocks(args: argparse.Namespace) -> int:
    """Of the pool: what the requests at once need at most, of 2,048 tokens one at least."""
    longest = int((args.input_len + args.output_len) * (1 + args.range_ratio)) + 2 * BLOCK
    return 2 + max(2048, args.max_num_seqs * longest) // BLOCK


def _peer(way: str, args: argparse.Namespace):
    """(folder of the model, what answers prompts) of transformers; a GGUF file is converted by this engine's loader."""
    from perf import peers

    if args.shape:
        folder = _dummy(args.shape)
    else:
        from pagegraph.compiler.build import model_folder
        from pagegraph.compiler.options import ModelOptions

        folder = model_folder(ModelOptions(model=args.model), None)
    model = peers.load(folder, args.device, args.dtype, dummy=bool(args.shape))
    ways = {"one by one": peers.static_batches(1), "static batches": peers.static_batches(args.max_num_seqs),
            "continuous batching": peers.continuous}  # fmt: skip

    def answer(prompts: list[list[int]], lengths: list[int]) -> tuple[float, list[float]]:
        done = ways[way](model, prompts, lengths)
        return done.seconds, done.first_token_s

    return folder, answer


def _dummy(shape: str) -> Path:
    return write_model(shape, Path(tempfile.gettempdir(), "pagegraph-models", shape))


class _Memory:
    """The most that is held from now on."""

    def __init__(self, device: str) -> None:
        self._on_device = device == "cuda"
        if self._on_device:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark of the most that was resident

    def most(self) -> int:
        if self._on_device:
            import torch

            return torch.cuda.max_memory_reserved()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _in_child(way: str) -> dict:
    """What a process of its own measured. Raises RuntimeError with the end of what it wrote."""
    command = [sys.executable, "-m", "perf.compare", *sys.argv[1:], "--child", way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
