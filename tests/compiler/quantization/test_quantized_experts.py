"""Quantised mixtures: each value is what the format says, and the engine's forward computes by it what transformers does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pagegraph.compiler.model import paged
from pagegraph.compiler.model.checkpoint import WeightsMismatch
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, PagedModel, wrap_model
from pagegraph.compiler.model.source import resolve_model
from pagegraph.compiler.model.weights import load_weights, plan_weights
from pagegraph.compiler.options import PassOptions
from pagegraph.compiler.passes.modules.quant_experts import quant_experts
from pagegraph.compiler.passes.registry import apply_module_passes
from pagegraph.compiler.quantization import layouts
from pagegraph.compiler.quantization.layouts import RepackedExperts
from pagegraph.compiler.quantization.linear import QuantExperts
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.quantization.online import quantize
from pagegraph.compiler.resolve import resolve_quantization
from pagegraph.kernels.quant import reference
from pagegraph.runtime.config import Config
from pagegraph.runtime.ipc.protocol import SamplingParams
from pagegraph.runtime.llm import LLM
from tests.compiler.gguf import files
from tests.compiler.model.test_paged import CHUNKED, MIXED, check_compiled, prompts_for, stock_logits
from tests.compiler.model.test_weights import Held
from tests.compiler.paged_run import run_paged
from tests.compiler.quantization.mixtures import config_of, write_mixture, write_mxfp4

CPU = torch.device("cpu")
FORMATS = [
    ("mixtral", "fp8_tensor"), ("deepseek_v3", "fp8_block"), ("mixtral", "awq_g64"), ("olmoe", "gptq_4_asymmetric"),
    ("qwen3_moe", "w4a16"), ("qwen3_moe", "w8a8"),
]  # fmt: skip
MORE = [
    ("qwen3_moe", "fp8_row"), ("qwen3_moe", "fp8_static"), ("qwen3_moe", "gptq_4"), ("qwen3_moe", "gptq_8"),
    ("qwen3_moe", "w4a16_asymmetric"), ("olmoe", "w8a16"),
]  # fmt: skip


def load(folder: Path, asked: str | None = None, dtype: torch.dtype = torch.float32) -> PagedModel:
    config = AutoConfig.from_pretrained(folder)
    quantization = resolve_quantization(asked, config, CPU)
    paged = wrap_model(build_meta(config, dtype, ATTENTION_NAME, max_model_len=256))
    load_weights(paged.model, folder, device=CPU, dtype=dtype, quantization=quantization, progress=False)
    return paged


def weights_of(model: nn.Module) -> dict[str, QuantExperts]:
    """Stacks of quantised experts by name."""
    return {path: module for path, module in model.named_modules() if type(module) is QuantExperts}


def check(built: PagedModel, stock: nn.Module, layers: int = 2) -> None:
    """Every value is the stock model's, and so are logits of steps that mix prompts and decodes."""
    held = weights_of(built.model)
    assert len(held) == 2 * layers
    for path, module in held.items():
        values = reference.dequantize(module.qweight, module.scale, module.zero, module.group)
        expected = stock.get_parameter(path)
        assert torch.equal(values, expected.transpose(1, 2) if "GptOss" in type(stock).__name__ else expected), path
    compare(built, stock, 1e-4)


@torch.inference_mode()
def compare(paged: PagedModel, stock: nn.Module, bound: float) -> None:
    apply_module_passes(paged.model, PassOptions())
    prompts = prompts_for(stock.config.vocab_size)
    expected = stock_logits(stock, prompts)
    for sequence, by_position in enumerate(run_paged(paged, paged, prompts, MIXED)):
        for position, logits in by_position.items():
            wanted = expected[sequence][position]
            torch.testing.assert_close(logits, wanted, atol=bound * max(1.0, wanted.abs().max().item()), rtol=0)


@pytest.mark.parametrize(("kind", "name"), [*FORMATS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)])
def test_quantised_checkpoints(kind: str, name: str, tmp_path: Path) -> None:
    stock = write_mixture(tmp_path, kind, name)
    paged = load(tmp_path)
    dense = 1 if kind == "deepseek_v3" else 0
    if name == "w8a8":  # this CPU's product of 8-bit linears rounds what it multiplies
        assert len(weights_of(paged.model)) == 4
        compare(paged, stock, 1e-2)
    else:
        check(paged, stock, 2 - dense)


