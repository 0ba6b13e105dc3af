"""Steps that are measured are such as texts make: random tokens, blocks of their own with values in them, nothing that slows them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.compiler.explain import measure
from pagegraph.compiler.explain.measure import MeasuredStep, measured_steps
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.compiler.step.inputs import StepInput
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from tests.compiler.architectures import tiny_config

BUCKETS = [Bucket(1, 1), Bucket(8, 8), Bucket(40, 2)]
CUDA_BUCKETS = [Bucket(2, 2), Bucket(8, 8), Bucket(64, 8)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltModel]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tiny_config("llama").save_pretrained(folder := tmp_path_factory.mktemp("model"))
    config = Config(
        model=str(folder), load_format="dummy", device=request.param, max_num_seqs=8, max_num_batched_tokens=64,
        block_size=16, num_blocks=300, compile=False,
    )  # fmt: skip
    built = build_compiled(compiler_options(config), progress=False)
    yield built
    built.close()


def measured(built: BuiltModel) -> list[MeasuredStep]:
    buckets = BUCKETS if built.device.type == "cpu" else CUDA_BUCKETS
    return measured_steps(built.step, buckets, 64, built.num_blocks, {buckets[0], buckets[1]})


def test_steps_are_of_random_tokens_in_blocks_of_their_own(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, launch = [], built.step.launch

    def keep(step: StepInput, *more: int):
        launched.append(step)
        return launch(step, *more)

    monkeypatch.setattr(built.step, "launch", keep)
    found = measured(built)
    assert [one.tokens for one in found] == ([1, 8, 40] if built.device.type == "cpu" else [2, 8, 64])
    assert all(one.ms > 0 for one in found) and found[1].kernels and not found[2].kernels
    for step in launched:
        distinct = len(np.unique(step.token_ids))
        assert step.token_ids.min() >= 0 and (step.num_tokens < 4 or distinct > step.num_tokens // 2)
    tables = built.step.state.block_tables
    assert len({int(block) for block in tables[:8, :4].flatten()}) == 32


def test_blocks_are_filled_with_random_values(built: BuiltModel) -> None:
    caches = built.step.state.caches
    measure.fill_blocks(caches)
    for cache in (*caches.key_caches, *caches.value_caches):
        assert len(cache) == 300 > measure.FILLED
        spread = cache.float().flatten(1).std(dim=1)
        assert spread.min() > 0.5 and spread.max() < 2


def test_nothing_is_timed_behind_a_profile(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("device_seconds", "_host_seconds", "profiled"):
        original = getattr(measure, name)
        monkeypatch.setattr(
            measure, name, lambda *given, name=name, original=original: (order.append(name), original(*given))[1]
        )
    measured(built)
    timed = "_host_seconds" if built.device.type == "cpu" else "device_seconds"
    assert order == [timed] * 3 + ["profiled"] * 2
