"""The draft model: its draws against the target's, and its bookkeeping against a plain recomputation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.compiler.step.inputs import SamplingInput, StepInput
from pagegraph.compiler.step.step import CompiledStep
from pagegraph.kernels.sampling import reference
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.scheduler.draft_tokens import ScheduledDrafts, verify
from pagegraph.runtime.scheduler.input_batch import InputBatch
from pagegraph.runtime.scheduler.sequence import Sequence
from pagegraph.runtime.spec_decode.draft_model import DraftModel
from tests.runtime.fake_step import FakeStep, next_token

DRAWS = 200_000
VOCAB = 6
CRITICAL = {5: 25.7, 30: 70.0}  # of chi-square at 0.9999, by degrees of freedom (30: above it)


def chi_square(counts: np.ndarray, chances: np.ndarray) -> float:
    expected = counts.sum() * chances
    return float(((counts - expected) ** 2 / expected).sum())


def log_chances(seed: int) -> torch.Tensor:
    """[VOCAB + 1, VOCAB]: of the next token, by the one before; the last line at the start."""
    return (1.5 * torch.randn(VOCAB + 1, VOCAB, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def drawn(logits: torch.Tensor, position: int) -> torch.Tensor:
    """One draw a slot, with the seeds 0.. and the position's noise, as both models draw."""
    seeds = torch.arange(DRAWS)
    return reference.gumbel_argmax(logits, torch.ones(DRAWS), seeds, torch.full((DRAWS,), position))


