"""Every Triton kernel compiles for sm_90 with the tiles it is launched with, and keeps its registers.

No device is needed: Triton lowers to PTX for the named target and the assembler reports spills.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention_decode, attention_prefill, kv_write, sampling

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
TARGET = GPUTarget("cuda", 90, 32)
ELEMENT = {2: "bf16", 4: "fp32"}


def spilled_bytes(kernel, types: dict[str, str], constants: dict[str, object], tmp_path: Path, **options: int) -> int:
    """Bytes of register spills of one compiled variant. Pointers and strides are taken as multiples of 16."""
    names = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n.endswith("stride")}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    compiled = triton.compile(source, target=TARGET, options=options)
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    report = subprocess.run(
        [PTXAS, "-v", "--gpu-name=sm_90a", ptx, "-o", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stderr
    assert compiled.metadata.shared <= 227 * 1024, f"{compiled.metadata.shared} bytes of shared memory"
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert spills, report
    return sum(map(int, spills))


def attention_types(kernel, element_bytes: int) -> dict[str, str]:
    element = "*" + ELEMENT[element_bytes]
    types = {p.name: "i32" for p in kernel.params}
    types |= dict.fromkeys(("out_ptr", "query_ptr", "key_cache_ptr", "value_cache_ptr", "sinks_ptr"), element)
    types |= dict.fromkeys(("block_tables_ptr", "query_start_ptr", "seq_lens_ptr"), "*i32")
    types |= dict.fromkeys(("mixed_ptr", "peak_ptr", "total_ptr"), "*fp32")
    return types | {"scale": "fp32"}


def layout(size: int, group: int = 4) -> dict[str, object]:
    """Constants of both attention kernels for one padded head size."""
    return {
        "BLOCK_SIZE": 16, "KV_HEADS": 8, "GROUP": group, "HEAD_SIZE": size, "VALUE_SIZE": size, "HEAD_PAD": size,
        "VALUE_PAD": size, "WINDOW": 0, "CHUNK": 0, "SOFTCAP": 0.0, "HAS_SINKS": False,
    }  # fmt: skip


FEATURES = {
    "plain": {},
    "window_cap_sinks": {"WINDOW": 4096, "SOFTCAP": 50.0, "HAS_SINKS": True},
    "head_80": {"HEAD_SIZE": 80, "VALUE_SIZE": 80, "HEAD_PAD": 128, "VALUE_PAD": 128},
    "group_3": {"GROUP": 3},
}
VARIANTS = [(*key, "plain") for key in attention_decode.TILES] + [
    (2, 128, "window_cap_sinks"),
    (2, 256, "window_cap_sinks"),
    (2, 128, "head_80"),
    (2, 64, "group_3"),
]


@pytest.mark.parametrize("splits", [1, 32])
@pytest.mark.parametrize(("element_bytes", "size", "feature"), VARIANTS)
def test_decode(element_bytes: int, size: int, feature: str, splits: int, tmp_path: Path) -> None:
    kernel = attention_decode.decode_kernel
    tile = attention_decode.TILES[element_bytes, size]
    constants = layout(size) | FEATURES[feature]
    constants |= {"BLOCK_M": 16, "BLOCK_N": tile.block_n, "NUM_SPLITS": splits, "MIN_SPLIT": 256, "BY_TOKEN": True}
    spills = spilled_bytes(
        kernel,
        attention_types(kernel, element_bytes),
        constants,
        tmp_path,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    assert spills == 0


@pytest.mark.parametrize(("element_bytes", "size", "feature"), VARIANTS)
def test_prefill(element_bytes: int, size: int, feature: str, tmp_path: Path) -> None:
    kernel = attention_prefill.prefill_kernel
    tile = attention_prefill.TILES[element_bytes, size]
    constants = layout(size) | FEATURES[feature]
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_Q": tile.block_m // constants["GROUP"], "BLOCK_N": tile.block_n}
    spills = spilled_bytes(
        kernel,
        attention_types(kernel, element_bytes),
        constants,
        tmp_path,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    assert spills == 0


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_merge(size: int, by_token: bool, tmp_path: Path) -> None:
    kernel = attention_decode.merge_kernel
    constants = {
        "HEADS": 32, "VALUE_SIZE": size, "VALUE_PAD": size, "BLOCK_N": 64, "NUM_SPLITS": attention_decode.MAX_SPLITS,
        "MIN_SPLIT": 256, "WINDOW": 0, "CHUNK": 0, "BY_TOKEN": by_token,
    }  # fmt: skip
    assert spilled_bytes(kernel, attention_types(kernel, 2), constants, tmp_path, num_warps=4) == 0


@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_kv_write(size: int, tmp_path: Path) -> None:
    pad = triton.next_power_of_2(size)
    types = dict.fromkeys(("key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr"), "*bf16")
    types |= {"slots_ptr": "*i32"}
    types |= {p.name: "i32" for p in kv_write.kv_write_kernel.params if p.name.endswith("stride")}
    constants = {"HEADS": 8, "KEY_SIZE": size, "VALUE_SIZE": size, "HEADS_PAD": 8, "KEY_PAD": pad, "VALUE_PAD": pad}
    assert spilled_bytes(kv_write.kv_write_kernel, types, constants, tmp_path, num_warps=kv_write.NUM_WARPS) == 0


def test_sampling(tmp_path: Path) -> None:
    vocab = 128_256
    parts = -(-vocab // sampling.BLOCK_V)
    types = {
        "score_ptr": "*fp32", "token_ptr": "*i32", "logits_ptr": "*fp32", "temperature_ptr": "*fp32", "seeds_ptr": "*i64",
        "positions_ptr": "*i32", "row_stride": "i32", "ids_ptr": "*i64",
    }  # fmt: skip
    warps = sampling.NUM_WARPS
    constants = {"VOCAB": vocab, "BLOCK_V": sampling.BLOCK_V, "PARTS": parts}
    assert spilled_bytes(sampling.best_of_parts_kernel, types, constants, tmp_path, num_warps=warps) == 0
    constants = {"PARTS": parts, "PARTS_PAD": triton.next_power_of_2(parts)}
    assert spilled_bytes(sampling.best_of_row_kernel, types, constants, tmp_path, num_warps=warps) == 0


def test_spills_are_seen(tmp_path: Path) -> None:
    """Negative control: a tile far too large for its warps spills."""
    kernel = attention_prefill.prefill_kernel
    constants = layout(256) | {"BLOCK_M": 128, "BLOCK_Q": 32, "BLOCK_N": 64}
    assert spilled_bytes(kernel, attention_types(kernel, 2), constants, tmp_path, num_warps=4, num_stages=1) > 0
