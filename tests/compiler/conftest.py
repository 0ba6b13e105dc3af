"""Fixtures of the compiler's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def impatient_threads() -> Iterator[None]:
    """Python's threads take turns after a few instructions, so that what one leaves half done another one meets."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)
