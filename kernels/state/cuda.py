"""Recurrent state on CUDA: which kernel takes which sequences of a step, by sizes alone. Knows no kernel's inside.

A step with as many rows as sequences, a decode, is taken row by row whatever it holds. In one with more, sequences of a few
rows are taken so too, so that a decode's numbers do not depend on prompts beside it, and longer ones in chunks; kernels of
either kind end at once on sequences of the other.

Chunks are of bfloat16 models. Tensor cores round operands, which bfloat16 has done already; float32 models are taken row by row
throughout, as exact as they decode, and so are float16's, whose range a state may leave as an operand. States with a decay for each
element are never multiplied as matrices: there prompts of every dtype are taken by blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagegraph.kernels.state.chunks import FEW
from pagegraph.kernels.state.delta import gated_delta_rows
from pagegraph.kernels.state.delta_chunks import gated_delta_chunks
from pagegraph.kernels.state.scan import selective_scan_rows
from pagegraph.kernels.state.scan_chunks import selective_scan_chunks
from pagegraph.kernels.state.scan_prompts import selective_scan_prompts
from pagegraph.kernels.state.time_steps import Steps, made_steps

CHUNKED = (torch.bfloat16,)  # dtypes of activations
# Of keys in chunks. Narrower ones are of no model that is known; Triton 3.6's code for 16 wrote out of bounds on an H200, that for 64 in
# bfloat16 gives wrong numbers there, that for 128, which 96 takes too, is right.
MIN_WIDTH = 96


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor, slots: Tensor,
    query_start: Tensor, seq_lens: Tensor, normalize: bool, draft_rows: Tensor | None = None,
    state_lens: Tensor | None = None, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    query, key, value = (one if one.stride(2) == 1 else one.contiguous() for one in (query, key, value))
    beta = beta if beta.stride(1) == 1 else beta.contiguous()
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    decay = decay if decay.dim() == 2 and decay.stride(1) == 1 else decay.contiguous()
    given = out, query, key, value, decay, beta, states, slots, query_start, seq_lens, normalize
    chunked = len(value) > len(slots) and value.dtype in CHUNKED and key.shape[2] >= MIN_WIDTH
    gated_delta_rows(*given, FEW if chunked else len(value), draft_rows, state_lens, A_log, dt_bias)
    if chunked:
        gated_delta_chunks(*given, A_log, dt_bias)
    return out


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    dt_min: float | None, dt_max: float | None, A_log: bool, states: Tensor, slots: Tensor, query_start: Tensor,
    seq_lens: Tensor, draft_rows: Tensor | None = None, state_lens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.ops`."""
    x, B, C = (one if one.stride(2) == 1 else one.contiguous() for one in (x, B, C))
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    steps, by_elements = Steps(dt, dt_bias, dt_softplus, dt_min, dt_max), A.dim() == 2
    chunked = len(x) > len(slots) and (by_elements or x.dtype in CHUNKED)
    if chunked:  # along a prompt they would wait for it chunk by chunk
        steps = made_steps(steps)
    given = out, x, steps, A.contiguous(), A_log, B, C, D, states, slots, query_start, seq_lens
    selective_scan_rows(*given, FEW if chunked else len(x), draft_rows, state_lens)
    if chunked:
        in_chunks = selective_scan_prompts if by_elements else selective_scan_chunks
        in_chunks(out, x, steps.dt, *given[3:])
    return out
