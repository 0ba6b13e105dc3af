"""deterministic: tokens and log-probabilities are equal bit by bit, whatever runs beside a request and however it is run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagegraph.compiler.build import BuiltModel, build_compiled, build_model
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.compiler.step.step import CompiledStep, Ticket
from pagegraph.runtime.config import Config, ConfigError, load_config
from pagegraph.runtime.engine.assemble import engine_of
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.ipc.protocol import Failed, Submit, Tokens
from pagegraph.runtime.llm import LocalMailbox
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import random_model
from tests.runtime.situations import (
    ALL_AT_ONCE,
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    SITUATIONS,
    Comparer,
    Situation,
    draw_requests,
)

pytestmark = pytest.mark.timeout(900)

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
REAL = 10_000  # tokens
POISON = 9999  # a seed
WINDOWS = dict(
    head_dim=24, hidden_size=72, query_pre_attn_scalar=20, num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
# Sizes that are no multiples of a vector's; windows; weights of 8 and 4 bits.
SIZES: dict[str, tuple[str, dict, dict]] = {
    "llama": ("llama", dict(intermediate_size=88, num_hidden_layers=1), dict(dtype="bfloat16")),
    "qwen3": ("qwen3", dict(head_dim=24, num_hidden_layers=1), dict(dtype="float32")),
    "gemma3": ("gemma3", WINDOWS, dict(dtype="bfloat16", kv_cache_dtype="fp8")),
    "int8": ("llama", dict(num_hidden_layers=1), dict(dtype="bfloat16", quantization="int8")),
    "int4": ("llama", dict(hidden_size=128, num_hidden_layers=1), dict(dtype="bfloat16", quantization="int4")),
}  # fmt: skip
OFTEN = {"qwen3", "gemma3", "int8"}


@pytest.fixture
def comparer_of(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Comparer]:
    """A function from a tiny model's name and settings to what compares over it."""

    def make(name: str, **overrides: object) -> Comparer:
        kind, sizes, given = SIZES[name]
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(tokenizer_folder, folder)
            random_model(tiny_config(kind, **sizes)).save_pretrained(folder)

        def config_of(**more: object) -> Config:
            fixed = dict(device="cpu", num_blocks=120, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN)
            return load_config(str(folder), {**fixed, "deterministic": True, **given, **overrides, **more}).config

        built = build_compiled(compiler_options(config_of(max_num_seqs=8, max_num_batched_tokens=512)), progress=False)
        return Comparer(built, config_of)

    return make


@pytest.mark.hypothesis
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in SIZES]
)
def test_tiny_models(comparer_of: Callable[..., Comparer], name: str) -> None:
    comparer = comparer_of(name)

    @settings(max_examples=2)
    @given(SITUATIONS, st.integers(0, 1000))
    @example(ALL_AT_ONCE, 0)
    def compare(situation, seed) -> None:
        comparer.compare(draw_requests(seed, 6, 128), situation)
        assert comparer.different == 0

    compare()
    assert comparer.compared > 100 and comparer.preempted and comparer.cached and comparer.drafted


def test_without_it_they_are_not_equal(comparer_of: Callable[..., Comparer]) -> None:
    """What is compared can differ."""
    comparer = comparer_of("qwen3", deterministic=False, compile=False)

    comparer.compare(draw_requests(0, 6, 128), ALL_AT_ONCE)
    assert comparer.different


@pytest.mark.slow
def test_neighbours_of_a_poisoned_request(comparer_of: Callable[..., Comparer], monkeypatch) -> None:
    """All sequences run again from what is committed, one at a time and then the others at once."""
    comparer = comparer_of("llama")
    requests = draw_requests(0, 8, 128)
    requests[5] = (requests[5][0], msgspec.structs.replace(requests[5][1], temperature=1.0, seed=POISON))
    requests = [(prompt, msgspec.structs.replace(one, max_tokens=16 + at)) for at, (prompt, one) in enumerate(requests)]
    for max_num_batched_tokens, num_draft_tokens in ((13, 3), (100, 0)):
        how = Situation(8, max_num_batched_tokens, True, num_draft_tokens, tight=False, twice=False, order=0)
        config = comparer.prepare(how)
        clean, failed = answers(config, comparer.built, requests)
        assert not failed and len(clean) == 8
        for where in ("launch", "wait"):
            for after in (0, 4):
                with monkeypatch.context() as patch:
                    times = poison(patch, where, after)
                    troubled, failed = answers(config, comparer.built, requests)
                assert failed == {"5": 500} and times() > 1
                assert len(troubled.get("5", [])) < len(clean["5"])
                assert {**troubled, "5": None} == {**clean, "5": None}, (how, where, after)


