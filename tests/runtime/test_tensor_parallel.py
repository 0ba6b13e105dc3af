"""tensor_parallel_size: two processes that share a model give the tokens and log-probabilities of one, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pagegraph.compiler.build import build_model
from pagegraph.compiler.step.step import RanksLost
from pagegraph.compiler.tensor_parallel.plan import Indivisible
from pagegraph.runtime.cli import main
from pagegraph.runtime.config import ConfigError, load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from pagegraph.runtime.engine.ranks import Followers
from pagegraph.runtime.llm import LLM, Completion
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.scheduler.counters import Counters
from pagegraph.runtime.structured_output import StructuredOutputs
from tests.compiler.architectures import tiny_config
from tests.compiler.model.every_type import tiny
from tests.compiler.model.test_paged import random_model
from tests.compiler.quantization.checkpoints import write
from tests.compiler.quantization.mixtures import write_mixture
from tests.runtime.server.served_model import ServedModel, first_event, served

pytestmark = pytest.mark.timeout(300)

# Few tokens a step and few blocks: prompts come in chunks, and sequences make room for others.
SETTINGS = dict(
    device="cpu", dtype="float32", compile=False, max_model_len=96, max_num_seqs=4, max_num_batched_tokens=16, block_size=8,
    num_blocks=13, speculative_method="ngram", num_speculative_tokens=3,
)  # fmt: skip
REAL_MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [[5, 6, 7, 8, 9] * 6, [11, 12, 13] * 9, [3, 4] * 10, [20, 21, 22, 23] * 8]
GREEDY = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True, logprobs=1)


@pytest.fixture
def folder_of(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., str]:
    """A function from an architecture's name to the folder of a tiny model of it."""

    def make(name: str, **changed: Any) -> str:
        shutil.copytree(tokenizer_folder, tmp_path / name)
        random_model(tiny_config(name, **changed)).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def llm_of(folder: str, size: int, **more: Any) -> LLM:
    return LLM(folder, progress=False, tensor_parallel_size=size, **{**SETTINGS, **more})


def answers(llm: LLM) -> tuple[list[Completion], Counters]:
    """Of prompts that find nothing in the cache, then of the same with seeds, penalties and a grammar among them."""
    done = llm.generate(PROMPTS, GREEDY)
    mixed = [
        GREEDY,
        SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, seed=3, repetition_penalty=1.2, logprobs=1),
        SamplingParams(max_tokens=8, temperature=0.0, structured_outputs=StructuredOutputs(regex="[ab]{2,8}c"), logprobs=1),
        SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=1, logprobs=1),
    ]  # fmt: skip
    done += llm.generate(PROMPTS, mixed)
    for _ in range(2):
        done += llm.generate(PROMPTS[:1], GREEDY)
    llm.engine.scheduler.check_integrity()
    return done, llm.engine.scheduler.counters


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2", "mixtral"))]
)
def test_two_ranks_answer_as_one(name: str, folder_of: Callable[..., str]) -> None:
    folder = folder_of(name, num_hidden_layers=2)
    expected, counters = answers(llm_of(folder, 1))
    shared = llm_of(folder, 2)
    try:
        got, found = answers(shared)
    finally:
        shared.close()
    for one in (counters, found):  # what was to be tried was
        assert one.preemptions and one.prefix_hits and one.accepted
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert logprobs(mine) == pytest.approx(logprobs(theirs), abs=1e-4)
    assert {layout.num_kv_heads for layout in shared.built.step.paged_model.layouts} == {1}  # of two


def logprobs(done: Completion) -> list[float]:
    of_prompt = [one for one in done.prompt_logprobs or () if one is not None]
    return [one.logprob for one in (*of_prompt, *done.logprobs)]


