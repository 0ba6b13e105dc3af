"""Each file in examples/ runs: scripts on a tiny random model, clients against a server over the fake engine."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagegraph.runtime.config import load_config
from tests.paths import ROOT
from tests.web.web_process import web_process

EXAMPLES = ROOT / "examples"


def run(*command: str | Path) -> str:
    """What a command prints, in a process of its own."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What an example in Python prints, run here: PyTorch is imported once for all of them."""

    def run_script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A YAML file of a tiny random model, uncompiled."""
    folder = tmp_path_factory.mktemp("model")
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    vocab = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15,
        )
    ).save_pretrained(folder)  # fmt: skip
    path = folder / "tiny.yaml"
    settings = {"model": folder, "device": "cpu", "dtype": "float32", "compile": "false", "kv_cache_memory": "32MiB"}
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return path


@pytest.fixture
def url(fake_engine, tokenizer_folder: Path, tmp_path: Path) -> Iterator[str]:
    """A web process over the fake engine, which answers " hello world"."""
    settings = tmp_path / "settings.json"
    values = {
        "engine_addresses": [fake_engine.address], "model": str(tokenizer_folder), "served_model_name": "tiny",
        "threads": 8, "enough_threads": 8,
    }  # fmt: skip
    settings.write_text(json.dumps(values))
    with web_process(settings, threads=8) as process:
        yield f"http://127.0.0.1:{process.port}"


def test_generate(script: Callable[..., str], config: Path) -> None:
    lines = script("generate.py", config).splitlines()
    assert len(lines) == 3 and lines[0].startswith("'The capital of France is' -> ")


def test_stream(script: Callable[..., str], config: Path) -> None:
    assert script("stream.py", config).strip()


def test_speculative(script: Callable[..., str], config: Path) -> None:
    said = script("speculative.py", config)
    assert "same tokens: True" in said and "vllm:spec_decode_num_draft_tokens_total" in said


def test_chat_client(script: Callable[..., str], url: str) -> None:
    assert "hello world" in script("chat_client.py", url)


def test_curl(url: str) -> None:
    said = run("bash", EXAMPLES / "curl.sh", url)
    assert "hello world" in said and "data: [DONE]" in said


@pytest.mark.parametrize(
    "path", sorted([*EXAMPLES.glob("*.yaml"), *(ROOT / "configs").glob("*.yaml")]), ids=lambda p: p.name
)
def test_configurations_are_read(path: Path) -> None:
    assert load_config(str(path), {}).config.model


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}" in listed for path in EXAMPLES.iterdir() if path.name != "README.md")