def test_mxfp4(tmp_path: Path) -> None:
    stock = write_mxfp4(tmp_path)
    check(load(tmp_path), stock)


REPACKED = [("gpt_oss", "mxfp4"), ("deepseek_v3", "fp8_block"), ("mixtral", "awq_g64"), ("qwen3_moe", "w8a16")]


@pytest.mark.parametrize(("kind", "name"), REPACKED)
def test_as_gpus_multiply_them(kind: str, name: str, tmp_path: Path) -> None:
    """The same logits by the layout that a GPU takes, whose op has its reference on a CPU; sizes of a plan too."""
    stock = write_mxfp4(tmp_path) if name == "mxfp4" else write_mixture(tmp_path, kind, name)
    paged = load(tmp_path)
    layers = 1 if kind == "deepseek_v3" else 2
    assert quant_experts(paged.model) == 0 and quant_experts(paged.model, device_type="cuda") == layers
    assert sum(type(module) is RepackedExperts for module in paged.model.modules()) == 2 * layers
    compare(paged, stock, 1e-4)


@pytest.mark.parametrize(
    ("name", "rounds"), [("fp8_row", True), ("fp8_row", False), ("fp8_block", True), ("w8a16", True)]
)
def test_activations_are_rounded_where_they_may_be(
    name: str, rounds: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In front of e4m3 with a scale a row alone, and where the setting has it; the log says so."""
    write_mixture(tmp_path, "qwen3_moe", name)
    paged = load(tmp_path, dtype=torch.bfloat16)
    with caplog.at_level("INFO", "pagegraph.quantization"):
        assert quant_experts(paged.model, rounds, "cuda") == 2
    expected = rounds and name == "fp8_row"
    apply_module_passes(paged.model, PassOptions(round_activations=rounds))
    said = "steps of more than 8 tokens may round activations to 8 bits in front of experts of 2 of 2 layers"
    assert (said in caplog.text) == expected
    asked: list[bool] = []
    op = torch.ops.pagegraph.repacked_experts
    with mock.patch.object(
        torch.ops.pagegraph, "repacked_experts", lambda *given, **named: asked.append(named["quantize_x"]) or op(*given)
    ):
        prompts = prompts_for(paged.model.config.vocab_size)
        run_paged(paged, paged, prompts, MIXED, torch.bfloat16)
    assert asked and set(asked) == {expected}


def test_groups_that_no_block_holds_are_held_unquantised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock = write_mxfp4(tmp_path)
    paged = load(tmp_path)
    with mock.patch.object(layouts, "repacked_group", lambda weight: 0):
        assert quant_experts(paged.model, device_type="cuda") == 2
    assert "experts of 2 of 2 layers; they are held unquantised" in caplog.text
    compare(paged, stock, 1e-4)


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "awq_g64"), ("deepseek_v3", "fp8_block"), ("gpt_oss", "mxfp4")])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.inference_mode()
def test_the_engines_tokens_are_those_of_transformers(kind: str, name: str, device: str, tmp_path: Path) -> None:
    """Greedy, of several prompts at once; they may part where two tokens are as likely as each other."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stock = write_mxfp4(tmp_path) if name == "mxfp4" else write_mixture(tmp_path, kind, name)
    words = tokenizers.models.WordLevel({f"t{token}": token for token in range(128)}, unk_token="t3")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    settings = dict(dtype="float32", max_model_len=128, kv_cache_memory=1 << 25, compile=False, device=device)
    llm = LLM(Config(model=str(tmp_path), **settings))
    prompts = [[5, 9, 77, 31, 8], [100, 3, 4], [64] * 20]
    for done in llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)):
        ids = done.prompt_token_ids + done.token_ids
        logits = stock(torch.tensor([ids])).logits[0, len(done.prompt_token_ids) - 1 : -1]
        given = logits.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(given, logits.amax(1), atol=1e-4 if device == "cpu" else 1e-3, rtol=0)


