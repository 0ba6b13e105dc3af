"""What the prefill and decode kernels share: loading a tile of keys through the page table, the online softmax.

Device functions only, inlined by Triton. Logits live in base 2: exp2 is what the hardware has.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Finite on purpose: the difference of two masked logits must not be NaN. What a wholly masked tile adds to a row
# is scaled by exp2(MASKED - x) = 0 as soon as the row meets the key it sees.
MASKED = tl.constexpr(-1.0e30)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one attention kernel: query rows, keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@triton.jit
def lowest_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First key that the query at `position` attends to."""
    low = position * 0
    if WINDOW > 0:
        low = tl.maximum(low, position - WINDOW + 1)
    if CHUNK > 0:
        low = tl.maximum(low, position // CHUNK * CHUNK)
    return low


@triton.jit
def load_pages(table, keys, end, PAGE: tl.constexpr):
    """Page of every key of a tile; keys from `end` on have none and get page 0."""
    return tl.load(table + keys // PAGE, mask=keys < end, other=0)


@triton.jit
def load_rows(
    cache, pages, keys, low, end,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Rows [keys, BLOCK_SIZE] of one head, `cache` pointing at the head; BOUNDED reads 0 outside low <= key < end.

    The bound is on the load: slots that hold no token of the sequence may hold NaN, and 0 * NaN is NaN.
    """
    at = tl.arange(0, BLOCK_SIZE)[None, :]
    slot = pages.to(tl.int64) * PAGE + keys % PAGE
    rows = cache + slot[:, None] * (HEADS * SIZE) + at
    if BOUNDED:
        inside = ((keys >= low) & (keys < end))[:, None]
        if SIZE != BLOCK_SIZE:
            inside = inside & (at < SIZE)
        tile = tl.load(rows, mask=inside, other=0.0)
    elif SIZE != BLOCK_SIZE:
        tile = tl.load(rows, mask=at < SIZE, other=0.0)
    else:
        tile = tl.load(rows)
    return tile


@triton.jit
def scaled_logits(query, keys, scale, SOFTCAP: tl.constexpr):
    """query [M, D] against keys [N, D] -> base-2 logits [M, N] before any mask."""
    logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)): exp2 overflowing to inf gives 1, underflowing to 0 gives -1.
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(logits * (scale * (2.0 / SOFTCAP * LOG2E))))
        logits = tanh * (SOFTCAP * LOG2E)
    else:
        logits = logits * (scale * LOG2E)
    return logits


@triton.jit
def accumulate(logits, values, largest, total, out):
    """One step of the online softmax (Milakov and Gimelshein 2018): new (largest, total, out) of every row."""
    bound = tl.maximum(largest, tl.max(logits, 1))
    weights = tl.exp2(logits - bound[:, None])
    shrink = tl.exp2(largest - bound)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")
    return bound, total, out


@triton.jit
def start_softmax(
    sinks, query_heads, rows_inside, counts_sink,
    HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """(largest, total, out) before the first key; the sink counts as a key of value 0 where `counts_sink`."""
    largest = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        if counts_sink:
            largest = tl.load(sinks + query_heads, mask=rows_inside, other=0.0).to(tl.float32) * LOG2E
            total += 1.0
    return largest, total, tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
