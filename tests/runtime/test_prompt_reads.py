"""What the real model says of prompts, against transformers' own forward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from pagegraph.compiler.step import prompt as step_prompt
from pagegraph.runtime.llm import LLM, Completion
from pagegraph.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.timeout(900)  # the first test compiles the model

PROMPTS = ["The capital of France is Paris, and that of Italy is", "Once", "1 2 3 4 5 6 7 8 9 10 11 12 13 " * 2]
TOP = 3


def asking(**fields: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "prompt_logprobs": TOP, "max_tokens": 4, "ignore_eos": True, **fields})


@pytest.fixture(scope="module")
def read(model: torch.nn.Module) -> Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]:
    """A function from token ids to (hidden states, log-probabilities) of transformers; each prompt is read once."""

    @functools.cache
    @torch.inference_mode()
    def forward(ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(torch.tensor([ids]), output_hidden_states=True)
        return out.hidden_states[-1][0].float(), out.logits[0].float().log_softmax(-1)

    return lambda ids: forward(tuple(ids))


def check(read, done: Completion) -> None:
    """Values, ranks and the likeliest are those of a full forward."""
    ids = done.prompt_token_ids
    _, expected = read(ids)
    assert done.prompt_logprobs[0] is None and len(done.prompt_logprobs) == len(ids)
    for at, entry in enumerate(done.prompt_logprobs[1:]):
        assert entry.token_id == ids[at + 1]
        assert entry.logprob == pytest.approx(expected[at, entry.token_id].item(), abs=2e-3)
        assert abs(entry.rank - 1 - int((expected[at] > expected[at, entry.token_id]).sum())) <= entry.rank // 20
        assert entry.top_logprobs == pytest.approx(expected[at].topk(TOP).values.tolist(), abs=2e-3)
        if entry.rank <= TOP:
            assert entry.top_logprobs[entry.top_ids.index(entry.token_id)] == entry.logprob


def test_prompt_logprobs_are_those_of_transformers(llm, read) -> None:
    for done in llm.generate(PROMPTS, asking()):
        check(read, done)


def test_chunks_caches_and_few_rows_at_a_time_change_nothing(config_of, built, read, monkeypatch) -> None:
    plain = LLM(config_of(), built=built).generate(PROMPTS, asking(prompt_logprobs=None))
    monkeypatch.setattr(step_prompt, "MAX_LOGITS_BYTES", 7 * 4 * built.vocab_size)
    chunked = LLM(config_of(max_num_batched_tokens=16), built=built)
    for _ in range(2):  # the second time the cache holds the prompts
        for done, without in zip(chunked.generate(PROMPTS, asking()), plain):
            check(read, done)
            assert done.token_ids == without.token_ids
    for done in chunked.generate(PROMPTS, asking(max_tokens=0)):
        check(read, done)
        assert done.token_ids == [] and done.finish_reason == "length"


def pooled(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    vector = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[pooling]
    return vector / vector.norm()


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_embeddings_are_those_of_transformers(config_of, built, read, pooling: str) -> None:
    """Whole and in chunks, the second time with what the cache holds."""
    for budget in (512, 16) if pooling == "mean" else (16,):
        llm = LLM(config_of(max_num_batched_tokens=budget, pooling=pooling), built=built)
        for _ in range(2):
            for prompt, vector in zip(PROMPTS, llm.embed(PROMPTS), strict=True):
                expected = pooled(read(llm.tokenizer.encode(prompt))[0], pooling)
                torch.testing.assert_close(torch.from_numpy(vector.copy()), expected, atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="dimensions is 64; give 576"):
        llm.embed(PROMPTS, dimensions=64)
