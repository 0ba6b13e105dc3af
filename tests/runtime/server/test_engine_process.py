"""A compilation that fails beside a serving engine: it serves on, says so, or ends where that is configured."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import triton
from torch._dynamo.callback import callback_handler

from pagegraph.compiler.build import BuiltModel, Timings
from pagegraph.runtime.config import Config
from pagegraph.runtime.server import engine_process


class Step:
    """Compiles to a name; or raises what it is given."""

    def __init__(self, compiled: str | Exception) -> None:
        self.compiled, self.forward = compiled, "plain"
        self.state = SimpleNamespace(max_blocks=4, dummy_slot=2, last_tokens=torch.zeros(1, device="meta"), ngram=None)

    def compiled_forward(self, *_: object) -> str:
        if isinstance(self.compiled, Exception):
            raise self.compiled
        return self.compiled


def built_of(*steps: Step) -> BuiltModel:
    facts = dict(
        folder=None, device=torch.device("meta"), dtype=torch.float32, vocab_size=3, hidden_size=2, max_model_len=4,
        num_blocks=5,
    )  # fmt: skip
    target, draft = (*steps, None)[:2]
    return BuiltModel(step=target, draft=draft, eos_ids=frozenset(), timings=Timings(), **facts)


@pytest.mark.parametrize("where", ["the first thing", "the model", "the draft model"])
def test_a_failure_leaves_every_step_uncompiled(where: str, caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("no toolchain")
    built = built_of(
        Step(error if where == "the model" else "compiled"),
        Step(error if where == "the draft model" else "compiled"),
    )
    first = Mock(side_effect=error if where == "the first thing" else None)
    with caplog.at_level(logging.INFO):
        engine_process._compile(Config(model="m"), built, first)
    assert [step.forward for step in built.steps] == ["plain", "plain"]
    assert built.compile_state == "failed"
    (record,) = caplog.records
    assert (
        record.levelno == logging.CRITICAL
        and "serves on, uncompiled" in record.message
        and "no toolchain" in caplog.text
    )


def test_a_failure_ends_a_server_that_requires_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        engine_process._compile(Config(model="m", compile="required"), built_of(Step(RuntimeError("no toolchain"))))
    os._exit.assert_called_once_with(3)
    assert "compile=required" in caplog.text and "no toolchain" in caplog.text


def test_a_compilation_swaps_every_step_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    built = built_of(Step("compiled"), Step("compiled too"))
    seen = []
    with caplog.at_level(logging.INFO):
        engine_process._compile(
            Config(model="m"), built, lambda: seen.append((built.compile_state, built.step.forward))
        )
    assert seen == [("compiling", "plain")]
    assert [step.forward for step in built.steps] == ["compiled", "compiled too"]
    assert built.compile_state == "compiled" and "compiled after" in caplog.text


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What a process has beaten that was told to tell of its compilers, as one with a GPU would be."""
    monkeypatch.setattr(callback_handler, "start_callbacks", [])
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
    beats: list[float | None] = []
    engine_process._tell_of_compilers(Config(model="m"), SimpleNamespace(device=torch.device("cuda")), beats.append)
    return beats


def test_a_compilation_beside_steps_is_no_hang(beats: list[float | None]) -> None:
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    assert beats == [None]


def test_a_triton_kernel_that_is_compiled_is_no_hang(beats: list[float | None]) -> None:
    """Triton asks this hook before it compiles what a launch needs, and goes on if it says nothing."""
    facts = dict(key="", repr="", fn=None, compile={}, is_manual_warmup=False, already_compiled=False)
    assert not triton.knobs.runtime.jit_cache_hook(**facts) and beats == [None]


def test_garbage_is_freed_before_what_is_built_is_frozen() -> None:
    class Node:
        pass

    gc.disable()
    one = Node()
    one.itself = one
    gone = weakref.ref(one)
    del one
    try:
        engine_process._freeze()
        assert gone() is None and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()
