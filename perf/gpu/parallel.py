"""One model on several GPUs: steps and jobs with `tensor_parallel_size`, sums over ranks alone, memory of a rank, vLLM beside it.

    python -m perf.gpu.run --section parallel --model 70b --tensor-parallel-size 2,4,8 --peer DIR

Ranks are processes, as in an engine: this one is the first. With `--device cpu --tiny` two of them meet over gloo: a trial of the
control flow. Knows the engine by its public parts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.distributed import FileStore

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.compiler.build import BuiltModel, build_compiled, plan_models
from pagegraph.compiler.explain.ledger import ledger, weights_of
from pagegraph.compiler.explain.machines import this_machine
from pagegraph.kernels.collective import groups
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.engine.ranks import build_with_ranks
from perf import workloads
from perf.floors import NVLINK, Ceilings, Shape
from perf.gpu import engine_steps
from perf.gpu.offline import Offline, ceilings_of, config_of, floor_seconds, random_prompts, step_of
from perf.gpu.report import Report, graph_seconds

SUMMED = (1, 32, 256, 8192)  # tokens of hidden states
TINY_SUMMED = (1, 8)
DECODES = ((1, 256), (32, 1024), (256, 384))  # (sequences, keys of each)
TINY_DECODES = ((1, 64), (8, 96))
# Of workloads, share of the requests: one stream, 1000 x (128, 256), 32 x 4096.
CASES = (("latency", 1.0), ("throughput", 1.0), ("prefill", 0.5))
TINY_SCALE = 0.01
GROUP = "perf"
MEET_S = 120.0
COMPARED_PROMPTS, COMPARED_TOKENS, COMPARED_CACHE = [20, 100, 300, 7], 40, 64 << 20
IN_A_GRAPH = 20  # sums, so that what a launch takes does not count
REPLAYS = 50  # on every rank


def parallel(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """For each model and number of ranks: sums alone, decode steps, jobs, memory; ms unless a name says otherwise."""
    report.fact(nvlink_GB_s=NVLINK / 1e9, nvlink_source="data sheet of the H200, one direction; not measured")
    for model in args.models:
        for size in args.ranks:
            there = torch.cuda.device_count() if args.device == "cuda" else size
            if there < size:
                report.failure(f"{model}: {size} ranks want as many GPUs, and there are {there}")
                continue
            if model == args.models[0]:
                _same_tokens(report, args, size)
            summed = _sums(report, args, model, size)
            _of_model(report, args, shared, model, size, summed)
            if args.peer:
                _vllm(report, args, model, size)


def _same_tokens(report: Report, args: argparse.Namespace, size: int) -> None:
    """The tiny model in float32 gives greedy tokens of one device; first of all, since it takes seconds."""
    outputs = []
    for ranks in (size, 1):
        config = config_of(
            args,
            "tiny",
            tensor_parallel_size=ranks,
            kv_cache_memory=COMPARED_CACHE,
            max_num_seqs=16,
            max_num_batched_tokens=256,
        )
        built = build_with_ranks(config, lambda options: build_compiled(options, progress=False))
        try:
            prompts = random_prompts(1, COMPARED_PROMPTS, built.vocab_size)
            outputs.append(Offline(config, built).run(prompts, [COMPARED_TOKENS] * len(prompts)).outputs)
        finally:
            built.close()
    equal = sum(ours == theirs for ours, theirs in zip(*outputs))
    report.row(model="tiny", ranks=size, sequences=len(outputs[0]), equal=equal)
    if equal != len(outputs[0]):
        report.failure(
            f"tiny: {len(outputs[0]) - equal} of {len(outputs[0])} sequences differ between {size} ranks and one"
        )


def _sums(report: Report, args: argparse.Namespace, model: str, size: int) -> dict[int, float]:
    """Tokens -> seconds of one sum of their hidden states over ranks, in processes that do nothing else."""
    hidden, dtype = Shape.of(model).hidden, "float32" if args.device == "cpu" else "bfloat16"
    tokens = TINY_SUMMED if args.tiny else SUMMED
    store = Path(tempfile.mkdtemp(prefix="pagegraph-perf-"), "store")
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
        given = [(str(store), rank, size, args.device, hidden, dtype, tokens) for rank in range(size)]
        of_ranks = list(pool.map(seconds_of_sums, given))
    found = {}
    for count, *seconds in zip(tokens, *of_ranks):
        found[count] = max(seconds)
        data = count * hidden * getattr(torch, dtype).itemsize
        bus = 2 * (size - 1) / size * data / found[count]
        report.row(
            model=model, ranks=size, tokens=count, KiB=data / 1024, all_reduce_us=found[count] * 1e6, bus_GB_s=bus / 1e9,
            of_nvlink=bus / NVLINK,
        )  # fmt: skip
    return found


def seconds_of_sums(given: tuple[str, int, int, str, int, str, tuple[int, ...]]) -> list[float]:
    """On one rank: seconds of a sum of so many tokens, captured in a graph on a GPU, each with the others'."""
    store, rank, size, device_type, hidden, dtype, tokens = given
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    group = groups.connect(FileStore(store, size), rank, size, device, MEET_S)
    groups.register(GROUP, group)
    of = [_seconds_of_sum(torch.ones(count, hidden, dtype=getattr(torch, dtype), device=device)) for count in tokens]
    group.close()
    return of


