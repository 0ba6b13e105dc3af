"""Cold starts under load: requests from the first moment on, through compilation and the swap, and never a wrong token.

Each start has an empty compile cache. Every second one runs the engine's Python with its threads taking turns a thousand times
as often. Set COLD_STARTS to how many there are to be (1), and COLD_START_MODEL to a model (a tiny random one). Weights are
float32. Compiled and uncompiled steps round differently all the same, so a prompt counts only if in every one of its tokens the
likeliest one is ahead of the next by GAP: of those all tokens are equal to what the settled server says.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

STARTS = int(os.environ.get("COLD_STARTS", 1))
MODEL = os.environ.get("COLD_START_MODEL")
CLIENTS, PROMPTS, TOKENS = 4, 12, 24
GAP = 1e-3  # of log-probabilities
LONGEST_S = 900.0  # that a start may take to compile
TAKE_TURNS = """
import sys
if "pagegraph.runtime.server.engine_process" in sys.orig_argv:
    sys.setswitchinterval(5e-6)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(STARTS * LONGEST_S)]


class Start:
    """One server with an empty cache."""

    def __init__(self, model: str, folder: Path, impatient: bool) -> None:
        environment = dict(os.environ)
        if impatient:
            (folder / "site").mkdir()
            (folder / "site" / "sitecustomize.py").write_text(TAKE_TURNS)
            environment["PYTHONPATH"] = os.pathsep.join(
                [str(folder / "site"), *filter(None, [environment.get("PYTHONPATH")])]
            )
        command = [sys.executable, "-m", "pagegraph.runtime.cli", "serve", model, "--port", "0", "--device", "cpu", "--dtype", "float32",
                   "--compile-cache-dir", str(folder / "cache"), "--served-model-name", "m", "--max-num-seqs", "8",
                   "--max-model-len", "256", "--kv-cache-memory", "32MiB", "--workers", "1"]  # fmt: skip
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self.wait_for(r"http://127\.0\.0\.1:\d+")
        self.probes = self.wait_for(r"probes and metrics (http://127\.0\.0\.1:\d+)", 1)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def said(self, pattern: str, group: int = 0) -> str | None:
        found = re.search(pattern, "".join(self.lines))
        return found[group] if found else None

    def wait_for(self, pattern: str, group: int = 0) -> str:
        while (found := self.said(pattern, group)) is None:
            assert self.process.poll() is None, "the server ended:\n" + "".join(self.lines)
            assert time.monotonic() - self.started < LONGEST_S, "not in time:\n" + "".join(self.lines)
            time.sleep(0.05)
        return found

    def ask(self, prompt: list[int]) -> dict:
        """Logprobs of a completion as its dict; raises what a client would meet."""
        body = dict(model="m", prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=2, ignore_eos=True)
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())["choices"][0]["logprobs"]

    def compile_state(self) -> str:
        with urllib.request.urlopen(self.probes + "/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return re.search(r'^pagegraph:compile_state\{.*state="(\w+)"\} 1\.0$', text, re.M)[1]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> str:
    if MODEL:
        return MODEL
    folder = tmp_path_factory.mktemp("model")
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    vocab = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def serve_meanwhile(
    start: Start, prompts: list[list[int]], until: Callable[[], bool], seed: int
) -> list[tuple[int, list[str]]]:
    """What CLIENTS clients got, (index of the prompt, tokens), each asking one prompt after the other."""

    def client(number: int) -> list[tuple[int, list[str]]]:
        choice, got = random.Random(seed * CLIENTS + number), []
        while not until():
            index = choice.randrange(len(prompts))
            got.append((index, start.ask(prompts[index])["tokens"]))
        return got

    with ThreadPoolExecutor(CLIENTS) as threads:
        return [answer for answers in threads.map(client, range(CLIENTS)) for answer in answers]


@pytest.fixture(scope="module")
def settled() -> dict[int, list[str]]:
    """Tokens by prompt, of prompts without a near tie; filled by the first start."""
    return {}


@pytest.mark.parametrize("number", range(STARTS))
def test_requests_are_right_through_a_cold_start(number: int, model: str, settled: dict, tmp_path: Path) -> None:
    generator = random.Random(1)
    prompts = [[generator.randrange(10, 250) for _ in range(generator.randrange(2, 40))] for _ in range(PROMPTS)]
    start = Start(model, tmp_path, impatient=number % 2 == 1)
    try:
        assert start.compile_state() == "compiling" and "compiling, serving uncompiled" in "".join(start.lines)

        def swapped_for_a_while() -> bool:
            assert start.process.poll() is None, "the server ended"
            assert time.monotonic() - start.started < LONGEST_S, "never compiled"
            if start.said("compiled after") is None:
                return False
            swapped.append(time.monotonic())
            return time.monotonic() - swapped[0] > 2

        swapped: list[float] = []
        got = serve_meanwhile(start, prompts, swapped_for_a_while, number)
        assert start.compile_state() == "compiled"
        afterwards = [start.ask(prompt) for prompt in prompts]
        if not settled:
            for index, answer in enumerate(afterwards):
                tops = [sorted(top.values(), reverse=True) for top in answer["top_logprobs"]]
                if min(first - second for first, second, *_ in tops) > GAP:
                    settled[index] = answer["tokens"]
        assert len(settled) >= PROMPTS * 2 // 3
        counted = [(index, tokens) for index, tokens in got if index in settled]
        print(
            f"start {number}{', impatient' * (number % 2)}: compiled after {swapped[0] - start.started:.0f} s, {len(got)} requests"
            f" meanwhile, {len(counted)} of prompts without a near tie, all of {TOKENS} tokens"
        )
        wrong = [(index, tokens, settled[index]) for index, tokens in counted if tokens != settled[index]]
        assert not wrong, f"{len(wrong)} of {len(counted)} answers differ: {wrong[:2]}"
        assert all(afterwards[index]["tokens"] == tokens for index, tokens in settled.items())
    finally:
        start.stop()
    assert start.process.returncode == 0, "".join(start.lines)