def answers(config: Config, built: BuiltModel, requests: list) -> tuple[dict[str, list[tuple]], dict[str, int]]:
    """Each request's tokens with the bits of their log-probabilities, and the status of those that failed."""
    mailbox = LocalMailbox()
    engine, _ = engine_of(config, built, mailbox)
    for number, (prompt, params) in enumerate(requests):
        mailbox.put(Submit(request_id=str(number), token_ids=prompt, params=params))
    tokens: dict[str, list[tuple]] = {}
    failed: dict[str, int] = {}
    while mailbox.inbox or not engine.idle:
        engine.turn()
        for message in mailbox.take():
            if isinstance(message, Failed):
                failed[message.request_id] = message.status
            for delta in message.each() if isinstance(message, Tokens) else ():
                assert delta.logprobs is not None
                told = [msgspec.structs.astuple(one) for one in delta.logprobs]
                tokens.setdefault(delta.request_id, []).extend(zip(delta.token_ids, told, strict=True))
    engine.scheduler.check_integrity()
    return tokens, failed


def poison(patch: pytest.MonkeyPatch, where: str, after: int) -> Callable[[], int]:
    """Steps with the request of the seed POISON raise from the `after`th on -> how many have raised."""
    launch, seen, raised = CompiledStep.launch, 0, 0

    def fail() -> NoReturn:
        nonlocal raised
        raised += 1
        raise OverflowError("a poisoned step")

    def instead(self: CompiledStep, step: StepInput, *rest: int) -> Ticket:
        nonlocal seen
        has_seed = POISON in step.sampling.seeds.tolist()
        seen += has_seed
        if not has_seed or seen <= after:
            return launch(self, step, *rest)
        if where == "launch":
            fail()
        ticket = launch(self, step, *rest)
        ticket.wait()  # it has written keys and values
        patch.setattr(ticket, "wait", fail)
        return ticket

    patch.setattr(CompiledStep, "launch", instead)
    return lambda: raised


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.hypothesis
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_real_model(dtype: str) -> None:
    def config_of(**more: object) -> Config:
        fixed = dict(
            device="cpu",
            dtype=dtype,
            deterministic=True,
            num_blocks=200,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
        )
        return load_config(MODEL, {**fixed, **more}).config

    built = build_compiled(compiler_options(config_of(max_num_seqs=8, max_num_batched_tokens=512)), progress=False)
    comparer = Comparer(built, config_of)

    @settings(max_examples=10)
    @given(SITUATIONS, st.integers(0, 10_000))
    @example(ALL_AT_ONCE, 0)
    def compare(situation, seed) -> None:
        comparer.compare(draw_requests(seed, 12, 40_000), situation)
        assert comparer.different == 0

    while comparer.compared < REAL // 2:
        compare()
    print(f"{dtype}: {comparer.compared} tokens with their log-probabilities are equal")
    assert comparer.preempted and comparer.cached and comparer.accepted


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="deterministic=true needs the compiled model, and compile=false; set compile to true"
    ):
        load_config("org/model", dict(deterministic=True, compile=False))
    random_model(tiny_config("mixtral", num_hidden_layers=1)).save_pretrained(tmp_path)
    options = dict(deterministic=True, device="cpu", num_blocks=20)
    with pytest.raises(UnsupportedModel, match="deterministic=true: .*gate .*multiplies weights in a way of its own"):
        build_model(compiler_options(load_config(str(tmp_path), options).config), progress=False)
    random_model(tiny_config("llama", num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="deterministic=true computes bfloat16 and float32 on a CPU, not float16"):
        build_model(
            compiler_options(load_config(str(tmp_path), {**options, "dtype": "float16"}).config), progress=False
        )