def test_mxfp4_is_unpacked_as_transformers_does(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    tensors, held = load_file(tmp_path / "model.safetensors"), weights_of(load(tmp_path).model)
    for path, module in held.items():
        expected = convert_moe_packed_tensors(tensors[f"{path}_blocks"], tensors[f"{path}_scales"], dtype=torch.float32)
        got = reference.dequantize(module.qweight, module.scale, module.zero, module.group)
        assert torch.equal(got, expected.transpose(1, 2))


@pytest.mark.parametrize(("kind", "method", "bound"), [
    ("qwen3_moe", "fp8", 0.08), ("gpt_oss", "int8", 0.03), ("granitemoe", "int4", 0.25), ("mixtral", "int4", 0.25),
])  # fmt: skip
@torch.inference_mode()
def test_quantised_while_loading(kind: str, method: str, bound: float, tmp_path: Path) -> None:
    """Experts too: logits within a stated share of their spread, from one expert's tensor at a time or from a stack."""
    stock = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32).eval()
    stock.save_pretrained(tmp_path)
    paged = load(tmp_path, method)
    kinds = {module.quantized.kind for module in weights_of(paged.model).values()}
    assert kinds == {method} and len(weights_of(paged.model)) == 4
    apply_module_passes(paged.model, PassOptions())
    prompts = prompts_for(stock.config.vocab_size)
    expected, errors, spread = stock_logits(stock, prompts), [], []
    for sequence, by_position in enumerate(run_paged(paged, paged, prompts, MIXED)):
        for position, logits in by_position.items():
            errors.append(logits - expected[sequence][position])
            spread.append(expected[sequence][position])
    assert 0 < torch.stack(errors).square().mean().sqrt() / torch.stack(spread).std() < bound


@pytest.mark.parametrize("method", ["fp8", "int8", "int4"])
def test_an_expert_is_quantised_as_a_linear_is(method: str, tmp_path: Path) -> None:
    stock = AutoModelForCausalLM.from_config(config_of("qwen3_moe"), dtype=torch.float32)
    stock.save_pretrained(tmp_path)
    path = "model.layers.1.mlp.experts.gate_up_proj"
    held = weights_of(load(tmp_path, method).model)[path]
    for expert, rows in enumerate(stock.get_parameter(path)):
        halves = [quantize(half, method, "here") for half in rows.chunk(2)]
        for got, *expected in zip(held.quantized[:3], *halves):
            if got is not None:
                assert torch.equal(got[expert].float(), torch.cat(expected).float())


def test_no_second_copy_is_held_while_experts_are_quantised(tmp_path: Path) -> None:
    """A few of an expert's tensors in float32 are, and nothing of the model in 16 bits."""
    config = config_of("qwen3_moe")
    config.num_experts = 16
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    largest = max(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    with Held() as held:
        model = load(tmp_path, "int8", torch.bfloat16).model
    placed = sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
    assert held.peak < placed + 8 * largest < 1.2 * placed


@pytest.mark.parametrize("name", ["fp8_block", "w4a16_asymmetric", "mxfp4", "int4"])
def test_a_plan_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    """Shapes and types, without values."""
    if name == "mxfp4":
        write_mxfp4(tmp_path)
    elif name == "int4":
        AutoModelForCausalLM.from_config(config_of("gpt_oss"), dtype=torch.float32).save_pretrained(tmp_path)
    else:
        write_mixture(tmp_path, "qwen3_moe", name)
    asked = name if name == "int4" else None
    config = AutoConfig.from_pretrained(tmp_path)
    quantization = resolve_quantization(asked, config, CPU)
    planned = wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256)).model
    plan_weights(planned, tmp_path, device_type="cpu", dtype=torch.float32, quantization=quantization)
    loaded = load(tmp_path, asked).model

    def sizes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tensor.shape, tensor.dtype) for name, tensor in named}

    assert sizes(planned) == sizes(loaded)


@torch.inference_mode()
def test_quantised_experts_are_one_full_graph(tmp_path: Path) -> None:
    stock = write_mixture(tmp_path, "qwen3_moe", "fp8_row")
    (graph,) = check_compiled(stock, load(tmp_path), [], CHUNKED)
    assert sum("pagegraph.quant_experts" in str(node.target) for node in graph.graph.nodes) == 2


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_order_of_inputs_is_refused(tmp_path: Path) -> None:
    write_mixture(tmp_path, "qwen3_moe", "gptq_4_act_order")
    with pytest.raises(QuantizationError, match=r"experts whose inputs are in an order of their own .* not served"):
        load(tmp_path)


