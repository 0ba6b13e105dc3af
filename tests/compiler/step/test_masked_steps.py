"""Steps that sample by masks give what the same tokens allowed by id give, launched ahead, with and without a graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pagegraph.compiler.build import BuiltModel
from pagegraph.compiler.step.inputs import Filters, StepInput
from tests.compiler.step.test_draft_graphs import SEQS, built, decode, prompts  # noqa: F401  (built is a fixture)

VOCAB, STEPS = 300, 6
ALLOWED = {0: np.array([3, 77, 150, 299], np.int32), 2: np.arange(0, VOCAB, 3, dtype=np.int32)}


def words(seqs: int) -> np.ndarray:
    """The bitmask of ALLOWED for the sequences that have it."""
    bits = np.zeros((len(masked(seqs)), -(-VOCAB // 32) * 32), bool)
    for index, sequence in enumerate(masked(seqs)):
        bits[index, ALLOWED[sequence]] = True
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


def masked(seqs: int) -> np.ndarray:
    return np.array([sequence for sequence in ALLOWED if sequence < seqs], np.int32)


def tokens(model: BuiltModel, steps: list[StepInput], masks: np.ndarray | None) -> np.ndarray:
    """Of steps of which each is launched before the one before is read."""
    model.step.launch(prompts("drawn"))
    tickets = []
    for one in steps:
        tickets.append(model.step.launch(one))
        if masks is not None:
            tickets[-1].masks[:] = masks
            tickets[-1].sample()
    return np.stack([ticket.wait().token_ids for ticket in tickets], axis=1)


@pytest.mark.parametrize("seqs", [1, SEQS])
@pytest.mark.parametrize("kind", ["greedy", "drawn", "filtered"])
def test_masks_allow_what_ids_allow(built: BuiltModel, kind: str, seqs: int) -> None:  # noqa: F811
    steps = [decode(kind, [50, 60, 70] if not behind else [-1] * SEQS, behind, seqs) for behind in range(STEPS)]
    if kind == "filtered":  # of the allowed tokens all, whose order is the same then
        everything = Filters(np.zeros(seqs, np.int32), np.ones(seqs, np.float32), np.zeros(seqs, np.float32))
        steps = [replace(one, sampling=replace(one.sampling, filters=everything)) for one in steps]
    allowed = {sequence: ids for sequence, ids in ALLOWED.items() if sequence < seqs}
    free = tokens(built, steps, None)
    expected = tokens(built, [replace(one, sampling=replace(one.sampling, allowed=allowed)) for one in steps], None)
    by_mask = [replace(one, sampling=replace(one.sampling, masked=masked(seqs))) for one in steps]
    for _ in range(2):
        np.testing.assert_array_equal(tokens(built, by_mask, words(seqs)), expected)
    assert not np.array_equal(free, expected) and np.isin(expected[0], ALLOWED[0]).all()


def test_more_masked_rows_than_before(built: BuiltModel) -> None:  # noqa: F811
    """Buffers grow, whatever stands in them."""
    step = decode("greedy", [50, 60, 70], 0)
    one = replace(step, sampling=replace(step.sampling, masked=np.array([1], np.int32)))
    many = replace(step, sampling=replace(step.sampling, masked=np.zeros(40, np.int32)))
    only = np.zeros((1, -(-VOCAB // 32)), np.int32)
    only[0, 4] = 2  # token 129
    for masks, which in ((only, one), (np.repeat(only, 40, axis=0), many), (only, one)):
        ids = tokens(built, [which], masks)[:, 0]
        assert ids[which.sampling.masked[0]] == 129 and (ids == 129).sum() == 1
