"""The next tokens on the CPU, by PyTorch's calls, and what a bitmask forbids. Knows no filters and no scheduling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagegraph.kernels.sampling import reference

ROWS_AT_ONCE = 8  # of `sample_allowed`: where nearly all tokens are allowed, more would not stay in the cache


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
    _hand_over(sampled.numpy() > 0, ids, positions, slots, last_tokens, last_at)
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
    """See `kernels.ops`. Over the tokens alone that are allowed, of several rows at once: often they are few."""
    sampled_ids, all_rows, words = ids.numpy(), rows.numpy(), bitmask.numpy()
    tokens = sampled_ids[all_rows]
    allowed = words[np.arange(len(all_rows)), tokens // 32] >> tokens % 32 & 1
    wrong = np.flatnonzero((all_rows >= 0) & (allowed == 0))
    if not len(wrong):
        return
    for at in range(0, len(wrong), ROWS_AT_ONCE):
        some = wrong[at : at + ROWS_AT_ONCE]
        owner, token = _set_bits(words[some], logits.shape[1])
        row = torch.from_numpy(all_rows[some].astype(np.int64))[owner]
        scores = _scores(row, token, logits, temperature, seeds, positions).numpy()
        begin, ends = 0, np.searchsorted(owner.numpy(), np.arange(len(some)), side="right")
        for each, end in zip(all_rows[some].tolist(), ends.tolist()):
            sampled_ids[each] = int(token[begin + scores[begin:end].argmax()]) if end > begin else 0
            begin = end
    anew = all_rows[wrong]
    _hand_over(anew[sampled.numpy()[anew] > 0], ids, positions, slots, last_tokens, last_at)


def _hand_over(
    which: np.ndarray, ids: Tensor, positions: Tensor, slots: Tensor, last_tokens: Tensor, last_at: Tensor
) -> None:
    """Write the ids of some rows, numbers or bool [S], and their positions where the next step finds them."""
    owners = slots.numpy()[which]
    last_tokens.numpy()[owners], last_at.numpy()[owners] = ids.numpy()[which], positions.numpy()[which]


def _set_bits(words: np.ndarray, vocab: int) -> tuple[Tensor, Tensor]:
    """Of words int32 [R, W] the row and the token of every bit that is 1, int64, in rising order."""
    row, word = words.nonzero()
    bits = np.unpackbits(words[row, word].view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    at, bit = bits.nonzero()
    token = word[at] * 32 + bit
    return torch.from_numpy(row[at][token < vocab]), torch.from_numpy(token[token < vocab])


def _scores(
    row: Tensor, token: Tensor, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """What `reference.gumbel_argmax` compares, of tokens int64 [N], each of its row int64 [N]."""
    scores, scale = logits[row, token].float(), temperature[row]
    drawn = scale > 0
    bits = reference.bits_of(reference.streams(seeds, positions)[row], token)
    return torch.where(drawn, scores / torch.where(drawn, scale, 1.0) + reference.noise_of(bits), scores)


def sample_with_noise(ids: Tensor, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> None:
    """`reference.gumbel_argmax` into ids int64 [S], of sequences with a temperature only."""
    drawn = temperature.numpy() > 0
    if drawn.any():
        drawn = torch.from_numpy(drawn.nonzero()[0])
        ids[drawn] = reference.gumbel_argmax(logits[drawn], temperature[drawn], seeds[drawn], positions[drawn])
