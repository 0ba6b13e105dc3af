"""The memory ledger: planned is what a build has, on a CPU to the byte and on an H200 as starts there had it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagegraph.compiler import build
from pagegraph.compiler.explain.ledger import Ledger, ledger, weights_of, would_fit
from pagegraph.compiler.explain.machines import GPUS, Machine, named_gpu
from pagegraph.compiler.explain.measure import measured_memory, resident
from pagegraph.compiler.options import CompilerOptions, KvCacheOptions, ModelOptions, StepOptions
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.tensor_parallel.shards import Ranks
from perf.floors import MAX_MODEL_LEN, write_model
from tests.compiler.architectures import RECURRENT, tiny_config
from tests.compiler.quantization.checkpoints import FORMATS, write
from tests.compiler.quantization.test_quantized_weights import stock_model
from tests.paths import ROOT

CPU = Machine("a CPU", 8 << 30, 1e10, 1e11, 2e11, None, 0.0, "made up")


def options_of(folder: Path, machine: Machine, quantization: str | None = None, **changed: object) -> CompilerOptions:
    memory = 1 << 22 if machine is CPU else None
    return CompilerOptions(
        model=ModelOptions(model=str(folder), load_format="dummy", quantization=quantization, max_model_len=None),
        device=torch.device(machine.device_type), capability=machine.capability,
        kv_cache=KvCacheOptions(block_size=16, memory=memory, state_memory=0), compile=False,
        step=StepOptions(max_num_seqs=8, max_decode_tokens=8, max_num_batched_tokens=64),
    )  # fmt: skip


def planned(options: CompilerOptions, machine: Machine, size: int = 1) -> Ledger:
    options = replace(options, ranks=Ranks(0, size))
    return ledger(options, build.plan_models(options), machine)


ARCHITECTURES, ONLINE = ["llama", "gemma3", "gpt2", "qwen3_moe", "falcon_h1", "mamba2"], ["int8", "int4", "fp8"]
OFTEN = {(one, None) for one in ARCHITECTURES} | {("llama", one) for one in ONLINE}
OFTEN |= {("gpt2", "int8"), ("qwen3_moe", "int4"), ("falcon_h1", "fp8")}


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        pytest.param(*one, marks=[] if one in OFTEN else pytest.mark.slow)
        for one in itertools.product(ARCHITECTURES, [None, *ONLINE])
    ],
)
def test_planned_is_what_is_built_on_a_cpu(architecture: str, quantization: str | None, tmp_path: Path) -> None:
    config = tiny_config(architecture)
    if architecture == "qwen3_moe":
        config.moe_intermediate_size = 64  # whole groups of int4
    config.save_pretrained(tmp_path)
    options = options_of(tmp_path, CPU, quantization)
    before = planned(options, CPU)
    built = build.build_model(options, progress=False)
    after = measured_memory(built, resident(options.device))
    built.close()
    assert before.weights == after.weights
    assert (before.state, before.blocks, before.num_blocks) == (after.state, after.blocks, after.num_blocks)
    assert before.slots == after.slots
    assert bool(before.slots) == (architecture in RECURRENT) and bool(before.blocks) == (architecture != "mamba2")
    tensors = [*built.step.paged_model.parameters(), *built.step.paged_model.buffers()]
    assert after.weight_bytes == sum({one.data_ptr(): one.nbytes for one in tensors}.values())


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_is_planned_as_it_is_read(name: str, tmp_path: Path) -> None:
    write(tmp_path, stock_model(), name)
    options = replace(options_of(tmp_path, CPU), model=ModelOptions(model=str(tmp_path)))
    built = build.build_model(options, progress=False)
    assert planned(options, CPU).weights == weights_of(built.step.paged_model.model)
    on_gpu = replace(options, device=torch.device("cuda"), capability=(9, 0))
    assert sum(one.bytes for one in planned(on_gpu, GPUS["h100"]).weights) > 0


def test_a_quantised_checkpoint_without_its_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, stock_model(), next(iter(FORMATS)))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(QuantizationError, match="fetch them first"):
        build.plan_models(replace(options_of(tmp_path, CPU), model=ModelOptions(model=str(tmp_path))))


def test_a_draft_model_counts_too(tmp_path: Path) -> None:
    for name in ("large", "small"):
        tiny_config("llama", num_hidden_layers=4 if name == "large" else 2).save_pretrained(tmp_path / name)
    alone = options_of(tmp_path / "large", CPU)
    small = ModelOptions(model=str(tmp_path / "small"), load_format="dummy")
    both = replace(alone, draft=small, step=replace(alone.step, max_draft_tokens=3))
    built = build.build_model(both, progress=False)
    found, measured = planned(both, CPU), measured_memory(built, 0)
    built.close()
    assert (found.weights, found.state, found.blocks) == (measured.weights, measured.state, measured.blocks)
    assert found.block_bytes == planned(alone, CPU).block_bytes * 3 // 2


def test_what_draft_tokens_bring_to_recurrent_states_counts_too(tmp_path: Path) -> None:
    tiny_config("mamba2").save_pretrained(tmp_path)
    alone = options_of(tmp_path, CPU)
    drafting = replace(alone, step=replace(alone.step, max_draft_tokens=3))
    built = build.build_model(drafting, progress=False)
    found, less, measured = planned(drafting, CPU), planned(alone, CPU), measured_memory(built, 0)
    caches = built.step.state.caches
    built.close()
    assert build.plan_models(drafting)[0].draft_bytes(drafting) == caches.draft_bytes
    assert (found.state, found.slots) == (measured.state, measured.slots) and found.slots == less.slots
    rows = [*caches.conv_drafts, *caches.recurrent_drafts]
    assert all(one.shape[:2] == (8, 7) for one in rows) and len(rows) == 2 * found.state_layers
    columns = 2  # of draft_tokens, which has one without
    assert found.state - less.state == sum(one.nbytes for one in rows) + 4 * 9 * columns + 4 * found.num_slots


def test_slots_of_recurrent_state_leave_less_for_blocks(tmp_path: Path) -> None:
    tiny_config("falcon_h1").save_pretrained(tmp_path)
    few = options_of(tmp_path, GPUS["h200"])
    many = replace(few, step=replace(few.step, max_num_seqs=1 << 22))
    fits, too_many = planned(few, GPUS["h200"]), planned(many, GPUS["h200"])
    assert fits.slots == 9 * sum(3 * 192 * 2 + 4 * 32 * 16 * 4 for _ in range(4)) and not fits.refusal
    assert "9 slots of recurrent state" in fits.source
    assert "ask for 4194305 slots" in too_many.refusal


@pytest.mark.parametrize(
    "name, result",
    [
        ("8b", "h200-2026-11-28-llama3-8b-prompts-in-graphs.json"),
        ("0.6b", "h200-2026-11-29-qwen3-0.6b-prefill-hopper.json"),
        ("30b-a3b-24l", "h200-2026-11-30-qwen3-30b-a3b-24l-steps.json"),
    ],
)
def test_an_estimate_gives_the_blocks_that_a_start_measured(name: str, result: str, tmp_path: Path) -> None:
    text = (ROOT / "perf" / "results" / result).read_text()
    [blocks] = {
        one["facts"]["num_blocks"] for one in json.loads(text)["sections"] if "num_blocks" in one.get("facts", {})
    }
    assert on_an_h200(name, 256, tmp_path).num_blocks == pytest.approx(blocks, rel=0.01)


@pytest.mark.parametrize("name", ["8b", "0.6b", "30b-a3b-24l"])
def test_an_estimate_is_what_is_kept_after_a_start_of_many_sequences(name: str, tmp_path: Path) -> None:
    rows = json.loads((ROOT / "perf" / "results" / "h200-2026-11-30-memory.json").read_text())["rows"]
    [row] = [row for row in rows if row["model"] == name]
    found = on_an_h200(name, row["max_num_seqs"], tmp_path)
    assert (found.weight_bytes, found.state, found.num_graphs) == (row["weights"], row["state"], row["graphs"])
    assert found.num_blocks == pytest.approx(row["num_blocks"], rel=0.01)
    assert found.loaded == pytest.approx(row["resident"], rel=0.03)


def on_an_h200(name: str, seqs: int, folder: Path) -> Ledger:
    """Of a start with so many sequences and steps of 8192 tokens."""
    options = options_of(write_model(name, folder), GPUS["h200"])
    options = replace(
        options, model=replace(options.model, max_model_len=MAX_MODEL_LEN[name]),
        step=StepOptions(max_num_seqs=seqs, max_decode_tokens=seqs, max_num_batched_tokens=8192),
    )  # fmt: skip
    return planned(options, GPUS["h200"])


def test_windows_are_told_from_whole_attention(tmp_path: Path) -> None:
    tiny_config("gemma3").save_pretrained(tmp_path)
    layers = planned(options_of(tmp_path, CPU), CPU).kv_layers
    assert {(one.layers, one.window) for one in layers} == {(2, 9), (2, 0)}
    assert sum(one.bytes_a_token for one in layers) * 16 == planned(options_of(tmp_path, CPU), CPU).block_bytes


def test_gpus_share_matrices_and_heads(tmp_path: Path) -> None:
    machine = GPUS["h100"]
    options = options_of(write_model("8b", tmp_path), machine)
    one, four, sixteen = (planned(options, machine, size) for size in (1, 4, 16))
    assert four.block_bytes * 4 == one.block_bytes
    assert sixteen.block_bytes * 8 == one.block_bytes  # 8 heads: two GPUs each hold the same one
    norms, frequencies = (sum(part.bytes for part in one.weights if part.kind == kind) for kind in ("norms", "other"))
    whole = norms + frequencies
    assert four.weight_bytes == (one.weight_bytes - whole) / 4 + whole
    assert {part.kind for part in four.weights} == {part.kind for part in one.weights}
    assert four.num_blocks > 4 * one.num_blocks


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    machine = GPUS["l4"]
    options = options_of(write_model("8b", tmp_path), machine)
    options = replace(options, step=StepOptions(max_num_seqs=256, max_decode_tokens=256, max_num_batched_tokens=8192))
    found = planned(options, machine)
    assert found.available < 0 and found.num_blocks == 0 and found.refusal
    advice = would_fit(options, machine)
    assert any(one.startswith("quantization=int4") for one in advice)
    int4 = replace(options, model=replace(options.model, quantization="int4"))
    assert not planned(int4, machine).refusal


def test_a_cache_that_is_too_small_says_which_length_fits(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    options = options_of(tmp_path, CPU)
    block = planned(options, CPU).block_bytes
    small = replace(options, kv_cache=replace(options.kv_cache, memory=5 * block))
    assert "Set max_model_len to at most 64" in planned(small, CPU).refusal
    assert would_fit(small, CPU)[0] == "max_model_len=64"


def test_a_gpu_without_fp8_is_refused_as_at_a_start(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match="compute capability 8.9"):
        build.plan_models(options_of(tmp_path, GPUS["a100"], "fp8"))
    assert build.plan_models(options_of(tmp_path, GPUS["l4"], "fp8"))


def test_ranks_on_one_cpu_share_its_rates_and_not_its_memory() -> None:
    half = CPU.shared_by(2)
    assert (half.bandwidth, half.flops, half.narrow_flops, half.memory) == (5e9, 5e10, 1e11, CPU.memory)
    assert CPU.shared_by(1) is CPU


def test_gpus_have_names() -> None:
    assert named_gpu("RTX 4090") is GPUS["rtx4090"]
    with pytest.raises(ValueError, match="there are b200, h200"):
        named_gpu("h2000")
