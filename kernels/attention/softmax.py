"""Device functions that the attention kernels share: finding a row's sequence, capping, one softmax update.

Logits are held in base 2: the caller folds log2(e) into the scale, so that every exponential is one exp2.
Knows no memory layout.

An fp8 cache is attended to in float16, which holds e4m3 exactly and comes of one instruction for two elements; by
bfloat16 it was twice as many instructions a key as a 16-bit cache. Queries are brought to its range by a power of two
a row. Decoding reads a block as pairs of bytes, so that the tensor core's operands come straight from the pipeline's
buffers and are converted in registers. Converted before, keys and values were written to shared memory and read
again.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)


def dot_precision(padded_size: int) -> str:
    """How float32 products are made (half precision has one way only), for the larger padded head size.

    Three TF32 products on the tensor cores are float32 to about 2^-21; above 128 their operands no longer fit in
    registers and scalar units multiply.
    """
    return "tf32x3" if padded_size <= 128 else "ieee"


@triton.jit
def last_not_above(starts_ptr, value, num_seqs, first_try, TILE: tl.constexpr):
    """Largest s in [0, num_seqs) with starts[s] // TILE + (s if TILE > 1) <= value; `first_try` is tried first.

    With TILE 1 it finds the sequence of a token row, else the sequence of a tile of TILE rows, where every
    sequence begins a tile of its own: s begins at or after tile starts[s] // TILE + s, which rises with s.
    """
    low = 0
    high = num_seqs
    first_try = tl.minimum(first_try, num_seqs - 1)
    if TILE == 1:
        # In a step of decodes row t belongs to sequence t: no search.
        if (tl.load(starts_ptr + first_try) <= value) & (tl.load(starts_ptr + first_try + 1) > value):
            low = first_try
            high = first_try + 1
    while low + 1 < high:
        middle = (low + high) // 2
        begin = tl.load(starts_ptr + middle)
        if TILE > 1:
            begin = begin // TILE + middle
        if begin <= value:
            low = middle
        else:
            high = middle
    return low


# Two neighbours of a column of pairs of e4m3 -> the first elements and the second ones, as two float16 each, which hold
# them exactly: the bytes change places, then one instruction converts two.
E4M3_PAIRS = tl.constexpr("""{
.reg .b32 sorted;
.reg .b16 first, second;
prmt.b32 sorted, $2, 0, 0x3120;
mov.b32 {first, second}, sorted;
cvt.rn.f16x2.e4m3x2 $0, first;
cvt.rn.f16x2.e4m3x2 $1, second;
}""")


@triton.jit
def of_pairs(pairs, ASSEMBLES: tl.constexpr):
    """int16 of two e4m3 each -> (float16 of the lower bytes, float16 of the upper ones)."""
    if ASSEMBLES:
        both: tl.constexpr = (tl.float16, tl.float16)
        return tl.inline_asm_elementwise(E4M3_PAIRS, "=r,=r,r", [pairs], both, is_pure=True, pack=2)
    else:
        lower = (pairs & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        upper = ((pairs >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return lower.to(tl.float32).to(tl.float16), upper.to(tl.float32).to(tl.float16)


@triton.jit
def levelled(query):
    """query [M, D] -> (float16, float32 [M] that its products are to be multiplied by): by a power of two, which is exact, each row
    is brought to where its largest element is 1 to 2, so that float16 holds it whatever the model's range."""
    wide = query.to(tl.float32)
    power = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000
    level = tl.maximum(power.to(tl.float32, bitcast=True), 1e-30)
    return (wide / level[:, None]).to(tl.float16), level


@triton.jit
def converted(elements, DTYPE: tl.constexpr):
    """What blocks hold, in DTYPE. 8-bit floats go by float32: straight to bfloat16 they would take a converter of a quarter of the rate."""
    if elements.dtype == DTYPE:
        return elements
    else:
        return elements.to(tl.float32).to(DTYPE)


@triton.jit
def first_key(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Smallest key position that a query at `position` sees."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK > 0:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def to_base2(products, scale, SOFTCAP: tl.constexpr):
    """Scaled and capped logits times log2(e). `scale` carries log2(e) unless there is a cap."""
    logits = products * scale
    if SOFTCAP > 0:
        # tanh(y) = 1 - 2 / (e^2y + 1): saturates at both ends without overflow.
        power = tl.exp2(logits * (2.0 * _LOG2E / SOFTCAP))
        logits = (1.0 - 2.0 / (power + 1.0)) * (SOFTCAP * _LOG2E)
    return logits


@triton.jit
def weigh(logits, scale, m_i, l_i, MAY_BE_EMPTY: tl.constexpr):
    """One tile of logits [M, N] (-inf where masked) that `scale` > 0 is still to be multiplied into: its weights.

    Returns (weights [M, N], new m_i [M], new l_i [M], alpha, what earlier sums are multiplied by [M]). Scale and m_i go into
    the exponent by one fused multiply-add. MAY_BE_EMPTY: a row may have seen no key yet.
    """
    m_new = tl.maximum(m_i, tl.max(logits, 1) * scale)
    anchor = m_new
    if MAY_BE_EMPTY:
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - anchor)
    weights = tl.exp2(logits * scale - anchor[:, None])
    return weights, m_new, l_i * alpha + tl.sum(weights, 1), alpha


@triton.jit
def update(logits, m_i, l_i, SUM_LATE: tl.constexpr):
    """One tile of logits float32 [M, N] (-inf where masked): its weights, and what is held so far.

    Returns (weights [M, N], new m_i [M], new l_i, alpha, what earlier sums are multiplied by [M]). l_i: [M], or [M, N] with
    SUM_LATE, which leaves the sum over N, and the warps' meeting for it, until after the last tile.
    """
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    # A row whose keys are all masked so far has no maximum; 0 keeps inf - inf out.
    anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - anchor)
    weights = tl.exp2(logits - anchor[:, None])
    if SUM_LATE:
        l_i = l_i * alpha[:, None] + weights
    else:
        l_i = l_i * alpha + tl.sum(weights, 1)
    return weights, m_new, l_i, alpha
