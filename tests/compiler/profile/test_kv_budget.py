"""Blocks from bytes, and refusals that name a value which then works."""

from __future__ import annotations

import re

import pytest

from pagegraph.compiler.profile.kv_budget import DoesNotFit, plan_blocks


def test_blocks_fill_the_memory() -> None:
    assert plan_blocks(1000, 10, 16, 64, "kv_cache_memory").num_blocks == 100


def test_refusal_names_a_length_that_fits() -> None:
    with pytest.raises(DoesNotFit, match="max_model_len 4096") as refusal:
        plan_blocks(1000, 10, 16, 4096, "kv_cache_memory")
    fits = int(re.search(r"at most (\d+)", str(refusal.value))[1])
    assert plan_blocks(1000, 10, 16, fits, "kv_cache_memory").num_blocks == 100
    with pytest.raises(DoesNotFit):
        plan_blocks(1000, 10, 16, fits + 1, "kv_cache_memory")


@pytest.mark.parametrize("available", [0, 1 << 10, 5 << 20])
def test_refusal_names_an_amount_that_fits(available: int) -> None:
    """Of blocks of 3 MiB; where not even one sequence of a block fits, no length of 0 is advised."""
    with pytest.raises(DoesNotFit, match="max_model_len 4096") as refusal:
        plan_blocks(available, 3 << 20, 16, 4096, "kv_cache_memory")
    assert "at most" not in str(refusal.value)
    enough, least = (int(mebibytes) << 20 for mebibytes in re.findall(r"(\d+)MiB", str(refusal.value)))
    assert plan_blocks(enough, 3 << 20, 16, 4096, "kv_cache_memory").num_blocks == 257
    assert plan_blocks(least, 3 << 20, 16, 16, "kv_cache_memory").num_blocks == 2
