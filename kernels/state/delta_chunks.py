"""Triton: the gated delta rule over prompts, in chunks of products of matrices. See `kernels.ops`.

With c the running sum of a chunk's log decays, S the state before it and rows of K, V and Q its keys, values and scaled queries,
what token t adds, u_t, depends on what those before it in the chunk have added. All together they are one triangular system
(Yang et al., 2024, "Gated Delta Networks", arXiv 2412.06464, section 3.3):

    (I + B) u = beta * (V - (exp(c) * K) S),  B_ts = beta_t exp(c_t - c_s) (k_t . k_s) for s < t
    y = (exp(c) * Q) S + P u,                 P_ts = exp(c_t - c_s) (q_t . k_s) for s <= t
    S' = exp(c_last) * S + (exp(c_last - c) * K)^T u

`delta_chunks_kernel` makes of every chunk at once what does not depend on S: T = (I + B)^-1, `changes` T (beta * V), `reads` T
(beta * exp(c) * K), so that u = changes - reads S, and P. `delta_states_kernel` goes along each sequence with its part of S in
registers and writes the results. No exponent is above zero, so nothing overflows whatever the decays: with one for each channel,
exp(c_t - c_s) is not a product of two such factors, and `delta_pairs_kernel` computes B and P before, block by block of SUB rows:
between blocks by way of the decay at the later one's first row, within one pair by pair.

I + B is inverted within blocks of SUB rows by substitution, row by row in float32, and from them by products: with D the blocks'
inverses and L what is below them, the inverse is (I + M)^-1 D for M = D L, and M to the power of CHUNK / SUB is zero. A series of
powers of B itself would lose everything where keys repeat.

Products are of the activations' dtype and added up in float32: with bfloat16, S, decays, norms and T are float32 and S and T are
rounded as operands, with float32 see `precision_of`. tests/kernels/state/test_triton.py has bounds of the error of both. With
float32 the kernels need more registers than there are: right, and slow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagegraph.kernels.pdl import dependent, wait
from pagegraph.kernels.state.chunks import FEW, chunk_at, decayed, places, precision_of, running
from pagegraph.kernels.state.gates import log_decay, share

SUB = 16
CHUNK = 4 * SUB  # rows; 2 * SUB would do as well
PAIRS_WARPS = 4
CHUNKS_WARPS = 4
VECTOR_CHUNKS_WARPS = 8  # with a decay for each channel
STATES_WARPS = 4
STATES_STAGES = 2
COLUMNS, VECTOR_COLUMNS = 64, 32  # of S in a program of `delta_states_kernel`; the second with a decay for each channel


@triton.jit
def _scales(x, NORMALIZE: tl.constexpr):
    """Of each row of x, what makes it a unit vector."""
    if NORMALIZE:
        return tl.rsqrt(tl.sum(x * x, 1) + 1e-6)
    else:
        return tl.full([x.shape[0]], 1.0, tl.float32)


@triton.jit(do_not_specialize=["num_seqs"])
def delta_pairs_kernel(
    met_ptr, seen_ptr, query_ptr, key_ptr, decay_ptr, beta_ptr, query_start_ptr, num_seqs,
    query_stride, key_stride, query_heads, key_heads, beta_stride, scale,
    H: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, SUB: tl.constexpr, FEW: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """B and P of SUB rows of a chunk, with a decay for each channel."""
    if PDL:
        wait()
    head = tl.program_id(1)
    key_head = head // SHARE
    block = tl.program_id(0) % (CHUNK // SUB)
    begin, end, chunk = chunk_at(tl.program_id(0) // (CHUNK // SUB), query_start_ptr, num_seqs, CHUNK)
    first = chunk + block * SUB
    if (first < end) & (end - begin > FEW):
        OPERAND: tl.constexpr = seen_ptr.dtype.element_ty
        feature = tl.arange(0, BLOCK_D)
        # Rows of other blocks, all before these.
        other = tl.arange(0, CHUNK)
        mask = (other < block * SUB)[:, None] & (feature < D)[None, :]
        of_chunk = chunk.to(tl.int64)
        places = key_ptr + of_chunk * key_stride + key_head * key_heads + other[:, None] * key_stride + feature[None, :]
        keys = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        places = decay_ptr + (of_chunk * H + head) * D + other[:, None] * (H * D) + feature[None, :]
        decays = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        until = tl.sum(decays, 0)[None, :] - tl.cumsum(decays, 0)
        keys *= tl.exp(until) * _scales(keys, NORMALIZE)[:, None]
        keys = tl.trans(keys.to(OPERAND))
        # These rows.
        row = tl.arange(0, SUB)
        mask = (first + row < end)[:, None] & (feature < D)[None, :]
        of_block = first.to(tl.int64)
        query_base = query_ptr + of_block * query_stride + key_head * query_heads + feature
        key_base = key_ptr + of_block * key_stride + key_head * key_heads + feature
        decay_base = decay_ptr + (of_block * H + head) * D + feature
        query = tl.load(query_base[None, :] + row[:, None] * query_stride, mask=mask, other=0.0).to(tl.float32)
        key = tl.load(key_base[None, :] + row[:, None] * key_stride, mask=mask, other=0.0).to(tl.float32)
        query *= (_scales(query, NORMALIZE) * scale)[:, None]
        key_scales = _scales(key, NORMALIZE)
        key *= key_scales[:, None]
        logs = tl.cumsum(tl.load(decay_base[None, :] + row[:, None] * (H * D), mask=mask, other=0.0).to(tl.float32), 0)
        reach = tl.exp(logs)
        seen = tl.dot((query * reach).to(OPERAND), keys, input_precision=PRECISION)
        met = tl.dot((key * reach).to(OPERAND), keys, input_precision=PRECISION)
        for at in range(0, SUB):
            there = (first + at < end) & (feature < D)
            one = tl.load(key_base + at * key_stride, mask=there, other=0.0).to(tl.float32)
            if NORMALIZE:
                one *= tl.rsqrt(tl.sum(one * one, 0) + 1e-6)
            since = tl.sum(tl.where((row == at)[:, None], logs, 0.0), 0)
            one = one[None, :] * tl.exp(tl.where((row >= at)[:, None], logs - since[None, :], 0.0))
            here = (other == block * SUB + at)[None, :]
            seen = tl.where(here & (row >= at)[:, None], tl.sum(query * one, 1)[:, None], seen)
            met = tl.where(here & (row > at)[:, None], tl.sum(key * one, 1)[:, None], met)
        live = first + row < end
        beta = tl.load(beta_ptr + (of_block + row) * beta_stride + head, mask=live, other=0.0).to(tl.float32)
        to = (of_block * H + head) * CHUNK + row[:, None] * (H * CHUNK) + other[None, :]
        tl.store(seen_ptr + to, seen.to(OPERAND), mask=live[:, None])
        tl.store(met_ptr + to, met * beta[:, None], mask=live[:, None])


@triton.jit
def _inverse(below, CHUNK: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr):
    """(I + below)^-1 of below float32 [CHUNK, CHUNK], zero but below its diagonal."""
    BLOCKS: tl.constexpr = CHUNK // SUB
    row = tl.arange(0, CHUNK)
    within = (row // SUB)[:, None] == (row // SUB)[None, :]
    line = tl.arange(0, SUB)
    block = tl.arange(0, BLOCKS)
    blocks = tl.sum(tl.reshape(tl.where(within, below, 0.0), [BLOCKS, SUB, BLOCKS, SUB]), 2)
    blocks = tl.permute(blocks, (0, 2, 1))
    found = tl.zeros([BLOCKS, SUB, SUB], tl.float32) + tl.where(line[:, None] == line[None, :], 1.0, 0.0)[None, :, :]
    for at in range(1, SUB):
        factors = tl.sum(tl.where((line == at)[None, None, :], blocks, 0.0), 2)
        change = tl.sum(factors[:, :, None] * found, 1)
        found -= tl.where((line == at)[None, :, None], change[:, None, :], 0.0)
    same = (block[:, None] == block[None, :])[:, None, :, None]
    diagonal = tl.reshape(tl.where(same, found[:, :, None, :], 0.0), [CHUNK, CHUNK])
    step = -tl.dot(diagonal, tl.where(within, 0.0, below), input_precision=PRECISION)
    eye = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    square = tl.dot(step, step, input_precision=PRECISION)
    series = tl.dot(
        eye + step, eye + square, input_precision=PRECISION
    )  # of two or four blocks: the fourth power is zero
    return tl.dot(series, diagonal, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_seqs"])
def delta_chunks_kernel(
    changes_ptr, reads_ptr, met_ptr, seen_ptr, queries_ptr, keys_ptr, kept_ptr,
    query_ptr, key_ptr, value_ptr, decay_ptr, beta_ptr, query_start_ptr, num_seqs,
    query_stride, key_stride, value_stride, query_heads, key_heads, value_heads, decay_stride, beta_stride, scale,
    A_log_ptr, dt_bias_ptr,
    H: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, VECTOR: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, FEW: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """changes and reads of a chunk and how much of S is kept; P and factors of queries and keys, or, with a decay for each
    channel, which reads B and P, queries and keys times theirs."""
    if PDL:
        wait()
    place, head = tl.program_id(0), tl.program_id(1)
    key_head = head // SHARE
    begin, end, first = chunk_at(place, query_start_ptr, num_seqs, CHUNK)
    if (first < end) & (end - begin > FEW):
        OPERAND: tl.constexpr = reads_ptr.dtype.element_ty
        row = tl.arange(0, CHUNK)
        live = first + row < end
        feature = tl.arange(0, BLOCK_D)
        mask = live[:, None] & (feature < D)[None, :]
        start = first.to(tl.int64)
        of_head = start * H + head
        wide = of_head * D + row[:, None] * (H * D) + feature[None, :]
        square = of_head * CHUNK + row[:, None] * (H * CHUNK) + row[None, :]
        key = tl.load(
            key_ptr + start * key_stride + key_head * key_heads + row[:, None] * key_stride + feature[None, :],
            mask=mask, other=0.0,
        )  # fmt: skip
        query = tl.load(
            query_ptr + start * query_stride + key_head * query_heads + row[:, None] * query_stride + feature[None, :],
            mask=mask, other=0.0,
        )  # fmt: skip
        beta = tl.load(beta_ptr + (start + row) * beta_stride + head, mask=live, other=0.0)
        if A_log_ptr is not None:
            beta = tl.where(live, share(beta), 0.0)
        beta = beta.to(tl.float32)
        query_scales = _scales(query.to(tl.float32), NORMALIZE) * scale
        key_scales = _scales(key.to(tl.float32), NORMALIZE)
        if VECTOR:
            decays = tl.load(decay_ptr + wide, mask=mask, other=0.0).to(tl.float32)
            logs, last = tl.cumsum(decays, 0), tl.sum(decays, 0)
            below = tl.load(met_ptr + square, mask=live[:, None], other=0.0)
            reach = tl.exp(logs)
            tl.store(queries_ptr + wide, (query.to(tl.float32) * reach * query_scales[:, None]).to(OPERAND), mask=mask)
            rest = key.to(tl.float32) * tl.exp(last[None, :] - logs) * key_scales[:, None]
            tl.store(keys_ptr + wide, rest.to(OPERAND), mask=mask)
            tl.store(kept_ptr + (place * H + head) * D + feature, tl.exp(last), mask=feature < D)
            key = (key.to(tl.float32) * reach).to(OPERAND)
            factors = beta * key_scales
        else:
            decays = tl.load(decay_ptr + (start + row) * decay_stride + head, mask=live, other=0.0).to(tl.float32)
            if A_log_ptr is not None:
                decays = tl.where(live, log_decay(decays, A_log_ptr, dt_bias_ptr, head), 0.0)
            logs, left_out, behind = running(decays)
            query, key = query.to(OPERAND), key.to(OPERAND)
            seen = decayed(tl.dot(query, tl.trans(key), input_precision=PRECISION), logs, left_out, row)
            seen *= query_scales[:, None] * key_scales[None, :]
            tl.store(seen_ptr + square, seen.to(OPERAND), mask=live[:, None])
            met = decayed(tl.dot(key, tl.trans(key), input_precision=PRECISION), logs, left_out, row)
            met *= (key_scales * beta)[:, None] * key_scales[None, :]
            below = tl.where(row[:, None] > row[None, :], met, 0.0)
            reach = tl.exp(logs)
            tl.store(queries_ptr + of_head + row * H, reach * query_scales, mask=live)
            tl.store(keys_ptr + of_head + row * H, tl.exp(behind) * key_scales, mask=live)
            tl.store(kept_ptr + place * H + head, tl.exp(tl.sum(decays, 0)))
            factors = beta * reach * key_scales
        inverse = _inverse(below, CHUNK, SUB, PRECISION)
        reads = tl.dot((inverse * factors[None, :]).to(OPERAND), key, input_precision=PRECISION)
        tl.store(reads_ptr + wide, reads.to(OPERAND), mask=mask)
        by_beta = (inverse * beta[None, :]).to(OPERAND)
        value_base = value_ptr + start * value_stride + head * value_heads
        for at in range(0, DV, BLOCK_V):
            column = at + tl.arange(0, BLOCK_V)
            there = live[:, None] & (column < DV)[None, :]
            value = tl.load(value_base + row[:, None] * value_stride + column[None, :], mask=there, other=0.0)
            changes = tl.dot(by_beta, value.to(OPERAND), input_precision=PRECISION)
            to = changes_ptr + of_head * DV + row[:, None] * (H * DV) + column[None, :]
            tl.store(to, changes.to(OPERAND), mask=there)


@triton.jit
def delta_states_kernel(
    out_ptr, changes_ptr, reads_ptr, seen_ptr, query_ptr, key_ptr, queries_ptr, keys_ptr, kept_ptr,
    states_ptr, slots_ptr, query_start_ptr, seq_lens_ptr, query_stride, key_stride, query_heads, key_heads,
    H: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, FEW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Along one sequence with some columns of S. VECTOR: queries and keys have their factors."""
    if PDL:
        wait()
    sequence, head = tl.program_id(0), tl.program_id(1)
    key_head = head // SHARE
    begin = tl.load(query_start_ptr + sequence)
    end = tl.load(query_start_ptr + sequence + 1)
    if end - begin > FEW:
        OPERAND: tl.constexpr = reads_ptr.dtype.element_ty
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        goes_on = tl.load(seq_lens_ptr + sequence) > end - begin
        feature = tl.arange(0, BLOCK_D)
        column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        row = tl.arange(0, CHUNK)
        state_ptrs = states_ptr + ((slot * H + head) * D + feature[:, None]) * DV + column[None, :]
        inside = (feature < D)[:, None] & (column < DV)[None, :]
        state = tl.load(state_ptrs, mask=inside & goes_on, other=0.0)
        place = begin // CHUNK + sequence
        for done in tl.range(0, end - begin, CHUNK, disable_licm=True):
            live = done + row < end - begin
            start = begin.to(tl.int64) + done
            of_head = start * H + head
            mask = live[:, None] & (feature < D)[None, :]
            wide = of_head * D + row[:, None] * (H * D) + feature[None, :]
            narrow = of_head * DV + row[:, None] * (H * DV) + column[None, :]
            narrow_mask = live[:, None] & (column < DV)[None, :]
            square = of_head * CHUNK + row[:, None] * (H * CHUNK) + row[None, :]
            if VECTOR:
                query_ptrs, key_ptrs = queries_ptr + wide, keys_ptr + wide
            else:
                query_ptrs = query_ptr + start * query_stride + key_head * query_heads
                query_ptrs = query_ptrs + row[:, None] * query_stride + feature[None, :]
                key_ptrs = key_ptr + start * key_stride + key_head * key_heads
                key_ptrs = key_ptrs + row[:, None] * key_stride + feature[None, :]
            rounded = state.to(OPERAND)
            reads = tl.load(reads_ptr + wide, mask=mask, other=0.0)
            changes = tl.load(changes_ptr + narrow, mask=narrow_mask, other=0.0).to(tl.float32)
            changes -= tl.dot(reads, rounded, input_precision=PRECISION)
            query = tl.load(query_ptrs, mask=mask, other=0.0).to(OPERAND)
            found = tl.dot(query, rounded, input_precision=PRECISION)
            if not VECTOR:
                found *= tl.load(queries_ptr + of_head + row * H, mask=live, other=0.0)[:, None]
            seen = tl.load(seen_ptr + square, mask=live[:, None], other=0.0)
            found += tl.dot(seen, changes.to(OPERAND), input_precision=PRECISION)
            tl.store(out_ptr + narrow, found.to(out_ptr.dtype.element_ty), mask=narrow_mask)
            key = tl.load(key_ptrs, mask=mask, other=0.0).to(OPERAND)
            if VECTOR:
                kept = tl.load(kept_ptr + (place * H + head) * D + feature, mask=feature < D, other=0.0)[:, None]
            else:
                kept = tl.load(kept_ptr + place * H + head)
                changes *= tl.load(keys_ptr + of_head + row * H, mask=live, other=0.0)[:, None]
            state *= kept
            state += tl.dot(tl.trans(key), changes.to(OPERAND), input_precision=PRECISION)
            place += 1
        slot = tl.load(slots_ptr + sequence).to(tl.int64)  # again: addresses would stay in registers meanwhile
        state_ptrs = states_ptr + ((slot * H + head) * D + feature[:, None]) * DV + column[None, :]
        tl.store(state_ptrs, state, mask=inside)