def _seconds_of_sum(x: torch.Tensor) -> float:
    def one() -> torch.Tensor:
        return torch.ops.pagegraph.all_reduce(x, GROUP)

    if x.device.type == "cuda":
        return _replayed_together([one] * IN_A_GRAPH)
    one()
    start = time.perf_counter()
    for _ in range(IN_A_GRAPH):
        one()
    return (time.perf_counter() - start) / IN_A_GRAPH


def _replayed_together(calls: list[Callable[[], object]]) -> float:
    """As `graph_seconds`, with the same number of replays on each rank."""
    return graph_seconds(calls, replays=REPLAYS)


def _of_model(
    report: Report, args: argparse.Namespace, shared: dict, model: str, size: int, summed: dict[int, float]
) -> None:
    config = config_of(args, model, tensor_parallel_size=size, expert_parallel=args.expert_parallel)
    predicted = _predicted(config)
    begin = time.perf_counter()
    built = build_with_ranks(config, lambda options: build_compiled(options, progress=False))
    try:
        report.fact(
            **{
                f"{model}_{size}_start_s": time.perf_counter() - begin,
                f"{model}_{size}_phases_s": built.timings.seconds,
            }
        )
        _memory(report, model, size, built, predicted)
        ceilings = ceilings_of(report, args, shared)
        _steps(report, args, config, built, model, size, ceilings, summed)
        _jobs(report, args, config, built, model, size, ceilings)
    finally:
        built.close()


def _predicted(config: Config) -> dict[str, float]:
    """What `runtime explain` says of a rank, before any is there."""
    options = compiler_options(config)
    machine = this_machine(options.device).shared_by(options.ranks.size)
    held = ledger(options, plan_models(options), machine)
    graphs = {"step_gib": held.step.peak / 2**30, "graphs_gib": held.graphs / 2**30}
    return {"weights_gib": held.weight_bytes / 2**30, "blocks": held.num_blocks, **graphs}


def _memory(report: Report, model: str, size: int, built: BuiltModel, predicted: dict[str, float]) -> None:
    """Of the first rank, beside what was predicted; ranks have the same sizes."""
    used = None
    if built.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(built.device)
        used = (total - free) / 2**30
    report.row(
        model=model, ranks=size, weights_gib=sum(one.bytes for one in weights_of(built.step.paged_model.model)) / 2**30, predicted_gib=predicted["weights_gib"], blocks=built.num_blocks,
        predicted_blocks=predicted["blocks"], used_gib=used, predicted_step_gib=predicted["step_gib"], predicted_graphs_gib=predicted["graphs_gib"],
    )  # fmt: skip


