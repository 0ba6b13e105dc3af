"""A model shared by two ranks, which meet through gloo, against transformers' own forward, in float32."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import FileStore
from transformers import AutoConfig, PretrainedConfig

from pagegraph.compiler.model import weights
from pagegraph.compiler.model.meta import build_meta
from pagegraph.compiler.model.paged import ATTENTION_NAME, PagedModel, wrap_model
from pagegraph.compiler.model.probe import UnsupportedModel
from pagegraph.compiler.model.weights import load_weights
from pagegraph.compiler.options import PassOptions
from pagegraph.compiler.passes.registry import apply_module_passes
from pagegraph.compiler.quantization.methods import QuantizationError
from pagegraph.compiler.resolve import resolve_quantization
from pagegraph.compiler.tensor_parallel.modules import join
from pagegraph.compiler.tensor_parallel.plan import Indivisible
from pagegraph.compiler.tensor_parallel.quantized import share_of
from pagegraph.compiler.tensor_parallel.shards import ALONE, Ranks, Shard
from pagegraph.kernels.collective import groups
from pagegraph.kernels.quant import reference
from pagegraph.kernels.quant.weight import QuantWeight
from tests.compiler.architectures import ARCHITECTURES, SIZES, tiny_config
from tests.compiler.model.every_type import tiny
from tests.compiler.model.test_paged import CHUNKED, prompts_for, random_model, stock_logits
from tests.compiler.paged_run import run_paged
from tests.compiler.quantization.checkpoints import FORMATS, write
from tests.compiler.quantization.mixtures import write_mixture, write_mxfp4

CPU = torch.device("cpu")
QUICK = ("qwen3", "gemma2", "phi3", "mixtral", "stablelm", "qwen3_next")
NOT_SHARED = {
    "gpt2": "no plan", "opt": "no plan", "stablelm": "takes sizes from elsewhere",
    **dict.fromkeys(
        ("qwen3_next", "kimi_linear", "lfm2", "nemotron_h", "falcon_h1", "jamba", "mamba2"), "recurrent state"
    ),
}  # fmt: skip
SHARED = [name for name in ARCHITECTURES if name not in NOT_SHARED]


@pytest.fixture(scope="module")
def peer() -> Iterator[ProcessPoolExecutor]:
    """The process of rank 1; rank 0 is this one. (Threads will not do: transformers' forwards share what they capture.)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or both would spin for the same CPUs
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pool.submit(torch.get_num_threads)  # starts it while the first test writes its checkpoint
        yield pool
    torch.set_num_threads(threads)


def with_peer(peer: ProcessPoolExecutor, work: Callable[..., Any], folder: Path, *given: Any) -> list[Any]:
    """What `work(ranks, folder, *given)` gives on both ranks."""
    store = folder / f"store-{work.__name__}"
    other = peer.submit(as_rank, 1, store, work, folder, *given)
    return [as_rank(0, store, work, folder, *given), other.result(60)]


def as_rank(rank: int, store: Path, work: Callable[..., Any], folder: Path, *given: Any) -> Any:
    groups.register("test", groups.connect(FileStore(str(store), 2), rank, 2, CPU, 60))
    try:
        return work(Ranks(rank, 2, "test"), folder, *given)
    finally:
        groups.forget("test")


def share(ranks: Ranks, folder: Path, **options: Any) -> PagedModel:
    """A rank's share of the model in `folder`, merged and joined."""
    config = AutoConfig.from_pretrained(folder)
    options.setdefault("quantization", resolve_quantization(None, config, CPU))
    paged = wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256), 0, ranks)
    assert paged.sharding is not None
    load_weights(
        paged.model, folder, device=CPU, dtype=torch.float32, progress=False, shards=paged.sharding.shards, **options
    )
    join(paged.model, paged.sharding)
    apply_module_passes(paged.model, PassOptions())
    return paged


def logits(ranks: Ranks, folder: Path, expert_parallel: bool = False) -> list[dict[int, torch.Tensor]]:
    paged = share(replace(ranks, expert_parallel=expert_parallel), folder)
    with torch.inference_mode():
        return run_paged(paged, paged, prompts_for(SIZES["vocab_size"]), CHUNKED)


def stored(config: PretrainedConfig, folder: Path) -> list[torch.Tensor]:
    """Logits of transformers' own model of `config`, whose checkpoint goes to `folder`."""
    stock = random_model(config)
    stock.save_pretrained(folder)
    return stock_logits(stock, prompts_for(SIZES["vocab_size"]))


def assert_both_give(
    expected: list[torch.Tensor], peer: ProcessPoolExecutor, folder: Path, *given: Any, atol: float = 1e-4
) -> None:
    first, second = with_peer(peer, logits, folder, *given)
    for sequence, by_position in enumerate(first):
        for position, got in by_position.items():
            torch.testing.assert_close(got, expected[sequence][position], atol=atol, rtol=0)
            assert torch.equal(got, second[sequence][position])  # or they would sample different tokens


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SHARED]
)
def test_two_ranks_give_the_logits_of_transformers(name: str, tmp_path: Path, peer: ProcessPoolExecutor) -> None:
    assert_both_give(stored(tiny_config(name), tmp_path), peer, tmp_path)