def test_verified_draws_follow_the_target_and_agree_more_often_than_independent_ones() -> None:
    """Two draft tokens by a model q for a target p, both chains over a small vocabulary, through the verification of the engine."""
    target, drafter = log_chances(0), log_chances(1)
    draft_tokens = [drawn(drafter[-1].expand(DRAWS, -1), 10)]
    draft_tokens.append(drawn(drafter[draft_tokens[0]], 11))
    queries = [
        drawn(target[-1].expand(DRAWS, -1), 10),
        drawn(target[draft_tokens[0]], 11),
        drawn(target[draft_tokens[1]], 12),
    ]
    ints = lambda value: np.full(DRAWS, value, np.int32)  # noqa: E731
    drafted = ScheduledDrafts(
        np.arange(DRAWS, dtype=np.int32), ints(2), 3 * np.arange(DRAWS, dtype=np.int32), np.zeros(3 * DRAWS, bool), None
    )
    sampled = torch.stack(queries, 1).flatten().int().numpy()
    found = verify(
        drafted,
        sampled,
        torch.stack(draft_tokens, 1).int().numpy(),
        ints(10),
        ints(100),
        ints(0),
        np.full((DRAWS, 1), -1, np.int32),
    )
    p, q = target.exp().numpy(), drafter.exp().numpy()
    first, second = found.tokens[:, 0], found.tokens[:, 1]
    assert chi_square(np.bincount(first, minlength=VOCAB), p[-1]) < CRITICAL[5]
    on = found.lengths > 1  # the first draft token held: the next token is the target's own given it
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


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    turns=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5), st.booleans()), min_size=1, max_size=8),
    max_tokens=st.integers(4, 40),
    max_decode_tokens=st.integers(4, 12),
    together=st.booleans(),
)
def test_draft_tokens_are_those_of_the_committed_tokens_alone(
    lengths, turns, max_tokens, max_decode_tokens, together
) -> None:
    """Whatever held, was corrected or went on without draft tokens: keys of the past are right when the next are made."""
    batch, blocks = InputBatch(len(lengths), 200, 1), itertools.count(1)
    for index, length in enumerate(lengths):
        params = SamplingParams(max_tokens=100)
        batch.enter(Sequence(str(index), np.arange(length) + index, params, frozenset(), 0, 200), [], 0)
    step = FakeStep(1 + 200 * len(lengths), len(lengths), block_size=1, max_len=200, accepts=False)
    model = DraftModel(step, batch, max_tokens, max_decode_tokens, together)
    for count, kept, others in turns:
        at = np.arange(len(lengths), dtype=np.int32)[:: 2 if others and len(lengths) > 1 else 1]
        counts = np.array([1 + (count + index) % 4 for index in range(len(at))], np.int32)
        for slot, wanted in zip(at.tolist(), counts.tolist()):
            tokens = int(batch.known[slot]) + wanted - 1  # the last draft token is not computed
            missing = (-(-tokens // 4) * 4 if together else tokens) - int(batch.num_blocks[slot])
            batch.add_blocks(
                np.array([slot]), np.array([max(missing, 0)]), list(itertools.islice(blocks, max(missing, 0)))
            )
        drafted = [tokens[:wanted] for tokens, wanted in zip(model.propose(at, counts).tolist(), counts.tolist())]
        for slot, tokens in zip(at.tolist(), drafted):
            history = batch.tokens[slot, : batch.known[slot]].tolist()
            for token in tokens:
                assert token == next_token(history, 0)
                history.append(token)
            came = [*tokens[:kept], *([1] * (kept + 1 - len(tokens[:kept])))]  # accepted draft tokens, and others
            batch.tokens[slot, batch.known[slot] : batch.known[slot] + len(came)] = came
            batch.known[slot] += len(came)
    assert max(step.tokens) <= max(max_tokens, max_decode_tokens)


def test_a_sequence_that_enters_a_slot_is_computed_from_its_start() -> None:
    batch = InputBatch(1, 200, 16)
    model = DraftModel(step := FakeStep(3, 1, block_size=16, accepts=False), batch, 40, 8)
    for tokens in ([1, 2, 3], [4, 5, 6, 7]):
        batch.enter(Sequence("a", np.array(tokens), SamplingParams(), frozenset(), 0, 200), [1], 0)
        assert model.propose(np.zeros(1, np.int32), np.full(1, 2, np.int32))[0, 0] == next_token(tokens, 0)
        step.memory[:] = -5
        batch.leave(0)


def test_slots_that_want_fewer_draft_tokens_go_along_as_far_as_their_blocks_reach() -> None:
    """So draft tokens are one launch; one more where a slot lacks two tokens or more, or has no block to go on in."""
    batch = InputBatch(3, 200, 4)
    for index in range(3):
        params = SamplingParams(max_tokens=100)
        batch.enter(
            Sequence(str(index), np.arange(6) + index, params, frozenset(), 0, 200),
            [3 * index + at for at in (1, 2, 3)],
            0,
        )
    step, at = FakeStep(12, 3, accepts=False), np.arange(3, dtype=np.int32)
    model = DraftModel(step, batch, 40, 8, together=True)
    launches = []
    for counts in ([3, 1, 2], [2, 4, 2], [1, 1, 1], [6, 5, 1]):
        if max(counts) > 4:
            batch.add_blocks(at[:2], np.ones(2, np.int32), [10, 11])
        before = step.launches
        tokens = model.propose(at, np.array(counts, np.int32))
        launches.append(step.launches - before)
        assert tokens.shape == (3, max(counts))
        batch.tokens[at, batch.known] = tokens[:, 0]
        batch.known += 1
    # With prompts; chains; at last the third slot, with 9 tokens known and blocks for 12, leaves after its fourth draft token.
    assert launches == [2, 1, 1, 2]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def drafted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltModel:
    """Random weights, uncompiled, with a draft model."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    ).save_pretrained(folder := tmp_path_factory.mktemp("model"))
    config = Config(
        model=str(folder), speculative_model=str(folder), load_format="dummy", dtype="float32", device=request.param,
        max_num_seqs=4, max_num_batched_tokens=64, block_size=8, num_blocks=64, compile=False,
    )  # fmt: skip
    return build_compiled(compiler_options(config), progress=False)


def afresh(step: CompiledStep, history: list[int], count: int, temperature: float, seed: int) -> list[int]:
    """What follows, each token from all that comes before, in the last slot and blocks of its own."""
    tokens, slot, blocks = list(history), step.state.dummy_slot - 1, np.arange(16)
    for _ in range(count):
        one = StepInput(
            np.array(tokens, np.int32), np.full(1, slot, np.int32), np.array([0, len(tokens)], np.int32), np.zeros(1, np.int32),
            np.ones(1, bool), np.stack([np.full(16, slot), blocks, 48 + blocks], axis=1).astype(np.int32),
            SamplingInput(np.full(1, temperature, np.float32), np.full(1, seed, np.int64)),
        )  # fmt: skip
        tokens.append(int(step.launch(one).wait().token_ids[0]))
    return tokens[len(history) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("together", [False, True])
def test_draft_tokens_of_a_real_model_are_what_it_says_afresh(
    drafted: BuiltModel, temperature: float, together: bool
) -> None:
    """Also behind a token that is not what the model itself would have put behind accepted draft tokens."""
    batch, at, count = InputBatch(4, 128, 8), np.arange(2, dtype=np.int32), 4
    for index, length in enumerate((5, 11)):
        params = SamplingParams(max_tokens=100, temperature=temperature, seed=index)
        sequence = Sequence(str(index), np.arange(3, 3 + length), params, frozenset(), index, 128)
        batch.enter(sequence, list(range(1 + 16 * index, 17 + 16 * index)), 0)
    model = DraftModel(drafted.draft, batch, 64, 64, together)
    for kept in (count, 2, count, 0):
        draft_tokens = model.propose(at, np.array([count, count - 1], np.int32))
        for slot, wanted in ((0, count), (1, count - 1)):
            history = batch.tokens[slot, : batch.known[slot]].tolist()
            expected = afresh(
                drafted.draft, history, count if together else wanted, temperature, int(batch.sampling.seed[slot])
            )
            assert draft_tokens[slot, : len(expected)].tolist() == expected
            came = [*expected[: min(kept, wanted)], 299 - expected[-1]]
            batch.tokens[slot, batch.known[slot] : batch.known[slot] + len(came)] = came
            batch.known[slot] += len(came)
