"""Correctness and speed of the engine on one CUDA machine, section by section: tables here, JSON under --out.

    python -m perf.gpu.run --section kernels,graphs,step,engine --model 8b,0.6b --commit $(git rev-parse --short HEAD)

Each group of sections runs in a process of its own: a crash, or a device that a bad kernel has left unusable, ends
that group and no other. Sections of one model share one built engine. Knows the order and the files; the sections
are in the modules beside this one. Wants no network.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from perf import workloads
from perf.floors import MODELS

ROOT = Path(__file__).resolve().parents[2]

SECTIONS = (
    "kernels", "graphs", "long_context", "parity", "quality", "micro", "experts", "quantized_experts", "state", "deterministic", "quantized", "quantized_step", "texts", "chains", "step", "engine", "memory", "speculation", "grammars",
    "arrivals", "chunk_limit", "parallel", "serve", "startup", "open_loop", "host", "peer",
)  # fmt: skip
OF_A_MODEL = ("step", "engine", "memory", "speculation", "grammars", "arrivals", "chunk_limit")
OF_A_SERVER = ("serve", "startup", "open_loop")  # of a model too, in a process that holds no engine yet
LAST = ("parallel", "host", "peer")  # of no engine that sections share
CASES = ",".join(workloads.CASES)
LONG_CASES = ",".join(workloads.LONG)
PEERS = ("vllm", "transformers")
START_SECONDS = 240  # on top of the sections' own time: imports, building, compiling, capturing
LOAD_TAIL_SECONDS = 30  # behind the last arrival of a rate
PEER_SECONDS = 420  # of a model, its start included
PARALLEL_SECONDS = 600  # of a model shared by so many ranks: its start, compilation and the peer's included


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--section", default="kernels,graphs,step,engine,host", help=f"comma-separated, of {','.join(SECTIONS)}"
    )
    p.add_argument("--model", default="8b,0.6b", help=f"comma-separated, of {', '.join(MODELS)}")
    p.add_argument(
        "--case",
        default=CASES,
        help=f"cases of the sections engine and peer, comma-separated; with --peer also {LONG_CASES}",
    )
    p.add_argument(
        "--scale", type=float, default=1.0, help="share of the requests of the cases, and of the prompts of parity"
    )
    p.add_argument("--seconds", type=float, default=100, help="wall time of a section before it skips what is left")
    p.add_argument(
        "--weights",
        help="GGUF file or folder of a real model, for parity, quality and texts; for grammars a folder with a tokenizer",
    )
    p.add_argument("--peer", type=Path, help="folder of a peer's benchmark: its workloads are used, and `peer` runs it")
    p.add_argument(
        "--peer-target", type=Path, default=Path(tempfile.gettempdir(), "peer"), help="where the peer is installed"
    )
    p.add_argument(
        "--peer-engine", default="vllm", help=f"what section peer runs, comma-separated, of {','.join(PEERS)}"
    )
    p.add_argument(
        "--quantization",
        choices=["fp8", "int8", "int4"],
        help="of all models while they load, and of peer vllm; the only one of quantized and quantized_step",
    )
    p.add_argument(
        "--checkpoint",
        action="store_true",
        help="write weights as they are published and load them, instead of drawing them",
    )
    p.add_argument("--group", type=int, default=128, help="columns to a scale of int4, in section quantized")
    p.add_argument(
        "--workers",
        type=int,
        default=8,
        help="web processes of the server, each of which writes some 5,000 events a second",
    )
    p.add_argument("--rate", default="10,30,50", help="requests a second of section open_loop, comma-separated")
    p.add_argument("--load-seconds", type=float, default=20, help="of each rate of section open_loop")
    p.add_argument(
        "--tensor-parallel-size", default="2", help="of section parallel: ranks that share a model, comma-separated"
    )
    p.add_argument("--expert-parallel", action="store_true", help="of section parallel: whole experts a rank")
    p.add_argument(
        "--target",
        default="none,auto",
        help="inter_token_target_ms of sections arrivals and chunk_limit, comma-separated",
    )
    p.add_argument("--out", type=Path, default=ROOT / "perf" / "results")
    p.add_argument("--commit", default="unknown", help="what is measured, for the record")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a trial of the control flow")
    p.add_argument("--tiny", action="store_true", help="the tiny model and small sizes")
    p.add_argument("--no-compile", action="store_true", help="run the models as plain PyTorch inside the graphs")
    p.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args(given)
    if args.tiny:
        args.model = "tiny"
    args.sections, args.models, args.cases = (one.split(",") for one in (args.section, args.model, args.case))
    args.engines = args.peer_engine.split(",")
    args.targets = args.target.split(",")
    args.ranks = [int(size) for size in args.tensor_parallel_size.split(",")]
    args.rates = [float(rate) for rate in args.rate.split(",")]
    if unknown := set(args.sections) - set(SECTIONS) - ({"start"} if args.child else set()):
        p.error(f"unknown section {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    for key, known in (("model", MODELS), ("case", f"{CASES},{LONG_CASES}".split(",")), ("peer_engine", PEERS)):
        if unknown := set(getattr(args, key).split(",")) - set(known):
            p.error(f"unknown {key.replace('_', '-')} {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for name in ("peer", "open_loop"):
        if name in args.sections and not args.peer:
            p.error(f"section {name} needs --peer DIR")
    if set(args.cases) & set(LONG_CASES.split(",")) and not args.peer:
        p.error(f"the cases {LONG_CASES} are a peer's: --peer DIR")
    if args.quantization and "peer" in args.sections and args.engines != ["vllm"]:
        p.error("--quantization is known to the peer vllm alone")
    for name in ("parity", "quality", "texts", "grammars"):
        if name in args.sections and not args.weights:
            p.error(f"section {name} needs --weights PATH")
    return args


def main() -> int:
    args = arguments()
    if args.child:
        return run_child(args)
    args.out.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now()
    path = args.out / f"h200-{now:%Y%m%d-%H%M%S}-{args.commit}.json"
    results = {
        "date": now.isoformat(timespec="seconds"),
        "commit": args.commit,
        "arguments": sys.argv[1:],
        "machine": None,
        "sections": [],
    }
    for sections, model in jobs(args):
        run_job(args, sections, model, path, results)
    print(f"\n{'section':>10}  {'model':>6}  {'seconds':>8}  result")
    for one in results["sections"]:
        outcome = "ok" if one["ok"] else one["error"][:100] or f"{len(one['failures'])} failures"
        print(f"{one['section']:>10}  {one['model'] or '':>6}  {one.get('seconds', ''):>8}  {outcome}")
    print(path)
    return 0 if all(one["ok"] for one in results["sections"]) else 1


def jobs(args: argparse.Namespace) -> list[tuple[list[str], str | None]]:
    """What runs together in one process: (sections, model)."""
    of_a_model = [name for name in SECTIONS if name in args.sections and name in OF_A_MODEL]
    alone = [name for name in SECTIONS if name not in (*OF_A_MODEL, *OF_A_SERVER, *LAST)]
    before = [([name], None) for name in alone if name in args.sections]
    between = [(["start", *of_a_model], model) for model in args.models if of_a_model]
    between += [([name], model) for name in OF_A_SERVER if name in args.sections for model in args.models]
    return before + between + [([name], None) for name in LAST if name in args.sections]


def run_job(args: argparse.Namespace, sections: list[str], model: str | None, path: Path, results: dict) -> None:
    """One child process; whatever it leaves is merged into the results and written."""
    part = Path(tempfile.mkdtemp(prefix="pagegraph-"), "sections.json")
    limit = START_SECONDS + len(sections) * args.seconds
    if sections == ["peer"]:
        limit = START_SECONDS + PEER_SECONDS * len(args.models) * len(args.engines)
    elif sections == ["parallel"]:
        limit = (
            len(args.models) * len(args.ranks) * (PARALLEL_SECONDS + args.seconds + (PEER_SECONDS if args.peer else 0))
        )
    elif sections == ["open_loop"]:
        limit = 2 * (START_SECONDS + len(args.rates) * (args.load_seconds + LOAD_TAIL_SECONDS))
    command = [
        sys.executable,
        "-u",
        "-m",
        "perf.gpu.run",
        *sys.argv[1:],
        "--child",
        str(part),
        "--results",
        str(path),
        "--section",
        ",".join(sections),
    ]
    command += ["--model", model] if model else []
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code, ended = child.wait(limit), ""
    except subprocess.TimeoutExpired:
        code, ended = 1, f"killed after {limit:.0f} s"
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)  # its own group alone: workers it may have left
        except ProcessLookupError:
            pass
    found = json.loads(part.read_text()) if part.exists() else {"machine": None, "sections": []}
    for name in sections[len(found["sections"]) :]:
        error = ended or f"not reached, exit code {code}"
        found["sections"].append({"section": name, "model": model, "ok": False, "error": error, "rows": []})
    if ended:
        print(f"{','.join(sections)}: {ended}", flush=True)
    results["machine"] = found["machine"] or results["machine"]
    results["sections"] += found["sections"]
    path.write_text(json.dumps(results, indent=1))


def run_child(args: argparse.Namespace) -> int:
    """Run the given sections in this process; a section that fails does not stop the next."""
    start = time.perf_counter()
    from perf.gpu.report import Report  # torch is imported in children alone

    report = Report(args.child, machine_facts(args), args.seconds)
    print(f"\n{report.machine['gpu']}, imports {time.perf_counter() - start:.1f} s", flush=True)
    model = args.models[0] if args.sections[0] in ("start", *OF_A_SERVER) else None
    shared: dict = {}  # what sections of one process hand on: the built engine
    for name in args.sections:
        try:
            with report.section(name, model):
                section(name)(report, args, shared)
        except Exception:
            traceback.print_exc()
    return 0 if all(one["ok"] for one in report.sections) else 1


def section(name: str):
    """The function of a section, imported when it runs: Triton is wanted by some alone."""
    if name == "kernels":
        from perf.gpu import kernel_ops as module
    elif name == "micro":
        from perf.gpu import micro as module
    elif name in ("experts", "quantized_experts"):
        from perf.gpu import experts as module
    elif name.startswith("quantized"):
        from perf.gpu import quantized as module
    elif name in ("start", "step", "engine", "peer"):
        from perf.gpu import engine_steps as module
    elif name == "arrivals":
        from perf.gpu import chunk_limit as module
    elif name in ("open_loop", "chunk_limit", "grammars", "long_context", "deterministic", "parallel", "state"):
        module = importlib.import_module(f"perf.gpu.{name}")
    elif name in OF_A_SERVER:
        from perf.gpu import serve as module
    elif name in ("speculation", "texts", "chains"):
        from perf.gpu import spec_decode as module
    else:
        from perf.gpu import checks as module
    return getattr(module, name)


def machine_facts(args: argparse.Namespace) -> dict[str, object]:
    import numpy
    import torch
    import transformers

    try:
        import triton
    except ImportError:
        triton = None
    cuda = args.device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else 0,
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": getattr(triton, "__version__", None),
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
