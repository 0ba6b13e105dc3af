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


def sample_allowed(
    ids: Tensor,
    rows: Tensor,
    bitmask: Tensor,
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    slots: Tensor,
    sampled: Tensor,
    last_tokens: Tensor,
    last_at: Tensor,
) -> None:
    """See `kernels.ops`. Row by row, over the tokens alone that are allowed: often they are few."""
    bits = bitmask.contiguous().numpy().view(np.uint8)
    for index, row in enumerate(rows.tolist()):
        token = int(ids[row])
        if row < 0 or bits[index, token // 8] >> token % 8 & 1:
            continue
        allowed = np.unpackbits(bits[index], count=logits.shape[1], bitorder="little").nonzero()[0]
        ids[row] = token = _best_of(
            torch.from_numpy(allowed), *(one[row : row + 1] for one in (logits, temperature, seeds, positions))
        )
        if sampled[row] > 0:
            last_tokens[slots[row]], last_at[slots[row]] = token, positions[row]


def _best_of(allowed: Tensor, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> int:
    """The token of one row, of ids int64 [N] in rising order; 0 if there is none."""
    if not len(allowed):
        return 0
    scores = logits[0, allowed].float()
    if temperature > 0:
        scores = scores / temperature + reference.gumbel(seeds, positions, allowed)[0]
    return int(allowed[scores.max(dim=0).indices])


def sample_with_noise(ids: Tensor, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> None:
    """`reference.gumbel_argmax` into ids int64 [S], of sequences with a temperature only."""
    drawn = temperature.numpy() > 0
    if drawn.any():
        drawn = torch.from_numpy(drawn.nonzero()[0])
        ids[drawn] = reference.gumbel_argmax(logits[drawn], temperature[drawn], seeds[drawn], positions[drawn])
