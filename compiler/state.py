"""Tensors that outlive a step: KV caches, the last sampled token of every row, penalty counts; and staging.

A row is a device slot that a running sequence owns. Padding uses the scrap row `max_num_seqs` and the
scrap page 0. On CUDA every tensor keeps its address, so captured graphs stay valid, and a step's metadata
travels in one pinned packet; on the CPU the packet itself is read. Knows no scheduling and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from compiler.buckets import Bucket
from compiler.capture import AttentionLayout
from compiler.step_input import StepInput

ALIGN = 16  # int32 words: every field starts on a 64-byte border
PACKETS = 3  # host packets in rotation: at most two steps are in flight


@dataclass(slots=True)
class Staged:
    """One padded step on the device. Shapes: [T] tokens, [S] sequences, [S, M] block tables; int32 unless said."""

    token_ids: torch.Tensor
    token_rows: torch.Tensor  # [T] row of each token's sequence
    positions: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor  # [S]
    query_start: torch.Tensor  # [S + 1]
    seq_lens: torch.Tensor
    sampled: torch.Tensor  # [S] 0 or 1
    temperature: torch.Tensor  # [S] float32
    seeds: torch.Tensor  # [S] int64
    draw_positions: torch.Tensor  # [S] index of the sampled token in its sequence
    logits_index: torch.Tensor  # [S] last token of each sequence
    block_tables: torch.Tensor  # [S, M]


def _field_sizes(bucket: Bucket, blocks: int) -> dict[str, int]:
    tokens, seqs = bucket.tokens, bucket.seqs
    return {
        "token_ids": tokens, "token_rows": tokens, "positions": tokens, "slots": tokens,
        "rows": seqs, "query_start": seqs + 1, "seq_lens": seqs, "sampled": seqs, "logits_index": seqs,
        "temperature": seqs, "seeds": 2 * seqs, "draw_positions": seqs,
        "block_tables": seqs * blocks,
    }


class Staging:
    """Turns a StepInput into padded device tensors through one packet of int32 words."""

    def __init__(self, device: torch.device, largest: Bucket, max_blocks: int, scrap_row: int) -> None:
        self.device = device
        self.scrap_row = scrap_row
        self.max_blocks = max_blocks
        self._turn = 0
        if device.type == "cuda":
            words = sum(-(-size // ALIGN) * ALIGN for size in _field_sizes(largest, max_blocks).values())
            self._host = [torch.empty(words, dtype=torch.int32, pin_memory=True) for _ in range(PACKETS)]
            self._free = [torch.cuda.Event() for _ in range(PACKETS)]
            self._device = torch.empty(words, dtype=torch.int32, device=device)

    def stage(self, step: StepInput, bucket: Bucket) -> Staged:
        """Pad `step` to `bucket` and bring it to the device; on CUDA one asynchronous copy."""
        if self.device.type == "cpu":
            blocks = max(step.block_tables.shape[1], 2)
            packet, views = self._layout(bucket, blocks)
            host = torch.empty(packet, dtype=torch.int32)
            self._fill(host.numpy(), views, step, bucket, blocks)
            return self._views(host, views, bucket, blocks)
        turn = self._turn = (self._turn + 1) % PACKETS
        self._free[turn].synchronize()  # the copy of three steps ago: long done
        packet, views = self._layout(bucket, self.max_blocks)
        host = self._host[turn]
        self._fill(host.numpy(), views, step, bucket, self.max_blocks)
        self._device[:packet].copy_(host[:packet], non_blocking=True)
        self._free[turn].record()
        return self._views(self._device, views, bucket, self.max_blocks)

    def placeholder(self, bucket: Bucket) -> Staged:
        """The bucket's device views filled as an all-padding step: what a capture runs on."""
        packet, views = self._layout(bucket, self.max_blocks)
        host = np.zeros(packet, np.int32)
        host[views["token_rows"]] = self.scrap_row
        host[views["rows"]] = self.scrap_row
        self._device[:packet].copy_(torch.from_numpy(host))
        return self._views(self._device, views, bucket, self.max_blocks)

    @staticmethod
    def _layout(bucket: Bucket, blocks: int) -> tuple[int, dict[str, slice]]:
        at, views = 0, {}
        for name, size in _field_sizes(bucket, blocks).items():
            views[name] = slice(at, at + size)
            at += -(-size // ALIGN) * ALIGN
        return at, views

    def _fill(self, host: np.ndarray, views: dict[str, slice], step: StepInput, bucket: Bucket, blocks: int) -> None:
        tokens, seqs = step.num_tokens, step.num_seqs

        def put(name: str, values: np.ndarray, pad: int) -> None:
            field = host[views[name]]
            field[: len(values)] = values
            field[len(values):] = pad

        put("token_ids", step.token_ids, 0)
        put("token_rows", np.repeat(step.rows, np.diff(step.query_start)), self.scrap_row)
        put("positions", step.positions, 0)
        put("slots", step.slots, 0)
        put("rows", step.rows, self.scrap_row)
        put("query_start", step.query_start, tokens)
        put("seq_lens", step.seq_lens, 0)
        put("sampled", step.sampled, 0)
        put("logits_index", step.query_start[1:] - 1, 0)
        put("temperature", step.sampling.temperature.view(np.int32), 0)
        put("seeds", step.sampling.seeds.view(np.int32), 0)
        put("draw_positions", step.sampling.positions, 0)
        table = host[views["block_tables"]].reshape(bucket.seqs, blocks)
        table[:seqs, : step.block_tables.shape[1]] = step.block_tables
        table[:seqs, step.block_tables.shape[1]:] = 0
        table[seqs:] = 0

    @staticmethod
    def _views(packet: torch.Tensor, views: dict[str, slice], bucket: Bucket, blocks: int) -> Staged:
        fields = {name: packet[where] for name, where in views.items()}
        fields["block_tables"] = fields["block_tables"].view(bucket.seqs, blocks)
        fields["temperature"] = fields["temperature"].view(torch.float32)
        fields["seeds"] = fields["seeds"].view(torch.int64)
        return Staged(**fields)


class DeviceState:
    """Everything on the device that a later step reads."""

    def __init__(
        self,
        layouts: list[AttentionLayout],
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.scrap_row = max_num_seqs
        self.vocab_size = vocab_size
        # Separate whole tensors: a view of a shared storage would be cloned by functionalization.
        self.key_caches = [
            torch.zeros(num_blocks, block_size, a.num_kv_heads, a.head_size, dtype=dtype, device=device) for a in layouts
        ]
        self.value_caches = [
            torch.zeros(num_blocks, block_size, a.num_kv_heads, a.value_size, dtype=dtype, device=device) for a in layouts
        ]
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._counts: tuple[torch.Tensor, torch.Tensor] | None = None

    def penalty_counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(output counts int32, prompt presence bool), each [max_num_seqs + 1, vocab]; made at first use."""
        if self._counts is None:
            shape, device = (self.scrap_row + 1, self.vocab_size), self.last_tokens.device
            self._counts = (
                torch.zeros(shape, dtype=torch.int32, device=device),
                torch.zeros(shape, dtype=torch.bool, device=device),
            )
        return self._counts

    def reset_row(self, row: int, prompt_ids: np.ndarray, output_ids: np.ndarray) -> None:
        """Rebuild the penalty counts of `row` for a sequence that starts or restarts in it."""
        outputs, prompt = self.penalty_counts()
        device = outputs.device
        outputs[row].zero_()
        prompt[row].zero_()
        prompt[row].index_fill_(0, torch.as_tensor(prompt_ids, dtype=torch.long, device=device), True)
        ids = torch.as_tensor(output_ids, dtype=torch.long, device=device)
        outputs[row].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))


def bytes_per_block(layouts: list[AttentionLayout], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of K and V that one page takes over all layers."""
    return sum(a.num_kv_heads * (a.head_size + a.value_size) for a in layouts) * block_size * dtype.itemsize
