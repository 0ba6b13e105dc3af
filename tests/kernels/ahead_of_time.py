"""Compiles kernels for a GPU that is not there, with exactly what their launchers pass; a script that reads and prints lines of JSON.

Launchers are called on meta tensors with Triton's launch replaced by one that compiles what no line before had compiled. Answers a line
with a list of [name, module, function, arguments], where an argument {"shape", "dtype"} is a tensor,
{"slice", ...} a tensor whose rows are a slice of wider ones, {"tile"} a tile of skinny_linear, {"few"} one of few rows,
{"norm"} a norm ahead of so many rows, {"weight"} a quantised weight, {"stack"} those of experts, {"type"} a type, {"hopper"} and {"form"} tiles and form of experts, {"grouped"} their
tiles by the rules of products without and with tensor cores, by a line with a list of `Compiled` or one with what went wrong.
Its argument is the compute capability, such as 90. Run without TRITON_INTERPRET, in a process of its own: the replaced launch stays replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from pagegraph.kernels import gpu, pdl
from pagegraph.kernels.attention import prefill_hopper
from pagegraph.kernels.linear.tiles import Tile
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.quant_stack import QuantStack
from pagegraph.kernels.moe.tiles import HopperTiles, gemv_tiles_of, grouped_tiles_of
from pagegraph.kernels.quant.tiles import QuantGemvTile
from pagegraph.kernels.quant.weight import QuantWeight

SHARED_MEMORY = 232448  # bytes a block may have on sm_90
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Compiled:
    """What one launch compiled to. `buffers`: copies of a tile of keys or values that the pipeline holds."""

    case: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    buffers: int
    tensor_cores: bool
    wgmma: bool
    waits: bool  # for the kernels before it, having let the next be set up
    exchanged: int  # stores from registers to shared memory ahead of its last tensor-core instruction but those of tf32
    early: list[str]  # what it does to global memory, or ends with, before it waits: opcodes of machine code


def source_of(kernel: JITFunction, arguments: tuple[Any, ...], named: dict[str, Any]) -> ASTSource:
    """The kernel, specialised as Triton specialises it at run time."""
    names = kernel.arg_names
    values = dict(zip(names, arguments)) | {n: v for n, v in named.items() if n in names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, TensorDescriptor):
            element = TYPES[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not fixed:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return kind(kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_source(source: ASTSource, options: dict[str, Any], capability: int) -> tuple[Compiled, bytes]:
    """What one launch compiled to, and its machine code."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    report, ptx = printed.getvalue(), compiled.asm["ptx"]
    depths = [int(depth) for depth in re.findall(r"local_alloc :.*memdesc<(\d+)x\d+x\d+x\w+", compiled.asm["ttgir"])]
    ahead = re.sub(r"wgmma\.mma_async\S*tf32", "", ptx).rpartition("wgmma.mma_async")[0]
    found = Compiled(
        case="",
        kernel=source.fn.fn.__name__,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled_bytes=sum(int(count) for count in re.findall(r"(\d+) bytes spill", report)),
        shared_bytes=compiled.metadata.shared,
        buffers=min(depths, default=0),
        tensor_cores="mma.sync" in ptx or "wgmma" in ptx,
        wgmma="wgmma.mma_async" in ptx,
        waits=all(f"griddepcontrol.{what}" in ptx for what in ("wait", "launch_dependents")),
        exchanged=len(re.findall(r"\bst\.shared", ahead)),
        early=[],
    )
    return found, machine_code(compiled.asm["cubin"])


def machine_code(cubin: bytes) -> bytes:
    """The section .text of an ELF file of one kernel; sections are (name, .., offset, length)."""
    (at,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + index * size) for index in range(count)]
    strings = sections[names][4]
    (code,) = (s for s in sections if cubin.startswith(b".text.", strings + s[0]))
    return cubin[code[4] : code[4] + code[5]]


def before_waits(codes: list[bytes], capability: int) -> list[list[str]]:
    """Loads, stores, atomics, prefetches and exits of each ahead of griddepcontrol.wait (ACQBULK), or in all of it.

    Of machine code, because ptxas is the last that may move a load; at once, because nvdisasm is slow to start.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--binary", f"SM{capability}", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"/\*[0-9a-f]+\*/\s+([^;]*);", listing)  # of 16 bytes each
    assert 16 * len(instructions) == sum(map(len, codes))
    found, at = [], 0
    for code in codes:
        end = at + len(code) // 16
        ahead = "\n".join(instructions[at:end]).partition("ACQBULK")[0]
        found.append(re.findall(r"\b(LDG|STG|LD|ST|LDGSTS|ATOMG?|RED|REDG|UBLK\w+|UTMA\w+|CCTL|EXIT)\b", ahead))
        at = end
    return found


def argument(described: Any) -> Any:
    """A meta tensor for its description; anything else as it is."""
    if not isinstance(described, dict):
        return described
    if "tile" in described:
        return Tile(*described["tile"])
    if "by_gemv" in described:
        return QuantGemvTile(*described["by_gemv"])
    if "hopper" in described:
        return HopperTiles(*described["hopper"])
    if "grouped" in described:
        tokens, pairs, transposed, *size = described["grouped"]
        return gemv_tiles_of(tokens, tuple(size), transposed) or grouped_tiles_of(pairs, tuple(size))
    if "form" in described:
        return Form(*described["form"])
    if "stack" in described:
        return QuantStack(*map(argument, described["stack"]))
    if "weight" in described:
        return QuantWeight(*map(argument, described["weight"]))
    if "norm" in described:
        from pagegraph.kernels.quant.activations import Norm  # binds what `main` replaces

        weight, residual, total = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in (described["norm"][1:], *[described["norm"]] * 2)
        )
        return Norm(weight, 1e-6, residual, total)
    if "type" in described:
        return getattr(torch, described["type"])
    dtype = getattr(torch, described["dtype"])
    if "slice" in described:
        rows, *row = described["slice"]
        size = row[0] * row[1]
        return torch.empty(rows, 3 * size, dtype=dtype, device="meta")[:, :size].unflatten(1, row)
    return torch.empty(described["shape"], dtype=dtype, device="meta")


def main() -> None:
    capability = int(sys.argv[1])
    compiled: dict[str, Compiled] = {}  # by what Triton compiles
    codes: dict[str, bytes] = {}  # likewise, until it is known what they do before they wait
    launches: list[tuple[str, str]] = []  # case, and what is compiled for it
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True  # what ptxas reports is not in Triton's cache
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints must not mix with answers

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        source = source_of(kernel, arguments, named)
        options = {n: v for n, v in named.items() if n in ("num_warps", "num_stages", "maxnreg", "launch_pdl")}
        key = f"{source.hash()} {options}"
        if key not in compiled:
            compiled[key], codes[key] = compile_source(source, options, capability)
        launches.append((case, key))

    JITFunction.run = GluonJITFunction.run = record
    gpu.multiprocessors = prefill_hopper.multiprocessors = lambda device: 132 if capability == 90 else 0
    pdl.dependent = lambda device: {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    for line in sys.stdin:
        launches.clear()
        try:
            for case, module, function, described in json.loads(line):  # noqa: B007  `record` reads it
                getattr(importlib.import_module(module), function)(*(argument(one) for one in described))
            if codes:
                for key, early in zip(codes, before_waits([*codes.values()], capability), strict=True):
                    compiled[key] = replace(compiled[key], early=early)
                codes.clear()
            answer: Any = [asdict(replace(compiled[key], case=case)) for case, key in launches]
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
