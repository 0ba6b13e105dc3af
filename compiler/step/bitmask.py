"""Bitmasks on their way to the device: written on the host while a step runs, brought over by one copy.

Buffers are used again and again: pinned memory is dear to ask for. Two on the host, because a step is launched while the
one before samples; one on the device, because masks are written when the tokens before them are on the host. Knows no
grammar and no step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Bitmask(NamedTuple):
    """Which tokens some sequences of a step may get; see `pagegraph::apply_bitmask`."""

    rows: torch.Tensor  # int32 [R]
    words: torch.Tensor  # int32 [R, ceil(vocab / 32)]


class _Buffer:
    """Memory for bitmasks of up to `capacity` rows: first all rows, then all words."""

    def __init__(self, capacity: int, words: int, device: torch.device, pinned: bool) -> None:
        self.capacity = capacity
        self._words = words
        self.memory = torch.empty(capacity * (1 + words), dtype=torch.int32, device=device, pin_memory=pinned)
        self._views: dict[int, Bitmask] = {}

    def of(self, count: int) -> Bitmask:
        """Of the first `count` rows."""
        if count not in self._views:
            words = self.memory[self.capacity : self.end(count)].view(count, self._words)
            self._views[count] = Bitmask(self.memory[:count], words)
        return self._views[count]

    def end(self, count: int) -> int:
        """Where the words of the first `count` rows end in the memory."""
        return self.capacity + count * self._words


class BitmaskBuffers:
    """Of the steps of one device."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._words = -(-vocab_size // 32)
        self._device = device
        self._on_device: _Buffer | None = None
        self._on_host: list[_Buffer] = []
        self._turn = 0
        self._uploads = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, rows: np.ndarray, padded_to: int = 1) -> Bitmask:
        """One on the host for the rows int32 [R], its words not written yet; until the second next is taken.

        padded_to: rows that `padded` will be asked for, at most.
        """
        wanted = max(len(rows), padded_to)
        if not self._on_host or wanted > self._on_host[0].capacity:
            capacity = max(1 << (wanted - 1).bit_length(), 16)
            pinned = self._uploads is not None
            self._on_host = [_Buffer(capacity, self._words, torch.device("cpu"), pinned) for _ in range(2)]
            if pinned:
                self._on_device = _Buffer(capacity, self._words, self._device, False)
        self._turn ^= 1
        host = self._on_host[self._turn]
        all_rows = host.of(host.capacity).rows.numpy()
        all_rows[: len(rows)], all_rows[len(rows) :] = rows, -1
        return host.of(len(rows))

    def send(self, bitmask: Bitmask) -> Bitmask:
        """The one taken last, on the device; the current stream waits for the copy, which is made beside it."""
        if self._uploads is None or self._on_device is None:
            return bitmask
        count, host = len(bitmask.rows), self._on_host[self._turn]
        end = host.end(count)
        with torch.cuda.stream(self._uploads):
            self._on_device.memory[:end].copy_(host.memory[:end], non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._uploads)
        return self._on_device.of(count)

    def padded(self, count: int) -> Bitmask:
        """The one that was sent last, on the device, with rows of -1 behind its own: at the same address every time."""
        assert self._on_device is not None
        return self._on_device.of(count)
