"""A step on its way to the device: its metadata, as one buffer of int32 words, and what it becomes there.

On CUDA the metadata of a bucket lies at a fixed address, so that captured graphs read it, and is sent by one copy from
pinned memory. A step that continues the one before, each sequence with the token it has just sampled and no new block,
needs no copy: the same metadata, read again, describes it (`kernels.inputs.prepare`). Knows no scheduling and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

import pagegraph.kernels.ops  # noqa: F401  (registers the ops)
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.compiler.step.state import DeviceState

ALIGN = 16  # int32 words: every field starts on a 64-byte border
PINNED = 3  # pinned buffers in rotation: at most two steps are in flight


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """A padded step as it is sent: T tokens and S sequences of the bucket; int32 unless said."""

    token_ids: torch.Tensor  # [T], below 0: known to the device, as in `StepInput`
    query_start: torch.Tensor  # [S + 1]
    slots: torch.Tensor  # [S]
    starts: torch.Tensor  # [S]
    sampled: torch.Tensor  # [S] 0 or 1
    temperature: torch.Tensor  # [S] float32
    seeds: torch.Tensor  # [S] int64
    num_new_blocks: torch.Tensor  # [1]
    new_blocks: torch.Tensor  # [P, 3], of which num_new_blocks count
    width: int  # blocks a sequence of the step may have


@dataclass(frozen=True, slots=True)
class Staged:
    """A padded step as the model reads it; int32 unless said. See `kernels.ops`."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slot_mapping: torch.Tensor  # [T]
    block_tables: torch.Tensor  # [S, width]
    query_start: torch.Tensor  # [S + 1]
    seq_lens: torch.Tensor  # [S], also the position of the token to be sampled
    logits_index: torch.Tensor  # [S] int64, last token of each sequence
    metadata: StepMetadata


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each field of a bucket's metadata lies, in words; new blocks come last, as many as there are."""

    fields: dict[str, slice]
    new_blocks: int

    @staticmethod
    @lru_cache(1024)
    def of(bucket: Bucket) -> Layout:
        tokens, seqs = bucket.tokens, bucket.seqs
        sizes = {
            "token_ids": tokens, "query_start": seqs + 1, "slots": seqs, "starts": seqs, "sampled": seqs,
            "temperature": seqs, "seeds": 2 * seqs, "num_new_blocks": 1,
        }  # fmt: skip
        at, fields = 0, {}
        for name, size in sizes.items():
            fields[name] = slice(at, at + size)
            at += -(-size // ALIGN) * ALIGN
        return Layout(fields, at)

    def views(self, words: torch.Tensor, num_new_blocks: int, width: int) -> StepMetadata:
        fields = {name: words[where] for name, where in self.fields.items()}
        fields["temperature"] = fields["temperature"].view(torch.float32)
        fields["seeds"] = fields["seeds"].view(torch.int64)
        return StepMetadata(
            **fields, new_blocks=words[self.new_blocks : self.new_blocks + 3 * num_new_blocks].view(-1, 3), width=width
        )


class Staging:
    """What staging on every device shares: one metadata buffer a step, and unpacking it."""

    def __init__(self, state: DeviceState) -> None:
        self.device = state.last_tokens.device
        self._state = state

    def send(self, step: StepInput, bucket: Bucket, num_steps: int = 1) -> StepMetadata:
        """Pad `step`, which is to run `num_steps` times, to `bucket` and bring its metadata to the device."""
        raise NotImplementedError

    def advance(self, metadata: StepMetadata) -> None:
        """Describe the step after: each sequence's token is the one it has just sampled.

        A launch, so that a graph can hold it.
        """
        metadata.token_ids.fill_(-1)

    def unpack(self, metadata: StepMetadata) -> Staged:
        """The step that the metadata on the device describes; launches only, so that a graph can hold it."""
        state, ops = self._state, torch.ops.pagegraph
        ops.update_tables(state.block_tables, metadata.new_blocks, metadata.num_new_blocks)
        ids, positions, slot_mapping, tables, seq_lens, logits_index = ops.unpack(
            metadata.token_ids, metadata.slots, metadata.query_start, metadata.starts, state.last_tokens, state.last_at,
            state.draft_tokens, state.block_tables, state.block_size, metadata.width,
        )  # fmt: skip
        return Staged(ids, positions, slot_mapping, tables, metadata.query_start, seq_lens, logits_index, metadata)

    def _remember(self, step: StepInput) -> None:
        for source, target in step.state_copies:
            self._state.caches.copy_state(source, target)
        for slot, tokens in step.cached:
            self._state.remember(slot, tokens)

    def _fill(self, host: np.ndarray, layout: Layout, step: StepInput) -> None:
        def put(name: str, values: np.ndarray, pad: int) -> None:
            field = host[layout.fields[name]]
            field[: len(values)] = values
            field[len(values) :] = pad

        put("token_ids", step.token_ids, 0)
        put("query_start", step.query_start, step.num_tokens)
        put("slots", step.slots, self._state.dummy_slot)
        put("starts", step.starts, 0)
        put("sampled", step.sampled, 0)
        put("temperature", step.sampling.temperature.view(np.int32), 0)
        put("seeds", step.sampling.seeds.view(np.int32), 0)
        host[layout.fields["num_new_blocks"]] = len(step.new_blocks)
        host[layout.new_blocks : layout.new_blocks + step.new_blocks.size] = step.new_blocks.ravel()


class CpuStaging(Staging):
    """Each step has a buffer of its own, which is read in place."""

    def send(self, step: StepInput, bucket: Bucket, num_steps: int = 1) -> StepMetadata:
        self._remember(step)
        return self._filled(step, bucket, num_steps)

    def _filled(self, step: StepInput, bucket: Bucket, num_steps: int = 1) -> StepMetadata:
        """Metadata in a buffer of its own."""
        layout = Layout.of(bucket)
        words = torch.empty(layout.new_blocks + step.new_blocks.size, dtype=torch.int32)
        self._fill(words.numpy(), layout, step)
        width = -(-(int(step.seq_lens.max()) + num_steps - 1) // self._state.block_size)
        # a width of one would be a constant to the compiler
        return layout.views(words, len(step.new_blocks), max(width, 2))


class CudaStaging(Staging):
    """A buffer at a fixed address on the device, filled by one copy from pinned memory, if the step needs one at all."""

    def __init__(self, state: DeviceState, largest: Bucket) -> None:
        super().__init__(state)
        self._captured: dict[Bucket, StepMetadata] = {}
        self._last: tuple[Bucket, StepInput] | None = None
        # Blocks that a step may bring: those of its tokens, and long prompts found in the cache.
        self._max_new_blocks = 2 * largest.tokens + 8 * largest.seqs
        self._allocate(Layout.of(largest).new_blocks + 3 * self._max_new_blocks)

    def _allocate(self, words: int) -> None:
        """Buffers of so many int32 words: one on the device, and pinned ones in rotation."""
        self._turn = 0
        self._host = [torch.empty(words, dtype=torch.int32, pin_memory=True) for _ in range(PINNED)]
        self._sent = [torch.cuda.Event() for _ in range(PINNED)]
        self._words = torch.empty(words, dtype=torch.int32, device=self.device)

    def send(self, step: StepInput, bucket: Bucket, num_steps: int = 1) -> StepMetadata:
        self._remember(step)
        metadata = self.metadata(bucket)
        if not self._continues(step, bucket):
            self._transfer(step, bucket)
        self._last = (bucket, step) if num_steps == 1 else None
        return metadata

    def metadata(self, bucket: Bucket) -> StepMetadata:
        """The bucket's fields at their fixed addresses."""
        if bucket in self._captured:
            return self._captured[bucket]
        return Layout.of(bucket).views(self._words, self._max_new_blocks, self._state.max_blocks)

    def placeholder(self, bucket: Bucket) -> StepMetadata:
        """The bucket's metadata filled as an all-padding step: what a capture runs on."""
        metadata = self._captured[bucket] = self.metadata(bucket)
        self._words.zero_()
        metadata.slots.fill_(self._state.dummy_slot)
        self._last = None
        return metadata

    def _continues(self, step: StepInput, bucket: Bucket) -> bool:
        """Whether the last step's metadata describes this step too, whose tokens only the device knows."""
        if self._last is None or self._last[0] != bucket or len(step.new_blocks) or step.num_tokens != step.num_seqs:
            return False
        last = self._last[1]
        return bool(
            _same(step.slots, last.slots)
            and step.token_ids.max() < 0
            and _same(step.token_ids, last.token_ids)
            and _same(step.sampled, last.sampled)
            and _same(step.sampling.seeds, last.sampling.seeds)
            and _same(step.sampling.temperature, last.sampling.temperature)
        )

    def _transfer(self, step: StepInput, bucket: Bucket) -> None:
        layout = Layout.of(bucket)
        # prompts that the cache holds whole bring more than the buffer takes
        if len(step.new_blocks) > self._max_new_blocks:
            self._put_new_blocks(step.new_blocks)
            step.new_blocks = step.new_blocks[:0]
        turn = self._turn = (self._turn + 1) % PINNED
        self._sent[turn].synchronize()  # the transfer of three steps ago: long done
        host, words = self._host[turn], layout.new_blocks + step.new_blocks.size
        self._fill(host.numpy(), layout, step)
        self._words[:words].copy_(host[:words], non_blocking=True)
        self._sent[turn].record()

    def _put_new_blocks(self, new_blocks: np.ndarray) -> None:
        slots, index, block = torch.from_numpy(new_blocks).to(self.device).unbind(1)
        self._state.block_tables[slots.long(), index.long()] = block


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one is other or np.array_equal(one, other)
