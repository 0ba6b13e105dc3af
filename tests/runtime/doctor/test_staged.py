"""`runtime doctor` on engines that were brought into trouble: each names the cause that was staged, and no other.

The model is tiny, steps are real, and so are the metrics, but for the clock: a step takes as long as its tokens say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pagegraph.compiler.build import BuiltModel, build_model
from pagegraph.runtime.config import load_config
from pagegraph.runtime.doctor.rules import diagnose
from pagegraph.runtime.engine import assemble
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.ipc.protocol import Failed, Submit
from pagegraph.runtime.llm import LocalMailbox
from pagegraph.runtime.sampling_params import SamplingParams
from tests.compiler.architectures import tiny_config

LENGTH = 1024
STEP_S, TOKEN_S = 2e-3, 5e-5
VOCAB = 128


class Staged:
    """An engine with these settings over a tiny model, all of whose work is done turn by turn."""

    def __init__(
        self, folder: Path, prepare: Callable[[BuiltModel], object] = lambda built: None, **settings: object
    ) -> None:
        tiny_config("qwen3", max_position_embeddings=LENGTH).save_pretrained(folder)
        given = dict(load_format="dummy", device="cpu", dtype="float32", compile=False, num_blocks=2000, max_num_seqs=8)
        config = load_config(str(folder), given | settings).config
        built = build_model(compiler_options(config), progress=False)
        prepare(built)
        self.mailbox, self.now = LocalMailbox(), 0.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assemble, "time", SimpleNamespace(monotonic=lambda: self.now))
            self.engine, self.metrics = assemble.engine_of(config, built, self.mailbox)
        self.refused = self._count = 0
        self._rng = np.random.default_rng(0)

    def ask(self, tokens: int, output: int, shared: int = 0, **params: object) -> None:
        """A request with a prompt of its own, whose first `shared` tokens all have."""
        prompt = [*range(3, 103)] * -(-shared // 100)
        prompt = prompt[:shared] + self._rng.integers(3, VOCAB, tokens - shared).tolist()
        self._count += 1
        given = dict(temperature=0.0, max_tokens=output, ignore_eos=True) | params
        self.mailbox.put(Submit(request_id=str(self._count), token_ids=prompt, params=SamplingParams(**given)))

    def turn(self, times: int) -> None:
        for _ in range(times):
            tokens = self.metrics.counts().launched.tokens
            self.engine.turn()
            self.now += STEP_S + TOKEN_S * (self.metrics.counts().launched.tokens - tokens)

    def finish(self) -> None:
        """Until nothing is left to do."""
        while self.mailbox.inbox or not self.engine.idle:
            self.turn(1)

    @property
    def findings(self) -> list[str]:
        return [found.rule for found in diagnose(self.metrics.render().decode())]


def queue_too_short(folder: Path) -> Staged:
    staged = Staged(folder, max_num_seqs=2, max_queue=2)
    for _ in range(16):
        staged.ask(20, 8)
        staged.turn(1)
    staged.finish()
    assert any(isinstance(message, Failed) and message.status == 503 for message in staged.mailbox.take())
    return staged


def pool_too_small(folder: Path) -> Staged:
    staged = Staged(folder, num_blocks=12, max_model_len=128)
    for _ in range(4):
        staged.ask(20, 60)
    staged.finish()
    return staged


def few_sequences_at_a_time(folder: Path) -> Staged:
    staged = Staged(folder, max_num_seqs=2)
    for _ in range(20):
        staged.ask(20, 30)
    staged.turn(10)
    return staged


def queue_for_blocks(folder: Path) -> Staged:
    staged = Staged(folder, num_blocks=27, max_model_len=256)
    for _ in range(10):
        staged.ask(190, 10)
    staged.turn(5)
    return staged


def caching_off_beside_shared_prefixes(folder: Path) -> Staged:
    staged = Staged(folder, enable_prefix_caching=False)
    for _ in range(24):
        staged.ask(130, 4, shared=120)
    staged.finish()
    return staged


def chunking_off_beside_long_prompts(folder: Path) -> Staged:
    staged = Staged(folder, enable_chunked_prefill=False, max_num_batched_tokens=LENGTH, inter_token_target_ms="none")
    for _ in range(7):
        staged.ask(10, 160)
    for _ in range(3):
        staged.turn(30)
        staged.ask(1000, 1)
    staged.finish()
    return staged


def drafts_of_noise(folder: Path) -> Staged:
    staged = Staged(folder, speculative_method="ngram", num_speculative_tokens=4, prompt_lookup_min=1)
    for at in range(8):
        staged.ask(100, 60, temperature=2.0, seed=at)
    staged.finish()
    return staged


def compilation_failed(folder: Path) -> Staged:
    def fail() -> None:
        raise RuntimeError("no compiler")

    def compile_and_fail(built: BuiltModel) -> None:
        with pytest.raises(RuntimeError, match="no compiler"):
            built.compile(first=fail)

    staged = Staged(folder, compile_and_fail)
    staged.ask(10, 4)
    staged.finish()
    return staged


@dataclass(frozen=True)
class Trouble:
    stage: Callable[[Path], Staged]
    rule: str


TROUBLES = (
    Trouble(queue_too_short, "queue too short"),
    Trouble(pool_too_small, "preemptions"),
    Trouble(few_sequences_at_a_time, "queue beside free blocks"),
    Trouble(queue_for_blocks, "queue for blocks"),
    Trouble(caching_off_beside_shared_prefixes, "no prefix cache"),
    Trouble(chunking_off_beside_long_prompts, "prompts stall streams"),
    Trouble(drafts_of_noise, "drafts that miss"),
    Trouble(compilation_failed, "not compiled"),
)


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.stage.__name__)
def test_the_cause_is_named(trouble: Trouble, tmp_path: Path) -> None:
    assert trouble.stage(tmp_path).findings == [trouble.rule]


def test_an_engine_that_is_well_gets_no_advice(tmp_path: Path) -> None:
    staged = Staged(tmp_path)
    for _ in range(24):
        staged.ask(130, 8, shared=120)
    staged.finish()
    assert staged.findings == []