@pytest.mark.parametrize(
    ("kind", "packing", "expert_parallel"),
    [("llama", "awq_g32", False), *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("llama", "fp8_block", False), ("qwen3_moe", "w8a8", True), ("mixtral", None, True), ("qwen2_moe", None, True)))],
)  # fmt: skip
def test_two_ranks_of_packed_weights_or_whole_experts_answer_as_one(
    kind: str, packing: str | None, expert_parallel: bool, tmp_path: Path, tokenizer_folder: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree(tokenizer_folder, folder)
    if packing is None:
        random_model(tiny(kind)).save_pretrained(folder)
    elif kind == "llama":
        wide = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32)
        write(folder, random_model(tiny_config(kind, **wide)), packing)
    else:
        write_mixture(folder, kind, packing)
    expected = llm_of(str(folder), 1).generate(PROMPTS, GREEDY)
    shared = llm_of(str(folder), 2, expert_parallel=expert_parallel)
    try:
        got = shared.generate(PROMPTS, GREEDY)
    finally:
        shared.close()
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert logprobs(mine) == pytest.approx(logprobs(theirs), abs=1e-3)


@pytest.mark.slow
def test_a_compiled_model_with_a_draft_model_answers_as_one(folder_of: Callable[..., str]) -> None:
    folder, draft = folder_of("llama"), folder_of("qwen3", num_hidden_layers=1)
    settings = dict(compile=True, speculative_method="draft", speculative_model=draft, num_blocks=64)
    expected, _ = answers(llm_of(folder, 1, **settings))
    shared = llm_of(folder, 2, **settings)
    try:
        got, _ = answers(shared)
    finally:
        shared.close()
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]


@pytest.fixture
def pair(folder_of: Callable[..., str]) -> Iterator[LLM]:
    llm = llm_of(folder_of("llama"), 2, watchdog_timeout_s=2)
    llm.generate(PROMPTS[:1], GREEDY)
    yield llm
    llm.close()


def process_of(llm: LLM) -> int:
    followers: Followers = llm.built.closing.__self__  # type: ignore[attr-defined]
    return followers.pids[0]


@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGKILL, "rank 1 of 2 ended with signal SIGKILL"), (signal.SIGSTOP, "did not answer in time")]
)  # fmt: skip
def test_a_rank_that_ends_or_hangs_ends_all(pair: LLM, number: signal.Signals, told: str) -> None:
    os.kill(process_of(pair), number)
    start = time.monotonic()
    for _ in range(2):  # and none is taken after it
        with pytest.raises(RanksLost, match=f"{told}.*tensor_parallel_size=2 needs all of its ranks"):
            pair.generate(PROMPTS, GREEDY)
    assert time.monotonic() - start < 20


