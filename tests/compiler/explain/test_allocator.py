"""The allocator's arithmetic, and what ops hold within, beside PyTorch's and the kernels' own figures."""

from __future__ import annotations

import pytest
import torch

from pagegraph.compiler.explain.allocator import MIB, CachingAllocator
from pagegraph.kernels.workspaces import DELTA_CHUNK, workspace_of

aten, ours = torch.ops.aten, torch.ops.pagegraph


def test_segments_are_small_middle_or_of_their_own() -> None:
    allocator = CachingAllocator()
    for size, reserved in ((1, 2), (MIB, 2), (MIB + 1, 22), (19 * MIB, 42), (100 * MIB + 1, 144)):
        allocator.take(size)
        assert allocator.reserved == reserved * MIB, size
    # a rest of 1 MiB stays with its block, a larger one is split off
    assert allocator.used == allocator.most == 512 + MIB + (MIB + 512) + 20 * MIB + (100 * MIB + 512)


def test_what_is_given_back_is_taken_again_where_it_is_large_enough() -> None:
    allocator = CachingAllocator()
    first, second = allocator.take(64 * MIB), allocator.take(32 * MIB)
    allocator.give_back(first)
    allocator.give_back(second)
    assert allocator.used == 0
    parts = [allocator.take(16 * MIB) for _ in range(2)]  # of the least that is large enough
    assert {one.segment for one in parts} == {second.segment} and allocator.reserved == 96 * MIB
    allocator.take(64 * MIB)
    assert allocator.reserved == 96 * MIB
    allocator.give_back(parts[0])
    allocator.give_back(parts[1])
    assert allocator.take(32 * MIB).segment == second.segment  # its parts were joined
    allocator.take(1 * MIB + 1)
    assert allocator.reserved == 116 * MIB and allocator.most == 97 * MIB + 512


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_arithmetic_is_that_of_the_device() -> None:
    torch.cuda.empty_cache()
    before, allocator = torch.cuda.memory_reserved(), CachingAllocator()
    sizes = torch.randint(1, 200 * MIB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    tensors, blocks = [], []
    for place, size in enumerate(sizes):
        tensors.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        blocks.append(allocator.take(size))
        if place % 3 == 2:
            del tensors[place // 3]
            allocator.give_back(blocks.pop(place // 3))
        assert torch.cuda.memory_reserved() - before == allocator.reserved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_sort_holds_what_is_said_of_it() -> None:
    x = torch.randn(256, 50000, device="cuda")
    x.sort(dim=-1, descending=True, stable=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = x.sort(dim=-1, descending=True, stable=True)
    held = torch.cuda.max_memory_allocated() - before - sum(one.nbytes for one in found)
    assert held == pytest.approx(sum(workspace_of(aten.sort.stable, {"self": x})), rel=0.01)


def test_experts_hold_a_row_for_each_pair() -> None:
    x, chosen = torch.empty(10, 64, dtype=torch.bfloat16), torch.empty(10, 4, dtype=torch.int64)
    down = torch.empty(8, 64, 32, dtype=torch.bfloat16)
    given = {"x": x, "chosen": chosen, "down": down}
    assert workspace_of(ours.experts.default, given) == [40 * 64 * 2, 40 * 32 * 2, 40 * 64 * 2]
    packed = given | {"down": torch.empty(8, 7, dtype=torch.uint8), "inner": 32}
    assert workspace_of(ours.repacked_experts.default, packed) == [40 * 64 * 2, 40 * 32 * 2, 40 * 64 * 2]
    rounded = workspace_of(ours.repacked_experts.default, packed | {"quantize_x": True})
    assert rounded == [10 * 64, 40 * 64, 40 * 32 * 2, 40 * 32, 40 * 64 * 2]


def test_chunks_of_delta_rules_leave_rows_for_each_other() -> None:
    chunks = pytest.importorskip("pagegraph.kernels.state.delta_chunks")
    assert DELTA_CHUNK == chunks.CHUNK
    key, value = torch.empty(100, 4, 64, dtype=torch.bfloat16), torch.empty(100, 4, 128, dtype=torch.bfloat16)
    given = {"key": key, "value": value, "decay": torch.empty(100, 4), "slots": torch.empty(2)}
    rows = 100 * 4 * 2
    assert workspace_of(ours.gated_delta.default, given) == [rows * 128, rows * 64, rows * DELTA_CHUNK]
    each = given | {"decay": torch.empty(100, 4, 64)}
    assert sum(workspace_of(ours.gated_delta.default, each)) == rows * (128 + 3 * 64 + 3 * DELTA_CHUNK)
    assert workspace_of(ours.gated_delta.default, given | {"slots": torch.empty(100)}) == []  # a decode
    assert workspace_of(ours.gated_delta.default, given | {"value": value.float()}) == []