def _steps(
    report: Report,
    args: argparse.Namespace,
    config: Config,
    built: BuiltModel,
    model: str,
    size: int,
    ceilings: Ceilings,
    summed: dict[int, float],
) -> None:
    """Decode steps, launched ahead and driven, against the floor of a rank's share and its link."""
    shape = Shape.of(model)
    for seqs, keys in TINY_DECODES if args.tiny else DECODES:
        if report.out_of_time((model, size, seqs, keys)):
            return
        one = step_of(
            np.random.default_rng(seqs), np.ones(seqs), np.full(seqs, keys),
            vocab_size=built.vocab_size, num_blocks=built.num_blocks, block_size=config.block_size,
        )  # fmt: skip
        floor = shape.step_floor(ceilings, one.query_start, one.seq_lens, config.quantization, ranks=size)
        launched = engine_steps.launched_seconds(built, one)
        turn, host, wait, _ = engine_steps.driven_seconds(config, built, seqs, keys)
        layer = 2 * summed[seqs]
        report.row(
            model=model, ranks=size, seqs=seqs, keys=keys, floor_ms=floor * 1e3, link_ms=1e3 * shape.link_bytes(seqs, seqs, size) / NVLINK,
            ahead_ms=launched * 1e3, ratio=launched / floor, turn_ms=turn * 1e3, host_ms=host * 1e3, wait_ms=wait * 1e3,
            all_reduce_us_a_layer=layer * 1e6, all_reduce_share=shape.sums * summed[seqs] / launched,
        )  # fmt: skip


def _jobs(
    report: Report,
    args: argparse.Namespace,
    config: Config,
    built: BuiltModel,
    model: str,
    size: int,
    ceilings: Ceilings,
) -> None:
    """Offline jobs through the engine, after a warm-up."""
    make = workloads.of_peer(args.peer) if args.peer else workloads.make
    shape = Shape.of(model)
    for case, scale in CASES:
        if report.out_of_time((model, size, case)):
            return
        work = make(case, built.vocab_size, scale * args.scale * (TINY_SCALE if args.tiny else 1))
        for prompts, lengths in work.warm:
            Offline(config, built).run(prompts, lengths)
        runs = [Offline(config, built).run(prompts, lengths) for prompts, lengths in work.rounds]
        seconds, turns = sum(run.seconds for run in runs), [turn for run in runs for turn in run.steps]
        floor = sum(floor_seconds(run, shape, ceilings, args.quantization, size) for run in runs)
        report.row(
            model=model, ranks=size, case=case, requests=work.requests, wall_s=seconds, out_tok_s=work.output_tokens / seconds,
            total_tok_s=(work.prompt_tokens + work.output_tokens) / seconds, ratio=seconds / floor, steps=len(turns),
            in_graphs=sum(run.graph_hits for run in runs) / len(turns), host_ms=1e3 * statistics.mean(turn.host for turn in turns),
        )  # fmt: skip


def _vllm(report: Report, args: argparse.Namespace, model: str, size: int) -> None:
    """vLLM with as many ranks on the same jobs; ratios to this section's rows."""
    engine_steps.install_vllm(report, args)
    ours = {
        row["case"]: row
        for row in report.sections[-1]["rows"]
        if row.get("ranks") == size and row.get("model") == model and "case" in row
    }
    lines = args.child.with_name(f"vllm-{model}-{size}.jsonl")
    cases = [f"{case}:{share}" for case, share in CASES]
    spread = ["--expert-parallel"] if args.expert_parallel else []
    command = engine_steps.vllm_command(args, model, cases, "--tensor-parallel-size", size, *spread, "--out", lines)
    with open(lines.with_suffix(".log"), "w+") as log:
        ended = engine_steps.how_it_ended(command, {**os.environ, "PY": sys.executable}, log)
        log.seek(0)
        if ended != "exit code 0":
            report.failure(f"vllm {model} {size}: {ended}: {log.read()[-1500:]}")
    for row in map(json.loads, lines.read_text().splitlines() if lines.exists() else []):
        if row["case"] == "startup":
            continue
        mine = ours.get(row["case"])
        report.row(
            model=model, ranks=size, peer="vllm", peer_case=row["case"], wall_s=row["wall_s"], out_tok_s=row["out_tok_s"],
            total_tok_s=row["total_tok_s"], ours_over_theirs=mine["total_tok_s"] / row["total_tok_s"] if mine else None,
        )  # fmt: skip