def test_a_head_of_keys_and_values_is_held_by_several_ranks(tmp_path: Path, peer: ProcessPoolExecutor) -> None:
    expected = stored(tiny_config("llama", num_hidden_layers=2, num_key_value_heads=1), tmp_path)
    assert_both_give(expected, peer, tmp_path)


@pytest.mark.slow
def test_a_vocabulary_that_does_not_divide_is_held_whole(tmp_path: Path, peer: ProcessPoolExecutor) -> None:
    expected = stored(tiny_config("llama", num_hidden_layers=2, vocab_size=129), tmp_path)
    assert_both_give(expected, peer, tmp_path)


@pytest.mark.slow
def test_an_embedding_that_is_the_head_too_is_cut_once(tmp_path: Path, peer: ProcessPoolExecutor) -> None:
    config = tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=True)
    assert_both_give(stored(config, tmp_path), peer, tmp_path)


WIDE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32)
QUICK_FORMATS = ("awq_g32", "fp8_block")
ACT_ORDER = ("gptq_4_act_order", "gptq_8_act_order_asymmetric")


def packed(folder: Path, name: str, **sizes: Any) -> list[torch.Tensor]:
    """Logits of a model whose checkpoint in `folder` is in the named format."""
    stock = write(folder, random_model(tiny_config("llama", **{**WIDE, **sizes})), name)
    return stock_logits(stock, prompts_for(SIZES["vocab_size"]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK_FORMATS else pytest.mark.slow)
        for name in FORMATS
        if name not in ACT_ORDER
    ],
)
def test_packed_checkpoints_are_cut_at_borders_of_groups(name: str, tmp_path: Path, peer: ProcessPoolExecutor) -> None:
    assert_both_give(packed(tmp_path, name), peer, tmp_path, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "awq_g128",
            "self_attn.o_proj: 2 ranks cannot share 384 inputs at borders of groups of 128; set tensor_parallel_size to one of 1, 3$",
        ),
        ("gptq_4_act_order", "mlp.down_proj: its inputs are in an order of their own .*set tensor_parallel_size=1"),
    ],
)
def test_packed_checkpoints_that_ranks_cannot_share_are_refused(name: str, why: str, tmp_path: Path) -> None:
    packed(tmp_path, name, hidden_size=384, num_attention_heads=6, head_dim=64)
    with pytest.raises(QuantizationError, match=rf"^model\.layers\.0\.{why}"):
        share(Ranks(1, 2, "test"), tmp_path)


@pytest.mark.parametrize("kind", ["int4", "int8", "e4m3 of one group", "e4m3, the last group short"])
def test_a_share_of_a_quantised_weight_is_that_of_its_values(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    columns, group = (96, 64) if "short" in kind else (128, 128) if "one" in kind else (128, 32)
    codes = torch.randint(-8, 8, (8, columns), generator=generator, dtype=torch.int8)
    scale, zero = (torch.rand(8, -(-columns // group), generator=generator) for _ in range(2))
    qweight = (
        reference.pack_nibbles(codes) if kind == "int4" else codes if kind == "int8" else codes.to(torch.float8_e4m3fn)
    )
    weight = QuantWeight(qweight, scale, zero, None, group, 8)
    values = reference.dequantize(*weight[:3], weight.group)
    for shard in (
        Shard(-2, 1, 2),
        Shard(-2, 1, 2, parts=2),
        *(() if "short" in kind else (Shard(-1, 1, 2), Shard(-1, 3, 4))),
    ):
        part = share_of(weight, shard, "here")
        assert torch.equal(reference.dequantize(*part[:3], part.group), shard.cut(values))
        assert [part.out_size, part.in_size] == shard.shape([8, columns])
    if "short" in kind:
        with pytest.raises(QuantizationError, match="here: 2 ranks cannot share 96 inputs at borders of groups of 64"):
            share_of(weight, Shard(-1, 0, 2), "here")


MIXTURES = ("mixtral", "qwen2_moe")  # the second with a shared expert


@pytest.mark.parametrize("name", MIXTURES)
def test_ranks_of_whole_experts_give_the_logits_of_transformers(
    name: str, tmp_path: Path, peer: ProcessPoolExecutor
) -> None:
    assert_both_give(stored(tiny(name), tmp_path), peer, tmp_path, True)


@pytest.mark.parametrize(
    ("kind", "name", "expert_parallel"),
    [("qwen3_moe", "w8a8", True), *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("qwen3_moe", "w8a8", False), ("mixtral", "awq_g64", True), ("mixtral", "fp8_tensor", False), ("gpt_oss", "mxfp4", False),
        ("gpt_oss", "mxfp4", True)))],
)  # fmt: skip
def test_packed_mixtures_are_shared(
    kind: str, name: str, expert_parallel: bool, tmp_path: Path, peer: ProcessPoolExecutor
) -> None:
    stock = write_mxfp4(tmp_path) if name == "mxfp4" else write_mixture(tmp_path, kind, name)
    expected = stock_logits(stock, prompts_for(SIZES["vocab_size"]))
    assert_both_give(expected, peer, tmp_path, expert_parallel, atol=2e-3)


def test_a_rank_of_whole_experts_holds_its_own_alone(tmp_path: Path) -> None:
    stored(tiny_config("mixtral", num_hidden_layers=1), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    paged = share(Ranks(1, 2, "test", expert_parallel=True), tmp_path)
    [experts] = [one for one in paged.modules() if hasattr(one, "first_expert")]
    assert (experts.first_expert, len(experts.down_proj)) == (2, 2)
    for at in range(2):
        name = next(one for one in tensors if re.search(rf"experts\.{2 + at}\.(w2|down_proj)\.weight", one))
        assert torch.equal(experts.down_proj[at], tensors[name])


def test_experts_that_do_not_divide_or_are_not_there_are_refused() -> None:
    ranks = Ranks(0, 2, expert_parallel=True)
    with pytest.raises(
        Indivisible,
        match="tensor_parallel_size=2 does not divide the 3 experts of model.layers.0.mlp.experts of mixtral; 1 does",
    ):
        wrap_model(
            build_meta(
                tiny_config("mixtral", num_local_experts=3, intermediate_size=96),
                torch.float32,
                ATTENTION_NAME,
                max_model_len=256,
            ),
            0,
            ranks,
        )
    with pytest.raises(UnsupportedModel, match="llama: expert_parallel .*set expert_parallel to false"):
        wrap_model(build_meta(tiny_config("llama"), torch.float32, ATTENTION_NAME, max_model_len=256), 0, ranks)


def wrapped(name: str, size: int, rank: int = 0, **changed: Any) -> PagedModel:
    config = tiny_config(name, **changed)
    return wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256), 0, Ranks(rank, size))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NOT_SHARED]
)
def test_what_cannot_be_shared_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{NOT_SHARED[name]}.*set tensor_parallel_size=1"):
        wrapped(name, 2)


