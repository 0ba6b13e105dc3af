"""Copies and gates ahead of convolutions and delta rules go, and logits stay."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from pagegraph.compiler.passes.graph.fuse_states import fuse_states
from pagegraph.compiler.passes.modules.merge_linears import merge_linears
from pagegraph.compiler.passes.modules.plain_columns import plain_columns
from tests.compiler.architectures import DELTA, SIZES, tiny_config
from tests.compiler.model.test_paged import CHUNKED, MIXED, check_compiled, paged_copy, random_model

ops = torch.ops.pagegraph
HEADS = DELTA["linear_num_key_heads"], DELTA["linear_num_value_heads"]


@pytest.mark.parametrize("schedule", [MIXED, CHUNKED])
@pytest.mark.parametrize("in_order", [True, False])
def test_nothing_is_copied_that_lies_in_order(in_order: bool, schedule: list[list[int]]) -> None:
    stock = random_model(tiny_config("qwen3_next"))
    paged = paged_copy(tiny_config("qwen3_next"), stock)
    if in_order:
        plain_columns(paged)
    merge_linears(paged)
    (graph,) = check_compiled(stock, paged, [fuse_states], schedule)
    nodes = list(graph.graph.nodes)
    rules = [node for node in nodes if node.target is ops.gated_delta]
    convolved = [node.args[0] for node in nodes if node.target is ops.causal_conv]
    assert [node.args[at].meta["example_value"].shape[1] for node in rules for at in range(3)] == [
        *2 * HEADS[:1],
        HEADS[1],
    ] * 2
    assert not [node for node in nodes if node.target in ("repeat_interleave", torch.nn.functional.softplus)]
    assert all(one.op == "placeholder" for node in rules for one in node.args[12:]) and len(rules[0].args) == 14
    assert [one.target == "narrow" for one in convolved] == [in_order] * 2
    assert all(one.meta["example_value"].stride(1) == 1 for one in convolved if in_order)


def test_keys_are_shared_where_columns_were_never_copied() -> None:
    config = AutoConfig.for_model("qwen3_5_text", **SIZES, **DELTA)
    stock = random_model(config)
    paged, counted = paged_copy(config, stock), []
    assert plain_columns(paged) == 0
    assert merge_linears(paged) == 2 + 2 + 4  # queries, keys, values, gates and rates of a delta rule by one product
    check_compiled(stock, paged, [lambda graph: counted.append(fuse_states(graph))], MIXED)
    assert counted == [2]


@pytest.mark.parametrize("name, scans", [("nemotron_h", 1), ("jamba", 2), ("mamba2", 4)])
def test_scans_take_the_parameter_that_is_the_logarithm_of_their_rates(name: str, scans: int) -> None:
    stock = random_model(tiny_config(name))
    (graph,) = check_compiled(stock, paged_copy(tiny_config(name), stock), [fuse_states], MIXED)
    found = [node for node in graph.graph.nodes if node.target is ops.selective_scan]
    assert len(found) == scans
    assert all(node.args[2].op == "placeholder" and node.args[10] is True for node in found)
    assert not [node for node in graph.graph.nodes if node.target is torch.exp]


def test_others_stay_as_they_are() -> None:
    stock = random_model(tiny_config("kimi_linear"))
    counted = []
    check_compiled(
        stock, paged_copy(tiny_config("kimi_linear"), stock), [lambda graph: counted.append(fuse_states(graph))], MIXED
    )
    assert counted == [0]