def test_what_ranks_cannot_share_is_refused(folder_of: Callable[..., str]) -> None:
    folder = folder_of("llama", hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    with pytest.raises(
        Indivisible, match="tensor_parallel_size=2 does not divide the 9 attention heads of llama; 1, 3 do"
    ):
        llm_of(folder, 2)
    with pytest.raises(ConfigError, match="set tensor_parallel_size to 1, or deterministic to false"):
        load_config(folder, dict(tensor_parallel_size=2, deterministic=True))
    with pytest.raises(
        ConfigError, match="expert_parallel=true spreads experts over ranks, and tensor_parallel_size=1; set that"
    ):
        load_config(folder, dict(expert_parallel=True))
    for command in ("verify", "tune"):
        told = CliRunner().invoke(main, [command, folder, "--tensor-parallel-size", "2"]).output
        assert f"runtime {command} runs one process, and tensor_parallel_size=2; set it to 1" in told
    config = load_config(folder, dict(tensor_parallel_size=3, device="cpu")).config
    with pytest.raises(ValueError, match="tensor_parallel_size=3: runtime serve, .*set it to 1"):
        build_model(compiler_options(config), progress=False)


@pytest.mark.slow
def test_three_heads_of_keys_and_values_are_shared_by_three_ranks() -> None:
    """SmolLM2: 9 attention heads, 3 of keys and values, and a vocabulary that three do not divide."""
    settings = dict(num_blocks=64, num_threads=1, block_size=16)
    with pytest.raises(Indivisible, match="does not divide the 9 attention heads of llama; 1, 3 do"):
        llm_of(REAL_MODEL, 2, **settings)
    params = SamplingParams(max_tokens=16, temperature=0.0, logprobs=1)
    (expected,) = llm_of(REAL_MODEL, 1, **settings).generate("The capital of France is", params)
    shared = llm_of(REAL_MODEL, 3, **settings)
    try:
        (got,) = shared.generate("The capital of France is", params)
    finally:
        shared.close()
    assert got.text == expected.text
    assert logprobs(got) == pytest.approx(logprobs(expected), abs=1e-3)


@pytest.mark.slow
def test_a_server_whose_rank_is_killed_starts_all_anew(folder_of: Callable[..., str]) -> None:
    with served(Path(folder_of("llama")), tensor_parallel_size=2, max_model_len=256, kv_cache_memory=4 << 20) as server:
        before = completed(server)
        engine = server.engine_pid
        os.kill(*rank_of(engine), signal.SIGKILL)
        server.wait(lambda: server.metric("engine_restarts_total") == 1)
        server.wait(lambda: server.get("/health", server.probe_port)[0] == 200, 120)
        assert "rank 1 of 2 ended with signal SIGKILL" in server.output
        assert completed(server) == before
        engine = server.engine_pid
        (rank,) = rank_of(engine)
        os.kill(engine, signal.SIGKILL)
        server.wait(lambda: not Path(f"/proc/{rank}").exists())  # none is left behind


@pytest.mark.slow
def test_two_engines_of_two_ranks_answer_as_one_process_and_fail_alone(folder_of: Callable[..., str]) -> None:
    """data_parallel_size with tensor_parallel_size: which engine answers is not to be seen, but where a rank of one ends."""
    folder = Path(folder_of("llama", max_position_embeddings=4096))
    settings = dict(max_model_len=4096, kv_cache_memory=8 << 20, max_num_seqs=2)
    with served(folder, **settings) as server:
        alone = completed(server)
    with served(folder, tensor_parallel_size=2, data_parallel_size=2, step_s=0.01, **settings) as server:
        before = [server.metric("generation_tokens_total", engine) for engine in range(2)]
        assert [completed(server) for _ in range(4)] == [alone] * 4
        assert all(server.metric("generation_tokens_total", engine) > before[engine] for engine in range(2))
        assert [len(rank_of(pid)) for pid in server.engine_pids] == [1, 1]
        streams = [server.complete(prompt=[5 + at] * 40, max_tokens=1500, stream=True) for at in range(2)]
        for stream in streams:
            first_event(stream)
        assert [server.metric("num_requests_running", engine) for engine in range(2)] == [1, 1]
        (rank,) = rank_of(server.engine_pids[1])
        os.kill(rank, signal.SIGKILL)
        with ThreadPoolExecutor(2) as threads:
            ends = list(threads.map(lambda stream: stream.read(), streams))
        assert sorted(b"engine_dead" in end for end in ends) == [False, True]
        assert all(b'"finish_reason":"length"' in end for end in ends if b"engine_dead" not in end)
        server.wait(lambda: server.metric("engine_restarts_total", 1) == 1)
        assert server.metric("engine_restarts_total", 0) == 0
        server.wait(lambda: server.metric("engine_up") == 2, 120)
        assert [completed(server) for _ in range(4)] == [alone] * 4


def completed(server: ServedModel) -> list[str]:
    answer = json.loads(server.complete(prompt=[5, 6, 7, 8], max_tokens=8, logprobs=1).read())
    return answer["choices"][0]["logprobs"]["tokens"]


def rank_of(engine: int) -> list[int]:
    """Processes of ranks that the engine has started."""
    return [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and (path / "cmdline").exists()
        and b"rank_process" in (path / "cmdline").read_bytes() and f"PPid:\t{engine}\n" in (path / "status").read_text()
    ]  # fmt: skip
