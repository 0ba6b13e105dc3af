"""Fixtures of the compiler's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def impatient_threads() -> Iterator[None]:
    """Python's threads take turns after a few instructions, so that what one leaves half done another one meets."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture
def graphs_anew() -> Iterator[None]:
    """Each graph is lowered again, so that its code can be read; C++ that was built before is taken from the cache."""
    inductor, functorch = torch._inductor.config, torch._functorch.config
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
