"""Speed of whole steps and whole jobs: one decode step, offline jobs, and a peer on the same jobs.

Weights are random: no speed here depends on what the model says. Knows the engine by its public parts alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch

from pagegraph.compiler.build import BuiltModel, build_compiled, plan_models
from pagegraph.compiler.explain.ledger import ledger, weights_of
from pagegraph.compiler.explain.machines import this_machine
from pagegraph.compiler.explain.measure import device_seconds, fill_blocks
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from perf import workloads
from perf.floors import MAX_MODEL_LEN, Shape
from perf.gpu.offline import (
    Offline,
    Run,
    built_of,
    ceilings_of,
    config_of,
    floor_seconds,
    method_of,
    random_prompts,
    step_of,
)  # fmt: skip
from perf.gpu.report import Report

DECODES = ((1, 256), (32, 1024), (256, 384))  # (sequences, keys of each)
TINY_DECODES = ((1, 64), (8, 96))
PROMPTS, TINY_PROMPTS = (2, 4096), (2, 64)  # likewise, all tokens of each
DRIVEN_TOKENS = 64  # steps of a decode that are driven through the engine
PROFILED = (1, 32, 256)
PEER_SECONDS = 400  # of a model, its start included
VLLM = Path(__file__).with_name("vllm_offline.py")
HF_CASES, HF_BUDGET = ("throughput", "latency"), 15  # seconds of timed work a case
NO_WAIT = 1e-4  # seconds: a turn that waits less was late, the device had nothing more to do


def start(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Build and compile the model and capture its graphs once for the sections that follow; seconds by phase."""
    config = config_of(args, args.models[0])
    begin, held = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = compiler_options(config)
    built = build_compiled(options, progress=False)
    report.fact(total_s=time.perf_counter() - begin, phases_s=built.timings.seconds, num_blocks=built.num_blocks)
    if args.checkpoint:
        report.fact(weights_gib=sum(one.bytes for one in weights_of(built.step.paged_model.model)) / 2**30)
        report.fact(host_gib=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 2**20)
        predicted = ledger(options, plan_models(options), this_machine(options.device))
        report.fact(predicted_weights_gib=predicted.weight_bytes / 2**30, predicted_blocks=predicted.num_blocks)
    if built.device.type == "cuda":
        fill_blocks(built.step.state.caches)
        free, total = torch.cuda.mem_get_info()
        report.fact(graphs=len(built.step.runner.capture_sizes.buckets()), used_gib=(total - free) / 2**30)
    shared["built"] = config, built


