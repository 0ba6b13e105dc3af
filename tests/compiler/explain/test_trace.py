"""What steps cost in a model's graph: as formulas say for shapes that have some, traced or not, before passes and after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pagegraph.compiler import build
from pagegraph.compiler.explain.ledger import planned_states, weight_tensors
from pagegraph.compiler.explain.machines import GPUS
from pagegraph.compiler.explain.roofline import floor_of
from pagegraph.compiler.explain.trace import costs, decodes, prompts, trace
from pagegraph.compiler.options import CompilerOptions, KvCacheOptions, ModelOptions, StepOptions
from pagegraph.compiler.passes.registry import graph_passes
from pagegraph.compiler.step.dummy import dummy_step
from pagegraph.kernels.costs import StepRows
from perf.floors import Ceilings, Shape, write_model
from tests.compiler.architectures import ARCHITECTURES, tiny_config

H200 = GPUS["h200"]


def options_of(folder: Path, device: str = "cuda", quantization: str | None = None) -> CompilerOptions:
    return CompilerOptions(
        model=ModelOptions(model=str(folder), load_format="dummy", quantization=quantization, dtype="bfloat16"),
        device=torch.device(device), capability=(9, 0), kv_cache=KvCacheOptions(block_size=8, memory=1 << 24),
        step=StepOptions(max_num_seqs=8, max_decode_tokens=8, max_num_batched_tokens=64),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method"),
    [("0.6b", None), ("8b", "fp8"), ("0.6b", "int8"),
     *(pytest.param(*one, marks=pytest.mark.slow) for one in (("8b", None), ("0.6b", "fp8"), ("8b", "int8")))],
)  # fmt: skip
def test_sums_are_those_of_the_formulas(name: str, method: str | None, tmp_path: Path) -> None:
    options = options_of(write_model(name, tmp_path / name), quantization=method)
    [model] = build.plan_models(options)
    [state] = planned_states(options, [model])
    shape, machine = Shape.of(name), replace(H200, narrow_flops=H200.flops)
    mixed = StepRows(np.array([1, 1, 300, 17]), np.array([900, 1, 300, 64]))
    for step in (decodes(4, 1000), prompts(512, 256), mixed):
        totals, _ = costs(model.paged_model, model.paged_model, state, step, len(step.rows))
        floor, _, _ = floor_of(totals, machine)
        query_start = np.concatenate([[0], np.cumsum(step.rows)])
        expected = shape.step_floor(Ceilings(machine.bandwidth, machine.flops), query_start, step.seq_lens, method)
        if method is None:
            head = shape.vocab * shape.hidden
            assert totals["linears"].flops == 2 * (shape.layer_weights * step.rows.sum() + head * len(step.rows))
            assert totals["linears"].weight_bytes == 2 * (shape.layer_weights + head)
            assert totals["attention"].cache_bytes == shape.kv_bytes * step.seq_lens.sum()
            assert floor == pytest.approx(expected, rel=1e-12)
        else:  # scales are read besides
            assert expected <= floor <= 1.01 * expected


def test_sums_of_a_mixture_are_those_of_the_formulas(tmp_path: Path) -> None:
    options = options_of(write_model("30b-a3b-24l", tmp_path))
    [model] = build.plan_models(options)
    [state] = planned_states(options, [model])
    shape = Shape.of("30b-a3b-24l")
    for step in (decodes(1, 1000), decodes(32, 1000), prompts(2048, 256)):
        totals, _ = costs(model.paged_model, model.paged_model, state, step, len(step.rows))
        flops, read = (sum(getattr(one, name) for one in totals.values()) for name in ("flops", "weight_bytes"))
        query_start = np.concatenate([[0], np.cumsum(step.rows)])
        by_bytes = shape.step_floor(Ceilings(1.0, 1e30), query_start, step.seq_lens)
        by_flops = shape.step_floor(Ceilings(1e30, 1.0), query_start, step.seq_lens)
        assert by_bytes == pytest.approx(read + totals["attention"].cache_bytes, rel=1e-6)
        assert by_flops == pytest.approx(flops, rel=1e-6)


@pytest.mark.parametrize("name", ["qwen3-next-12l", "nemotron-h-8b"])
def test_sums_of_layers_with_a_state_are_those_of_the_formulas(name: str, tmp_path: Path) -> None:
    options = options_of(write_model(name, tmp_path))
    [model] = build.plan_models(options)
    [state] = planned_states(options, [model])
    shape = Shape.of(name)
    for step in (decodes(1, 1000), decodes(32, 1000), prompts(2048, 256)):
        totals, _ = costs(model.paged_model, model.paged_model, state, step, len(step.rows))
        states, read = totals.pop("states"), sum(one.weight_bytes for one in totals.values())
        query_start = np.concatenate([[0], np.cumsum(step.rows)])
        by_bytes = shape.step_floor(Ceilings(1.0, 1e30), query_start, step.seq_lens)
        by_flops = shape.step_floor(Ceilings(1e30, 1.0), query_start, step.seq_lens)
        assert states.cache_bytes == 2 * shape.recurrence.state_bytes * len(step.rows)
        assert states.flops == shape.recurrence.flops * step.rows.sum()
        assert by_bytes == pytest.approx(read + totals["attention"].cache_bytes + states.cache_bytes, rel=1e-6)
        assert by_flops == pytest.approx(sum(one.flops for one in totals.values()) + states.flops, rel=1e-6)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2", "qwen3_moe"])
def test_the_traced_graph_costs_what_the_forward_does_and_what_passes_make_of_it(
    architecture: str, tmp_path: Path
) -> None:
    tiny_config(architecture).save_pretrained(tmp_path)
    options = options_of(tmp_path)
    [model] = build.plan_models(options)
    [state] = planned_states(options, [model])
    traced = trace(model.paged_model, state, [dummy_step([5, 1, 3], 0)], graph_passes(options.passes, options.device))
    assert len(traced.graphs) == 1
    for step, seqs in ((decodes(4, 100), 4), (decodes(8, 30), 8), (prompts(40, 200), 2)):
        plain, apart = costs(model.paged_model, model.paged_model, state, step, seqs)
        rewritten, calls = traced.costs(step, seqs)
        for kind, totals in plain.items():
            assert (rewritten[kind].flops, rewritten[kind].bytes) == (totals.flops, totals.bytes)
        assert ("experts" in plain) == (architecture == "qwen3_moe")
        for listed, summed in ((apart, plain), (calls, rewritten)):
            for kind, totals in summed.items():
                of_kind = [call.cost for call in listed if call.cost is not None and call.cost.kind == kind]
                assert len(of_kind) == totals.calls and sum(one.flops for one in of_kind) == totals.flops
        assert len(calls) <= len(apart)


@pytest.mark.parametrize(("architecture", "method", "rounds"), [("qwen3_moe", "fp8", True), ("gpt_oss", "fp8", False),
                                                                ("qwen3_moe", "int8", False)])  # fmt: skip
def test_rows_of_experts_may_be_rounded_in_front_of_e4m3_without_biases(
    architecture: str, method: str, rounds: bool, tmp_path: Path
) -> None:
    tiny_config(architecture).save_pretrained(tmp_path)
    [model] = build.plan_models(options := options_of(tmp_path, quantization=method))
    [state] = planned_states(options, [model])
    _, calls = costs(model.paged_model, model.paged_model, state, prompts(40, 200), 2)
    experts = [call for call in calls if call.op == "repacked_experts"]
    assert experts and all(call.narrow == rounds for call in experts)


def test_calls_are_those_that_the_passes_left(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    options = options_of(tmp_path)
    [model] = build.plan_models(options)
    [state] = planned_states(options, [model])
    traced = trace(model.paged_model, state, [dummy_step([5, 1, 3], 0)], graph_passes(options.passes, options.device))
    _, calls = traced.costs(decodes(6, 20), 6)
    layers, hidden = model.num_layers, model.paged_model.hidden_size
    names = [call.op for call in calls]
    assert names.count("rope_attention") == layers and names.count("linear_norm_linear") == 2 * layers - 1
    [first] = [call for call in calls if call.op == "linear_norm_linear"][:1]
    assert (first.rows, len(first.matrices)) == (6, 2) and first.matrices[0][0] == hidden
    given = [6 * first.matrices[0][1], 6 * hidden, hidden]  # what attention gave, the residual, the norm's weight
    left = [6 * hidden, 6 * first.matrices[1][0] // 2]  # the sum, gate times up
    assert first.moved == 2 * (sum(given) + sum(left)) + 4 * 7  # and where sequences begin


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_of_every_architecture_is_read_once(architecture: str, tmp_path: Path) -> None:
    tiny_config(architecture).save_pretrained(tmp_path)
    options = options_of(tmp_path)
    [model] = build.plan_models(options)
    [state] = planned_states(options, [model])
    step = decodes(300, 50)  # so many that every expert is chosen
    totals, _ = costs(model.paged_model, model.paged_model, state, step, 300)
    inner = model.paged_model.model
    tied = inner.get_input_embeddings().weight is inner.get_output_embeddings().weight
    held = [(kind, one) for kind, _, one in weight_tensors(inner) if one.dim() > 1]
    assert not [one.shape for kind, one in held if kind == "other"]
    looked_up = [one for kind, one in held if kind == "embedding"]
    read = sum(one.nbytes for _, one in held) - sum(one.nbytes for one in looked_up[tied:])
    assert sum(one.weight_bytes for one in totals.values()) == pytest.approx(
        read, rel=0.015
    )  # biases of experts, routers cast
    attention = totals["attention"].calls if "attention" in totals else 0
    assert attention == len(model.paged_model.layouts)


def test_prompts_are_whole_ones_or_the_end_of_one() -> None:
    assert [part.tolist() for part in prompts(100, 300)] == [[100], [300]]
    assert [part.tolist() for part in prompts(700, 300)] == [[300, 300, 100], [300, 300, 100]]
    assert [part.tolist() for part in prompts(600, 300)] == [[300, 300], [300, 300]]
