"""Several steps in one launch give what they give one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.compiler.step.capture_queue import CAPTURE_NOW
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.inputs import Filters, SamplingInput, StepInput
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options

SEQS, BLOCK, NUM_BLOCKS = 3, 8, 6  # blocks of each sequence
LENGTHS = np.array([5, 1, 13])  # of the prompts
TIMES = 5
NO_BLOCKS = np.empty((0, 3), np.int32)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltModel]:
    """Random weights, uncompiled; on CUDA with the graphs of its buckets, without draft graphs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=128,
    ).save_pretrained(folder := tmp_path_factory.mktemp("model"))  # fmt: skip
    config = Config(
        model=str(folder), load_format="dummy", dtype="float32", device=request.param, max_num_seqs=8,
        max_num_batched_tokens=64, block_size=BLOCK, num_blocks=1 + SEQS * NUM_BLOCKS, compile=False,
    )  # fmt: skip
    built = build_compiled(compiler_options(config), progress=False)
    yield built
    built.close()


def sampling(kind: str, seqs: int = SEQS) -> SamplingInput:
    """Of the first `seqs` sequences: all greedy, or one of them."""
    temperature = np.array([0.0, 0.9, 1.3] if kind != "greedy" else [0.0] * SEQS, np.float32)
    filters = Filters(np.full(seqs, 20, np.int32), np.full(seqs, 0.9, np.float32), np.zeros(seqs, np.float32))
    return SamplingInput(temperature[:seqs], np.arange(7, 7 + seqs), filters if kind == "filtered" else None)


def prompts(kind: str) -> StepInput:
    """All sequences, in blocks of their own."""
    counts = LENGTHS.astype(np.int32)
    index = np.arange(SEQS * NUM_BLOCKS)
    return StepInput(
        np.random.default_rng(0).integers(3, 300, counts.sum(), dtype=np.int32), np.arange(SEQS, dtype=np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), np.zeros(SEQS, np.int32), np.zeros(SEQS, bool),
        np.stack([index // NUM_BLOCKS, index % NUM_BLOCKS, 1 + index], axis=1).astype(np.int32), sampling(kind),
    )  # fmt: skip


def decode(kind: str, tokens: list[int], behind: int, seqs: int = SEQS) -> StepInput:
    """A token of each sequence, so many positions behind its prompt."""
    return StepInput(
        np.array(tokens[:seqs], np.int32), np.arange(seqs, dtype=np.int32), np.arange(seqs + 1, dtype=np.int32),
        (LENGTHS[:seqs] + behind).astype(np.int32), np.ones(seqs, bool), NO_BLOCKS, sampling(kind, seqs),
    )  # fmt: skip


def one_by_one(step, kind: str, seqs: int = SEQS) -> np.ndarray:
    step.launch(prompts(kind))
    tickets = [
        step.launch(decode(kind, [50, 60, 70] if behind == 0 else [-1] * SEQS, behind, seqs)) for behind in range(TIMES)
    ]
    return np.stack([ticket.wait().token_ids for ticket in tickets], axis=1)


@pytest.mark.parametrize("kind", ["greedy", "drawn", "filtered"])
def test_steps_in_one_launch_are_steps_one_by_one(built: BuiltModel, kind: str) -> None:
    """Begun with tokens of the host's, then continued by a second launch, over a border of blocks."""
    expected = one_by_one(built.step, kind)
    assert len(np.unique(expected)) > 3
    built.step.launch(prompts(kind))
    whole = built.step.launch(decode(kind, [50, 60, 70], 0), TIMES).wait().token_ids
    np.testing.assert_array_equal(whole, expected)
    built.step.launch(prompts(kind))
    tickets = [
        built.step.launch(decode(kind, [50, 60, 70], 0), 2),
        built.step.launch(decode(kind, [-1] * SEQS, 2), TIMES - 2),
    ]
    np.testing.assert_array_equal(np.concatenate([ticket.wait().token_ids for ticket in tickets], axis=1), expected)
    state = built.step.state
    np.testing.assert_array_equal(state.last_tokens[:SEQS].cpu(), expected[:, -1])
    np.testing.assert_array_equal(state.last_at[:SEQS].cpu(), LENGTHS + TIMES)


@pytest.mark.parametrize("seqs", [1, SEQS])
@pytest.mark.parametrize("kind", ["greedy", "drawn"])
@pytest.mark.parametrize("built", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_draft_graph_is_its_steps_one_by_one(built: BuiltModel, kind: str, seqs: int) -> None:
    """Padding beside the sequences, and steps of other kinds between two replays."""
    step, bucket = built.step, built.step.runner.capture_sizes.bucket(seqs, seqs)
    expected, draft = one_by_one(step, kind, seqs), Bucket(bucket.tokens, bucket.seqs, TIMES)
    for _ in range(CAPTURE_NOW + 2):  # captured on the way
        step.launch(prompts(kind))
        got = step.launch(decode(kind, [50, 60, 70], 0, seqs), TIMES)
        after = step.launch(decode(kind, [-1] * SEQS, TIMES, seqs))
        np.testing.assert_array_equal(got.wait().token_ids, expected)
        assert after.wait().token_ids.shape == (seqs,)
    assert draft in step.runner.graphs and step.runner.graphs.replay(draft).ids.shape == (bucket.seqs, TIMES)
    np.testing.assert_array_equal(one_by_one(step, kind, seqs), expected)
    np.testing.assert_array_equal(step.state.last_at[:seqs].cpu(), LENGTHS[:seqs] + TIMES)