def test_experts_of_two_kinds_are_refused(tmp_path: Path) -> None:
    write_mixture(tmp_path, "qwen3_moe", "fp8_row")
    path = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({path: torch.ones(192, 128, dtype=torch.int8)}))
    with pytest.raises(QuantizationError, match=r"experts\.2\.up_proj: 192 rows of int8 .* another expert .* has fp8"):
        load(tmp_path)


@pytest.mark.parametrize("leaf", ["down_proj", "up_proj"])
def test_a_layer_that_is_quantised_in_part_is_refused(leaf: str, tmp_path: Path) -> None:
    write_mixture(tmp_path, "qwen3_moe", "fp8_row")

    def half(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(4) if leaf == "down_proj" else [2]:
            path = f"model.layers.1.mlp.experts.{expert}.{leaf}"
            del tensors[f"{path}.weight_scale"]
            tensors[f"{path}.weight"] = tensors[f"{path}.weight"].float()

    edit(tmp_path, half)
    with pytest.raises(
        QuantizationError, match=r"layers\.1.* a part is quantised and a part is not; take a checkpoint"
    ):
        load(tmp_path)


def test_models_that_compute_experts_themselves_are_named(tmp_path: Path) -> None:
    write_mixture(tmp_path, "qwen3_moe", "fp8_row")
    with mock.patch.object(paged, "take_experts", lambda model: 0):
        with pytest.raises(QuantizationError, match="leave them to a function of transformers, .* take the original"):
            load(tmp_path)


def test_blocks_without_scales_are_named(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    edit(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(QuantizationError, match="experts.down_proj: MXFP4 needs .*_blocks and .*_scales"):
        load(tmp_path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write_mixture(tmp_path, "qwen3_moe", "gptq_4")

    def without(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".0.mlp.experts.3.down_proj." in name]:
            del tensors[name]

    edit(tmp_path, without)
    with pytest.raises(
        WeightsMismatch, match=r"missing weights: model\.layers\.0\.mlp\.experts\.down_proj of expert 3$"
    ):
        load(tmp_path)


HALVES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}  # where blocks have a float16
KINDS = [("Q4_0", "Q8_0"), ("Q4_K", "Q6_K"), ("Q4_1", "Q4_0")]


def gguf_mixture(path: Path, first: str, second: str) -> dict[str, np.ndarray]:
    """A file of Qwen3 MoE whose experts are random blocks, gate and up of the first type -> what the gguf package makes of them."""
    sizes = dict(hidden_size=256, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2, head_dim=64)
    model = files.stock_model("qwen3_moe", **sizes, num_hidden_layers=2)
    own = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 256, "attention.key_length": 64}
    held, plain = {}, files.write_model(path.with_name("plain.gguf"), model, own)
    reader, generator = gguf.GGUFReader(plain), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], kind)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType[second if "ffn_down_exps" in tensor.name else first]
        if "_exps" not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        values, size = gguf.GGML_QUANT_SIZES[kind]
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        data = generator.integers(0, 256, (len(rows), rows.shape[1] // values, size), np.uint8)
        for at in HALVES[kind.name]:
            data[..., at : at + 2] = np.full((*data.shape[:2], 1), 1e-3, np.float16).view(np.uint8)
        data = data.reshape(*tensor.data.shape[:2], -1)
        held[tensor.name] = gguf.dequantize(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize(("first", "second"), KINDS)
def test_gguf(first: str, second: str, taken: bool, tmp_path: Path) -> None:
    """Experts in the blocks of the file, value by value; unpacked where a model computes them itself."""
    held = gguf_mixture(tmp_path / "some.gguf", first, second)
    folder = resolve_model(str(tmp_path / "some.gguf"), keep_quantized=True, cache_dir=tmp_path / "cache")
    with nullcontext() if taken else mock.patch.object(paged, "take_experts", lambda model: 0):
        built = load(folder)
    stacks = weights_of(built.model)
    assert len(stacks) == (4 if taken else 0)
    for layer in range(2):
        for leaf, parts in dict(gate_up_proj=("gate", "up"), down_proj=("down",)).items():
            expected = np.concatenate([held[f"blk.{layer}.ffn_{part}_exps.weight"] for part in parts], axis=1)
            got = getattr(built.model.model.layers[layer].mlp.experts, leaf)
            if stacks:
                got = reference.dequantize(got.qweight, got.scale, got.zero, got.group)
            np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
