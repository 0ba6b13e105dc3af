"""The offline API over an engine whose step says a script: no model, no compiler."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from compiler.step import StepCounts, Ticket
from compiler.step_input import StepInput, StepOutput
from runtime.config import Config
from runtime.llm import LLM
from runtime.protocol import SamplingParams
from runtime.tokenizer import Tokenizer

MAX_LEN = 400


class Script:
    """A step in which the token at position p of every sequence is script[p]."""

    compiled, counts = True, StepCounts()

    def __init__(self) -> None:
        self.script = np.zeros(MAX_LEN + 1, np.int32)

    def launch(self, step: StepInput) -> Ticket:
        ids = self.script[step.starts + np.diff(step.query_start)]
        return Ticket(lambda: StepOutput(ids))


@pytest.fixture
def llm(tokenizer_folder: Path) -> LLM:
    built = SimpleNamespace(
        step=Script(), folder=tokenizer_folder, device=torch.device("cpu"), dtype=torch.float32, vocab_size=350, max_model_len=MAX_LEN,
        num_blocks=200, eos_ids=frozenset({1}), use_idle_time=lambda: False, draft=None,
    )  # fmt: skip
    return LLM(Config(model="tiny", max_num_seqs=8, max_num_batched_tokens=64), built=built)


def says(llm: LLM, text: str, prompt: int = 1) -> list[int]:
    """Have the step say `text` and the end after prompts of `prompt` tokens -> its ids."""
    ids = [*llm.tokenizer.encode(text), 1]
    llm.built.step.script[prompt : prompt + len(ids)] = ids
    return ids


def ended(llm: LLM) -> dict[str, float]:
    families = text_string_to_metric_families(llm.metrics.render().decode())
    samples = [sample for family in families for sample in family.samples if sample.name == "vllm:request_success_total"]
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
