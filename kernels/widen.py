"""Device functions that widen codes of 4 and 8 bits to the type of a product, and give them scale and shift.

By packed arithmetic in assembly where it is bfloat16. Knows no memory layout but that of eight codes in a word.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Eight codes as `reference.fragments` lays them: a code, 0 to 15, becomes the low bits of 128.0 in bfloat16, then 136 is taken off, which is exact.
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
# Two int8 codes: their low seven bits the same way, then 128 is taken off, 256 where the code is negative.
BYTES = tl.constexpr("""{
.reg .b32 low, bias, minus;
mov.b32 minus, 0xbf80bf80;
cvt.u32.u16 low, $1;
prmt.b32 low, low, 0, 0x4140;
lop3.b32 bias, low, 0x00800080, 0x43004300, 0xea;
lop3.b32 low, low, 0x007f007f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, bias, minus, low;
}""")
ASSEMBLES = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def settled(total):
    """float32 sums of products whose left operand is in registers, once the matrix unit is done with those.

    Triton lets the last product of a turn run on into the next, which writes the same registers. No instruction: a use of the sums.
    """
    if ASSEMBLES:
        return tl.inline_asm_elementwise("", "=f,0", [total], tl.float32, is_pure=False, pack=1)
    else:
        return total


@triton.jit
def scaled(wide, scale, shift, HAS_SHIFT: tl.constexpr):
    """Codes [BLOCK_N, columns] in the type of x, scale and shift [BLOCK_N] of their group -> the weight in the same type."""
    if ASSEMBLES and wide.dtype == tl.bfloat16 and scale.dtype == tl.bfloat16:
        scale = tl.broadcast_to(scale[:, None], wide.shape)
        if HAS_SHIFT:
            shift = tl.broadcast_to(shift[:, None], wide.shape)
            asm: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"
            return tl.inline_asm_elementwise(asm, "=r,r,r,r", [wide, scale, shift], tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [wide, scale], tl.bfloat16, is_pure=True, pack=2)
    else:
        weight = wide.to(tl.float32) * scale.to(tl.float32)[:, None]
        if HAS_SHIFT:
            weight += shift.to(tl.float32)[:, None]
        return weight.to(wide.dtype)


@triton.jit
def nibbles(codes, DTYPE: tl.constexpr):
    """uint8 [threads, bytes] as `reference.fragments` lays them -> the codes of each thread's two rows, -8 to 7, [threads, bytes] in DTYPE.

    Not pure as far as Triton knows, so it stays where four bytes lie in a register.
    """
    if ASSEMBLES and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(NIBBLES, "=&r,=&r,=&r,=&r,r", [codes], (tl.bfloat16, tl.bfloat16), is_pure=False, pack=4)
    else:
        # Of a word, byte 2 * p + h holds column p of both halves of 8 columns, in row h.
        words: tl.constexpr = codes.shape[1] // 4
        first, second = (codes & 15).to(tl.int8) - 8, (codes >> 4).to(tl.int8) - 8
        halves = tl.join(first, second).reshape(codes.shape[0], words, 2, 2, 2).permute(0, 1, 4, 2, 3)
        low, high = tl.split(halves)
        return low.reshape(codes.shape).to(DTYPE), high.reshape(codes.shape).to(DTYPE)


@triton.jit
def wide_codes(codes, scale, shift, DTYPE: tl.constexpr, WHOLE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """int8 or e4m3 codes [BLOCK_N, columns] in DTYPE; with WHOLE the weight."""
    if ASSEMBLES and DTYPE == tl.bfloat16 and codes.dtype == tl.int8:
        wide = tl.inline_asm_elementwise(BYTES, "=r,h", [codes], tl.bfloat16, is_pure=True, pack=2)
    else:  # e4m3 to float32 and on: straight to bfloat16 it takes the slower converter
        wide = codes.to(tl.float32).to(DTYPE)
    if WHOLE:
        wide = scaled(wide, scale, shift, HAS_SHIFT)
    return wide
