"""Blocks from bytes, and refusals that name a value which then works."""

from __future__ import annotations

import re

import pytest

from pagegraph.compiler.profile.kv_budget import DoesNotFit, check_slots, plan_blocks


def test_blocks_fill_the_memory() -> None:
    assert plan_blocks(1000, 10, 16, 64, 8, "kv_cache_memory").num_blocks == 100


def test_refusal_names_a_length_that_fits() -> None:
    with pytest.raises(DoesNotFit, match="max_model_len 4096") as refusal:
        plan_blocks(1000, 10, 16, 4096, 8, "kv_cache_memory")
    fits = int(re.search(r"at most (\d+)", str(refusal.value))[1])
    assert plan_blocks(1000, 10, 16, fits, 8, "kv_cache_memory").num_blocks == 100
    with pytest.raises(DoesNotFit):
        plan_blocks(1000, 10, 16, fits + 1, 8, "kv_cache_memory")


@pytest.mark.parametrize("available", [0, 1 << 10, 5 << 20])
def test_refusal_names_an_amount_that_fits(available: int) -> None:
    """Of blocks of 3 MiB; where not even one sequence of a block fits, no length of 0 is advised."""
    with pytest.raises(DoesNotFit, match="max_model_len 4096") as refusal:
        plan_blocks(available, 3 << 20, 16, 4096, 8, "kv_cache_memory")
    assert "at most" not in str(refusal.value)
    enough, least = (int(mebibytes) << 20 for mebibytes in re.findall(r"(\d+)MiB", str(refusal.value)))
    assert plan_blocks(enough, 3 << 20, 16, 4096, 8, "kv_cache_memory").num_blocks == 257
    assert plan_blocks(least, 3 << 20, 16, 16, 8, "kv_cache_memory").num_blocks == 2


def test_blocks_without_memory_are_as_many_as_all_sequences_want() -> None:
    assert plan_blocks(0, 0, 16, 100, 8, "kv_cache_memory").num_blocks == 1 + 8 * 7


def test_slots_that_do_not_fit_say_how_many_would() -> None:
    with pytest.raises(DoesNotFit, match="101 slots .* 1.0 MiB each, .* leaves 0.05 GiB") as refused:
        check_slots(50 << 20, 1 << 20, 101, "gpu_memory_utilization 0.9")
    fewer = int(re.search(r"max_num_seqs by (\d+)", str(refused.value))[1])
    assert "less 50 slots" in check_slots(50 << 20, 1 << 20, 101 - fewer, "gpu_memory_utilization 0.9")
    assert check_slots(0, 0, 100, "kv_cache_memory") == "kv_cache_memory"
