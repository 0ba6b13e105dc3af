"""Weights reach the model as transformers itself would load them, and nothing else passes for a checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pagegraph.compiler.model.checkpoint import BrokenFile, WeightsMismatch
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.compiler.model.weights import load_weights
from tests.compiler.architectures import SIZES, tiny_config
from tests.compiler.model.every_type import tiny

CPU = torch.device("cpu")


def stock_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="eager", dtype=torch.float32).eval()


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str = "eager") -> nn.Module:
    return build_meta(config, dtype, attention, max_model_len=config.max_position_embeddings)


def load(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    load_weights(model, folder, device=CPU, dtype=dtype, progress=False, **options)
    return model


@torch.inference_mode()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, SIZES["vocab_size"], (1, 17), generator=torch.Generator().manual_seed(1))
    return model(ids, use_cache=False).logits


def edit(folder: Path, change: object) -> None:
    """Rewrite the single checkpoint file of `folder` by `change`, a function of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    stock = stock_model(name)
    stock.save_pretrained(tmp_path)
    model = load(build(AutoConfig.from_pretrained(tmp_path)), tmp_path)
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-6, rtol=0)


def test_loads_shards(tmp_path: Path) -> None:
    stock = stock_model("llama")
    stock.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(load(build(tiny_config("llama")), tmp_path)), logits(stock), atol=1e-6, rtol=0)


def test_casts_to_the_asked_dtype(tmp_path: Path) -> None:
    stock_model("llama").save_pretrained(tmp_path)
    model = load(build(tiny_config("llama"), torch.bfloat16), tmp_path, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    config = tiny_config("gemma2")
    assert config.tie_word_embeddings
    stock_model("gemma2").save_pretrained(tmp_path)
    model = load(build(config), tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_meta_build_holds_no_weights_but_real_buffers() -> None:
    config = tiny_config("gemma3")
    before = copy.deepcopy(config)
    model = build(config, torch.bfloat16, ATTENTION_NAME)
    assert all(parameter.is_meta for parameter in model.parameters())
    stock = dict(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).named_buffers())
    buffers = dict(model.named_buffers())
    assert buffers.keys() == stock.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, stock[name]), name
    assert before._attn_implementation != model.config._attn_implementation


