"""What step metadata becomes: Triton against the plain lookups, ragged and padded; and what need not be sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagegraph.compiler.step.caches import Caches
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.inputs import SamplingInput, StepInput
from pagegraph.compiler.step.staging import CpuStaging, CudaStaging
from pagegraph.compiler.step.state import DeviceState
from pagegraph.kernels.inputs import cpp, reference

NUM_SLOTS, BLOCKS, BLOCK, DRAFT_TOKENS = 9, 150, 16, 5


def metadata_of(counts: list[int], padded: Bucket, seed: int) -> tuple[torch.Tensor, ...]:
    """token_ids, slots, query_start, starts, last_tokens, last_at, draft tokens, tables of a step of these tokens a sequence."""
    rng = np.random.default_rng(seed)
    tokens, seqs = sum(counts), len(counts)
    ids = np.where(rng.random(tokens) < 0.5, -rng.integers(1, DRAFT_TOKENS + 2, tokens), rng.integers(0, 1000, tokens))
    words = lambda *parts: torch.from_numpy(np.concatenate(parts).astype(np.int32))  # noqa: E731
    return (
        words(ids, np.zeros(padded.tokens - tokens)),
        words(rng.permutation(NUM_SLOTS)[:seqs], np.full(padded.seqs - seqs, NUM_SLOTS)),
        words([0], np.cumsum(counts), np.full(padded.seqs - seqs, tokens)),
        words(rng.integers(0, BLOCKS * BLOCK - max(counts), seqs), np.zeros(padded.seqs - seqs)),
        words(rng.integers(0, 1000, NUM_SLOTS + 1)),
        words(rng.integers(0, BLOCKS * BLOCK - max(counts) - DRAFT_TOKENS, NUM_SLOTS + 1)),
        words(rng.integers(0, 1000, (NUM_SLOTS + 1) * DRAFT_TOKENS)).view(NUM_SLOTS + 1, DRAFT_TOKENS),
        words(rng.integers(1, 10_000, (NUM_SLOTS + 1) * BLOCKS)).view(NUM_SLOTS + 1, BLOCKS),
    )


@pytest.mark.parametrize(
    ("counts", "padded"),
    [
        ([1], Bucket(2, 2)),
        ([1] * 9, Bucket(9, 9)),
        ([1] * 5, Bucket(8, 8)),
        ([7, 1, 130, 2, 1], Bucket(150, 5)),
        ([300, 1, 1, 5], Bucket(320, 9)),
        ([33], Bucket(48, 9)),
    ],
)
def test_equals_reference(triton_calls, counts: list[int], padded: Bucket) -> None:
    for seed, width in ((0, BLOCKS), (1, BLOCKS - 1)):
        metadata = metadata_of(counts, padded, seed)
        got, _ = triton_calls.call("pagegraph.kernels.inputs.prepare", "unpack", *metadata, BLOCK, width)
        for mine, theirs in zip(got, reference.unpack(*metadata, BLOCK, width), strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_padding_may_say_what_it_will(triton_calls) -> None:
    """Where metadata was advanced, padding too has the code of a slot's last token."""
    ids, slots, *others = metadata_of([1] * 5, Bucket(8, 8), 0)
    given = torch.full_like(ids, -1), slots, *others
    got, _ = triton_calls.call("pagegraph.kernels.inputs.prepare", "unpack", *given, BLOCK, BLOCKS)
    for mine, theirs in zip(got, reference.unpack(*given, BLOCK, BLOCKS), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(one[5:].any() for one in got[:5])


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("counts", [[1], [1] * 9, [7, 1, 130, 2, 1], [33]], ids=str)
def test_the_cpu_equals_reference(counts: list[int], padded: int, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_kernel", None)
    if built:
        cpp.build()
        assert cpp._kernel is not None
    for seed, width in ((0, BLOCKS), (1, BLOCKS - 1)):
        metadata = metadata_of(counts, Bucket(sum(counts) + padded, len(counts) + padded), seed)
        before = [one.clone() for one in metadata]
        got = torch.ops.pagegraph.unpack(*metadata, BLOCK, width)
        for mine, theirs in zip(got, reference.unpack(*metadata, BLOCK, width), strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(metadata, before))


def test_reference_by_hand() -> None:
    tables = torch.zeros(4, 3, dtype=torch.int32)
    tables[2], tables[0], tables[1] = torch.tensor([5, 6, 9]), torch.tensor([7, 0, 0]), torch.tensor([8, 4, 0])
    words = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    draft_tokens = torch.tensor([[0, 0], [31, 32], [0, 0], [0, 0]], dtype=torch.int32)
    # Slot 2's last token, two tokens at hand of slot 0, slot 1's last token and both draft tokens, padding.
    ids, slots, starts = words(-1, 11, 12, -1, -2, -3, 0), words(2, 0, 1, 1, 1, 3), words(99, 3, 99, 99, 99, 0)
    given = (
        ids,
        slots,
        words(0, 1, 3, 4, 5, 6, 6),
        starts,
        words(0, 30, 42, 0),
        words(0, 15, 17, 0),
        draft_tokens,
        tables,
    )
    ids, positions, slot_mapping, out, lengths, index = reference.unpack(*given, BLOCK, 2)
    assert ids.tolist() == [42, 11, 12, 30, 31, 32, 0] and positions.tolist() == [17, 3, 4, 15, 16, 17, 0]
    assert slot_mapping.tolist() == [6 * 16 + 1, 7 * 16 + 3, 7 * 16 + 4, 8 * 16 + 15, 4 * 16, 4 * 16 + 1, 0]
    assert out.tolist() == [[5, 6], [7, 0], [8, 0], [8, 4], [8, 4], [0, 0]]
    assert lengths.tolist() == [18, 5, 16, 17, 18, 0] and index.tolist() == [0, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("blocks", [0, 3, 2500])
def test_updates_equal_reference(triton_calls, blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    places = rng.permutation(40 * BLOCKS)[:blocks]
    entries = np.stack([places // BLOCKS, places % BLOCKS, rng.integers(1, 999, blocks)], axis=1)
    entries = np.concatenate([entries, np.full((5, 3), 7)])  # beyond the count: not read
    arguments = [
        torch.from_numpy(one.astype(np.int32)) for one in (np.zeros((40, BLOCKS)), entries, np.array([blocks]))
    ]
    expected = [one.clone() for one in arguments]
    _, arguments = triton_calls.call("pagegraph.kernels.inputs.prepare", "update_tables", *arguments)
    reference.update_tables(*expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(arguments, expected))


def state_of(slots: int) -> DeviceState:
    return DeviceState(
        Caches.none(), block_size=BLOCK, max_num_seqs=slots, max_blocks=BLOCKS, vocab_size=10,
        device=torch.device("cpu"),
    )  # fmt: skip


def decode(slots: list[int], starts: list[int], **changed: object) -> StepInput:
    words = lambda values: np.array(values, np.int32)  # noqa: E731
    given = dict(
        token_ids=words([-1] * len(slots)), slots=words(slots), query_start=words(range(len(slots) + 1)), starts=words(starts),
        sampled=np.ones(len(slots), bool), new_blocks=np.zeros((0, 3), np.int32),
        sampling=SamplingInput(temperature=np.zeros(len(slots), np.float32), seeds=np.zeros(len(slots), np.int64)),
    )  # fmt: skip
    return StepInput(**{**given, **changed})


CHANGED = {
    "another slot": decode([4, 3], [8, 21]),
    "another order": decode([2, 4], [21, 8]),
    "a slot less": decode([4], [8]),
    "a draft token": decode([4, 4], [8, 9], token_ids=np.array([-1, -2], np.int32)),
    "a known token": decode([4, 2], [8, 21], token_ids=np.array([-1, 5], np.int32)),
    "a new block": decode([4, 2], [8, 21], new_blocks=np.array([[4, 1, 3]], np.int32)),
    "nothing sampled": decode([4, 2], [8, 21], sampled=np.array([True, False])),
    "another seed": decode([4, 2], [8, 21], sampling=SamplingInput(np.zeros(2, np.float32), np.array([0, 1]))),
    "another heat": decode(
        [4, 2], [8, 21], sampling=SamplingInput(np.array([0, 0.5], np.float32), np.zeros(2, np.int64))
    ),
}


class Recording(CudaStaging):
    """One fixed buffer a bucket, as on CUDA but in plain memory; counts transfers."""

    def _allocate(self, words: int) -> None:
        self.transfers = 0
        self.fixed: dict[Bucket, object] = {}

    def metadata(self, bucket: Bucket) -> object:
        return self.fixed.get(bucket)

    def _transfer(self, step: StepInput, bucket: Bucket) -> None:
        self.transfers += 1
        self.fixed[bucket] = CpuStaging(self._state).send(step, bucket)


def sent(staging: Recording, step: StepInput, bucket: Bucket) -> tuple[list, ...]:
    staging.send(step, bucket)
    staged = staging.unpack(staging.metadata(bucket))
    return tuple(one.tolist() for one in (staged.token_ids, staged.positions, staged.slot_mapping, staged.seq_lens))


@pytest.mark.parametrize("what", CHANGED)
def test_only_what_the_device_knows_is_not_sent(what: str) -> None:
    staging = Recording(state_of(6), Bucket(8, 4))
    sent(staging, decode([4, 2], [7, 20]), Bucket(2, 2))
    staging.send(CHANGED[what], Bucket(2, 2))
    assert staging.transfers == 2


def test_a_step_in_another_bucket_is_sent() -> None:
    staging = Recording(state_of(6), Bucket(8, 4))
    sent(staging, decode([4, 2], [7, 20]), Bucket(2, 2))
    sent(staging, decode([4, 2], [8, 21]), Bucket(4, 4))
    assert staging.transfers == 2


def test_a_known_token_is_sent_again() -> None:
    """Its place is in the metadata, not on the device."""
    staging = Recording(state_of(6), Bucket(8, 4))
    step = decode([4, 2], [8, 21], token_ids=np.array([-1, 5], np.int32))
    sent(staging, step, Bucket(2, 2))
    sent(staging, step, Bucket(2, 2))
    assert staging.transfers == 2


def test_metadata_that_was_advanced_is_not_taken_for_what_was_sent() -> None:
    staging = Recording(state_of(6), Bucket(8, 4))
    step = decode([4, 2], [8, 21], token_ids=np.array([3, 5], np.int32))
    metadata = staging.send(step, Bucket(2, 2), num_steps=2) or staging.metadata(Bucket(2, 2))
    staging.advance(metadata)
    staging._state.last_tokens[:], staging._state.last_at[:] = 9, torch.arange(7, dtype=torch.int32)
    staged = staging.unpack(metadata)
    assert (
        staged.token_ids.tolist() == [9, 9]
        and staged.positions.tolist() == [4, 2]
        and staged.seq_lens.tolist() == [5, 3]
    )
    staging.send(decode([4, 2], [5, 3]), Bucket(2, 2))
    assert staging.transfers == 2


@settings(max_examples=60)
@given(st.data())
def test_reading_again_equals_sending_anew(data: st.DataObject) -> None:
    """Random decodes, some of which continue the one before: the device reads the same either way."""
    lazy, eager = Recording(state_of(6), Bucket(8, 6)), Recording(state_of(6), Bucket(8, 6))
    for staging in (lazy, eager):
        staging._state.block_tables[:] = torch.arange(7 * BLOCKS, dtype=torch.int32).view(7, BLOCKS)
        staging._state.last_tokens[:] = torch.arange(7, dtype=torch.int32)
    slots = [4, 2]
    stands = [data.draw(st.integers(0, 2000)) for _ in range(6)]
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            slots = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
        for staging in (lazy, eager):
            staging._state.last_at[:6] = torch.tensor(stands, dtype=torch.int32)
        starts = [stands[slot] for slot in slots]
        blocks = (
            [[slots[0], starts[0] // BLOCK, data.draw(st.integers(1, 99))]]
            if data.draw(st.booleans())
            else np.zeros((0, 3))
        )
        step = decode(slots, starts, new_blocks=np.array(blocks, np.int32))
        eager._last = None
        assert sent(lazy, step, Bucket(4, 4)) == sent(eager, step, Bucket(4, 4))
        for slot in slots:
            stands[slot] += data.draw(st.integers(1, 3))  # as many as the device has kept
    assert lazy.transfers <= eager.transfers
