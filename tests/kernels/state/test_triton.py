"""Triton kernels over recurrent state against the token by token reference."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.state import reference
from tests.kernels.state.cases import PADDING, Step, compare, conv, delta, scan

ATOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
both_dtypes = pytest.mark.parametrize("dtype", ATOL, ids=str)
every_step = pytest.mark.parametrize("name", ["short prompts", "decodes"])  # the interpreter takes its time
# float32's prompts are taken in chunks here alone, to tell the algorithm's error from that of bfloat16 operands.
IN_CHUNKS = {
    "pagegraph.kernels.state.cuda.CHUNKED": (torch.bfloat16, torch.float32),
    "pagegraph.kernels.state.cuda.MIN_WIDTH": 16,
}
CHUNKS_ATOL = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # with TF32 in place of float32, three products for one


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def on_device(triton_calls, module: str, function: str, constants: dict | None = None):
    """The launcher as an op: what it mutates is copied back."""

    def call(*arguments):
        out, after = triton_calls.call(f"pagegraph.kernels.state.{module}", function, *arguments, constants=constants)
        for given, changed in zip(arguments, after):
            if isinstance(given, torch.Tensor):
                given.copy_(changed)
        return out

    return call


@every_step
@both_dtypes
@pytest.mark.parametrize("bias, width, silu", [(True, 4, True), (False, 3, False)])
def test_causal_conv(triton_calls, name: str, dtype: torch.dtype, bias: bool, width: int, silu: bool) -> None:
    step = Step.of(name)
    op = on_device(triton_calls, "conv", "causal_conv")
    compare(op, reference.causal_conv, *conv(step, dtype, bias, width), step, silu, atol=ATOL[dtype])


@every_step
@both_dtypes
@pytest.mark.parametrize("vector", [False, True])
def test_gated_delta(triton_calls, name: str, dtype: torch.dtype, vector: bool) -> None:
    step = Step.of(name)
    op = on_device(triton_calls, "cuda", "gated_delta")
    compare(op, reference.gated_delta, *delta(step, dtype, vector), step, True, atol=ATOL[dtype])


@every_step
@both_dtypes
@pytest.mark.parametrize("mamba1", [False, True])
def test_selective_scan(triton_calls, name: str, dtype: torch.dtype, mamba1: bool) -> None:
    step = Step.of(name)
    op = on_device(triton_calls, "cuda", "selective_scan")
    compare(op, reference.selective_scan, *scan(step, dtype, mamba1), step, atol=ATOL[dtype])


@both_dtypes
@pytest.mark.parametrize("vector", [False, True])
def test_gated_delta_in_chunks(triton_calls, dtype: torch.dtype, vector: bool) -> None:
    step = Step.of("chunks")
    op = on_device(triton_calls, "cuda", "gated_delta", IN_CHUNKS)
    compare(op, reference.gated_delta, *delta(step, dtype, vector), step, True, atol=CHUNKS_ATOL[dtype])


@pytest.mark.parametrize("vector", [False, True])
def test_gated_delta_of_equal_keys_between_strong_decays(triton_calls, vector: bool) -> None:
    """A series of powers would lose its numbers to the keys, products of decays would overflow."""
    step = Step.of("chunks")
    (query, key, value, decay, beta), pool = delta(step, torch.float32, vector)
    live = slice(0, step.rows - PADDING)
    key[live] = key[0].clone()
    beta[live] = 1.0
    decay[live] = 0.0
    decay[live][::20] = -200.0
    op = on_device(triton_calls, "cuda", "gated_delta", IN_CHUNKS)
    compare(op, reference.gated_delta, [query, key, value, decay, beta], pool, step, True, atol=1e-4)


@both_dtypes
def test_selective_scan_in_chunks(triton_calls, dtype: torch.dtype) -> None:
    step = Step.of("chunks")
    op = on_device(triton_calls, "cuda", "selective_scan", IN_CHUNKS)
    compare(op, reference.selective_scan, *scan(step, dtype, False), step, atol=CHUNKS_ATOL[dtype])


def test_selective_scan_by_blocks_of_rows(triton_calls) -> None:
    """With a decay for each element, two programs for the channels; exact in every dtype."""
    step = Step.of("chunks")
    op = on_device(triton_calls, "cuda", "selective_scan", {"pagegraph.kernels.state.scan_prompts.ELEMENTS": 32})
    compare(op, reference.selective_scan, *scan(step, torch.bfloat16, True), step, atol=ATOL[torch.float32])
