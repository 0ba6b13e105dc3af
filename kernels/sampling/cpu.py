"""The next tokens on the CPU, by PyTorch's calls, and what a bitmask forbids. Knows no filters and no scheduling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagegraph.kernels.sampling import reference


def sample(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    slots: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
) -> Tensor:
    """See `kernels.ops`. Noise is made for the sequences with a temperature only."""
    ids = logits.max(dim=-1).indices  # `argmax` takes twice the time
    sample_with_noise(ids, logits, temperature, seeds, positions)
    kept = sampled.numpy() > 0
    owners = slots.numpy()[kept]
    last_tokens.numpy()[owners], last_at.numpy()[owners] = ids.numpy()[kept], positions.numpy()[kept]
    return ids


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """See `kernels.ops`. Row by row: a row stays in the cache."""
    bits = bitmask.contiguous().numpy().view(np.uint8)
    for row, words in zip(rows.tolist(), bits):
        forbidden = np.unpackbits(~words, count=logits.shape[1], bitorder="little")
        logits[row].masked_fill_(torch.from_numpy(forbidden.view(bool)), -torch.inf)


def forbidden(ids: Tensor, rows: Tensor, bitmask: Tensor) -> Tensor:
    """The indices int64 in rows [R] of those whose token of ids int64 [S] their bitmask forbids; none is below 0."""
    tokens = ids[rows.clamp(min=0).long()]
    words = bitmask.gather(1, (tokens // 32)[:, None])[:, 0]
    return ((rows >= 0) & ((words >> (tokens % 32) & 1) == 0)).nonzero()[:, 0]


def sample_with_noise(ids: Tensor, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> None:
    """`reference.gumbel_argmax` into ids int64 [S], of sequences with a temperature only."""
    drawn = temperature.numpy() > 0
    if drawn.any():
        drawn = torch.from_numpy(drawn.nonzero()[0])
        ids[drawn] = reference.gumbel_argmax(logits[drawn], temperature[drawn], seeds[drawn], positions[drawn])
