"""Operations and bytes of ops, against counting them one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagegraph.kernels.costs import ATTENTION, PRODUCTS, STATES, Cost, StepRows, cost_of, visible
from pagegraph.kernels.ops import OPS

STEP = StepRows(np.array([1, 1, 5, 9, 3]), np.array([1, 20, 5, 30, 33]))
META = torch.device("meta")


@pytest.mark.parametrize("window, chunk", [(0, 0), (1, 0), (7, 0), (64, 0), (0, 8), (0, 64)])
def test_pairs_and_touched_keys(window: int, chunk: int) -> None:
    pairs = touched = 0
    for rows, length in zip(*STEP):
        seen = {
            (at, key)
            for at in range(length - rows, length)
            for key in range(at + 1)
            if (not window or key > at - window) and (not chunk or key // chunk == at // chunk)
        }
        # what lies between the first key that a row sees and the last is read as one run
        keys = [key for _, key in seen]
        pairs, touched = pairs + len(seen), touched + max(keys) - min(keys) + 1
    assert visible(STEP, window, chunk) == (pairs, touched)


def test_a_product_counts_its_weight_once_and_its_rows() -> None:
    x, weight = torch.empty(6, 32, device=META), torch.empty(24, 32, device=META, dtype=torch.bfloat16)
    op = torch.ops.pagegraph.linear.default
    cost = cost_of(op, dict(x=x, weight=weight, bias=None), torch.empty(6, 24, device=META), [weight], STEP)
    assert cost == Cost("linears", 2 * 6 * 24 * 32, 2 * 24 * 32)
    assert cost_of(op, dict(x=x, weight=weight, bias=None), None, [], STEP) is None


def test_attention_counts_keys_that_are_seen() -> None:
    tokens = int(STEP.rows.sum())
    given = dict(
        query=torch.empty(tokens, 4, 16, device=META), value=torch.empty(tokens, 2, 8, device=META), window=7, chunk=0,
        key_cache=torch.empty(1, 8, 2, 16, device=META, dtype=torch.bfloat16),
    )  # fmt: skip
    cost = cost_of(torch.ops.pagegraph.paged_attention.default, given, None, [], STEP)
    pairs, touched = visible(STEP, 7, 0)
    assert cost == Cost("attention", 2 * 4 * (16 + 8) * pairs, 0, 2 * (16 + 8) * 2 * touched)


def test_experts_that_are_chosen_are_read() -> None:
    step = StepRows(np.array([1]), np.array([9]))
    x, weight = torch.empty(2, 16, device=META), torch.empty(8, 16, 4, device=META)
    given = {"self": x, "mat2": weight}
    op = torch.ops.aten._grouped_mm.default
    assert cost_of(op, given, torch.empty(2, 4, device=META), [weight], step) == Cost(
        "experts", 2 * 2 * 4 * 16, weight.nbytes * 2 // 8
    )
    many = StepRows(np.array([1000]), np.array([1000]))
    read = cost_of(
        op, given | {"self": torch.empty(2000, 16, device=META)}, torch.empty(2000, 4, device=META), [weight], many
    )
    assert read is not None and read.weight_bytes == weight.nbytes


def test_experts_of_ours_cost_what_grouped_products_do() -> None:
    step = StepRows(np.array([1]), np.array([1]))
    up, down = torch.empty(8, 12, 16, device=META), torch.empty(8, 16, 6, device=META)
    given = dict(x=torch.empty(1, 16, device=META), chosen=torch.empty(1, 2, device=META), up=up, down=down)
    op = torch.ops.pagegraph.experts.default
    assert cost_of(op, given, given["x"], [up, down], step) == Cost(
        "experts", 2 * 2 * (12 * 16 + 16 * 6), (up.nbytes + down.nbytes) * 2 // 8
    )


def test_states_are_read_and_written_once_a_sequence_with_rows() -> None:
    states = torch.empty(9, 3, 16, 24, device=META)
    step = StepRows(np.array([5, 0, 1]), np.array([5, 0, 9]))
    cost = cost_of(torch.ops.pagegraph.gated_delta.default, dict(states=states), None, [], step)
    assert cost == Cost("states", 6 * 7 * 3 * 16 * 24, 0, 2 * 2 * 4 * 3 * 16 * 24)


def test_every_op_of_ours_that_multiplies_weights_has_a_formula() -> None:
    names = [row.schema.partition("(")[0] for row in OPS]
    counted = {
        getattr(torch.ops.pagegraph, name).default
        for name in names
        if any(word in name for word in ("linear", "layer", "attention", "experts", "conv", "delta", "scan"))
    }
    assert counted <= {*PRODUCTS, *ATTENTION, *STATES}
