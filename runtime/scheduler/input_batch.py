"""The input batch: running sequences as columns, element i of every array for the sequence in slot i.

It holds what a step reads or changes of every running sequence, so that scheduling, packing and committing are array
operations whatever the batch. A waiting or finished sequence holds its own tokens and nothing here.
Knows no scheduling order, no pool and no device.

An object a sequence cost 1.4 ms of Python a step at 256 sequences; columns are a tenth of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from pagegraph.runtime.scheduler.sampling_columns import SamplingColumns
from pagegraph.runtime.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Fixed:
    """Columns of `InputBatch` that are constant while a sequence keeps its slot, gathered: element i is of slots[i]."""

    slots: np.ndarray
    epochs: np.ndarray
    max_len: np.ndarray
    min_len: np.ndarray
    num_prompt: np.ndarray
    stop_ids: np.ndarray
    owners: np.ndarray
    request_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the engine's clock, by slot; float64."""

    arrival: np.ndarray
    last_token: np.ndarray  # NaN before the first token


class InputBatch:
    """`num_slots` slots for sequences of at most `max_model_len` tokens in blocks of `block_size`; int32 unless said.

    Half-open ranges of slot i: tokens[i, :computed[i]] have their keys and values in blocks or in a launched step;
    tokens[i, :known[i]] are committed, which is to say on the host; at most total[i] - known[i] sampled tokens are
    scheduled and still to come. `computed` and `total` count draft tokens in flight as accepted; `commit` subtracts
    those that were rejected.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int) -> None:
        def column(dtype: type = np.int32) -> np.ndarray:
            return np.zeros(num_slots, dtype)

        self.block_size = block_size
        self.sequences: Any = np.full(num_slots, None, object)  # Sequence or None
        self.epoch = column(np.int64)  # counts the sequences that enter slots; 0: the slot is empty
        self.tokens = np.empty((num_slots, max_model_len), np.int32)  # takes memory only as far as it is written
        self.known, self.total, self.computed = column(), column(), column()
        self.num_prompt = column()
        self.max_len = column()  # tokens at which the sequence ends, whatever they are
        self.min_len = column()  # tokens up to which no id stops it
        self.stop_ids = np.full((num_slots, 1), -1, np.int32)  # wider once a sequence has more
        self.blocks = np.zeros((num_slots, -(-max_model_len // block_size)), np.int32)
        self.num_blocks = column()
        self.sampling = SamplingColumns(num_slots)
        self.reads_prompt = column(bool)  # something is asked of the prompt's tokens: `Sequence.prompt`
        self.owner = column()
        self.request_ids = np.full(num_slots, "", object)
        self.times = Times(column(np.float64), column(np.float64))
        self._epochs = count(1)
        self.clear()

    def clear(self) -> None:
        """Empty all slots."""
        self.sequences[:] = None
        self.epoch[:] = self.known[:] = self.total[:] = self.computed[:] = self.num_blocks[:] = 0
        self.blocks[:] = 0
        self._free = list(range(len(self.epoch) - 1, -1, -1))
        self._new_blocks: list[np.ndarray] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def enter(self, sequence: Sequence, blocks: list[int], computed: int) -> int:
        """Give the sequence a slot, its blocks, and the tokens whose KV these hold already -> the slot.

        If that raises, it still has no slot.
        """
        slot = self._free.pop()
        num_known = len(sequence.tokens)
        self.tokens[slot, :num_known] = sequence.tokens
        self.known[slot] = self.total[slot] = num_known
        self.computed[slot] = computed
        self.num_prompt[slot] = sequence.num_prompt
        self.max_len[slot] = sequence.max_len
        self.min_len[slot] = sequence.num_prompt + sequence.params.min_tokens
        self._set_stop_ids(slot, sequence.stop_ids)
        self._put_blocks(slot, np.arange(len(blocks)), np.array(blocks, np.int32))
        self.num_blocks[slot] = len(blocks)
        self.sampling.enter(slot, sequence)
        self.reads_prompt[slot] = sequence.prompt is not None
        self.owner[slot], self.request_ids[slot] = sequence.owner, sequence.request_id
        self.times.arrival[slot], self.times.last_token[slot] = sequence.arrival, sequence.times.last_token
        self.epoch[slot] = next(self._epochs)
        self.sequences[slot], sequence.slot = sequence, slot
        return slot

    def fixed(self, slots: np.ndarray) -> Fixed:
        """Of these slots, in this order."""
        return Fixed(
            slots,
            self.epoch[slots],
            self.max_len[slots],
            self.min_len[slots],
            self.num_prompt[slots],
            self.stop_ids[slots],
            self.owner[slots],
            self.request_ids[slots],
        )

    def leave(self, slot: int) -> None:
        """Copy the tokens back to the sequence and free its slot, whose blocks were released before."""
        sequence = self.sequences[slot]
        sequence.tokens = self.tokens[slot, : self.known[slot]].copy()
        sequence.times.last_token = float(self.times.last_token[slot])
        sequence.slot = -1
        self.sequences[slot] = None
        self.epoch[slot] = 0
        self._free.append(slot)

    def add_blocks(self, slots: np.ndarray, counts: np.ndarray, blocks: list[int]) -> None:
        """Append counts[i] of `blocks`, in order, to the table of slot slots[i]; no slot twice."""
        within = np.arange(len(blocks)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._put_blocks(
            np.repeat(slots, counts), np.repeat(self.num_blocks[slots], counts) + within, np.array(blocks, np.int32)
        )
        self.num_blocks[slots] += counts

    def take_new_blocks(self) -> np.ndarray:
        """What was appended to block tables since the last call, int32 [P, 3]: (slot, index, block)."""
        new, self._new_blocks = self._new_blocks, []
        return np.concatenate(new) if new else _NO_BLOCKS

    def blocks_of(self, slot: int) -> list[int]:
        """The slot's blocks in order."""
        return self.blocks[slot, : self.num_blocks[slot]].tolist()

    def take_blocks(self, slot: int) -> list[int]:
        """Empty the slot's block table -> the blocks it held."""
        blocks = self.blocks_of(slot)
        self.blocks[slot, : len(blocks)] = 0
        self.num_blocks[slot] = self.computed[slot] = 0
        return blocks

    def _put_blocks(self, slots: np.ndarray | int, at: np.ndarray, blocks: np.ndarray) -> None:
        self.blocks[slots, at] = blocks
        new = np.empty((len(blocks), 3), np.int32)
        new[:, 0], new[:, 1], new[:, 2] = slots, at, blocks
        self._new_blocks.append(new)

    def _set_stop_ids(self, slot: int, ids: frozenset[int]) -> None:
        if len(ids) > self.stop_ids.shape[1]:
            more = np.full((len(self.stop_ids), len(ids) - self.stop_ids.shape[1]), -1, np.int32)
            self.stop_ids = np.concatenate([self.stop_ids, more], axis=1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(ids)] = list(ids)


_NO_BLOCKS = np.empty((0, 3), np.int32)
