"""Fixtures of the explanation's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_other_models() -> Iterator[None]:
    """Dynamo counts the forwards of all models of a process, and stops at eight."""
    torch._dynamo.reset()
    yield
