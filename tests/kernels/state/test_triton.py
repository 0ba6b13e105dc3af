"""Triton kernels over recurrent state against the token by token reference."""

from __future__ import annotations

import pytest
import torch

from pagegraph.kernels.state import reference
from tests.kernels.state.cases import (
    PADDING,
    Step,
    compare,
    compare_drafted,
    conv,
    delta,
    drafted_steps,
    projected_delta,
    scan,
    scan_of_a_layer,
    with_gates,
)

ATOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
both_dtypes = pytest.mark.parametrize("dtype", ATOL, ids=str)
every_step = pytest.mark.parametrize("name", ["short prompts", "decodes"])  # the interpreter takes its time
# float32's prompts are taken in chunks here alone, to tell the algorithm's error from that of bfloat16 operands.
IN_CHUNKS = {"pagegraph.kernels.state.cuda.CHUNKED": (torch.bfloat16, torch.float32)}
WIDE = 128  # keys that chunks take
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


def test_a_convolution_of_prompts_reads_nothing_but_rows_within_a_sequence(triton_calls) -> None:
    """Sequences of several blocks of tokens, that end and begin within one; of the blocks inside, states would be out of place."""
    step = Step.of("prompts")
    (x, weight, bias), pool = conv(step, torch.float32, True, 4)
    op = on_device(triton_calls, "conv", "causal_conv")
    compare(op, reference.causal_conv, [x, weight.T.contiguous().T, bias], pool, step, True, atol=ATOL[torch.float32])


@every_step
@both_dtypes
@pytest.mark.parametrize("vector, share", [(False, 1), (False, 2), (True, 1)])
def test_gated_delta(triton_calls, name: str, dtype: torch.dtype, vector: bool, share: int) -> None:
    step = Step.of(name)
    op = on_device(triton_calls, "cuda", "gated_delta")
    compare(op, reference.gated_delta, *delta(step, dtype, vector, share=share), step, True, atol=ATOL[dtype])


@every_step
@both_dtypes
def test_gated_delta_as_projected(triton_calls, name: str, dtype: torch.dtype) -> None:
    step = Step.of(name)
    op = with_gates(on_device(triton_calls, "cuda", "gated_delta"), dtype)
    given = projected_delta(step, dtype)
    compare(op, with_gates(reference.gated_delta, dtype), *given, step, True, atol=ATOL[dtype])


@both_dtypes
def test_gated_delta_as_projected_in_chunks(triton_calls, dtype: torch.dtype) -> None:
    step = Step.of("chunks")
    op = with_gates(on_device(triton_calls, "cuda", "gated_delta", IN_CHUNKS), dtype)
    given = projected_delta(step, dtype, WIDE)
    compare(op, with_gates(reference.gated_delta, dtype), *given, step, True, atol=CHUNKS_ATOL[dtype])


def test_what_is_put_aside_is_behind_the_gates(triton_calls) -> None:
    op = with_gates(on_device(triton_calls, "cuda", "gated_delta"), torch.float32)
    oracle = with_gates(reference.gated_delta, torch.float32)
    wide = 4 * (16 + 24 + 1 + 1)
    case = lambda step: projected_delta(step, torch.float32)  # noqa: E731
    compare_drafted(op, oracle, case, [1, 2, 3, 4], True, atol=2e-5, wide=wide)


@every_step
@both_dtypes
@pytest.mark.parametrize("mamba1", [False, True])
def test_selective_scan(triton_calls, name: str, dtype: torch.dtype, mamba1: bool) -> None:
    step = Step.of(name)
    op = on_device(triton_calls, "cuda", "selective_scan")
    compare(op, reference.selective_scan, *scan(step, dtype, mamba1), step, atol=ATOL[dtype])


