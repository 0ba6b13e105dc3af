"""What the engine sets before PyTorch is loaded, which test modules may do before they import the engine; and the gates."""

import pytest

import pagegraph.compiler.host.openmp_spin  # noqa: F401
from perf.gates import FILE, Gate, gates


@pytest.fixture
def gate(request: pytest.FixtureRequest) -> Gate:
    """The gate of the test that asks for it."""
    found = gates().get(request.node.name)
    if found is None:
        pytest.fail(f"{FILE} has no gate named {request.node.name}")
    return found
