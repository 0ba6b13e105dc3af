"""Checkpoints of every served format load code by code, and compute what their dequantised values compute."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pagegraph.compiler.model import weights
from pagegraph.compiler.model.checkpoint import WeightsMismatch, sidecar_quantization
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.weights import load_weights
from pagegraph.compiler.options import PassOptions
from pagegraph.compiler.passes.modules import merge_linears as merge_module
from pagegraph.compiler.passes.modules import quant_linears
from pagegraph.compiler.passes.modules.merge_linears import MergedQuantLinear
from pagegraph.compiler.passes.registry import apply_module_passes
from pagegraph.compiler.quantization import config as quant_config
from pagegraph.compiler.quantization import methods, online, packing
from pagegraph.compiler.quantization.layouts import Int4Packed, Int8Dynamic, RepackedLinear
from pagegraph.compiler.quantization.linear import QuantLinear
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.quantization.online import online_group
from pagegraph.compiler.resolve import resolve_cache_dtype, resolve_quantization
from pagegraph.kernels.quant import reference
from pagegraph.kernels.quant.weight import QuantWeight
from pagegraph.runtime.config import Config, ConfigError, load_config
from tests.compiler.architectures import tiny_config
from tests.compiler.quantization.checkpoints import FORMATS, compressed, words, write

CPU = torch.device("cpu")
WIDE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32)  # groups of 128 fit
PASSES = PassOptions(skinny_linears=False, rotary_once=False)


def stock_model(name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(name)
    if name == "llama":
        config.update(WIDE)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()


def load(
    folder: Path, asked: str | None = None, dtype: torch.dtype = torch.float32, load_format: str = "auto"
) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    quantization = resolve_quantization(asked, config, CPU)
    model = build_meta(config, dtype, "eager", max_model_len=config.max_position_embeddings)
    load_weights(
        model, folder, device=CPU, dtype=dtype, quantization=quantization, progress=False, load_format=load_format
    )
    return model


@torch.inference_mode()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 128, (1, 17), generator=torch.Generator().manual_seed(1))
    return model(ids, use_cache=False).logits.float()


def quantised(model: nn.Module) -> dict[str, QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_is_the_formats(name: str, tmp_path: Path) -> None:
    """Bit for bit: codes, zero points and half-precision scales multiply exactly in float32."""
    stock = write(tmp_path, stock_model(), name)
    model = load(tmp_path)
    linears = quantised(model)
    assert len(linears) == 7 * WIDE["num_hidden_layers"]
    for path, linear in linears.items():
        assert torch.equal(linear.dequantized(), stock.get_submodule(path).weight), path
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["awq_g32", "gptq_4_act_order", "w4a16_asymmetric", "w8a8", "fp8_row", "gptq_8"])
def test_passes_keep_what_it_computes(name: str, tmp_path: Path) -> None:
    """Merged, and in the form of this CPU: within the roundings that the form adds (states to two int8 values (int8x2), scales to the dtype)."""
    stock = write(tmp_path, stock_model(), name)
    model = load(tmp_path)
    reports = {report.name: report.changes for report in apply_module_passes(model, PASSES)}
    assert reports["merge_linears"] == 2 * WIDE["num_hidden_layers"]
    assert reports["quant_linears"] == 4 * WIDE["num_hidden_layers"]
    assert not quantised(model)
    got, expected = logits(model), logits(stock)
    kinds = {type(module) for module in model.modules()}
    if name == "w8a8":
        assert Int8Dynamic in kinds or not torch.cpu._is_vnni_supported()
        assert (got - expected).abs().max() < 5e-4 * expected.abs().max()
    else:
        assert (Int4Packed in kinds) == (name not in ("fp8_row", "gptq_8"))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_linears_left_unquantised_stay(tmp_path: Path) -> None:
    stock = write(tmp_path, stock_model(), "awq_g64")
    path = "model.layers.1.mlp.down_proj"
    tensors = load_file(tmp_path / "model.safetensors")
    for leaf in ("qweight", "qzeros", "scales"):
        del tensors[f"{path}.{leaf}"]
    tensors[f"{path}.weight"] = stock.get_submodule(path).weight.detach()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    assert type(model.get_submodule(path)) is nn.Linear
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-5, rtol=1e-5)


def test_siblings_in_different_orders_are_not_merged(tmp_path: Path) -> None:
    write(tmp_path, stock_model(), "gptq_4_act_order")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    expected = logits(model)
    reports = {report.name: report.changes for report in apply_module_passes(model, PASSES)}
    assert reports["merge_linears"] == 2 * WIDE["num_hidden_layers"] - 1
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method, error", [("int8", 0.03), ("int4", 0.25), ("fp8", 0.08)])
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen2", "phi", "opt", "gpt_neox", "deepseek_v3", "mixtral", "cohere2"]
)
def test_quantised_while_loading(name: str, method: str, error: float, tmp_path: Path) -> None:
    """Logits within a stated share of their spread; every linear but small routers is quantised, the head as its method says."""
    if name == "deepseek_v3" and method == "int4":
        pytest.skip("its low-rank projections of 24 inputs hold no group of 32")
    stock = stock_model(name)
    stock.save_pretrained(tmp_path)
    model = load(tmp_path, method)
    head = model.get_output_embeddings()
    assert isinstance(head, QuantLinear) == (method != "fp8")
    left = [path for path, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    assert all(path.endswith("gate") for path in left)
    apply_module_passes(model, PASSES)
    expected = logits(stock)
    difference = (logits(model) - expected).pow(2).mean().sqrt() / expected.std()
    assert difference < error, f"{difference:.3f}"


def test_one_unquantised_weight_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_model().save_pretrained(tmp_path)
    given, original = [], weights.quantize

    def watched(weight: torch.Tensor, *arguments: str) -> QuantWeight:
        assert not any(earlier() is not None for earlier in given)
        given.append(weakref.ref(weight))
        return original(weight, *arguments)

    monkeypatch.setattr(weights, "quantize", watched)
    load(tmp_path, "int8", torch.bfloat16)
    assert len(given) == 7 * WIDE["num_hidden_layers"] + 1


def test_passes_let_each_weight_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next group is merged, or the next linear gets its form, those before are gone."""
    stock_model().save_pretrained(tmp_path)
    model, held = load(tmp_path, "int8", torch.bfloat16), []
    check, form = merge_module._check, quant_linears._form

    def checked(merged: MergedQuantLinear, linears: list[QuantLinear], where: str) -> None:
        assert not any(linear() is not None for linear in held)
        held.extend(map(weakref.ref, linears))
        check(merged, linears, where)

    def formed(linear: QuantLinear, *arguments: bool) -> nn.Module:
        assert not any(linear() is not None for linear in held)
        held.append(weakref.ref(linear))
        return form(linear, *arguments)

    monkeypatch.setattr(merge_module, "_check", checked)
    monkeypatch.setattr(quant_linears, "_form", formed)
    apply_module_passes(model, PASSES)
    layers = WIDE["num_hidden_layers"]
    assert len(held) == 5 * layers + 4 * layers + 1