@both_dtypes
@pytest.mark.parametrize("vector, share", [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_gated_delta_in_chunks(triton_calls, dtype: torch.dtype, vector: bool, share: int) -> None:
    step = Step.of("chunks")
    op = on_device(triton_calls, "cuda", "gated_delta", IN_CHUNKS)
    compare(op, reference.gated_delta, *delta(step, dtype, vector, WIDE, share), step, True, atol=CHUNKS_ATOL[dtype])


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("vector", [False, True])
def test_narrow_keys_are_taken_row_by_row(triton_calls, vector: bool, size: int) -> None:
    """A call of the kernels of chunks would fail."""
    step = Step.of("chunks")
    op = on_device(triton_calls, "cuda", "gated_delta", {"pagegraph.kernels.state.cuda.gated_delta_chunks": None})
    given = delta(step, torch.bfloat16, vector, size)
    compare(op, reference.gated_delta, *given, step, True, atol=ATOL[torch.bfloat16])


@pytest.mark.parametrize("vector", [False, True])
def test_gated_delta_of_equal_keys_between_strong_decays(triton_calls, vector: bool) -> None:
    """A series of powers would lose its numbers to the keys, products of decays would overflow."""
    step = Step.of("chunks")
    (query, key, value, decay, beta), pool = delta(step, torch.float32, vector, WIDE)
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


# Draft tokens that there is room for: as the CPU is tested, with prompts beside decodes, and full rooms, decodes alone.
every_room = pytest.mark.parametrize("room", [3, 4])
two_rooms = [(3, True), (4, False), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((3, False), (4, True)))]


def drafting(room: int) -> dict:
    return {} if room == 3 else dict(steps=drafted_steps(room), most=room)


@every_room
def test_draft_tokens_leave_no_trace_in_a_convolution(triton_calls, room: int) -> None:
    weights = conv(Step.of("decodes"), torch.bfloat16, True, 4)[0][1:]

    def case(step: Step) -> tuple[list, torch.Tensor]:
        (x, *_), pool = conv(step, torch.bfloat16, True, 4)
        return [x, *weights], pool

    op = on_device(triton_calls, "conv", "causal_conv")
    compare_drafted(op, reference.causal_conv, case, [0], True, atol=ATOL[torch.bfloat16], **drafting(room))


@pytest.mark.parametrize("room, vector", two_rooms)
def test_draft_tokens_leave_no_trace_in_a_delta_rule(triton_calls, room: int, vector: bool) -> None:
    """In float32, which is as exact row by row as in chunks of products."""
    op = on_device(triton_calls, "cuda", "gated_delta")
    case = lambda step: delta(step, torch.float32, vector)  # noqa: E731
    compare_drafted(op, reference.gated_delta, case, [1, 2, 3, 4], True, atol=2e-5, **drafting(room))


def test_what_is_put_aside_of_a_shared_key_is_that_of_each_head(triton_calls) -> None:
    op = on_device(triton_calls, "cuda", "gated_delta")
    case = lambda step: delta(step, torch.float32, False, share=2)  # noqa: E731
    wide = 4 * (16 + 24 + 1 + 1)
    compare_drafted(op, reference.gated_delta, case, [1, 2, 3, 4], True, atol=2e-5, wide=wide)


@pytest.mark.parametrize("vector", [False, True])
def test_chunks_of_a_delta_rule_go_on_from_accepted_draft_tokens(triton_calls, vector: bool) -> None:
    op = on_device(triton_calls, "cuda", "gated_delta", IN_CHUNKS)
    case = lambda step: delta(step, torch.bfloat16, vector, WIDE)  # noqa: E731
    compare_drafted(op, reference.gated_delta, case, [1, 2, 3, 4], True, atol=ATOL[torch.bfloat16])


@pytest.mark.parametrize("room, mamba1", two_rooms)
def test_draft_tokens_leave_no_trace_in_a_state_space_model(triton_calls, room: int, mamba1: bool) -> None:
    """Two programs for the channels of a slot."""
    case = scan_of_a_layer(torch.float32, mamba1)

    name, most = ("VECTOR_ELEMENTS", 32) if mamba1 else ("ELEMENTS", 256)
    elements = {f"pagegraph.kernels.state.scan.{name}": most}
    op = on_device(triton_calls, "cuda", "selective_scan", elements)
    compare_drafted(op, reference.selective_scan, case, [0, 1, 3], atol=2e-5, **drafting(room))


def test_chunks_of_a_state_space_model_go_on_from_accepted_draft_tokens(triton_calls) -> None:
    case = scan_of_a_layer(torch.bfloat16, False)

    op = on_device(triton_calls, "cuda", "selective_scan", IN_CHUNKS)
    compare_drafted(op, reference.selective_scan, case, [0, 1, 3], atol=ATOL[torch.bfloat16])


def test_states_are_counted(triton_calls) -> None:
    """More sequences than a program counts, draft tokens and padding among them."""
    slots = [at // 3 for at in range(300)] + [200] * 4 + [150]
    counts = [1] * 300 + [0] * 4 + [9]
    lengths = [50 + at for at in range(300)] + [0] * 4 + [30]
    step = Step.made(slots, counts, lengths)
    mine, expected = torch.arange(201, dtype=torch.int32), torch.arange(201, dtype=torch.int32)
    on_device(triton_calls, "drafts", "count_states")(mine, step.slots, step.query_start, step.seq_lens)
    reference.count_states(expected, step.slots, step.query_start, step.seq_lens)
    assert torch.equal(mine, expected) and mine[150] == 39 and mine[99] == 51 + 297 and mine[200] == 200
