"""Work through the offline engine over a step that computes nothing: counts, turns, names of figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pagegraph.runtime.bench import offline
from pagegraph.runtime.bench.work import Request, Shape, made_up
from pagegraph.runtime.config import Config
from pagegraph.runtime.llm import LLM
from tests.runtime.fake_step import FakeStep


@pytest.fixture
def llm(tokenizer_folder: Path) -> LLM:
    """Says token 7, and the end as its fourth."""
    step = FakeStep(200, 8, says=lambda history, seed: 1 if len(history) % 4 == 0 else 7, block_size=16, max_len=400)
    built = SimpleNamespace(
        step=step, folder=tokenizer_folder, device=torch.device("cpu"), dtype=torch.float32, vocab_size=350, hidden_size=8, has_head=True,
        max_model_len=400, num_blocks=200, eos_ids=frozenset({1}), slot_bytes=0, use_idle_time=lambda: False, draft=None, compile_state="off",
        generation_config={},
    )  # fmt: skip
    return LLM(Config(model="tiny", max_num_seqs=8, max_num_batched_tokens=64), built=built)


def test_exact_lengths(llm: LLM) -> None:
    done = offline.run(llm, made_up(20, Shape(input_len=11, output_len=6), vocab_size=300), ignore_eos=True)
    assert (done.prompt_tokens, done.output_tokens) == (220, 120) and done.seconds > 0


def test_each_request_moves_the_bar_once(llm: LLM) -> None:
    ended: list[None] = []
    work = made_up(9, Shape(input_len=5, output_len=3, num_turns=3), vocab_size=300)
    offline.run(llm, work, ignore_eos=True, tick=lambda: ended.append(None))
    assert len(ended) == 9


def test_answers_of_their_own_end_where_they_end(llm: LLM) -> None:
    assert offline.run(llm, [Request([5, 5], 50)], ignore_eos=False).output_tokens < 50


def test_text_is_tokenised(llm: LLM) -> None:
    done = offline.run(llm, [Request("hello world", 2)], ignore_eos=True)
    assert done.prompt_tokens == len(llm.tokenizer.encode("hello world"))


def test_a_turn_goes_on_with_prompt_and_answer(llm: LLM) -> None:
    """Turns of 20, 20 + 4 + 20 and 44 + 4 + 20 tokens; what was asked and answered before is found in the cache."""
    done = offline.run(llm, made_up(3, Shape(input_len=20, output_len=4, num_turns=3), vocab_size=300), ignore_eos=True)
    assert (done.prompt_tokens, done.output_tokens) == (20 + 44 + 68, 12)
    assert done.cached_tokens >= 16 + 32


def test_shared_prefixes_are_found(llm: LLM) -> None:
    requests = made_up(9, Shape(input_len=4, output_len=1, prefix_len=64), vocab_size=300)
    offline.run(llm, requests[:1], ignore_eos=True)
    assert offline.run(llm, requests[1:], ignore_eos=True).cached_tokens == 8 * 64


def test_nothing_runs_if_one_is_too_long(llm: LLM) -> None:
    with pytest.raises(ValueError, match="400"):
        offline.run(llm, [Request([5], 1), Request([5] * 500, 1)], ignore_eos=True)
    assert llm.engine.idle


def test_the_names_of_throughput() -> None:
    found = offline.throughput_figures(offline.Done(2.0, 30, 10, 5), 4)
    assert found == dict(
        elapsed_time=2.0, num_requests=4, total_num_tokens=40, requests_per_second=2.0, tokens_per_second=20.0,
        total_output_tokens=10, output_tokens_per_second=5.0, cached_prompt_tokens=5,
    )  # fmt: skip


def test_latencies_are_those_behind_the_warm_up() -> None:
    calls: list[int] = []
    found = offline.latencies(lambda: calls.append(1), 2, 3)
    assert len(calls) == 5 and len(found) == 3 and min(found) >= 0


def test_the_names_of_latency() -> None:
    seconds = [0.5, 0.1, 0.4, 0.2, 0.3]
    found = offline.latency_figures(seconds)
    assert found["avg_latency"] == pytest.approx(0.3) and found["std_latency"] == pytest.approx(np.std(seconds))
    assert found["latencies"] == seconds and list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == 0.3 and found["percentiles"]["99"] == pytest.approx(np.percentile(seconds, 99))
