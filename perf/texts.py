"""Prompts to draft on: texts under data/ whose continuation repeats them, and random tokens, which nothing repeats.

Knows no engine: `encode` turns text into ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pagegraph.runtime.bench.work import draw_ids

DATA = Path(__file__).parent / "data"
NAMES = ("code_edit", "json_rewrite", "quoting")
RANDOM_TOKENS, RANDOM_IDS = 200, 40_000


def repetitive(encode: Callable[[str], list[int]], streams: int) -> list[list[int]]:
    """The texts in turn, each behind a token of its own, so that no two share blocks."""
    texts = [encode((DATA / f"{name}.txt").read_text().rstrip()) for name in NAMES]
    return [[1000 + index, *texts[index % len(texts)]] for index in range(streams)]


def random(streams: int) -> list[list[int]]:
    """Random ids; at temperature 1 they go on as random."""
    return draw_ids(np.random.default_rng(streams), [RANDOM_TOKENS] * streams, RANDOM_IDS)
