"""A model shared by two ranks, which meet through gloo, against transformers' own forward, in float32."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
from pagegraph.compiler.tensor_parallel.modules import join
from pagegraph.compiler.tensor_parallel.plan import Indivisible
from pagegraph.compiler.tensor_parallel.shards import ALONE, Ranks, Shard
from pagegraph.kernels.collective import groups
from tests.compiler.architectures import ARCHITECTURES, SIZES, tiny_config
from tests.compiler.model.test_paged import CHUNKED, prompts_for, random_model, stock_logits
from tests.compiler.paged_run import run_paged

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
    paged = wrap_model(build_meta(config, torch.float32, ATTENTION_NAME, max_model_len=256), 0, ranks)
    assert paged.sharding is not None
    load_weights(
        paged.model, folder, device=CPU, dtype=torch.float32, progress=False, shards=paged.sharding.shards, **options
    )
    join(paged.model, paged.sharding)
    apply_module_passes(paged.model, PassOptions())
    return paged


def logits(ranks: Ranks, folder: Path) -> list[dict[int, torch.Tensor]]:
    paged = share(ranks, folder)
    with torch.inference_mode():
        return run_paged(paged, paged, prompts_for(SIZES["vocab_size"]), CHUNKED)


def stored(config: PretrainedConfig, folder: Path) -> list[torch.Tensor]:
    """Logits of transformers' own model of `config`, whose checkpoint goes to `folder`."""
    stock = random_model(config)
    stock.save_pretrained(folder)
    return stock_logits(stock, prompts_for(SIZES["vocab_size"]))


def assert_both_give(expected: list[torch.Tensor], peer: ProcessPoolExecutor, folder: Path) -> None:
    first, second = with_peer(peer, logits, folder)
    for sequence, by_position in enumerate(first):
        for position, got in by_position.items():
            torch.testing.assert_close(got, expected[sequence][position], atol=1e-4, rtol=0)
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