def step(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """One decode step: replayed alone, launched ahead without waiting, and driven through the engine; one of prompts, launched
    ahead; ms."""
    model = args.models[0]
    config, built = built_of(shared)
    profiled = []
    shape, ceilings = Shape.of(model), ceilings_of(report, args, shared)

    def made(seqs: int, rows: int, keys: int) -> tuple[StepInput, float]:
        one = step_of(
            np.random.default_rng(seqs), np.full(seqs, rows), np.full(seqs, keys),
            vocab_size=built.vocab_size, num_blocks=built.num_blocks, block_size=config.block_size,
        )  # fmt: skip
        return one, shape.step_floor(ceilings, one.query_start, one.seq_lens, method_of(args, model))

    for seqs, keys in TINY_DECODES if args.tiny else DECODES:
        if report.out_of_time((seqs, keys)):
            break
        one, floor = made(seqs, 1, keys)
        replay = _replayed(built, one)
        launched = launched_seconds(built, one)
        turn, host, wait, launch = driven_seconds(config, built, seqs, keys)
        report.row(
            **_method(args), seqs=seqs, keys=keys, floor_ms=floor * 1e3, replay_ms=replay * 1e3, ratio=replay / floor,
            ahead_ms=launched * 1e3, turn_ms=turn * 1e3, turn_ratio=turn / floor, over_ms=(turn - replay) * 1e3,
            host_ms=host * 1e3, launch_ms=launch * 1e3, wait_ms=wait * 1e3,
        )  # fmt: skip
        profiled += [one] if seqs in PROFILED else []
    if not report.out_of_time("prompts"):
        prompts, tokens = TINY_PROMPTS if args.tiny else PROMPTS
        one, floor = made(prompts, tokens, tokens)
        launched = launched_seconds(built, one, count=8)
        report.row(
            **_method(args),
            prompts=prompts,
            keys=tokens,
            floor_ms=floor * 1e3,
            ahead_ms=launched * 1e3,
            ratio=launched / floor,
        )
        profiled.append(one)
    if built.device.type != "cuda":
        return
    for one in profiled:  # last: a profiler leaves hooks that slow launches
        _profile(report, built, one)


def _method(args: argparse.Namespace) -> dict[str, str]:
    """How the weights of a row's model are quantised, if they are."""
    return {"quantization": args.quantization} if args.quantization else {}


def _replayed(built: BuiltModel, one: StepInput) -> float:
    """Seconds of the step's graph, replayed back to back; nan where there is none."""
    return device_seconds(built.step, one) if built.device.type == "cuda" else float("nan")


def launched_seconds(built: BuiltModel, one: StepInput, count: int = 50) -> float:
    """Seconds a launch when launches follow each other and no result is waited for: staging, forward, sampling."""
    count = count if built.device.type == "cuda" else 5
    for warm in (True, False):
        tickets, start = [], time.perf_counter()
        for _ in range(3 if warm else count):
            tickets.append(built.step.launch(one))
        for ticket in tickets:
            ticket.wait()
        seconds = (time.perf_counter() - start) / len(tickets)
    return seconds


def driven_seconds(config: Config, built: BuiltModel, seqs: int, keys: int) -> tuple[float, float, float, float]:
    """Median seconds of (turn, host, wait, launch) over turns that decode `seqs` sequences of about `keys` keys."""
    prompts = random_prompts(seqs, [keys - DRIVEN_TOKENS // 2] * seqs, built.vocab_size)
    offline = Offline(config, built)
    offline.run([prompt[:8] for prompt in prompts], [4] * seqs)
    run = offline.run(prompts, [DRIVEN_TOKENS] * seqs)
    # A turn waits for the step before it: both have to be full decodes.
    full = [turn.num_decodes == seqs for turn in run.turns]
    turns = [turn for before, now, turn in zip(full, full[1:], run.turns[1:]) if before and now]
    return tuple(
        statistics.median(getattr(turn, name) for turn in turns) for name in ("seconds", "host", "wait", "launch")
    )


def _profile(report: Report, built: BuiltModel, one: StepInput) -> None:
    """The fifteen kernels that take most of one launched step."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            built.step.launch(one).wait()
            torch.cuda.synchronize()
        events = [event for event in profile.key_averages() if event.self_device_time_total]
        events.sort(key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events)
        for event in events[:15]:
            spent = event.self_device_time_total
            report.row(
                tokens=len(one.token_ids), us=spent, share=spent / total, calls=event.count, kernel=event.key[:90]
            )
        report.row(
            tokens=len(one.token_ids), us=total, share=1.0, calls=sum(event.count for event in events), kernel="all"
        )
    except Exception as error:  # a machine without profiling rights still measures the rest
        report.fact(profiler=f"{type(error).__name__}: {error}"[:300])


def engine(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Offline jobs through the engine: greedy, EOS ignored, exact output lengths, after a warm-up."""
    model = args.models[0]
    _, built = built_of(shared)
    shape, ceilings = Shape.of(model), ceilings_of(report, args, shared)
    make = workloads.of_peer(args.peer) if args.peer else workloads.make
    long = Offline(config_of(args, model, enable_prefix_caching=True), built)  # whose cache outlives a case
    for case, caching in jobs_of(model, args.cases):
        if report.out_of_time((case, caching)):
            return
        work = make(case, built.vocab_size, args.scale)
        config = config_of(args, model, enable_prefix_caching=caching)
        _run_rounds(long if case in workloads.LONG else Offline(config, built), work.warm)
        runs = []
        for _ in range(work.repeat):
            # Each repeat with an empty prefix cache, as the first had.
            offline = long if case in workloads.LONG else Offline(config, built)
            runs.append(_run_rounds(offline, work.rounds))
        rounds = sorted(runs, key=_seconds)[len(runs) // 2]
        floor = sum(floor_seconds(run, shape, ceilings, method_of(args, model)) for run in rounds)
        seconds, turns = _seconds(rounds), [turn for run in rounds for turn in run.steps]
        report.row(
            **_method(args), case=case, caching=caching, requests=work.requests, wall_s=seconds,
            out_tok_s=work.output_tokens / seconds, total_tok_s=(work.prompt_tokens + work.output_tokens) / seconds,
            ratio=seconds / floor, steps=len(turns), in_graphs=sum(run.graph_hits for run in rounds) / len(turns),
            turn_ms=1e3 * seconds / len(turns),
            host_ms=1e3 * statistics.mean(turn.host for turn in turns),
            launch_ms=1e3 * statistics.mean(turn.launch for turn in turns),
            late=sum(turn.wait < NO_WAIT for turn in turns) / len(turns),
            spread=(max(map(_seconds, runs)) - min(map(_seconds, runs))) / seconds,
            distinct=workloads.distinct(rounds[-1].outputs),
        )  # fmt: skip


def jobs_of(model: str, cases: Sequence[str]) -> list[tuple[str, bool]]:
    """(case, whether prefixes are cached). Long prompts are run as both engines come: with prefix caching."""
    if model == "8b-128k":
        return [(case, True) for case in cases]
    return [(case, case in workloads.LONG) for case in cases] + ([("prefix", True)] if "prefix" in cases else [])


def _run_rounds(offline: Offline, rounds: Sequence[workloads.Round]) -> list[Run]:
    return [offline.run(prompts, lengths) for prompts, lengths in rounds]


def _seconds(rounds: Sequence[Run]) -> float:
    return sum(run.seconds for run in rounds)


def peer(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Peers on the same work, in processes of their own; ratios of output rates to this run's `engine` rows."""
    environment = {**os.environ, "PY": sys.executable}
    if "vllm" in args.engines:
        install_vllm(report, args)
    known = json.loads(args.results.read_text())["sections"] if args.results and args.results.exists() else []
    for model, engine in itertools.product(args.models, args.engines):
        ours = {
            (row["case"], row["caching"]): row
            for one in known if one["section"] == "engine" and one["model"] == model for row in one["rows"]
        }  # fmt: skip  # all of this run, whose models are quantised alike
        for theirs in _peer_rows(args, engine, model, environment):
            if "error" in theirs or theirs["case"] == "startup":
                report.row(
                    model=model,
                    peer=engine,
                    **_method(args),
                    **{key: theirs[key] for key in ("case", "error", "llm_init_s", "init_s") if key in theirs},
                )
                if "error" in theirs:
                    report.failure(f"{model} {theirs['case']}: {theirs['error']}")
                continue
            caching = theirs.get("prefix_caching", False)
            mine = ours.get((theirs["case"], caching))
            report.row(
                model=model, peer=engine, **_method(args), case=theirs["case"], caching=caching, requests=theirs["requests"], wall_s=theirs["wall_s"],
                out_tok_s=theirs["out_tok_s"], total_tok_s=theirs["total_tok_s"], distinct=theirs.get("distinct"), ours_s=mine["wall_s"] if mine else None,
                ours_over_theirs=mine["total_tok_s"] / theirs["total_tok_s"] if mine else None,
            )  # fmt: skip


def install_vllm(report: Report, args: argparse.Namespace) -> None:
    """Unpack the peer into its target, unless an earlier section has."""
    if (args.peer_target / "env.sh").exists():
        return
    start = time.perf_counter()
    command = ["bash", args.peer / "install.sh", args.peer, args.peer_target]
    subprocess.run(command, env={**os.environ, "PY": sys.executable}, check=True, timeout=300)
    report.fact(install_s=time.perf_counter() - start)


def in_vllm(args: argparse.Namespace, *command: object) -> list[str]:
    """The command that runs Python's `command` where the peer is installed."""
    shell = f'source "{args.peer_target}/env.sh" && exec "$PY" "$@"'
    return ["bash", "-c", shell, "python", *map(str, command)]


def vllm_command(args: argparse.Namespace, model: str, cases: Sequence[str], *more: object) -> list[str]:
    """That runs vLLM on these cases; where its lines go is to be said behind it. more: options of `perf.gpu.vllm_offline`."""
    quantized = ["--quantization", args.quantization] if args.quantization else []
    return in_vllm(
        args, VLLM, "--peer", args.peer, "--model", config_of(args, model).model, "--scale", args.scale, *quantized,
        "--max-model-len", MAX_MODEL_LEN[model], *more, "--case", *cases,
    )  # fmt: skip


def _peer_commands(args: argparse.Namespace, engine: str, model: str) -> list[list[str]]:
    """The peer's runs. That of transformers is static batches of 64 and less work: rates are compared."""
    if engine == "vllm":
        kinds: dict[bool, list[str]] = {}
        for case, caching in jobs_of(model, args.cases):
            kinds.setdefault(caching, []).append(case)
        return [
            vllm_command(args, model, cases, *(["--prefix-caching"] if caching else []))
            for caching, cases in kinds.items()
        ]
    cases = [case for case in HF_CASES if case in args.cases]
    if not cases:
        raise RuntimeError(f"transformers runs the cases {', '.join(HF_CASES)} alone; name one in --case")
    # One batch a case, three of the shortest: within a minute.
    scale = 0.004 if args.tiny else 0.064
    command = [
        sys.executable, args.peer / "bench_hf.py", "--model", config_of(args, model).model, "--scale", scale, "--budget", HF_BUDGET,
        "--device", args.device, "--case", *cases,
    ]  # fmt: skip
    return [[str(part) for part in command]]


def _peer_rows(args: argparse.Namespace, engine: str, model: str, environment: dict[str, str]) -> list[dict]:
    """The lines the peer's benchmark writes; those of a run that ends badly too."""
    lines = args.child.with_name(f"peer-{engine}-{model}.jsonl")
    errors = []
    for command in _peer_commands(args, engine, model):
        with open(lines.with_suffix(".log"), "w+") as log:
            ended = how_it_ended([*command, "--out", str(lines)], environment, log)
            log.seek(0)
            if ended != "exit code 0":
                errors.append({"case": "all", "error": f"{ended}: {log.read()[-1500:]}"})
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return rows + errors


def how_it_ended(command: list[str], environment: dict[str, str], log: IO[str]) -> str:
    run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        return f"exit code {run.wait(PEER_SECONDS)}"
    except subprocess.TimeoutExpired:
        return f"killed after {PEER_SECONDS} s"
    finally:
        try:
            os.killpg(run.pid, signal.SIGKILL)  # its own group alone: engine processes it may have left
        except ProcessLookupError:
            pass
