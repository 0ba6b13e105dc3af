"""Triton sampling over the vocabulary without a sort: argmax, and Gumbel-max at a temperature.

The random bits are those of `kernels.reference.gumbel`, integer for integer; the logarithms of the noise are computed
here, to within rounding of the reference. Filters, penalties and biases are done before; this file sees logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # tokens a program takes
WARPS = 4

_LN2_HIGH = tl.constexpr(0.693145751953125)  # ln 2 in two parts: the high one times an exponent is exact
_LN2_LOW = tl.constexpr(1.42860682030941723212e-6)


def sample(logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Ids int64 [S] drawn from softmax(logits / temperature); temperature 0 takes the largest logit, first of ties.

    logits [S, V] floating, rows contiguous; temperature float32 [S]; seeds int64 [S]; positions int32 [S], the index
    of the drawn token in its sequence. Waits for nothing: usable in a captured CUDA graph. ValueError if a row of
    logits is not contiguous.
    """
    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("sample needs rows of logits that are contiguous")
    blocks = triton.cdiv(vocab, BLOCK)
    values = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block_argmax_kernel[(rows, blocks)](
            logits, temperature, seeds, positions, values, tokens, vocab, blocks, logits.stride(0),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        row_argmax_kernel[(rows,)](
            values, tokens, ids, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=WARPS
        )
    return ids


@triton.jit
def mix32(word):
    """The 32-bit finaliser of MurmurHash3 on uint32, as `kernels.reference.mix32`."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def natural_log(x):
    """ln of a positive normal float32 to about 1e-7 relative, also next to 1.

    The hardware's approximate log2 has an absolute error near 1, where -ln(u) is the small number whose logarithm is
    the upper tail of the noise: it would turn the likeliest winners into infinities. Here x = 2^e m with m in
    [0.75, 1.5), and ln m = 2 artanh((m - 1) / (m + 1)) by its series; m - 1 is exact.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    square = s * s
    series = 1.0 / 9.0 + square * (1.0 / 11.0)
    series = 1.0 / 5.0 + square * (1.0 / 7.0 + square * series)
    artanh = s + s * square * (1.0 / 3.0 + square * series)
    power = exponent.to(tl.float32)
    return power * _LN2_HIGH + (power * _LN2_LOW + 2.0 * artanh)


@triton.jit
def noise_bits(seed, position, token):
    """Random uint32 of (seed int64, position int32, token int32), the integers of `kernels.reference.gumbel`."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    row = mix32(low ^ mix32(high ^ mix32(position.to(tl.uint32) + 0x9E3779B9)))
    return mix32(row ^ mix32((token + 1).to(tl.uint32)))


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise from uniform bits: -ln(-ln(u)), u the middle of one of 2^23 equal steps of (0, 1)."""
    # Through int32: 23 bits fit, and the conversion from signed integers is one instruction.
    uniform = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -natural_log(-natural_log(uniform))


@triton.jit
def block_argmax_kernel(
    logits, temperature, seeds, positions, values, tokens, vocab, blocks, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Best (value, token) of one block of one row, with noise where the row's temperature is above 0."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    if heat > 0:
        noise = gumbel(noise_bits(tl.load(seeds + row), tl.load(positions + row), token))
        score = tl.div_rn(score, tl.zeros_like(score) + heat) + noise
    best, index = tl.max(score, 0, return_indices=True)
    tl.store(values + row * blocks + block, best)
    tl.store(tokens + row * blocks + block, block * BLOCK + index)


@triton.jit
def row_argmax_kernel(values, tokens, ids, blocks, BLOCKS: tl.constexpr):
    """Token of the row's best block, the first of equals."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    best = tl.load(values + row * blocks + block, mask=block < blocks, other=float("-inf"))
    tl.store(ids + row, tl.load(tokens + row * blocks + tl.argmax(best, 0)).to(tl.int64))
