"""`runtime verify` on tiny random models: unharmed ones pass, and planted faults are found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from pagegraph.compiler import build
from pagegraph.compiler.passes import registry
from pagegraph.compiler.passes.registry import PASSES, Pass
from pagegraph.compiler.verify.bands import BIT_FOR_BIT, floor_of
from pagegraph.kernels.linear import fixed_rows
from pagegraph.runtime.cli import main
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.verify import itself, verification
from tests.compiler.architectures import ARCHITECTURES, tiny_config
from tests.compiler.model.test_paged import random_model

SMALL = ("--max-num-seqs", "8", "--kv-cache-memory", "4MiB", "--max-model-len", "128", "--device", "cpu", "--quick")
TEXTS = [
    "QWERTYUIOPASDFGHJKLZXCVBNM and the end",
    "hello world, AAAABBBB CCCCDDDD 00112233 XYZ",
    "ABCABCABCABCABCABCABCABC",
]
Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path, tokenizer_folder: Path) -> Save:
    """A function from an architecture to a folder with a tiny random model of it, and a tokenizer."""

    def write(name: str = "llama", **changed: object) -> str:
        folder = tmp_path / name
        config = tiny_config(name, vocab_size=352, bos_token_id=0, **changed)
        random_model(config).save_pretrained(folder)
        for file in tokenizer_folder.iterdir():
            shutil.copy(file, folder)
        return str(folder)

    return write


@pytest.fixture
def verify(tmp_path: Path) -> Callable[..., tuple[Result, dict[str, Any]]]:
    """A function from a model to the command's result and its JSON; float32 and uncompiled unless told."""

    def run(model: str, *flags: str, dtype: str = "float32", compiled: str = "false") -> tuple[Result, dict[str, Any]]:
        prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
        prompts.write_text("\n".join(TEXTS))
        given = ("--prompts", str(prompts), "--json", str(out), "--dtype", dtype, "--compile", compiled)
        result = CliRunner().invoke(main, ["verify", model, *SMALL, *given, *flags])
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return result, json.loads(out.read_text()) if out.exists() else {}

    return run


def differing(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["says"] for check in found["checks"] if check["ok"] is False}


def test_an_unharmed_model_passes(save: Save, verify) -> None:
    result, found = verify(save())
    assert result.exit_code == 0, result.output
    assert found["ok"] and max(map(len, result.stdout.splitlines())) <= 100
    names = {check["name"] for check in found["checks"] if check["ok"]}
    assert names >= {
        "teacher-forced", "greedy", "given the same input", "modules: merge_linears", "prefix cache hit against cold",
        "chunked prefill against whole", "preempted against not", "speculative (ngram) against not",
    }  # fmt: skip
    forced = next(check for check in found["checks"] if check["name"] == "teacher-forced")["figures"]
    assert forced["top1"] == 1.0 and 0 < forced["largest"] < 1e-4


def test_so_does_one_with_recurrent_state(save: Save, verify) -> None:
    result, found = verify(save("falcon_h1"))
    assert result.exit_code == 0, result.output
    names = {check["name"] for check in found["checks"] if check["ok"]}
    assert names >= {"teacher-forced", "given the same input", "chunked prefill against whole"}
    assert "speculative (ngram) against not" in {check["name"] for check in found["checks"]}


@pytest.mark.parametrize(("dtype", "flags"), [("bfloat16", ()), ("float32", ("--quantization", "int8"))])
def test_so_does_one_of_fewer_bits(save: Save, verify, dtype: str, flags: tuple[str, ...]) -> None:
    result, found = verify(save(), *flags, dtype=dtype)
    assert result.exit_code == 0, result.output
    assert found["quantised"] == bool(flags) and (found["own"] is not None) == (dtype == "bfloat16")


def test_quantised_experts_are_compared_with_their_values(save: Save, verify) -> None:
    result, found = verify(save("qwen3_moe"), "--quantization", "int8")
    assert result.exit_code == 0, result.output
    assert found["quantised"] and found["checks"][0]["figures"]["kl"] < 1e-4


def test_no_bit_may_differ_where_bits_are_promised() -> None:
    near = itself.Equality("one by one", "1 sequence a step", 2, [(1, 3, 0.0)], [0.0, 1e-9])
    same = itself.Equality("one by one", "1 sequence a step", 2, [], [0.0, 0.0])
    band = floor_of(torch.float32, quantised=False)
    assert verification._equality(near, band, 8).ok
    assert not verification._equality(near, BIT_FOR_BIT, 8).ok
    assert not verification._equality(replace(near, differing=[], errors=[0.0, 1e-9]), BIT_FOR_BIT, 8).ok
    assert verification._equality(same, BIT_FOR_BIT, 8).ok


