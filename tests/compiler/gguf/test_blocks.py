"""The unpacked blocks of every kept GGUF type give the values of the gguf package's own dequantiser."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig

from pagegraph.compiler.gguf.blocks import BLOCKS, keep, unpack_blocks
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.quantization.methods import QuantizationError

ROWS, BLOCKS_A_ROW = 6, 3


def random_bytes(kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Every bit of values and small scales at random; the half-precision scales of a block finite."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (ROWS * BLOCKS_A_ROW, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,)):
        half = generator.normal(size=len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = half[:, None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_planes_give_the_packages_values(kind: gguf.GGMLQuantizationType) -> None:
    data = random_bytes(kind)
    expected = gguf.dequantize(data, kind)
    qweight, scale, zero = unpack_blocks(data, kind)
    group = qweight.shape[1] // scale.shape[1]
    assert np.array_equal(qweight, qweight.round()) and -128 <= qweight.min() and qweight.max() <= 127
    got = qweight * scale.repeat(group, axis=1)
    if zero is None:
        assert np.array_equal(got, expected)
    else:
        # The zero moved to the middle of the values costs roundings of float32.
        largest = np.abs(expected).max()
        assert np.abs(got + zero.repeat(group, axis=1) - expected).max() <= 4 * np.finfo(np.float32).eps * largest


def llama(path: Path, attention: Type, rest: Type) -> dict[str, np.ndarray]:
    """A GGUF file of one layer, its linears of two types; name -> the values it holds."""
    generator, hidden, inner, vocab = np.random.default_rng(0), 64, 96, 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    linears = dict(attn_q=(hidden, hidden), attn_k=(32, hidden), attn_v=(32, hidden), attn_output=(hidden, hidden))
    linears |= dict(ffn_gate=(inner, hidden), ffn_up=(inner, hidden), ffn_down=(hidden, inner))
    held = {}
    for name, shape in linears.items():
        kind = attention if name.startswith("attn") else rest
        data = gguf.quantize(generator.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=kind)
        held[name] = gguf.dequantize(data, kind)
    for name, shape in {
        "token_embd": (vocab, hidden),
        "output": (vocab, hidden),
        "output_norm": hidden,
        "blk.0.attn_norm": hidden,
        "blk.0.ffn_norm": hidden,
    }.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def kept(path: Path) -> dict[str, torch.Tensor]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = build_meta(config, torch.float32, "eager", max_model_len=64)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert keep(path, model, tensors) == {"quant_method": "gguf"}
    return tensors


def test_types_that_are_not_kept_become_bfloat16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = llama(tmp_path / "some.gguf", Type.Q8_0, Type.Q5_0)
    with caplog.at_level(logging.WARNING):
        tensors = kept(tmp_path / "some.gguf")
    assert "some.gguf holds weights as Q5_0 too" in caplog.text
    layer = "model.layers.0"
    qweight, scale = (tensors[f"{layer}.self_attn.v_proj.{name}"] for name in ("qweight", "scale"))
    assert np.array_equal((qweight.float() * scale.repeat_interleave(32, 1)).numpy(), held["attn_v"])
    assert tensors[f"{layer}.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors[f"{layer}.mlp.up_proj.weight"], torch.from_numpy(held["ffn_up"]).bfloat16())


@pytest.mark.parametrize("kind, found", [(Type.Q5_0, "Q5_0"), (Type.F16, "nothing is quantised")])
def test_a_file_of_other_types_is_refused(tmp_path: Path, kind: Type, found: str) -> None:
    llama(tmp_path / "other.gguf", kind, kind)
    with pytest.raises(
        QuantizationError,
        match=f"keeps Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, and no linear of the file is one of these .{found}.; leave quantization out",
    ):
        kept(tmp_path / "other.gguf")