@pytest.mark.parametrize(
    ("size", "changed", "told"),
    [
        (2, dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3), "does not divide the 9 attention heads of llama; 1, 3 do"),
        (3, dict(hidden_size=72, num_attention_heads=6, num_key_value_heads=2), "does not divide the 2 heads of keys and values of llama; 1, 2, 6 do"),
        (4, dict(intermediate_size=90), "does not divide the 90 outputs of model.layers.0.mlp.gate_proj of llama; 1, 2 do"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(size: int, changed: dict, told: str) -> None:
    with pytest.raises(Indivisible, match=f"tensor_parallel_size={size} {told}"):
        wrapped("llama", size, **changed)


def test_a_rank_reads_its_slices_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all large tensors; whole are norms."""
    stored(tiny_config("mixtral"), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    read: dict[str, int] = {}
    original = weights.safe_open

    class Opened:
        def __init__(self, *given: Any, **named: Any) -> None:
            self.file = original(*given, **named)

        def __enter__(self) -> Opened:
            self.file.__enter__()
            return self

        def __exit__(self, *given: Any) -> None:
            self.file.__exit__(*given)

        def get_tensor(self, name: str) -> torch.Tensor:
            read[name] = self.file.get_tensor(name).numel()
            return self.file.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            part = self.file.get_slice(name)

            class Slice:
                get_shape = staticmethod(part.get_shape)

                def __getitem__(self, at: Any) -> torch.Tensor:
                    read[name] = read.get(name, 0) + part[at].numel()
                    return part[at]

            return Slice()

    monkeypatch.setattr(weights, "safe_open", Opened)
    share(Ranks(1, 2), tmp_path)
    sizes = {name: tensor.numel() for name, tensor in load_file(path).items()}
    assert read.keys() == sizes.keys()
    for name, size in sizes.items():
        whole = "norm" in name or ".gate." in name
        assert read[name] == (size if whole else size // 2), name


def test_ranks_draw_the_weights_of_one(tmp_path: Path) -> None:
    tiny_config("mixtral").save_pretrained(tmp_path)

    def drawn(ranks: Ranks) -> PagedModel:
        config = AutoConfig.from_pretrained(tmp_path)
        paged = wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256), 0, ranks)
        shards = {} if paged.sharding is None else paged.sharding.shards
        load_weights(paged.model, tmp_path, device=CPU, dtype=torch.float32, load_format="dummy", seed=3, shards=shards)
        return paged

    whole = drawn(ALONE).model.state_dict()
    for rank in range(2):
        paged = drawn(Ranks(rank, 2))
        assert paged.sharding is not None
        for key, held in paged.model.state_dict().items():
            shard = paged.sharding.shards.get(key)
            assert torch.equal(held, whole[key] if shard is None else shard.cut(whole[key])), key


def test_a_shard_is_its_runs() -> None:
    numbers = torch.arange(24).view(12, 2)
    assert Shard(-2, 1, 3).cut(numbers)[:, 0].tolist() == [8, 10, 12, 14]
    assert Shard(-2, 1, 3, parts=2).cut(numbers)[:, 0].tolist() == [4, 6, 16, 18]
    assert Shard(-1, 0, 2).whole(Shard(-1, 0, 2).shape([12, 2])) == [12, 2]