@pytest.mark.parametrize("asked, config", [("fp8", {}), (None, dict(quantization_config=dict(quant_method="fp8")))])
def test_a_gpu_that_knows_no_fp8(monkeypatch: pytest.MonkeyPatch, asked: str | None, config: dict) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    device = torch.device("cuda")
    with pytest.raises(
        QuantizationError,
        match="quantization=fp8 needs a GPU of compute capability 8.9 or later, an older GPU has less; set quantization to int8 or int4",
    ):
        resolve_quantization(asked, PretrainedConfig(**config), device)
    with pytest.raises(QuantizationError, match="kv_cache_dtype=fp8 needs .*; set kv_cache_dtype to auto"):
        resolve_cache_dtype("fp8", torch.bfloat16, device)
    assert resolve_quantization("int4", PretrainedConfig(), device) == "int4"


def test_dummy_weights_can_be_quantised(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path)
    linears = quantised(load(tmp_path, "int4", load_format="dummy"))
    assert linears.pop("lm_head").qweight.dtype == torch.int8
    assert [linear.qweight.dtype for linear in linears.values()] == [torch.uint8] * 7 * WIDE["num_hidden_layers"]


def test_quantised_weights_are_smaller(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path)

    def size(method: str | None) -> int:
        model = load(tmp_path, method, torch.bfloat16)
        layers = model.model.layers
        return sum(t.nbytes for t in [*layers.parameters(), *layers.buffers()])

    plain = size(None)
    assert size("int8") < 0.53 * plain
    assert size("fp8") < 0.53 * plain
    assert size("int4") < 0.38 * plain  # of 16 bits: 4, and two of float32 to 32 codes until a device's form is chosen