@pytest.mark.slow
def test_bits_that_differ_under_deterministic_are_named(save: Save, verify, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save()
    result, found = verify(folder, "--deterministic", "true", compiled="true")
    assert result.exit_code == 0, result.output
    product_of = fixed_rows.product_of

    def by_company(rows: Tensor, product: fixed_rows.Product, key: object) -> Tensor:
        return product_of(rows, product, key) * (1 + 2**-20 * (len(rows) > 4))

    monkeypatch.setattr(fixed_rows, "product_of", by_company)
    result, found = verify(folder, "--deterministic", "true", compiled="true")
    assert "chunked prefill against whole" in differing(found)


def test_a_wrong_rope_factor_is_named(save: Save, verify, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build.build_meta

    def harmed(*arguments: Any, **named: Any) -> nn.Module:
        model = original(*arguments, **named)
        model.model.rotary_emb.inv_freq.mul_(1 / 1.1)
        return model

    monkeypatch.setattr(build, "build_meta", harmed)
    result, found = verify(save())
    assert result.exit_code == 1
    assert {"teacher-forced", "given the same input"} <= differing(found).keys()
    assert "first at model.rotary_emb;" in differing(found)["given the same input"]


def test_a_swapped_weight_is_named(save: Save, verify, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build.load_weights

    def harmed(model: nn.Module, *arguments: Any, **named: Any) -> None:
        original(model, *arguments, **named)
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight

    monkeypatch.setattr(build, "load_weights", harmed)
    result, found = verify(save())
    assert result.exit_code == 1
    figures = next(check["figures"] for check in found["checks"] if check["section"] == "layers")
    assert figures["outside"] == ["model.layers.1"] and figures["culprit"] == "model.layers.1.mlp.gate_proj"
    assert "first at model.layers.1.mlp.gate_proj" in result.stdout.replace("\n", " ")


def test_a_window_that_is_one_too_long_is_named(save: Save, verify, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build.wrap_model

    def harmed(*arguments: Any, **named: Any) -> Any:
        paged = original(*arguments, **named)
        paged.layouts = [replace(one, window=one.window + 1) for one in paged.layouts]
        return paged

    monkeypatch.setattr(build, "wrap_model", harmed)
    result, found = verify(save("mistral_window"))
    assert result.exit_code == 1
    figures = next(check["figures"] for check in found["checks"] if check["section"] == "layers")
    assert figures["outside"] == [f"model.layers.{at}" for at in range(4)]
    assert figures["culprit"] == "model.layers.0.self_attn, ahead of o_proj"


def test_a_pass_over_modules_that_drops_something_is_named(save: Save, verify, monkeypatch: pytest.MonkeyPatch) -> None:
    def drops_a_norm(model: nn.Module) -> int:
        model.model.layers[2].input_layernorm = nn.Identity()
        return 1

    monkeypatch.setattr(registry, "PASSES", (*PASSES[:2], Pass(None, drops_a_norm), *PASSES[2:]))
    result, found = verify(save())
    assert result.exit_code == 1
    assert [name for name in differing(found) if name.startswith("modules")] == ["modules: drops_a_norm"]


def test_blocks_that_are_not_what_they_were_show(save: Save, verify, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are lost between two requests, so that what is found in the prefix cache is wrong, and nothing else."""

    class Forgetful(LLM):
        def generate(self, *arguments: Any, **named: Any) -> Any:
            done = super().generate(*arguments, **named)
            for keys in self.built.step.state.caches.key_caches:
                keys.zero_()
            return done

    monkeypatch.setattr(itself, "LLM", Forgetful)
    result, found = verify(save())
    assert result.exit_code == 1
    assert [*differing(found)] == ["prefix cache hit against cold"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("nowhere/",), "no folder or file"),
        (("--max-model-len", "5"), "leaves no room"),
        (("--prompts", "bad.jsonl"), "bad.jsonl:2 is no JSON object with a prompt"),
        (("--dtype", "int3"), "dtype"),
    ],
)
def test_wrong_use_ends_with_2(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"prompt": "fine"}\n{"text": "not"}\n')
    model = () if flags[0] == "nowhere/" else (save(),)
    result = CliRunner().invoke(main, ["verify", *model, *flags, "--device", "cpu", "--compile", "false"])
    assert result.exit_code == 2, result.output
    assert says in result.output


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes(save: Save, verify, name: str, dtype: str) -> None:
    result, _ = verify(save(name), dtype=dtype)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_a_pass_over_the_graph_that_drops_a_residual_is_named(
    save: Save, verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command, compiled; what runs after it stays as it was."""
    from tests.compiler.verify.test_passes import drops_a_residual

    def with_fault(*arguments: Any) -> list[Any]:
        return [*registry.graph_passes(*arguments), drops_a_residual]

    for module in (verification, build):
        monkeypatch.setattr(module, "graph_passes", with_fault)
    result, found = verify(save(), compiled="true")
    assert result.exit_code == 1
    names = [name for name in differing(found) if name.startswith("graph")]
    assert names == ["graph: drops_a_residual", "graph: Inductor"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_model_passes() -> None:
    result = CliRunner().invoke(main, ["verify", "models/SmolLM2-135M-Instruct.Q4_1.gguf", "--device", "cpu"])
    assert result.exit_code == 0, result.output
