"""The workload at its times, through an engine over a step that computes nothing."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pagegraph.runtime.bench.work import Request, Shape, made_up
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.assemble import engine_of
from pagegraph.runtime.llm import LocalMailbox
from pagegraph.runtime.spec_decode.proposer import NgramProposer
from pagegraph.runtime.tune.load import Load, accepted_share
from pagegraph.runtime.tune.measurement import CannotRun, TooSlow
from tests.runtime.fake_step import FakeStep

NGRAM = NgramProposer(2, 5)


@pytest.fixture
def engine(tokenizer_folder: Path) -> tuple:
    """Says token 7; a pool of 40 blocks and room for 4 sequences, 64 tokens a step."""
    step = FakeStep(40, 8, says=lambda history, seed: 7, block_size=16, max_len=400)
    built = SimpleNamespace(
        step=step, folder=tokenizer_folder, device=torch.device("cpu"), dtype=torch.float32, vocab_size=350, hidden_size=8, has_head=True,
        max_model_len=400, num_blocks=40, eos_ids=frozenset({1}), slot_bytes=0, use_idle_time=lambda: False, draft=None, compile_state="off",
        generation_config={},
    )  # fmt: skip
    mailbox = LocalMailbox()
    config = Config(model="tiny", max_num_seqs=4, max_num_batched_tokens=64)
    return *engine_of(config, built, mailbox, max_queue=1000), mailbox


def test_every_request_has_its_length_and_its_times(engine: tuple) -> None:
    requests = made_up(10, Shape(input_len=30, output_len=6), vocab_size=300)
    load = Load(*engine, requests, [0.0] * 10, ignore_eos=True)
    load.run()
    assert all((one.prompt_len, one.output_tokens, len(one.itl)) == (30, 6, 5) for one in load.outcomes)
    assert all(one.latency == pytest.approx(one.ttft + sum(one.itl)) for one in load.outcomes)
    assert load.duration >= max(one.latency for one in load.outcomes)
    counts = load.counts(NGRAM)
    assert counts.running == 4 and counts.waiting >= 6 and 0 < counts.blocks < 1 and counts.preemptions == 0
    assert counts.mixed_steps > 0


def test_requests_wait_for_their_times(engine: tuple) -> None:
    load = Load(*engine, made_up(2, Shape(input_len=8, output_len=2), vocab_size=300), [0.05, 0.2], ignore_eos=True)
    load.run()
    assert load.outcomes[1].start_time - load.outcomes[0].start_time == pytest.approx(0.15)
    assert load.duration >= 0.2 and load.counts(NGRAM).running == 1


def test_a_turn_goes_on_with_prompt_and_answer(engine: tuple) -> None:
    load = Load(*engine, made_up(2, Shape(input_len=20, output_len=4, num_turns=2), vocab_size=300), [0.0, 0.0], ignore_eos=True)  # fmt: skip
    load.run()
    first, second = load.outcomes
    assert second.prompt_len == 20 + 4 + 20 and second.start_time >= first.start_time + first.latency


def test_a_run_that_is_ended_leaves_an_idle_engine(engine: tuple) -> None:
    def watch(seconds: float) -> None:
        raise TooSlow

    with pytest.raises(TooSlow):
        Load(*engine, made_up(10, Shape(input_len=30, output_len=90), vocab_size=300), [0.0] * 10, ignore_eos=True, watch=watch).run()  # fmt: skip
    assert engine[0].idle and not engine[0].scheduler.num_running
    begin = time.perf_counter()
    Load(*engine, [Request([5, 6], 2)], [0.0], ignore_eos=True).run()
    assert time.perf_counter() - begin < 60


def test_a_request_that_is_refused_is_told(engine: tuple) -> None:
    with pytest.raises(CannotRun, match="400"):
        Load(*engine, [Request([5] * 500, 1)], [0.0], ignore_eos=True).run()
    assert engine[0].idle


def test_what_n_gram_draft_tokens_would_have_been_accepted() -> None:
    assert accepted_share(NGRAM, [(4, [1, 2, 3, 1, 2, 3, 1, 2])]) == 0.75  # all but the 2 behind a single 1
    assert accepted_share(NGRAM, [(2, [1, 2, 3, 4, 5, 6])]) == 0.0 == accepted_share(NGRAM, [])