def test_merged_linears_are_stacked_codes(tmp_path: Path) -> None:
    write(tmp_path, stock_model(), "fp8_tensor")
    model = load(tmp_path)
    before = quantised(model)["model.layers.0.mlp.up_proj"].qweight
    apply_module_passes(model, PassOptions(merge_linears=True, skinny_linears=False, rotary_once=False))
    merged = [m for m in model.modules() if isinstance(m, MergedQuantLinear)]
    assert len(merged) == 2 * WIDE["num_hidden_layers"]
    assert before.shape[0] * 2 == merged[1].linear.out_features


def test_every_method_that_the_configuration_takes_is_carried_out() -> None:
    """By a checkpoint of its kind, or while loading; and what checkpoints say of themselves may be asked for."""
    of_checkpoints = {
        method: name for name, (stored, _) in FORMATS.items() if (method := quant_config.detect(stored).method)
    }
    assert set(of_checkpoints) | set(methods.ONLINE) | {"gguf", "mxfp4"} == set(methods.METHODS)
    for method in methods.METHODS:
        asked = Config(model="any", quantization=method).quantization
        if method in of_checkpoints:
            assert quant_config.resolve(asked, FORMATS[of_checkpoints[method]][0]).method == method
        elif method in ("gguf", "mxfp4"):
            assert quant_config.resolve(asked, {"quant_method": method}).method == method
        else:
            assert quant_config.resolve(asked, None) == method
        if method in methods.ONLINE:
            linear = online.quantize(torch.randn(128, 128), method, "linear")
            assert linear.qweight.nbytes <= 128 * 128
    with pytest.raises(ConfigError, match="awq, gptq, compressed-tensors"):
        load_config("any", {"quantization": "awq2"})


@pytest.mark.parametrize(
    "asked, name, message",
    [
        ("gptq", "awq_g64", "quantization=gptq, but the checkpoint is quantised by awq; .*awq"),
        ("int8", "w8a8", "quantised by compressed-tensors; .*compressed-tensors"),
        ("awq", None, "has no quantization_config; fp8, int8, int4 quantise while loading"),
        ("gguf", None, "comes from no .gguf file"),
    ],
)
def test_flag_against_checkpoint(asked: str, name: str | None, message: str) -> None:
    config = PretrainedConfig(quantization_config=FORMATS[name][0]) if name else PretrainedConfig()
    with pytest.raises(QuantizationError, match=message):
        resolve_quantization(asked, config, CPU)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(quant_method="bitsandbytes"),
            "'bitsandbytes' is not known; known: awq, gptq, fp8, mxfp4, compressed-tensors",
        ),
        (dict(quant_method="gptq", bits=3), "gptq of 3 bits is not served; 4 and 8 are"),
        (dict(quant_method="awq", bits=4, version="gemv"), "'gemv' of AWQ is not served; gemm is"),
        (dict(quant_method="gptq", bits="4"), "gptq of '4' bits"),
        (
            dict(quant_method="compressed-tensors", format="int-quantized", config_groups={}),
            "config_groups has to name at least one group",
        ),
        (
            dict(quant_method="compressed-tensors", format="marlin-24", config_groups=dict(a=dict(weights={}))),
            "'marlin-24'.*pack-quantized",
        ),
    ],
)
def test_unknown_checkpoints_are_refused(config: dict, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quant_config.detect(config)


@pytest.mark.parametrize("structure", ["128x128", [128, 128]])
def test_blocks_of_compressed_tensors(structure: object) -> None:
    config = compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=structure)
    assert quant_config.detect(config).block == (128, 128)


