"""Which draft tokens are accepted and what is drafted next: Triton against plain arrays, and these by hand and against another search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pagegraph.kernels.ops  # noqa: F401  registers torch.ops.pagegraph
from pagegraph.kernels.spec_decode import cpp as spec_decode_cpp
from pagegraph.kernels.spec_decode import reference
from pagegraph.runtime.spec_decode.proposer import NgramProposer, continuation

NUM_SLOTS, WIDTH, DRAFT_TOKENS = 7, 2500, 5
MIN_NGRAM, MAX_NGRAM = 2, 4


def words(values: object) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.int32))


def text_of(rng: np.random.Generator, size: int) -> np.ndarray:
    """Tokens with repetitions of all lengths, or with none."""
    return rng.integers(0, rng.choice([2, 4, 50, 100_000]), size)


def step_of(seed: int, padding: int = 2) -> dict[str, torch.Tensor]:
    """A step of several kinds: prompts, some unfinished, single tokens, and slots with draft tokens, right ones and wrong ones."""
    rng = np.random.default_rng(seed)
    history = np.stack([text_of(rng, WIDTH) for _ in range(NUM_SLOTS + 1)])
    ids, tokens, slots, counts, lengths, sampled = [], [], [], [], [], []
    for slot in rng.permutation(NUM_SLOTS)[: rng.integers(1, NUM_SLOTS + 1)].tolist():
        kind, start = rng.choice(["prompt", "part", "one", "draft_tokens"]), int(rng.integers(1, WIDTH - 1400))
        if kind in ("prompt", "part"):
            count = int(rng.choice([2, 9, 1300]))
            queries = [(count, start + count, kind == "prompt")]
            tokens.append(text_of(rng, count))
        else:
            many = int(rng.integers(1, DRAFT_TOKENS + 1)) + 1 if kind == "draft_tokens" else 1
            queries = [(1, start + 1 + j, kind == "one") for j in range(many)]
            tokens.append(text_of(rng, many))
        drawn = text_of(rng, len(queries))
        if kind == "draft_tokens":
            right = rng.integers(0, many)
            drawn[:right] = tokens[-1][1 : right + 1]
        ids.append(drawn)
        slots += [slot] * len(queries)
        for count, length, draws in queries:
            counts.append(count), lengths.append(length), sampled.append(draws)
    total, live = sum(counts), len(slots)
    fill = np.zeros(padding, np.int64)
    return dict(
        ids=torch.from_numpy(np.concatenate([*ids, fill])), token_ids=words(np.concatenate([*tokens, fill])), slots=words([*slots, *[NUM_SLOTS] * padding]),
        query_start=words([0, *np.cumsum(counts), *[total] * padding]), seq_lens=words([*lengths, *fill]), sampled=words([*sampled, *fill]),
        history=words(history), draft_tokens=words(rng.integers(0, 4, (NUM_SLOTS + 1, DRAFT_TOKENS))), last_tokens=words(rng.integers(0, 9, NUM_SLOTS + 1)),
        last_at=words(rng.integers(0, 9, NUM_SLOTS + 1)), live=torch.tensor(live),
    )  # fmt: skip


STEP = ("ids", "token_ids", "slots", "query_start", "seq_lens")
MORE = ("sampled", "last_tokens", "last_at", "history", "draft_tokens")


@pytest.mark.parametrize("seed", range(12))
def test_kernels_equal_reference(triton_calls, seed: int) -> None:
    one = step_of(seed, padding=seed % 3)
    common = [one[name] for name in STEP]
    last = [one[name] for name in ("last_tokens", "last_at")]
    _, after = triton_calls.call("pagegraph.kernels.spec_decode.ngram", "accept", *common, *last, DRAFT_TOKENS)
    reference.accept(*common, *last, DRAFT_TOKENS)
    assert torch.equal(after[5], last[0]) and torch.equal(after[6], last[1])
    one = step_of(seed, padding=seed % 3)
    common, more = ([one[name] for name in names] for names in (STEP, MORE))
    found, after = triton_calls.call(
        "pagegraph.kernels.spec_decode.ngram", "propose_ngram", *common, *more, MIN_NGRAM, MAX_NGRAM
    )
    expected = reference.propose_ngram(*common, *more, MIN_NGRAM, MAX_NGRAM)
    live = int(one["live"])
    assert torch.equal(found[:, :live], expected[:, :live])
    assert all(torch.equal(changed, own) for changed, own in zip(after[6:], more[1:]))


@pytest.mark.parametrize("seed", range(40))
def test_cpp_equals_reference(seed: int) -> None:
    spec_decode_cpp.build()
    assert spec_decode_cpp._kernel is not None
    one, other = (step_of(seed, padding=seed % 3) for _ in range(2))
    names = (*STEP, *MORE)
    found = torch.ops.pagegraph.propose_ngram(*(one[name] for name in names), MIN_NGRAM, MAX_NGRAM)
    expected = reference.propose_ngram(*(other[name] for name in names), MIN_NGRAM, MAX_NGRAM)
    assert torch.equal(found, expected)
    assert all(torch.equal(one[name], other[name]) for name in names)


def test_by_hand() -> None:
    """Slot 1 has two draft tokens, of which the first holds; slot 0 decodes; slot 2 has a prompt that goes on."""
    history = torch.zeros(3, 20, dtype=torch.int32)
    history[1, :7] = words([5, 6, 7, 8, 9, 5, 6])
    step = (
        torch.tensor([7, 4, 9, 3, 1]),
        words([6, 7, 8, 2, 4, 4]),
        words([1, 1, 1, 0, 2]),
        words([0, 1, 2, 3, 4, 6]),
        words([7, 8, 9, 3, 2]),
    )
    tokens, at = words([0, 0, 0]), words([0, 0, 0])
    reference.accept(*step, tokens, at, 2)
    assert tokens.tolist() == [0, 4, 0] and at.tolist() == [0, 8, 0], "a slot without draft tokens is not its business"
    draft_tokens = words([[3, 3], [7, 9], [1, 1]])
    found = reference.propose_ngram(*step, words([0, 0, 0, 1, 0]), tokens, at, history, draft_tokens, 1, 3)
    assert history[1, :10].tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 4, 0] and history[0, :5].tolist() == [0, 0, 2, 3, 0]
    assert history[2, :3].tolist() == [4, 4, 0]
    assert found.tolist() == [[1, 0, 0, 1, 0], [6, 7, 8, 2, 4]], (
        "no match for either, but both first draft tokens were right"
    )
    assert draft_tokens.tolist() == [[3, 3], [4, 4], [1, 1]]


@settings(max_examples=200)
@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    min_ngram=st.integers(1, 3),
    more=st.integers(0, 3),
    count=st.integers(1, 6),
)
def test_what_is_looked_up_is_what_the_search_of_one_slot_finds(
    tokens: list[int], min_ngram: int, more: int, count: int
) -> None:
    text = np.array(tokens, np.int32)
    slots = np.stack([np.append(text, [1, 1, 1]), np.zeros(len(text) + 3)]).astype(np.int32)
    draft_tokens, matched = reference.ngram_proposal(
        slots, np.array([len(text), 1]), count, min_ngram, min_ngram + more
    )
    end, seen = NgramProposer(min_ngram, min_ngram + more).find(text)
    assert matched.tolist() == [seen, 0]
    assert draft_tokens[0].tolist() == (continuation(text, end, count) if end else np.full(count, text[-1])).tolist()


def test_what_was_looked_up_by_tokens_that_were_not_it_is_made_good() -> None:
    """A step that draws again, with filters say, settles again."""
    one, other = step_of(3), step_of(3)
    reference.propose_ngram(
        torch.zeros_like(one["ids"]), *(one[name] for name in (*STEP[1:], *MORE)), MIN_NGRAM, MAX_NGRAM
    )
    again = reference.propose_ngram(*(one[name] for name in (*STEP, *MORE)), MIN_NGRAM, MAX_NGRAM)
    straight = reference.propose_ngram(*(other[name] for name in (*STEP, *MORE)), MIN_NGRAM, MAX_NGRAM)
    assert torch.equal(again[0] >> 1, straight[0] >> 1) and torch.equal(one["draft_tokens"], other["draft_tokens"])