def gated_delta_chunks(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor, slots: Tensor,
    query_start: Tensor, seq_lens: Tensor, normalize: bool, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Rows of `out` [T, H, Dv] and states of the sequences with more than FEW rows; see `kernels.ops` for the arguments.

    query, key, value, beta and decay have stride 1 in their last dimension; one decay for each channel is contiguous.
    """
    tokens, heads, size = value.shape
    width, vector = key.shape[2], decay.dim() == 3
    operand = value.dtype
    blocks = places(tokens, len(slots), CHUNK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=value.device)

    changes, reads = empty(tokens, heads, size, dtype=operand), empty(tokens, heads, width, dtype=operand)
    seen = empty(tokens, heads, CHUNK, dtype=operand)
    if vector:
        met = empty(tokens, heads, CHUNK)
        queries, keys = (empty(tokens, heads, width, dtype=operand) for _ in range(2))
        kept = empty(blocks, heads, width)
    else:
        met, kept = None, empty(blocks, heads)
        queries, keys = (empty(tokens, heads) for _ in range(2))
    block_v = min(VECTOR_COLUMNS if vector else COLUMNS, max(triton.next_power_of_2(size), 16))
    strides = query.stride(0), key.stride(0), query.stride(1), key.stride(1)
    shared = dict(
        H=heads, SHARE=heads // key.shape[1], D=width, PRECISION=precision_of(operand), CHUNK=CHUNK, FEW=FEW,
        BLOCK_D=max(triton.next_power_of_2(width), 16), **dependent(value.device),
    )  # fmt: skip
    if vector:
        delta_pairs_kernel[(blocks * (CHUNK // SUB), heads)](
            met, seen, query, key, decay, beta, query_start, len(slots), *strides, beta.stride(0), width**-0.5,
            NORMALIZE=normalize, SUB=SUB, num_warps=PAIRS_WARPS, **shared,
        )  # fmt: skip
    delta_chunks_kernel[(blocks, heads)](
        changes, reads, met, seen, queries, keys, kept, query, key, value, decay, beta, query_start, len(slots),
        query.stride(0), key.stride(0), value.stride(0), query.stride(1), key.stride(1), value.stride(1),
        decay.stride(0), beta.stride(0), width**-0.5, A_log, dt_bias,
        DV=size, VECTOR=vector, NORMALIZE=normalize, SUB=SUB, BLOCK_V=block_v,
        num_warps=VECTOR_CHUNKS_WARPS if vector else CHUNKS_WARPS, **shared,
    )  # fmt: skip
    delta_states_kernel[(len(slots), heads, triton.cdiv(size, block_v))](
        out, changes, reads, seen, query, key, queries, keys, kept, states, slots, query_start, seq_lens, *strides,
        DV=size, VECTOR=vector, BLOCK_V=block_v, num_warps=STATES_WARPS, num_stages=STATES_STAGES, **shared,
    )  # fmt: skip
