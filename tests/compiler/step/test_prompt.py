"""What a step brings back of prompts is what the forward's own hidden states and head give, captured or not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import GraniteConfig

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.compiler.step import prompt as step_prompt
from pagegraph.compiler.step.dummy import dummy_step, read_whole
from pagegraph.compiler.step.inputs import PromptInput, StepInput
from pagegraph.compiler.step.prompt import read_prompt
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options

BLOCK, LENGTHS = 8, (13, 1, 6)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltModel]:
    """Random weights and logits that are scaled behind the head; uncompiled, on CUDA with graphs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    GraniteConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, logits_scaling=0.125,
    ).save_pretrained(folder := tmp_path_factory.mktemp("model"))  # fmt: skip
    config = Config(
        model=str(folder), load_format="dummy", dtype="float32", device=request.param, max_num_seqs=8,
        max_num_batched_tokens=64, block_size=BLOCK, num_blocks=18, compile=request.param == "cuda",
    )  # fmt: skip
    built = build_compiled(compiler_options(config), progress=False)
    yield built
    built.close()


def prompts(asked: PromptInput | None) -> StepInput:
    """Three prompts in blocks of their own."""
    step = dummy_step(LENGTHS, 0, prompt=asked)
    step.slots = np.arange(3, dtype=np.int32)
    step.token_ids = np.random.default_rng(0).integers(3, 300, sum(LENGTHS), dtype=np.int32)
    step.sampled = np.ones(3, bool)
    step.new_blocks = np.array([(0, 0, 1), (0, 1, 2), (1, 0, 3), (2, 0, 4)], np.int32)
    return step


def some_rows() -> PromptInput:
    """All of the first prompt's but the last, and sums of the third's last and of the second's only token."""
    numbers = lambda *values: np.array(values, np.int32)  # noqa: E731
    targets = prompts(None).token_ids[1:13]
    return PromptInput(
        numbers(0, 1, 2), np.arange(12, dtype=np.int32), targets, numbers(12, 0, 0), 2, numbers(13, 18, 19), numbers(0, 1, 2)
    )  # fmt: skip


@torch.inference_mode()
def test_rows_and_sums_are_those_of_the_forward(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time; behind a graph, and beside tokens that are sampled as if nothing were asked."""
    monkeypatch.setattr(step_prompt, "MAX_LOGITS_BYTES", 5 * 4 * built.vocab_size)
    step, kept = built.step, []
    tokens = step.launch(prompts(None)).wait().token_ids
    keeps = lambda asked, hidden, *rest: kept.append(hidden.clone()) or read_prompt(asked, hidden, *rest)  # noqa: E731
    monkeypatch.setattr("pagegraph.compiler.step.executor.read_prompt", keeps)
    asked = some_rows()
    tickets = [step.launch(prompts(one)) for one in (asked, None, asked)]
    outputs = [ticket.wait() for ticket in tickets]
    for output in outputs:
        np.testing.assert_array_equal(output.token_ids, tokens)
    assert outputs[1].prompt is None and outputs[0].prompt.asked is asked
    hidden = kept[0][0]
    logits = step.paged_model.head(hidden[:12])
    unscaled = step.paged_model.model.lm_head(hidden[:12])
    torch.testing.assert_close(logits, unscaled / 0.125)
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.from_numpy(asked.targets).long().to(logits.device)[:, None])
    for one in (outputs[0].prompt, outputs[2].prompt):
        np.testing.assert_allclose(one.logprobs.chosen, chosen[:, 0].cpu(), atol=1e-4)
        np.testing.assert_array_equal(one.logprobs.ranks, 1 + (logprobs > chosen).sum(1).cpu())
        values, ids = logprobs.topk(2)
        np.testing.assert_allclose(one.logprobs.top_values, values.cpu(), atol=1e-4)
        np.testing.assert_array_equal(one.logprobs.top_ids, ids.cpu())
        np.testing.assert_allclose(one.sums[1], hidden[13].cpu(), atol=1e-5)
        np.testing.assert_allclose(one.sums[2], (hidden[18] + hidden[19]).cpu(), atol=1e-5)
    if built.device.type == "cuda":
        assert step.counts.graphed >= 4
    # The last token of a prompt is followed by what the step samples: greedy here.
    last = step.paged_model.head(hidden[[12, 13, 19]])
    np.testing.assert_array_equal(last.argmax(-1).cpu(), tokens)


def test_all_that_can_be_asked_of_a_step(built: BuiltModel) -> None:
    """What the memory profile runs."""
    output = built.step.launch(dummy_step(LENGTHS, built.step.state.dummy_slot, prompt=read_whole(LENGTHS))).wait()
    assert output.prompt.logprobs.top_ids.shape == (20, 20) and output.prompt.sums.shape == (3, 128)
    assert np.isfinite(output.prompt.sums).all() and np.isfinite(output.prompt.logprobs.chosen).all()
