"""Where the Triton kernels run in these tests: the interpreter, in a process of its own, or a CUDA device."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.interpreter_process import InterpreterProcess, replaced


class CudaCalls:
    """The interface of `InterpreterProcess`, on the device."""

    def call(self, module: str, function: str, *arguments, constants: dict | None = None):
        there = [_moved(a, "cuda") for a in arguments]
        with replaced(constants or {}):
            result = getattr(importlib.import_module(module), function)(*there)
        return _moved(result, "cpu"), _moved(tuple(there), "cpu")


def _moved(value, device: str):
    """A tensor, or what a tuple holds of tensors, on the device; anything else as it is."""
    if isinstance(value, tuple):
        moved = [_moved(one, device) for one in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="session", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_calls(request: pytest.FixtureRequest) -> Iterator[InterpreterProcess | CudaCalls]:
    """Runs launchers of the Triton kernels on CPU tensors."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield CudaCalls()
        return
    process = InterpreterProcess()
    yield process
    process.close()
