"""What a step is expected to take: the kernels that its calls launch, each with what it takes to begin and to move and multiply.

The shares and seconds below are the only numbers; they were fitted to replayed steps on one H200, of the stored
results that are named beside them, and hold for kernels, not for models. On another GPU its own rates are put in, so that
what comes of it is an estimate. Knows calls as they were traced and machines.
"""

from __future__ import annotations

from collections.abc import Iterable

from pagegraph.compiler.explain.machines import Machine
from pagegraph.compiler.explain.trace import Call
from pagegraph.kernels.gpu import HOPPER
from pagegraph.kernels.linear.tiles import MAX_SINGLE_ROWS, gemv_tile_of
from pagegraph.kernels.moe.tiles import HOPPER_BLOCK_M, MAX_GEMV_TOKENS, e4m3_tiles_of

FITTED = "NVIDIA H200"
# Of a device copy's rate, what kernels read weights and keys with (h200-2026-11-29-attention-kernels.json: 4.11 to 4.2 TB/s).
READ_SHARE = 0.98
# Of the rate of one large product, what products keep up under the power limit for as long as steps follow each other
# (h200-2026-11-29-gemm.json), and attention over prompts (h200-2026-11-29-attention-kernels.json: 600 TFLOP/s).
PRODUCT_SHARE, ATTENTION_SHARE = 0.9, 0.76
# Of the same, what products of a few rows reach without tensor cores, behind the first row, which hides behind its weights
# (h200-2026-11-24-few-rows.txt: 1 and 2 rows).
VECTOR_SHARE = 0.0215
# Seconds from the end of one kernel to where the next is under way, by what it does first (kernels of
# h200-2026-11-29-steps-and-jobs.json, less their bytes and operations): one by rows, a product by tiles, and one that looks up
# what it is to read, as attention and grouped products do. GEMVs ask for their weights while the kernel before still runs.
ROWS_S, PRODUCT_S, LOOKUP_S = 1.6e-6, 4.2e-6, 8.5e-6
AROUND = 8  # small kernels of a step around its forward: of its metadata, of sampling


def step_seconds(calls: Iterable[Call], logits_bytes: int, machine: Machine) -> float:
    """Of a step with these calls, whose sampling reads so many bytes of logits."""
    around = AROUND * ROWS_S + logits_bytes / _bandwidth(machine)
    return around + sum(call_seconds(call, machine) for call in calls)


def call_seconds(call: Call, machine: Machine) -> float:
    """Of the kernels of one call."""
    moved, cost = call.moved / _bandwidth(machine), call.cost
    if cost is None:
        return ROWS_S + moved
    read = (cost.weight_bytes + cost.cache_bytes) / _bandwidth(machine)
    multiplied = cost.flops / (PRODUCT_SHARE * (machine.narrow_flops if _is_narrow(call, machine) else machine.flops))
    if cost.kind == "attention":  # and what rotates and stores keys ahead of it
        return ROWS_S + LOOKUP_S + moved + read + cost.flops / (ATTENTION_SHARE * machine.flops)
    if cost.kind == "states":
        return LOOKUP_S + moved + max(read, multiplied)
    if "experts" in call.op:
        return moved + _experts(call, read, multiplied, machine)
    if call.rows <= MAX_SINGLE_ROWS and all(gemv_tile_of(call.rows, *size) for size in call.matrices if len(size) == 2):
        return moved + read + cost.flops * (1 - 1 / call.rows) / (VECTOR_SHARE * machine.flops)
    norm = ROWS_S if "norm" in call.op else 0.0
    return PRODUCT_S * len(call.matrices) + norm + moved + max(read, multiplied)


def _is_narrow(call: Call, machine: Machine) -> bool:
    """Whether a product that may be is one of 8-bit numbers there: of experts Hopper's kernel alone rounds rows."""
    if "experts" in call.op and (machine.capability != HOPPER or e4m3_tiles_of(call.pairs) is None):
        return False
    return call.narrow


def _experts(call: Call, read: float, multiplied: float, machine: Machine) -> float:
    """Of few rows GEMVs, else tiles of rows that chose one expert, the last of which is half empty in the mean."""
    if call.rows <= MAX_GEMV_TOKENS:
        return 2 * ROWS_S + read
    filled = 1 + call.matrices[0][0] * HOPPER_BLOCK_M / 2 / call.pairs
    # rows in the order of experts and what they become, each written and read once in two bytes; what stands between the products
    # is less, and in a cache
    between = 2 * 2 * 2 * call.pairs * call.columns / _bandwidth(machine)
    return 2 * LOOKUP_S + 3 * ROWS_S + between + max(read, filled * multiplied)


def _bandwidth(machine: Machine) -> float:
    return READ_SHARE * machine.bandwidth
