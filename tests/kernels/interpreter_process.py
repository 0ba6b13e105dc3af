"""A process with Triton's interpreter on: runs launchers of `kernels` on CPU tensors sent to it.

TRITON_INTERPRET has to be set before Triton is imported and changes what every later kernel of the process is,
so it is kept out of the process of the tests. Run as a script it serves calls; imported it is the caller's end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]


class Pickler(pickle.Pickler):
    """PyTorch does not pickle float8 that it can read again: it goes as bytes."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == torch.float8_e4m3fn:
            return torch.Tensor.view, (value.view(torch.uint8), value.dtype)
        return NotImplemented


class InterpreterProcess:
    """Calls `module.function(*arguments)` over there; mutated tensor arguments come back with the result."""

    def __init__(self) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def call(
        self, module: str, function: str, *arguments: Any, constants: dict[str, Any] | None = None
    ) -> tuple[Any, tuple[Any, ...]]:
        """(result, arguments after the call). `constants`: "module.NAME" to the value it has during the call."""
        Pickler(self._process.stdin).dump((module, function, arguments, constants or {}))
        self._process.stdin.flush()
        error, result, arguments = pickle.load(self._process.stdout)
        if error:
            raise AssertionError(f"{module}.{function} failed under the interpreter:\n{error}")
        return result, arguments

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


def widen_products() -> None:
    """The interpreter keeps bfloat16 as 16-bit words and multiplies the words: give its dot floats instead. Added up in float64 and
    rounded once, a row's sums do not depend on its place in a tile, as numpy's in float32 do and tensor cores' do not.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    plain_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if total.dtype.scalar != tl.float32 or a.dtype.scalar.is_fp8():
            return plain_dot(self, a, b, total, *rest)
        wide = [self.cast_impl(x, tl.float32).data.astype("float64") for x in (a, b)]
        return interpreter.TensorHandle((wide[0] @ wide[1] + total.data).astype("float32"), tl.float32)

    interpreter.InterpreterBuilder.create_dot = create_dot


def round_as_devices() -> None:
    """The interpreter cuts float32 off on its way to bfloat16, and loses a carry on its way to e4m3: round as PyTorch does."""
    from triton import language as tl
    from triton.runtime import interpreter

    plain_cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and source.dtype.scalar.is_int():  # it would take the integer for the 16-bit word
            source = plain_cast(self, source, tl.float32)
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return plain_cast(self, source, to)
        words = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(words, to.scalar)

    plain_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, to: Any, mode: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.float8e4nv:
            return plain_fp_to_fp(self, source, to, mode)
        words = torch.from_numpy(source.data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(words, to.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def spare_repeated_work() -> None:
    """What the interpreter spends most of its time on, done once or not at all: for every call of a function it patches Triton's
    language anew, for every operation it makes its table of types, and for every sum of integers it computes in 64 bits whether it
    overflows, for an assertion that it then leaves out.
    """
    from triton.runtime import interpreter

    plain_patch, patched = interpreter._patch_lang, set()

    def patch_lang(function: Any) -> Any:
        if function not in patched:
            plain_patch(function)
            patched.add(function)
        return interpreter._LangPatchScope()  # of which nothing is undone

    plain_type, types = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype: Any) -> Any:
        if dtype.name not in types:
            types[dtype.name] = plain_type(dtype)
        return types[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, get_np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def keep_types() -> None:
    """A type of blocks, and what a tensor has of its type, are worked out at the first of their name: there are few, of very many values."""
    from triton.language import core

    plain_block, plain_tensor, blocks, tensors = core.block_type.__init__, core.tensor.__init__, {}, {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
        key = (element_ty.name, *sizes)
        if key not in blocks:
            plain_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            plain_tensor(self, handle, type)
            tensors[type.name] = vars(self).copy()
        vars(self).update(tensors[type.name], handle=handle, type=type)

    core.block_type.__init__, core.tensor.__init__ = block, tensor


def serve() -> None:
    """Answer calls until the input ends."""
    spare_repeated_work()
    keep_types()
    widen_products()
    round_as_devices()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not mix with answers
    while True:
        try:
            module, function, arguments, constants = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        error, result = "", None
        try:
            with replaced(constants):
                result = getattr(importlib.import_module(module), function)(*arguments)
        except Exception:
            error = traceback.format_exc()
        Pickler(answers).dump((error, result, arguments))
        answers.flush()


@contextlib.contextmanager
def replaced(constants: dict[str, Any]) -> Iterator[None]:
    """Module constants set to other values for a while."""
    with contextlib.ExitStack() as stack:
        for name, constant in constants.items():
            module, _, attribute = name.rpartition(".")
            stack.enter_context(mock.patch.object(importlib.import_module(module), attribute, constant))
        yield


if __name__ == "__main__":
    serve()
