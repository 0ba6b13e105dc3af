"""Device functions that dequantise integers of 4 and 8 bits, and e2m1, to the type of a GEMM, and give them scale and zero.

By packed arithmetic in assembly where it is bfloat16 or 8 bits; and what else of such a product has to be said in assembly: that its operand
stays in registers, that sums are done, that lines are wanted soon. Knows no memory layout but that of the values in a word.

Integers become bfloat16 by packed arithmetic in assembly, because the instructions an SM can issue run out before
memory's bytes do. Scale and zero of a group are applied there too, one multiply-add for two values, rounded to
bfloat16 as a dequantised weight is; sums by group were exact but cost two multiply-adds for each row of x and group.
An iteration ends when its tensor core instructions are done: Triton lets the last one run on into the next iteration,
which writes the registers it still reads, and tiles of 128 rows gave wrong sums. That costs up to a sixth of the
speed at 256 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Eight values as `reference.repack` lays them: a value, 0 to 15, becomes the low bits of 128.0 in bfloat16, then 136 is taken off, which is exact.
NIBBLES = tl.constexpr("""{
.reg .b32 one, bias, more;
mov.b32 one, 0x3f803f80;
mov.b32 bias, 0xc308c308;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 more, $4, 4;
lop3.b32 $1, more, 0x000f000f, 0x43004300, 0xea;
shr.u32 more, $4, 8;
lop3.b32 $2, more, 0x000f000f, 0x43004300, 0xea;
shr.u32 more, $4, 12;
lop3.b32 $3, more, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, one, bias;
fma.rn.bf16x2 $1, $1, one, bias;
fma.rn.bf16x2 $2, $2, one, bias;
fma.rn.bf16x2 $3, $3, one, bias;
}""")
# Eight codes of e2m1 in the same places: sign, exponent and mantissa go where bfloat16 has them, which is the value times 2 ** -126.
CODES = tl.constexpr("""{
.reg .b32 large, none, more, sign;
mov.b32 large, 0x7e807e80;
mov.b32 none, 0x80008000;
shl.b32 more, $4, 6;
and.b32 more, more, 0x01c001c0;
shl.b32 sign, $4, 12;
lop3.b32 $0, sign, 0x80008000, more, 0xea;
shl.b32 more, $4, 2;
and.b32 more, more, 0x01c001c0;
shl.b32 sign, $4, 8;
lop3.b32 $1, sign, 0x80008000, more, 0xea;
shr.u32 more, $4, 2;
and.b32 more, more, 0x01c001c0;
shl.b32 sign, $4, 4;
lop3.b32 $2, sign, 0x80008000, more, 0xea;
shr.u32 more, $4, 6;
and.b32 more, more, 0x01c001c0;
lop3.b32 $3, $4, 0x80008000, more, 0xea;
fma.rn.bf16x2 $0, $0, large, none;
fma.rn.bf16x2 $1, $1, large, none;
fma.rn.bf16x2 $2, $2, large, none;
fma.rn.bf16x2 $3, $3, large, none;
}""")
# Four int8 values: their low seven bits the same way, then 128 is taken off, 256 where the value is negative.
BYTES = tl.constexpr("""{
.reg .b32 bias, more, minus;
mov.b32 minus, 0xbf80bf80;
lop3.b32 $0, $2, 0x007f007f, 0x43004300, 0xea;
lop3.b32 bias, $2, 0x00800080, 0x43004300, 0xea;
fma.rn.bf16x2 $0, bias, minus, $0;
shr.u32 more, $2, 8;
lop3.b32 $1, more, 0x007f007f, 0x43004300, 0xea;
lop3.b32 bias, more, 0x00800080, 0x43004300, 0xea;
fma.rn.bf16x2 $1, bias, minus, $1;
}""")
# Eight int8 values of two words: each row's four in a word.
BYTES_BY_ROW = tl.constexpr("""prmt.b32 $0, $2, $3, 0x6420;
prmt.b32 $1, $2, $3, 0x7531;""")
# Eight values of 4 bits as `reference.repack` lays them: each row's four in a word, in the order of `bytes_by_row`.
NIBBLES_BY_ROW = tl.constexpr("""{
.reg .b32 low, high;
and.b32 low, $2, 0x0f0f0f0f;
shr.u32 high, $2, 4;
and.b32 high, high, 0x0f0f0f0f;
prmt.b32 $0, low, high, 0x6420;
prmt.b32 $1, low, high, 0x7531;
}""")
ASSEMBLES = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def settled(total):
    """float32 sums of products whose left operand is in registers, once the tensor cores are done with those.

    Triton lets the last product of a turn run on into the next, which writes the same registers. No instruction: a use of the sums.
    """
    if ASSEMBLES:
        return tl.inline_asm_elementwise("", "=f,0", [total], tl.float32, is_pure=False, pack=1)
    else:
        return total


@triton.jit
def scaled(wide, scale, zero, HAS_ZERO: tl.constexpr):
    """Values in the type of x, scale and zero of their group in shapes that broadcast to theirs -> the weight in the same type."""
    if ASSEMBLES and wide.dtype == tl.bfloat16 and scale.dtype == tl.bfloat16:
        scale = tl.broadcast_to(scale, wide.shape)
        if HAS_ZERO:
            zero = tl.broadcast_to(zero, wide.shape)
            asm: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"
            return tl.inline_asm_elementwise(asm, "=r,r,r,r", [wide, scale, zero], tl.bfloat16, is_pure=True, pack=2)
        else:
            # A product as a sum with -0, which changes none: GPUs before 9.0 have no other.
            asm: tl.constexpr = "{.reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none;}"
            return tl.inline_asm_elementwise(asm, "=r,r,r", [wide, scale], tl.bfloat16, is_pure=True, pack=2)
    else:
        weight = wide.to(tl.float32) * scale.to(tl.float32)
        if HAS_ZERO:
            weight += zero.to(tl.float32)
        return weight.to(wide.dtype)


@triton.jit
def nibbles(qweight, DTYPE: tl.constexpr):
    """uint8 [threads, bytes] as `reference.repack` lays them -> the values of a thread's upper and lower row, -8 to 7, [threads, bytes] in DTYPE.

    Not pure as far as Triton knows, so it stays where four bytes lie in a register.
    """
    if ASSEMBLES and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            NIBBLES, "=&r,=&r,=&r,=&r,r", [qweight], (tl.bfloat16, tl.bfloat16), is_pure=False, pack=4
        )
    else:
        upper, lower = _by_row(qweight & 15, qweight >> 4)
        return (upper.to(tl.int8) - 8).to(DTYPE), (lower.to(tl.int8) - 8).to(DTYPE)


@triton.jit
def e2m1_codes(qweight, DTYPE: tl.constexpr):
    """As `nibbles`, of codes of e2m1."""
    if ASSEMBLES and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            CODES, "=&r,=&r,=&r,=&r,r", [qweight], (tl.bfloat16, tl.bfloat16), is_pure=False, pack=4
        )
    else:
        upper, lower = _by_row(qweight & 15, qweight >> 4)
        return _e2m1(upper).to(DTYPE), _e2m1(lower).to(DTYPE)


@triton.jit
def _e2m1(code):
    """float32 of codes 0 to 15: sign, two bits of exponent with bias 1, one of mantissa."""
    bits = (code & 7).to(tl.int32) << 22 | (code & 8).to(tl.int32) << 28
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126


@triton.jit
def e8m0(scale):
    """uint8 scales of MXFP4 -> 2 ** (scale - 127), in bfloat16, which holds it exactly."""
    if ASSEMBLES:
        bits = tl.where(scale == 0, 0x40, scale.to(tl.int16) << 7)  # 2 ** -127 is less than the least normal number
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return tl.exp2(scale.to(tl.float32) - 127)


@triton.jit
def _by_row(first, second):
    """Halves of bytes [threads, bytes] as `reference.repack` lays them -> those of a thread's upper and of its lower row."""
    # Of a word, byte 2 * p + h holds column p of both halves of 8 columns, in row h.
    halves = tl.join(first, second).reshape(first.shape[0], first.shape[1] // 4, 2, 2, 2).permute(0, 1, 4, 2, 3)
    upper, lower = tl.split(halves)
    return upper.reshape(first.shape), lower.reshape(first.shape)


@triton.jit
def wide_bytes(qweight, DTYPE: tl.constexpr):
    """int8 [threads, bytes] as `reference.repack` lays them -> the values [threads, bytes] in DTYPE, of each word first those of the upper row."""
    if ASSEMBLES and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(BYTES, "=&r,=&r,r", [qweight], tl.bfloat16, is_pure=False, pack=4)
    else:
        words: tl.constexpr = qweight.shape[1] // 4
        return qweight.reshape(qweight.shape[0], words, 2, 2).permute(0, 1, 3, 2).reshape(qweight.shape).to(DTYPE)


@triton.jit
def bytes_by_row(qweight):
    """int8 [threads, bytes] as `reference.repack` lays them -> the same values, of each eight first those of the upper row.

    In the order of `reference.int8_rows`: of each 16 columns the neighbours of the first 8 and then those of the last 8.
    """
    if ASSEMBLES:
        return tl.inline_asm_elementwise(BYTES_BY_ROW, "=&r,=&r,r,r", [qweight], tl.int8, is_pure=False, pack=8)
    else:
        threads: tl.constexpr = qweight.shape[0]
        return qweight.reshape(threads, qweight.shape[1] // 8, 4, 2).permute(0, 1, 3, 2).reshape(qweight.shape)


@triton.jit
def nibbles_by_row(qweight):
    """uint8 [threads, bytes] as `reference.repack` lays them -> a thread's upper and lower row, the values plus 8 times 2**-9, e4m3 [threads, bytes].

    That is what an e4m3 stands for whose upper four bits are 0. In the order of `bytes_by_row`.
    """
    if ASSEMBLES:
        upper, lower = tl.inline_asm_elementwise(
            NIBBLES_BY_ROW, "=&r,=&r,r", [qweight], (tl.uint8, tl.uint8), is_pure=False, pack=4
        )
    else:
        upper, lower = _by_row(qweight & 15, qweight >> 4)
    return upper.to(tl.float8e4nv, bitcast=True), lower.to(tl.float8e4nv, bitcast=True)


@triton.jit
def halves(wide, DTYPE: tl.constexpr):
    """float32 that DTYPE holds exactly, in it: of bfloat16 the upper halves, which takes no converter."""
    if ASSEMBLES and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [wide], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return wide.to(DTYPE)


@triton.jit
def in_registers(weight):
    """A left operand of 16 bits as it lies in registers. No instruction: Triton does not look behind it for a layout of its own."""
    if ASSEMBLES:
        return tl.inline_asm_elementwise("", "=r,0", [weight], weight.dtype, is_pure=False, pack=2)
    else:
        return weight


@triton.jit
def fetched(at):
    """Have the lines at these addresses brought to the L2; waits for nothing."""
    if ASSEMBLES:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
