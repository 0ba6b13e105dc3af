"""Pages from bytes, and refusals that name a value which then works."""

from __future__ import annotations

import re

import pytest

from compiler.memory import DoesNotFit, plan_pages


def test_pages_fill_the_memory() -> None:
    assert plan_pages(1000, 10, 16, 64, "kv_cache_memory").num_blocks == 100


def test_refusal_names_a_length_that_fits() -> None:
    with pytest.raises(DoesNotFit, match="max_model_len 4096") as refusal:
        plan_pages(1000, 10, 16, 4096, "kv_cache_memory")
    fits = int(re.search(r"at most (\d+)", str(refusal.value))[1])
    assert plan_pages(1000, 10, 16, fits, "kv_cache_memory").num_blocks == 100
    with pytest.raises(DoesNotFit):
        plan_pages(1000, 10, 16, fits + 1, "kv_cache_memory")
