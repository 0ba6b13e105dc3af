"""Passes over the graph one after the other: a fault is that of the pass that makes it."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from pagegraph.compiler.build import BuiltModel, build_model
from pagegraph.compiler.passes.graph.patterns import is_call, shape
from pagegraph.compiler.verify.bands import floor_of
from pagegraph.compiler.verify.passes import check_compiled, check_graph_passes
from pagegraph.compiler.verify.steps import HandSteps
from pagegraph.runtime.config import load_config
from pagegraph.runtime.engine.compiler_options import compiler_options
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import random_model

IDS = list(range(3, 60))


def drops_a_residual(module: GraphModule) -> int:
    """What a layer gives, without what it was given."""
    for node in module.graph.nodes:
        if is_call(node, operator.add) and len(shape(node)) == 3 and shape(node)[-1] == 64 and len(node.users) > 1:
            node.replace_all_uses_with(node.args[1])
            return 1
    return 0


def adds_nothing(module: GraphModule) -> int:
    return 0


@pytest.fixture
def built(tmp_path: Path) -> BuiltModel:
    random_model(tiny_config("llama", num_hidden_layers=2)).save_pretrained(tmp_path)
    settings = dict(device="cpu", dtype="float32", kv_cache_memory="1MiB", max_num_seqs=8, compile=False)
    return build_model(compiler_options(load_config(str(tmp_path), settings).config), progress=False)


def test_the_pass_that_drops_a_residual_is_named(built: BuiltModel) -> None:
    checks = check_graph_passes(built, [adds_nothing, drops_a_residual, adds_nothing], IDS)
    band = floor_of(torch.float32, quantised=False)
    assert [one.name for one in checks] == ["adds_nothing", "drops_a_residual", "adds_nothing"]
    assert [bool(band.leaves(one.found)) for one in checks] == [False, True, False]
    assert checks[1].changes == 2  # in the graph of one token, and in that of several


def test_a_forward_that_differs_from_the_modules_shows(built: BuiltModel) -> None:
    band, modules = floor_of(torch.float32, quantised=False), built.step.paged_model
    assert not band.leaves(check_compiled(built, IDS).found)
    built.step.forward = lambda *inputs: (modules(*inputs)[0] * 1.01, None)
    assert band.leaves(check_compiled(built, IDS).found)


def test_steps_that_the_cache_does_not_hold() -> None:
    with pytest.raises(ValueError, match="33 tokens takes 3 blocks, the cache holds 2"):
        HandSteps([33], num_blocks=3, block_size=16, width=9, device=torch.device("cpu"))