def test_the_given_configuration_stays_as_it_was() -> None:
    config = tiny_config("llama")
    config.rope_parameters = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    before = config.to_dict()
    build_meta(config, torch.bfloat16, ATTENTION_NAME, max_model_len=512)
    assert config.to_dict() == before
    assert config._attn_implementation != ATTENTION_NAME


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "falcon"])
def test_models_with_their_own_attention_are_refused(kind: str) -> None:
    sizes = dict(
        gptj=dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
        gpt_neo=dict(hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
        falcon=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    )
    config = AutoConfig.for_model(kind, vocab_size=128, **sizes[kind])
    with pytest.raises(UnsupportedModel, match=f"{kind}: .*attention interface"):
        build_meta(config, torch.bfloat16, ATTENTION_NAME, max_model_len=64)


def test_types_without_a_causal_language_model_are_refused() -> None:
    config = AutoConfig.for_model("siglip")
    with pytest.raises(UnsupportedModel, match="siglip: transformers has no causal language model of this type"):
        build_meta(config, torch.bfloat16, ATTENTION_NAME, max_model_len=64)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    stock_model("llama").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(WeightsMismatch, match=r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(build(tiny_config("llama")), tmp_path)


def test_unexpected_weights_are_named(tmp_path: Path) -> None:
    stock_model("llama").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.extra.weight": torch.ones(2)}))
    with pytest.raises(WeightsMismatch, match=r"unexpected.*self_attn\.extra\.weight"):
        load(build(tiny_config("llama")), tmp_path)


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    stock_model("llama").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(WeightsMismatch, match=r"model\.norm\.weight.*\[3\].*\[64\]"):
        load(build(tiny_config("llama")), tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*safetensors"):
        load(build(tiny_config("llama")), tmp_path)


def test_an_index_without_its_shard_fails(tmp_path: Path) -> None:
    names = dict(build(tiny_config("llama")).named_parameters())
    index = {"weight_map": dict.fromkeys(names, "gone.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenFile, match=r"index\.json names gone\.safetensors .1 files., not there"):
        load(build(tiny_config("llama")), tmp_path)


def test_a_shard_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    stock_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / index["model.norm.weight"]
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BrokenFile, match=rf"{shard.name} lacks model\.norm\.weight .1 tensors.* download both again"):
        load(build(tiny_config("llama")), tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of Git LFS .* `git lfs pull`",
        ),
        (b"", "0 bytes that are cut short"),
        (None, r"bytes that are cut short or damaged .* download it again"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_files_that_are_not_whole_are_named(tmp_path: Path, content: bytes | None, message: str, sharded: bool) -> None:
    stock_model("llama").save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "1GB")
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(BrokenFile, match=rf"{file.name} is no whole safetensors file: .*{message}"):
        load(build(tiny_config("llama")), tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [("{}", "weight_map"), ("version https://git-lfs.github.com/spec/v1", "git lfs pull"), ("{", "download it again")],
)
def test_a_broken_index_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BrokenFile, match=f"index.json is no index of safetensors files .*{message}"):
        load(build(tiny_config("llama")), tmp_path)


def test_dummy_weights_follow_the_seed(tmp_path: Path) -> None:
    def dummy(seed: int) -> nn.Module:
        return load(build(tiny_config("llama")), tmp_path, load_format="dummy", seed=seed)

    first, again, other = logits(dummy(1)), logits(dummy(1)), logits(dummy(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model = dummy(1)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


MIXTURES = [
    "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "phimoe", "minimax_m2", "ernie4_5_moe",
]  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_are_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    """Bit for bit, from a checkpoint that names every expert where the model's checkpoints do."""
    config = tiny(kind)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    got = load(build(config, torch.bfloat16), tmp_path, torch.bfloat16).state_dict()
    assert got.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(got[name].to(expected[name].dtype), expected[name])]


class Held(TorchDispatchMode):
    """Bytes of the storages that ops and reads of files have made and that are still held, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "granitemoe"])
def test_a_second_copy_is_never_held(kind: str, tmp_path: Path) -> None:
    """Beside the weights where they will be, the host holds one tensor of the checkpoint at a time."""
    config = tiny(kind)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    largest = max(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    model = build(config, torch.bfloat16)
    with Held() as held:
        load(model, tmp_path, torch.bfloat16)
    placed = sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
    assert placed > 4 * largest
    assert placed <= held.peak + largest <= placed + 2 * largest


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    stock_model("qwen3_moe").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
    with pytest.raises(
        WeightsMismatch, match=r"missing weights: model\.layers\.1\.mlp\.experts\.gate_up_proj of expert 2$"
    ):
        load(build(tiny_config("qwen3_moe")), tmp_path)


def test_more_experts_than_the_model_has_are_named(tmp_path: Path) -> None:
    stock_model("qwen3_moe").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name.format(4): tensors[name.format(3)].clone()}))
    with pytest.raises(
        WeightsMismatch, match=r"unexpected weights: model\.layers\.1\.mlp\.experts\.4\.down_proj\.weight"
    ):
        load(build(tiny_config("qwen3_moe")), tmp_path)


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    stock_model("qwen3_moe").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(1, 64)}))
    with pytest.raises(WeightsMismatch, match=r"experts\.3\.gate_proj\.weight: .*\[1, 64\], the model \[48, 64\]"):
        load(build(tiny_config("qwen3_moe")), tmp_path)


def test_a_body_without_its_prefix_and_old_buffers_load(tmp_path: Path) -> None:
    """Names as a bare body is saved under, and rotary frequencies that every layer once kept."""
    stock = stock_model("qwen3_moe")
    stock.save_pretrained(tmp_path)

    def as_body(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit(tmp_path, as_body)
    torch.testing.assert_close(logits(load(build(tiny_config("qwen3_moe")), tmp_path)), logits(stock), atol=0, rtol=0)


def test_an_embedding_saved_under_the_name_of_the_head_loads(tmp_path: Path) -> None:
    stock = stock_model("gemma2")
    stock.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    torch.testing.assert_close(logits(load(build(tiny_config("gemma2")), tmp_path)), logits(stock), atol=0, rtol=0)
