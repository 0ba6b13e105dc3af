"""The device's ceilings, and how near single kernels come to them: matmuls, attention, sampling, an empty kernel.

Every figure is the median of replays of a CUDA graph whose inputs rotate through more memory than the L2 holds.
Knows the shapes of the reference models and the ops; knows no engine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton

from pagegraph.kernels import ops  # noqa: F401  registers torch.ops.pagegraph
from perf.floors import BYTES, Ceilings, Shape
from perf.gpu.offline import ceilings_of
from perf.gpu.report import Report, graph_seconds

ROTATED = 192 << 20  # bytes that inputs rotate through
NODES = 16  # calls in a graph at least
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DECODES = [(seqs, keys) for seqs in (1, 8, 32, 128, 256) for keys in (256, 1024, 4096)]
PREFILLS = ((1, 4096), (4, 1024))
BLOCK_SIZE = 16
MAX_BLOCKS = 8192 // BLOCK_SIZE  # width of the tables, as an engine of 8192 tokens stages them


@triton.jit
def _empty_kernel(pointer):
    pass


def micro(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Ceilings, then each kernel in microseconds and as a ratio to its floor."""
    ceilings = ceilings_of(report, args, shared)
    _bandwidth(report)
    one = torch.zeros(1, device="cuda")
    report.fact(empty_kernel_us=1e6 * graph_seconds([lambda: _empty_kernel[(1,)](one)] * 1000))
    report.fact(add_of_one_us=1e6 * graph_seconds([lambda: one.add_(1)] * 1000))
    models = [model for model in args.models if model != "tiny"] or ["8b"]
    for part in (_decode_attention, _prefill_attention, _sampling, _matmuls):
        for model in models:
            if report.out_of_time((part.__name__, model)):
                return
            part(report, model, Shape.of(model), ceilings)


def _bandwidth(report: Report) -> None:
    for mib in (256, 4096):
        source = torch.randn(mib << 18, device="cuda")
        target = torch.empty_like(source)
        size = source.nbytes
        report.row(
            MiB=mib,
            copy_TB_s=2 * size / graph_seconds([lambda: target.copy_(source)] * 4) / 1e12,
            read_TB_s=size / graph_seconds([lambda: torch.sum(source)] * 4) / 1e12,
            write_TB_s=size / graph_seconds([lambda: target.zero_()] * 4) / 1e12,
        )


