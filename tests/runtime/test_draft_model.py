"""The model that guesses: its draws against the target's, and its bookkeeping against a plain recomputation."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiler.step import Ticket
from compiler.step_input import StepInput, StepOutput
from kernels import reference
from runtime.draft_model import DraftModel
from runtime.protocol import SamplingParams
from runtime.request import Sequence
from runtime.rows import Rows
from runtime.verify import Guessed, verdict

DRAWS = 200_000
VOCAB = 6
CRITICAL = {5: 25.7, 30: 70.0}  # of chi-square at 0.9999, by degrees of freedom (30: above it)


def chi_square(counts: np.ndarray, chances: np.ndarray) -> float:
    expected = counts.sum() * chances
    return float(((counts - expected) ** 2 / expected).sum())


def log_chances(seed: int) -> torch.Tensor:
    """[VOCAB + 1, VOCAB]: of the next token, by the one before; the last row at the start."""
    return (1.5 * torch.randn(VOCAB + 1, VOCAB, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def drawn(logits: torch.Tensor, position: int) -> torch.Tensor:
    """One draw a row, with the seeds 0.. and the position's noise, as both models draw."""
    seeds = torch.arange(DRAWS)
    return reference.gumbel_argmax(logits, torch.ones(DRAWS), seeds, torch.full((DRAWS,), position))


def test_verified_draws_follow_the_target_and_agree_more_often_than_independent_ones() -> None:
    """Two guesses by a model q for a target p, both chains over a small vocabulary, through the verdict of the engine."""
    target, guesser = log_chances(0), log_chances(1)
    guesses = [drawn(guesser[-1].expand(DRAWS, -1), 10)]
    guesses.append(drawn(guesser[guesses[0]], 11))
    entries = [drawn(target[-1].expand(DRAWS, -1), 10), drawn(target[guesses[0]], 11), drawn(target[guesses[1]], 12)]
    ints = lambda value: np.full(DRAWS, value, np.int32)  # noqa: E731
    guessed = Guessed(np.arange(DRAWS, dtype=np.int32), ints(2), 3 * np.arange(DRAWS, dtype=np.int32), np.zeros(3 * DRAWS, bool), None)
    sampled = torch.stack(entries, 1).flatten().int().numpy()
    found = verdict(
        guessed, sampled, torch.stack(guesses, 1).int().numpy(), ints(10), ints(100), ints(0), np.full((DRAWS, 1), -1, np.int32)
    )
    p, q = target.exp().numpy(), guesser.exp().numpy()
    first, second = found.tokens[:, 0], found.tokens[:, 1]
    assert chi_square(np.bincount(first, minlength=VOCAB), p[-1]) < CRITICAL[5]
    on = found.lengths > 1  # the first guess held: the next token is the target's own given it
    pairs = np.bincount(first[on] * VOCAB + second[on], minlength=VOCAB**2).reshape(VOCAB, VOCAB)
    statistic = sum(chi_square(pairs[token], p[token]) for token in range(VOCAB))
    assert statistic < CRITICAL[30]
    # P(both draw i) = 1 / sum_j max(p_j / p_i, q_j / q_i): the larger of two races decides (Daliri et al. 2024).
    ratio = np.maximum(p[-1] / p[-1][:, None], q[-1] / q[-1][:, None]).sum(axis=1)
    agree, independent, most = (1 / ratio).sum(), (p[-1] * q[-1]).sum(), np.minimum(p[-1], q[-1]).sum()
    reached = (found.accepted > 0).mean()
    assert abs(reached - agree) < 4 * (agree * (1 - agree) / DRAWS) ** 0.5
    assert independent + 0.1 < reached <= most
    assert not (found.accepted > found.counts).any() and (found.accepted == 2).any()


def next_token(history: list[int]) -> int:
    return (7 * sum(history) + 3 * len(history)) % 11


class FakeStep:
    """Remembers the tokens whose keys it has computed, by row and position, and says what follows them."""

    def __init__(self, num_rows: int) -> None:
        self.memory: list[dict[int, int]] = [{} for _ in range(num_rows)]
        self.last = np.zeros(num_rows, np.int64)
        self.largest = 0
        self.limits = [1000] * num_rows  # tokens that the row has pages for

    def launch(self, step: StepInput) -> Ticket:
        self.largest = max(self.largest, step.num_tokens)
        ids = np.where(step.token_ids < 0, self.last[np.repeat(step.rows, np.diff(step.query_start))], step.token_ids)
        for entry, row in enumerate(step.rows.tolist()):
            assert int(step.starts[entry]) + step.query_start[entry + 1] - step.query_start[entry] <= self.limits[row]
            for at, token in enumerate(ids[step.query_start[entry] : step.query_start[entry + 1]].tolist()):
                self.memory[row][int(step.starts[entry]) + at] = token
        sampled = []
        for row, length, draws in zip(step.rows.tolist(), step.seq_lens.tolist(), step.sampled.tolist()):
            sampled.append(next_token([self.memory[row][at] for at in range(length)]))
            if draws:
                self.last[row] = sampled[-1]
        return Ticket(lambda: StepOutput(np.array(sampled, np.int32)))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    turns=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5), st.booleans()), min_size=1, max_size=8),
    max_tokens=st.integers(4, 40),
    max_entries=st.integers(4, 12),
)
def test_guesses_are_those_of_the_confirmed_tokens_alone(lengths, turns, max_tokens, max_entries) -> None:
    """Whatever held, was corrected or went on without guesses: keys of the past are right when the next are made."""
    rows = Rows(len(lengths), 200, 16)
    for index, length in enumerate(lengths):
        rows.enter(Sequence(str(index), np.arange(length) + index, SamplingParams(), frozenset(), 0, 200), [], 0)
    step = FakeStep(len(lengths))
    model = DraftModel(step, rows, max_tokens, max_entries)
    for count, kept, others in turns:
        at = np.arange(len(lengths), dtype=np.int32)[:: 2 if others and len(lengths) > 1 else 1]
        counts = np.array([1 + (count + index) % 4 for index in range(len(at))], np.int32)
        for row, wanted in zip(at.tolist(), counts.tolist()):
            step.limits[row] = int(rows.known[row]) + wanted - 1  # the last guess is not computed
        guessed = [tokens[:wanted] for tokens, wanted in zip(model.propose(at, counts).tolist(), counts.tolist())]
        for row, tokens in zip(at.tolist(), guessed):
            history = rows.tokens[row, : rows.known[row]].tolist()
            for token in tokens:
                assert token == next_token(history)
                history.append(token)
            came = [*tokens[:kept], *([1] * (kept + 1 - len(tokens[:kept])))]  # guesses that held, and others
            rows.tokens[row, rows.known[row] : rows.known[row] + len(came)] = came
            rows.known[row] += len(came)
    assert step.largest <= max(max_tokens, max_entries)


def test_a_sequence_that_enters_a_row_is_computed_from_its_start() -> None:
    rows = Rows(1, 200, 16)
    model = DraftModel(step := FakeStep(1), rows, 40, 8)
    for tokens in ([1, 2, 3], [4, 5, 6, 7]):
        rows.enter(Sequence("a", np.array(tokens), SamplingParams(), frozenset(), 0, 200), [], 0)
        assert model.propose(np.zeros(1, np.int32), np.full(1, 2, np.int32))[0, 0] == next_token(tokens)
        step.memory[0].clear()
        rows.leave(0)
