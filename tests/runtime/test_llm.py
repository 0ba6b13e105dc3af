"""The offline API over an engine whose step says a script: no model, no compiler."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from pagegraph.runtime.config import Config
from pagegraph.runtime.ipc.protocol import Submit
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams
from tests.runtime.fake_step import FakeStep

MAX_LEN = 400


@pytest.fixture
def llm(tokenizer_folder: Path) -> LLM:
    script = np.zeros(MAX_LEN + 1, np.int32)  # the token at position p of every sequence is script[p]
    step = FakeStep(200, 8, says=lambda history, seed: script[len(history)], block_size=16, max_len=MAX_LEN)
    step.script = script
    built = SimpleNamespace(
        step=step, folder=tokenizer_folder, device=torch.device("cpu"), dtype=torch.float32, vocab_size=350, hidden_size=8, has_head=True,
        max_model_len=MAX_LEN, num_blocks=200, eos_ids=frozenset({1}), slot_bytes=0, use_idle_time=lambda: False, draft=None, compile_state="off",
        generation_config={"temperature": 0.5, "max_new_tokens": 3, "eos_token_id": 1},
    )  # fmt: skip
    return LLM(Config(model="tiny", max_num_seqs=8, max_num_batched_tokens=64), built=built)


def says(llm: LLM, text: str, prompt: int = 1) -> list[int]:
    """Have the step say `text` and the end after prompts of `prompt` tokens -> its ids."""
    ids = [*llm.tokenizer.encode(text), 1]
    llm.built.step.script[prompt : prompt + len(ids)] = ids
    return ids


def ended(llm: LLM) -> dict[str, float]:
    families = text_string_to_metric_families(llm.metrics.render().decode())
    samples = [
        sample for family in families for sample in family.samples if sample.name == "vllm:request_success_total"
    ]
    return {sample.labels["finished_reason"]: sample.value for sample in samples if sample.value}


def test_a_stop_string_counts_as_stop(llm: LLM) -> None:
    says(llm, "hello world and the end")
    done = llm.generate([[5]], SamplingParams(max_tokens=20), stop=["world"])[0]
    assert (done.text, done.finish_reason, done.stop_reason) == ("hello ", "stop", "world")
    llm.generate([[5]], SamplingParams(max_tokens=2), stop=["world"])
    assert ended(llm) == {"stop": 1, "length": 1}
    stream = llm.stream([5], SamplingParams(max_tokens=20))
    next(stream)
    stream.close()
    assert ended(llm) == {"stop": 1, "length": 1, "abort": 1}


@pytest.mark.parametrize(
    ("prompt", "fields", "stop", "names"),
    [
        ([5] * MAX_LEN, {}, None, "maximum context length is 400 .*max_model_len"),
        ([350], {}, None, "prompt must hold token ids from 0 to 349"),
        ([], {}, None, "prompt has no tokens"),
        ([5], {"logit_bias": {350: 1.0}}, None, "logit_bias must hold token ids"),
        ([5], {"min_tokens": 2000, "max_tokens": None}, None, "give min_tokens of at most 399"),
        ([5], {}, [""], "stop must hold strings"),
    ],
)
def test_bad_requests_are_refused_before_any_runs(llm: LLM, prompt, fields, stop, names) -> None:
    says(llm, "hello")
    with pytest.raises(ValueError, match=names):
        llm.generate([[5], prompt], [SamplingParams(), SamplingParams(**fields)], stop=stop)
    assert llm.engine.idle and not llm._mailbox.inbox
    assert llm.generate([[5]])[0].token_ids


def test_the_engine_refuses_what_would_harm_a_step(llm: LLM) -> None:
    """Its own gate, for messages of others than the offline API."""
    harmful = [
        ([5] * MAX_LEN, {}, "maximum context"),
        ([350], {}, "token ids"),
        ([5], {"stop_token_ids": [350]}, "stop_token_ids"),
    ]
    for ids, fields, names in harmful:
        llm._mailbox.put(Submit(request_id="x", token_ids=ids, params=SamplingParams(**fields)))
        llm.engine.turn()
        (failed,) = llm._mailbox.take()
        assert failed.status == 400 and names in failed.message


def test_sampling_that_nobody_asked_for_is_the_models(llm: LLM) -> None:
    assert llm.sampling_params() == SamplingParams(temperature=0.5, max_tokens=3)
    assert llm.sampling_params(top_k=3, temperature=0) == SamplingParams(temperature=0.0, max_tokens=3, top_k=3)
    ids = says(llm, "the end of the world is near")
    assert len(ids) > 5
    assert llm.generate([[5]])[0].token_ids == ids[:3]
    assert llm.generate([[5]], SamplingParams(max_tokens=5))[0].token_ids == ids[:5]  # taken as they are
    assert "".join(llm.stream([5])) == llm.tokenizer.decode(ids[:3])
    other = LLM(dataclasses.replace(llm.config, generation_config="none"), built=llm.built)
    assert other.sampling_params() == SamplingParams()


def test_steps_are_shaped_for_streams_and_so_not_offline(llm: LLM) -> None:
    assert llm.engine.scheduler.chunk_limit is None
    other = LLM(dataclasses.replace(llm.config, inter_token_target_ms=20.0), built=llm.built)
    limit = other.engine.scheduler.chunk_limit
    assert limit is not None and limit.target_ms == 20.0
    says(other, "hello there, hello")
    other.generate([[5]], SamplingParams(max_tokens=5))
    assert limit.step_time.decode_ms(1), "the engine tells it how long steps take"


@pytest.mark.parametrize("seed", [2**31, 2**63 - 1])
def test_an_engine_of_any_seed_serves_requests_that_bring_none(llm: LLM, seed: int) -> None:
    other = LLM(dataclasses.replace(llm.config, seed=seed), built=llm.built)
    says(other, "hello")
    assert other.generate([[5]])[0].token_ids