def changed(tmp_path: Path, name: str, leaf: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """The checkpoint with one tensor of `model.layers.0.mlp.up_proj` changed, or left out."""
    write(tmp_path, stock_model(), name)
    tensors = load_file(tmp_path / "model.safetensors")
    path = f"model.layers.0.mlp.up_proj.{leaf}"
    if (tensor := change(tensors.pop(path))) is not None:
        tensors[path] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name, leaf, change, message",
    [
        (
            "awq_g64",
            "scales",
            lambda tensor: None,
            r"up_proj: the checkpoint has no model\.layers\.0\.mlp\.up_proj\.scales",
        ),
        (
            "awq_g64",
            "scales",
            lambda tensor: tensor[:, :-8].contiguous(),
            r"up_proj: qweight \[128, 32\], scales \[2, 248\], qzeros .* do not belong together in 4 bits",
        ),
        (
            "w4a16_asymmetric",
            "weight_zero_point",
            lambda tensor: tensor[:4].contiguous(),
            "weight_zero_point .* do not belong together",
        ),
        (
            "w4a16_asymmetric",
            "weight_zero_point",
            lambda tensor: tensor.repeat(8, 1),
            "weight_zero_point .* do not belong together",
        ),
        (
            "w4a16_asymmetric",
            "weight_packed",
            lambda tensor: tensor.repeat(1, 2),
            "weight_packed .* do not belong together",
        ),
        (
            "awq_g64",
            "qzeros",
            lambda tensor: tensor.float(),
            r"up_proj\.qzeros is float32 .*; int32 and two axes are served",
        ),
        (
            "awq_g64",
            "scales",
            lambda tensor: tensor[0].clone(),
            r"up_proj\.scales is float16 \[256\]; two axes are served",
        ),
        (
            "gptq_4_act_order",
            "g_idx",
            lambda tensor: tensor[:64].clone(),
            "groups of 64 inputs, a weight of 128; is `bits`",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, name: str, leaf: str, change: Callable, message: str
) -> None:
    changed(tmp_path, name, leaf, change)
    with pytest.raises(QuantizationError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("empty", [0, -1])
def test_group_indices_that_say_nothing(tmp_path: Path, empty: int) -> None:
    """All 0 or all -1 is how some quantisers write that inputs keep their order; with an order declared it is a contradiction."""
    stock = write(tmp_path, stock_model(), "gptq_4")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        assert tensors[name].max() > 0
        tensors[name] = torch.full_like(tensors[name], empty)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits(load(tmp_path)), logits(stock), atol=1e-5, rtol=1e-5)
    declare_order(tmp_path, lambda config: config, desc_act=True)
    with pytest.raises(QuantizationError, match="_proj: .*desc_act.* all 0"):
        load(tmp_path)


def declare_order(folder: Path, place: Callable[[dict], dict], **said: Any) -> None:
    """Let config.json say so, where `place` finds it in quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    place(config["quantization_config"]).update(said)
    (folder / "config.json").write_text(json.dumps(config))


def test_an_order_that_is_declared_has_its_group_indices(tmp_path: Path) -> None:
    write(tmp_path / "gptq", stock_model(), "gptq_4_act_order")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith("layers.1.mlp.up_proj.g_idx")}
    save_file(left, tmp_path / "gptq" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj: .*desc_act.* no group indices"):
        load(tmp_path / "gptq")


def test_an_order_of_compressed_tensors_has_its_group_indices(tmp_path: Path) -> None:
    def weights(config: dict) -> dict:
        return next(iter(config["config_groups"].values()))["weights"]

    stock = write(tmp_path, stock_model(), "w4a16")
    declare_order(tmp_path, weights, actorder="weight")  # inputs keep their order
    torch.testing.assert_close(logits(load(tmp_path)), logits(stock), atol=1e-5, rtol=1e-5)
    declare_order(tmp_path, weights, actorder="group")
    with pytest.raises(QuantizationError, match=r"_proj: .*actorder.* no group indices"):
        load(tmp_path)


def test_one_group_has_no_order() -> None:
    """Of all inputs: their order means nothing, with group indices or without."""
    assert packing._g_idx_order(None, 64, 64, "up_proj", True) is None
    assert packing._g_idx_order(torch.zeros(64, dtype=torch.int32), 64, 64, "up_proj", True) is None


def test_zero_points_one_by_one(tmp_path: Path) -> None:
    """As int8 [N, groups] they are those of the words, less 8."""

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        return (packing.unpack_integers(words, 4, 0) - 8).to(torch.int8)

    changed(tmp_path, "w4a16_asymmetric", "weight_zero_point", unpacked)
    one_by_one = load(tmp_path)
    write(tmp_path, stock_model(), "w4a16_asymmetric")
    assert torch.equal(logits(one_by_one), logits(load(tmp_path)))


@pytest.mark.parametrize(
    "file, words, scheme",
    [
        ("quantize_config.json", dict(bits=8, group_size=64, desc_act=True), ("gptq", 8)),
        ("quant_config.json", dict(zero_point=True, q_group_size=64, w_bit=4, version="GEMM"), ("awq", 4)),
        ("config.json", dict(bits=8), None),
    ],
)
def test_a_quantisers_own_file(tmp_path: Path, file: str, words: dict, scheme: tuple[str, int] | None) -> None:
    """It counts where weights are packed; those may be in one file of any name."""
    (tmp_path / file).write_text(json.dumps(words))
    save_file({"a.qweight": torch.zeros(1)}, tmp_path / "gptq_model-4bit-64g.safetensors")
    found = resolve_quantization(None, PretrainedConfig(), CPU, sidecar_quantization(tmp_path))
    assert (found and (found.method, found.bits)) == scheme
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "gptq_model-4bit-64g.safetensors")
    assert sidecar_quantization(tmp_path) is None


def test_a_quantisers_own_file_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text("bits: 4")
    save_file({"a.qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(QuantizationError, match="quantize_config.json is no JSON"):
        sidecar_quantization(tmp_path)


@pytest.mark.parametrize("zero", [None, 3])
def test_one_scale_for_all(zero: int | None) -> None:
    """compressed-tensors' strategy tensor: scale and zero point, int8, of one element; a scale a row may have one axis."""
    qweight = torch.randint(-8, 8, (48, 64), generator=torch.Generator().manual_seed(0))
    packed = words((qweight + 8).numpy(), 4)
    scheme = quant_config.detect(
        compressed("pack-quantized", num_bits=4, type="int", strategy="tensor", symmetric=zero is None)
    )
    tensors = dict(weight_packed=packed, weight_scale=torch.tensor([0.5]), weight_shape=torch.tensor([48, 64]))
    if zero is not None:
        tensors["weight_zero_point"] = torch.tensor([zero], dtype=torch.int8)
    for scale in (torch.tensor([0.5]), torch.full((48,), 0.5)):
        if scale.numel() > 1 and zero is not None:
            tensors["weight_zero_point"] = torch.full((48,), zero, dtype=torch.int8)
        read = scheme.read(tensors | dict(weight_scale=scale), "a")
        weight = reference.dequantize(read.qweight, read.scale, read.zero, read.group)
        assert torch.equal(weight, (qweight - (zero or 0)).float() * 0.5)


def test_scales_of_keys_and_values_alone_quantise_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dict(quant_method="compressed-tensors", config_groups={}, kv_cache_scheme=dict(num_bits=8, type="float"))
    assert quant_config.detect(config) is None
    stock_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{name}_scale": torch.ones(1) for name in ("k", "v", "kv")}
    save_file(tensors | scales, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("INFO"):
        load(tmp_path)
    assert "scales of keys and values are not used" in caplog.text


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_the_form_of_a_gpu_computes_what_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, device: str
) -> None:
    """Merged and laid out; on the CPU by the reference of its op."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stock_model().save_pretrained(tmp_path)
    plain, model = load(tmp_path, method, torch.bfloat16), load(tmp_path, method, torch.bfloat16).to(device)
    if device == "cpu":
        monkeypatch.setattr(quant_linears, "_form", lambda linear, quantize_x, _: RepackedLinear(linear, quantize_x))
    apply_module_passes(model, PASSES)
    forms = [type(module) for module in model.modules()]
    assert forms.count(RepackedLinear) == 4 * 2 + (method != "fp8") and QuantLinear not in forms
    assert all(module.quantize_x for module in model.modules() if type(module) is RepackedLinear)
    ids = torch.randint(3, 128, (1, 17), generator=torch.Generator().manual_seed(1))
    expected, out = logits(plain), model(ids.to(device), use_cache=False).logits.float().cpu()
    assert ((out - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("quantize_x", [True, False])
def test_whether_states_may_be_rounded_is_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quantize_x: bool
) -> None:
    monkeypatch.setattr(quant_linears, "_form", lambda linear, quantize_x, _: RepackedLinear(linear, quantize_x))
    stock_model().save_pretrained(tmp_path)
    model = load(tmp_path, "int8", torch.bfloat16)
    with caplog.at_level("INFO"):
        apply_module_passes(model, PassOptions(round_activations=quantize_x))
    assert {module.quantize_x for module in model.modules() if type(module) is RepackedLinear} == {quantize_x}
    assert ("may round activations to 8 bits in front of 9 of 9" in caplog.text) == quantize_x


def test_experts_that_stay_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock_model("mixtral").save_pretrained(tmp_path)
    load(tmp_path, "int8")
    assert "the experts of a mixture are not quantised" in caplog.text


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.update(dict(intermediate_size=80))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        QuantizationError,
        match=r"down_proj: 80 inputs do not divide into groups of 32; set quantization to int8 or fp8",
    ):
        load(tmp_path, "int4")


@pytest.mark.parametrize(
    ("inputs", "device", "group"), [(4096, "cuda", 128), (576, "cuda", 64), (96, "cuda", 32), (4096, "cpu", 32)]
)
def test_groups_made_while_loading_suit_the_device(inputs: int, device: str, group: int) -> None:
    assert online_group(inputs, device, "w") == group


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path, stock_model(), "gptq_4")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"missing.*model\.norm\.weight"):
        load(tmp_path)
    tensors["model.norm.weight"] = torch.ones(128)
    tensors["model.extra.qweight"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"unexpected.*model\.extra\.qweight"):
        load(tmp_path)


def test_a_bias_that_the_model_lacks(tmp_path: Path) -> None:
    """Of zeros it is left out; else it would be lost."""
    stock = write(tmp_path, stock_model(), "gptq_4")
    name = "model.layers.0.mlp.up_proj.bias"
    tensors = load_file(tmp_path / "model.safetensors")
    for value in (0.0, 1.0):
        tensors[name] = torch.full((256,), value)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if value == 0.0:
            torch.testing.assert_close(logits(load(tmp_path)), logits(stock), atol=1e-5, rtol=1e-5)
        else:
            with pytest.raises(WeightsMismatch, match=r"up_proj\.bias.*not zero"):
                load(tmp_path)


def test_a_configuration_without_quantised_tensors_is_refused(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": FORMATS["awq_g64"][0]}))
    with pytest.raises(QuantizationError, match="awq, but no linear of the model has qweight"):
        load(tmp_path)