def _rotated(make: Callable[[], Callable[[], object]], size: int) -> list[Callable[[], object]]:
    """Calls over copies of inputs of `size` bytes, enough of them to miss the L2; NODES calls at least."""
    copies = [make() for _ in range(max(1, min(256, ROTATED // size)))]
    return copies * math.ceil(NODES / len(copies))


def _matmuls(report: Report, model: str, shape: Shape, ceilings: Ceilings) -> None:
    """cuBLAS over the model's matrices: one line a matrix, microseconds/ratio for each number of rows."""
    print(f"{model}: us/ratio to floor by rows {', '.join(map(str, ROWS))}")
    for name, (outputs, inputs) in shape.matmuls().items():
        size = outputs * inputs * BYTES
        weights = [
            torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
            for _ in range(max(1, min(32, ROTATED // size)))
        ]
        line = []
        for rows in ROWS:
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            calls = [lambda weight=weight: F.linear(x, weight) for weight in weights]
            seconds = graph_seconds(calls * math.ceil(NODES / len(calls) / max(1, size >> 28)), 0.02)
            moved = size + rows * (inputs + outputs) * BYTES
            floor = max(moved / ceilings.bandwidth, 2 * rows * outputs * inputs / ceilings.flops)
            report.row(
                show=False,
                kernel="matmul",
                model=model,
                matrix=name,
                rows=rows,
                us=seconds * 1e6,
                ratio=seconds / floor,
            )
            line.append(f"{seconds * 1e6:.1f}/{seconds / floor:.2f}")
        print(f"{name:>8}  {'  '.join(line)}", flush=True)


def _attention_call(shape: Shape, seqs: int, rows: int, keys: int) -> Callable[[], object]:
    """One layer's op on `seqs` sequences of `keys` keys, the last `rows` of them computed now; inputs of its own."""
    blocks_each = -(-keys // BLOCK_SIZE)
    blocks = seqs * blocks_each + 1

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    caches = [random(blocks, BLOCK_SIZE, shape.kv_heads, shape.head_size) for _ in range(2)]
    tables = torch.zeros(seqs, MAX_BLOCKS, dtype=torch.int32, device="cuda")
    tables[:, :blocks_each] = (torch.randperm(blocks - 1, device="cuda") + 1).view(seqs, blocks_each)
    position = torch.arange(keys - rows, keys, device="cuda").expand(seqs, rows)
    slot_mapping = tables.gather(1, position // BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE
    arguments = (
        random(seqs * rows, shape.heads, shape.head_size),
        random(seqs * rows, shape.kv_heads, shape.head_size),
        random(seqs * rows, shape.kv_heads, shape.head_size),
        *caches,
        position.flatten().int(),
        slot_mapping.flatten().int(),
        tables,
        torch.arange(seqs + 1, device="cuda", dtype=torch.int32) * rows,
        torch.full((seqs,), keys, device="cuda", dtype=torch.int32),
        None,
        shape.head_size**-0.5,
        0,
        0.0,
        0,
    )
    return lambda: torch.ops.pagegraph.paged_attention(*arguments)


def _decode_attention(report: Report, model: str, shape: Shape, ceilings: Ceilings) -> None:
    """The op, its KV write included, against reading the keys and values once."""
    for seqs, keys in DECODES:
        size = seqs * keys * shape.kv_bytes // shape.layers
        seconds = graph_seconds(_rotated(lambda: _attention_call(shape, seqs, 1, keys), size))
        floor = size / ceilings.bandwidth
        report.row(
            kernel="decode", model=model, seqs=seqs, keys=keys, us=seconds * 1e6, floor_us=floor * 1e6, ratio=seconds / floor,
            TB_s=size / seconds / 1e12,
        )  # fmt: skip


def _prefill_attention(report: Report, model: str, shape: Shape, ceilings: Ceilings) -> None:
    """The op on whole prompts; operations of the causal half alone are counted."""
    for seqs, keys in PREFILLS:
        flop = 4 * shape.heads * shape.head_size * seqs * keys * (keys + 1) // 2
        seconds = graph_seconds([_attention_call(shape, seqs, keys, keys)] * 4)
        report.row(
            kernel="prefill", model=model, seqs=seqs, keys=keys, us=seconds * 1e6, TFLOP_s=flop / seconds / 1e12,
            ratio=seconds * ceilings.flops / flop,
        )  # fmt: skip


def _sampling(report: Report, model: str, shape: Shape, ceilings: Ceilings) -> None:
    """Gumbel-max and plain argmax over float32 logits, against reading them once."""
    for rows in (1, 32, 256):
        size = rows * shape.vocab * 4

        def draw(temperature: float) -> Callable[[], object]:
            logits = torch.randn(rows, shape.vocab, device="cuda")
            heat = torch.full((rows,), temperature, device="cuda")
            seeds = torch.arange(rows, device="cuda")
            whole = seeds.int()
            return lambda: torch.ops.pagegraph.sample(logits, heat, seeds, whole, whole, whole, whole.clone())

        def largest() -> Callable[[], object]:
            logits = torch.randn(rows, shape.vocab, device="cuda")
            return lambda: logits.argmax(dim=-1)

        floor = size / ceilings.bandwidth
        made = {"gumbel": lambda: draw(1.0), "greedy": lambda: draw(0.0), "argmax": largest}
        for name, make in made.items():
            seconds = graph_seconds(_rotated(make, size))
            report.row(
                kernel=name, model=model, rows=rows, us=seconds * 1e6, floor_us=floor * 1e6, ratio=seconds / floor
            )
