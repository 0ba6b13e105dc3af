"""Verification of draft tokens and the n-gram proposer in numpy: the specification and the oracle of the tests. Knows no device."""

from __future__ import annotations

import numpy as np
import torch

MAX_MATCH = 32  # a match is measured up to so many tokens


def verify(
    ids: torch.Tensor, token_ids: torch.Tensor, slots: torch.Tensor, query_start: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every live slot of a step, in order: (its first query, the query behind the accepted draft tokens, its last); int64 [R].

    The queries of a slot stand together, the second and later ones a draft token each.
    """
    begins = query_start.numpy()
    live = int((begins[1:] > begins[:-1]).sum())  # padding comes last
    ids, slots, starts = ids.numpy()[:live], slots.numpy()[:live], begins[:live]
    draft = np.zeros(live, bool)
    draft[1:] = slots[1:] == slots[:-1]
    if not draft.any():
        alone = np.arange(live)
        return alone, alone, alone
    wrong = np.zeros(live, bool)
    wrong[1:] = draft[1:] & (token_ids.numpy()[starts[1:]] != ids[:-1])
    first = np.flatnonzero(~draft)
    last = np.append(first[1:], live) - 1
    total = np.cumsum(wrong)
    slot = np.cumsum(~draft) - 1
    accepted = total == total[first][slot]
    return first, first + np.bincount(slot, accepted, minlength=len(first)).astype(np.int64) - 1, last


def accept(
    ids: torch.Tensor,
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    last_tokens: torch.Tensor,
    last_at: torch.Tensor,
    max_draft_tokens: int,
) -> None:
    """See `kernels.ops`."""
    _accept(verify(ids, token_ids, slots, query_start), ids, slots, seq_lens, last_tokens, last_at)


def _accept(
    accepted: tuple[np.ndarray, np.ndarray, np.ndarray],
    ids: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    last_tokens: torch.Tensor,
    last_at: torch.Tensor,
) -> None:
    first, kept, last = accepted
    kept = kept[last > first]
    owners = slots.numpy()[kept]
    last_tokens.numpy()[owners], last_at.numpy()[owners] = ids.numpy()[kept], seq_lens.numpy()[kept]


def propose_ngram(
    ids: torch.Tensor,
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    sampled: torch.Tensor,
    last_tokens: torch.Tensor,
    last_at: torch.Tensor,
    history: torch.Tensor,
    draft_tokens: torch.Tensor,
    min_ngram: int,
    max_ngram: int,
) -> torch.Tensor:
    """See `kernels.ops`."""
    found = np.zeros((2, len(ids)), np.int32)
    firsts, kepts, lasts = accepted = verify(ids, token_ids, slots, query_start)
    _accept(accepted, ids, slots, seq_lens, last_tokens, last_at)
    if not len(firsts):
        return torch.from_numpy(found)
    text, tokens, drawn = history.numpy(), token_ids.numpy(), ids.numpy()
    lengths, begins, owners = seq_lens.numpy(), query_start.numpy(), slots.numpy()
    found[1, : lasts[-1] + 1] = tokens[begins[1 : lasts[-1] + 2] - 1]
    ended = (lasts > firsts) | (sampled.numpy()[firsts] > 0)
    for first, kept, sampling in zip(firsts.tolist(), kepts.tolist(), ended.tolist()):
        slot, begin, end, length = owners[first], begins[first], begins[first + 1], int(lengths[first])
        text[slot, length - (end - begin) : length] = tokens[begin:end]
        if sampling:
            text[slot, length : length + kept - first + 1] = drawn[first : kept + 1][: text.shape[1] - length]
    first, kept = firsts[ended], kepts[ended]
    if not len(first):
        return torch.from_numpy(found)
    at, known = owners[first], np.minimum(lengths[kept] + 1, text.shape[1])
    hit = draft_tokens.numpy()[at, 0] == drawn[first]
    proposed, matched = ngram_proposal(text[at, : known.max()], known, draft_tokens.shape[1], min_ngram, max_ngram)
    draft_tokens.numpy()[at] = proposed
    found[0, first] = 2 * matched + hit
    return torch.from_numpy(found)


def ngram_proposal(
    text: np.ndarray, known: np.ndarray, count: int, min_ngram: int, max_ngram: int
) -> tuple[np.ndarray, np.ndarray]:
    """text int32 [R, W], of which known[i] >= 1 tokens are slot i's -> (draft tokens int32 [R, count], matched int32 [R]).

    The latest place where the slot's last `min_ngram` to `max_ngram` tokens stood before, as many of them as stood anywhere; what
    followed there is drafted, going on with its period where that ends. matched: tokens alike, up to MAX_MATCH; 0
    where there is no such place, and the last token is drafted then.
    """
    slot, width = np.arange(len(text)), text.shape[1]
    at = np.arange(width)
    same = at < known[:, None] - 1
    length = np.zeros(same.shape, np.int32)
    for back in range(max_ngram):
        wanted = text[slot, np.maximum(known - 1 - back, 0)]
        same[:, back:] &= text[:, : width - back] == wanted[:, None]
        same[:, :back] = False
        if not same.any():
            break
        length += same
    best = length.max(axis=1)
    end = width - 1 - (length[:, ::-1] == best[:, None]).argmax(axis=1)
    back = np.arange(MAX_MATCH)
    before = end[:, None] - back
    alike = (before >= 0) & (
        text[slot[:, None], np.maximum(before, 0)] == text[slot[:, None], np.maximum(known[:, None] - 1 - back, 0)]
    )
    matched = np.where(best >= min_ngram, np.logical_and.accumulate(alike, axis=1).sum(axis=1), 0)
    begin = np.where(matched > 0, end + 1, known - 1)
    return text[slot[:, None], begin[:, None] + np.arange(count) % (known - begin)[:, None]], matched.astype(np.int32)
