"""Measures for how many rows `kernels.linear.gated_gemm_hopper` beats cuBLAS with `silu_mul`, in the chain of a layer, on a Hopper GPU.

Prints a line for each number of rows; `GATED_TABLE` of `kernels/linear/tiles.py` is made of them.

    python -m perf.tune.gated_rows --out perf/results --hidden 4096 --inner 14336

The chain is output projection, norm, gate and up, gate, down and norm over several layers' weights, in CUDA graphs whose
replays take turns: at the power limit times of one thing differ by several percent from moment to moment, so it is the
median over turns of the ratio to cuBLAS's time that counts. Checks no results: that is the tests' work.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pagegraph.compiler.step.capture_sizes import MAX_CAPTURED_TOKENS, cuda_capture_sizes
from pagegraph.kernels.gpu import multiprocessors
from pagegraph.kernels.linear.gated_gemm_hopper import gated_gemm
from pagegraph.kernels.linear.rms_norm import add_rms_norm
from pagegraph.kernels.linear.silu_mul import silu_mul
from pagegraph.kernels.linear.tiles import MAX_ROWS, last_round_of

LAYERS = 4
WARM_MS = 100  # before the first turn
TURN_MS = 6
Gate = Callable[[Tensor, Tensor], Tensor]


def weights(hidden: int, inner: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Output projection, merged gate and up, down of each layer."""
    shapes = ((hidden, hidden), (2 * inner, hidden), (hidden, inner))
    return [
        tuple(torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[1] ** -0.5 for shape in shapes)
        for _ in range(LAYERS)
    ]


def graph_of(gate: Gate, layers: list[tuple[Tensor, Tensor, Tensor]], rows: int) -> torch.cuda.CUDAGraph:
    hidden = len(layers[0][0])
    heads, residual = (torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)

    def chain() -> None:
        total = residual
        for out, gate_up, down in layers:
            total, normed = add_rms_norm(functional.linear(heads, out), total, norm, 1e-6)
            total, _ = add_rms_norm(functional.linear(gate(normed, gate_up), down), total, norm, 1e-6)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return graph


def timed(graph: torch.cuda.CUDAGraph, times: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events around so many replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    return start, end


def measure(layers: list[tuple[Tensor, Tensor, Tensor]], rows: int, turns: int, programs: int) -> dict:
    gates: dict[str, Gate] = {
        "cublas": lambda x, weight: silu_mul(functional.linear(x, weight)),
        "whole": lambda x, weight: gated_gemm(x, weight, programs),
        "narrow": lambda x, weight: gated_gemm(x, weight, programs, True),
    }
    graphs = {name: graph_of(gate, layers, rows) for name, gate in gates.items()}
    start, end = timed(graphs["cublas"], 1)
    end.synchronize()
    once = start.elapsed_time(end)
    timed(graphs["cublas"], round(WARM_MS / once))
    replays, names = max(1, round(TURN_MS / once)), list(graphs)
    events = {name: [] for name in names}
    for turn in range(turns):
        for name in names[turn % 3 :] + names[: turn % 3]:
            graphs[name].replay()  # what was in the cache is gone
            events[name].append(timed(graphs[name], replays))
    torch.cuda.synchronize()
    us = {name: [s.elapsed_time(e) * 1e3 / replays / LAYERS for s, e in pairs] for name, pairs in events.items()}
    ratios = {
        name: statistics.median(base / own for base, own in zip(us["cublas"], us[name], strict=True))
        for name in ("whole", "narrow")
    }
    gate_up = layers[0][1]
    return {
        "rows": rows,
        "layer_us": {name: round(statistics.median(values), 2) for name, values in us.items()},
        "ratio": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "chosen": last_round_of(rows, *gate_up.shape, programs=programs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--rows", type=int, nargs="*", help="default: what steps are padded to")
    parser.add_argument("--turns", type=int, default=12)
    options = parser.parse_args()
    programs = multiprocessors(torch.device("cuda", 0)) if torch.cuda.is_available() else 0
    if not programs:
        parser.error("the kernel is for GPUs of compute capability 9.0: run this on an H100 or H200")
    sizes = cuda_capture_sizes(256, MAX_CAPTURED_TOKENS)
    rows = options.rows or [n for n in sorted({*sizes.decode, *sizes.mixed}) if n > MAX_ROWS]
    layers = weights(options.hidden, options.inner)
    measured = []
    for one in rows:
        measured.append(measure(layers, one, options.turns, programs))
        print(json.dumps(measured[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"gpu": torch.cuda.get_device_name(), "hidden": options.hidden, "inner": options.inner, "rows": measured}
    path = options.out / f"tune-gated-rows-{options.hidden}x{options.inner}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
