"""Floors of models that ranks share agree with what the compiler plans of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pagegraph.compiler.build import plan_models
from pagegraph.compiler.explain.ledger import ledger
from pagegraph.compiler.explain.machines import named_gpu
from pagegraph.compiler.explain.roofline import sent_bytes
from pagegraph.compiler.step.capture_sizes import Bucket
from pagegraph.runtime.config import Config
from pagegraph.runtime.engine.compiler_options import compiler_options
from perf.floors import BYTES, MODELS, NVLINK, Ceilings, Shape, write_model


@pytest.mark.parametrize("name", ["70b", "235b-a22b"])
def test_a_rank_holds_and_sends_what_the_compiler_plans(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers: planning all of them takes long."""
    monkeypatch.setitem(MODELS, name, MODELS[name] | {"num_hidden_layers": 2})
    config = Config(
        model=str(write_model(name, tmp_path / name)), load_format="dummy", device="cuda", max_model_len=1024, tensor_parallel_size=4
    )  # fmt: skip
    gpu = named_gpu("h200")
    options = compiler_options(config, torch.device("cuda"), gpu.capability)
    models, shape = plan_models(options), Shape.of(name)
    planned, held = ledger(options, models, gpu).weight_bytes, BYTES * shape.share(4).weight_elements
    assert held < planned < 1.001 * held  # norms and the table of rotations are left out
    assert sent_bytes(models[0], Bucket(32, 32)) == pytest.approx(shape.link_bytes(32, 32, 4), abs=1)
    assert gpu.link == NVLINK


def test_a_step_of_ranks_is_its_share_and_what_they_send() -> None:
    shape, ceilings = Shape.of("70b"), Ceilings(4.3e12, 790e12)
    start, lengths = np.arange(33), np.full(32, 1024)
    alone, shared = (shape.step_floor(ceilings, start, lengths, ranks=ranks) for ranks in (1, 8))
    assert alone / 8 < shared < alone / 4
    assert shared - shape.share(8).step_floor(ceilings, start, lengths) == pytest.approx(
        shape.link_bytes(32, 32, 8) / NVLINK
    )
    with pytest.raises(ValueError, match="7 ranks do not divide 64 heads"):
        shape.share(7)
