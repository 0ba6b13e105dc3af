"""Every Triton kernel compiled for sm_90 with its real tiles: registers, spills, shared memory, pipeline depth.

Needs no GPU. What it cannot say is how fast anything is. A kernel is compiled once in each of its forms; lists named MORE_ are the
same forms of other sizes, which tests marked slow compile too.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pagegraph.kernels.attention.decode import TILES
from pagegraph.kernels.gpu import OTHERS_TAKE
from pagegraph.kernels.linear.tiles import Tile, gemv_tile_of, tile_of
from pagegraph.kernels.moe.form import Form
from pagegraph.kernels.moe.tiles import grouped_tiles_of, quant_grouped_tiles_of
from pagegraph.kernels.quant.tiles import QuantGemvTile, gemm_16bit_tile_by_rule
from tests.paths import ROOT

SHARED_MEMORY = 232448  # bytes a block may have on sm_90
REGISTERS = 255  # registers a thread may have


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype}


def attention(
    head_size: int,
    value_size: int,
    kv_heads: int,
    group: int,
    dtype: str = "bfloat16",
    tokens: int = 512,
    num_seqs: int = 64,
    sinks: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    cache: str | None = None,
) -> list[Any]:
    """One call of the launcher: blocks of 16, tables for 8192 tokens, query a slice of a merged projection."""
    shape = f"{head_size}/{value_size} {kv_heads}x{group} {dtype}/{cache or dtype} T={tokens} S={num_seqs}"
    name = f"{shape} window={window} softcap={softcap} chunk={chunk} sinks={sinks}"
    arguments = [
        {"slice": (tokens, kv_heads * group, head_size), "dtype": dtype},
        {"slice": (tokens, kv_heads, head_size), "dtype": dtype},
        {"slice": (tokens, kv_heads, value_size), "dtype": dtype},
        tensor(cache or dtype, 4096, 16, kv_heads, head_size),
        tensor(cache or dtype, 4096, 16, kv_heads, value_size),
        tensor("int32", tokens),
        tensor("int32", tokens),
        tensor("int32", num_seqs, 512),
        tensor("int32", num_seqs + 1),
        tensor("int32", num_seqs),
        tensor("float32", kv_heads * group) if sinks else None,
        head_size**-0.5,
        window,
        softcap,
        chunk,
    ]
    return [name, "pagegraph.kernels.attention.cuda", "paged_attention", arguments]


def sampling(vocab: int, dtype: str) -> list[Any]:
    words = tensor("int32", 256)
    arguments = [
        tensor(dtype, 256, vocab),
        tensor("float32", 256),
        tensor("int64", 256),
        words,
        words,
        words,
        words,
        words,
    ]
    return [f"sampling {vocab} {dtype}", "pagegraph.kernels.sampling.gumbel", "sample", arguments]


def bitmask(vocab: int, dtype: str) -> list[Any]:
    arguments = [tensor(dtype, 256, vocab), tensor("int32", 64), tensor("int32", 64, -(-vocab // 32))]
    return [f"bitmask {vocab} {dtype}", "pagegraph.kernels.sampling.bitmask", "apply_bitmask", arguments]


def sampling_allowed(vocab: int, dtype: str) -> list[Any]:
    module, (logits, *parameters) = "pagegraph.kernels.sampling.allowed", sampling(vocab, dtype)[-1]
    arguments = [tensor("int64", 256), tensor("int32", 64), tensor("int32", 64, -(-vocab // 32)), logits, *parameters]
    return [f"sampling among allowed {vocab} {dtype}", module, "sample_allowed", arguments]


def rows(rows: int, size: int) -> list[list[Any]]:
    x, weight = tensor("bfloat16", rows, size), tensor("bfloat16", size)
    return [
        [f"norm {rows}x{size}", "pagegraph.kernels.linear.rms_norm", "rms_norm", [x, weight, 1e-6]],
        [f"add and norm {rows}x{size}", "pagegraph.kernels.linear.rms_norm", "add_rms_norm", [x, x, weight, 1e-6]],
        [f"silu {rows}x{size}", "pagegraph.kernels.linear.silu_mul", "silu_mul", [x]],
    ]


def gated_norms(rows: int, size: int) -> list[list[Any]]:
    """Of groups with a weight each behind a gate, as Mamba 2 has them, and of heads of 128 ahead of one, as a delta rule has."""
    module, name = "pagegraph.kernels.linear.gated_rms_norm", "gated_rms_norm"
    group, head, weight = {"slice": (rows, 8, size)}, {"slice": (rows, 32, 128)}, tensor("bfloat16", 128)
    wide = {**group, "dtype": "float32"}, {**group, "dtype": "bfloat16"}, tensor("bfloat16", 8 * size)
    heads = {**head, "dtype": "bfloat16"}
    return [
        [f"gate and norm {rows}x{size}", module, name, [*wide, 1e-5, True]],
        [f"norm and gate {rows}x{size}", module, name, [heads, heads, weight, 1e-5, False]],
    ]


def unpack(tokens: int, seqs: int) -> list[list[Any]]:
    tables, starts = tensor("int32", 257, 512), tensor("int32", seqs)
    update = [tables, tensor("int32", 4096, 3), tensor("int32", 1)]
    rows, draft_tokens = tensor("int32", 257), tensor("int32", 257, 15)
    arguments = [
        tensor("int32", tokens),
        starts,
        tensor("int32", seqs + 1),
        starts,
        rows,
        rows,
        draft_tokens,
        tables,
        16,
        512,
    ]
    return [
        [f"update {seqs}", "pagegraph.kernels.inputs.prepare", "update_tables", update],
        [f"unpack {tokens} {seqs}", "pagegraph.kernels.inputs.prepare", "unpack", arguments],
    ]


def drafting(tokens: int, seqs: int) -> list[list[Any]]:
    entries, rows = tensor("int32", seqs), tensor("int32", 257)
    step = [tensor("int64", seqs), tensor("int32", tokens), entries, tensor("int32", seqs + 1), entries]
    return [
        [f"accept {seqs}", "pagegraph.kernels.spec_decode.ngram", "accept", [*step, rows, rows, 15]],
        [
            f"look up {seqs}",
            "pagegraph.kernels.spec_decode.ngram",
            "propose_ngram",
            [*step, entries, rows, rows, tensor("int32", 257, 8193), tensor("int32", 257, 15), 2, 5],
        ],
    ]


def linear(rows: int, out_size: int, size: int) -> list[Any]:
    """The product with the tile that is chosen for it, or a plain one."""
    tile = tile_of(rows, out_size, size) or Tile(32, 128, 1, 4, 4)
    arguments = [tensor("bfloat16", rows, size), tensor("bfloat16", out_size, size), None, {"tile": tile}]
    return [
        f"linear {rows} {out_size}x{size} {tile}",
        "pagegraph.kernels.linear.skinny_gemm",
        "skinny_gemm",
        arguments,
    ]


def fixed(rows: int, out_size: int, size: int, dtype: str = "bfloat16", gated: bool = False) -> list[Any]:
    arguments = [tensor(dtype, rows, size), tensor(dtype, out_size, size), None, gated]
    return [
        f"fixed {rows} {out_size}x{size} {dtype} gated={gated}", "pagegraph.kernels.linear.fixed_gemm", "fixed_linear", arguments,
    ]  # fmt: skip


def fixed_attention(*sizes: Any, **features: Any) -> list[Any]:
    name, *where, arguments = attention(*sizes, **features)
    return [f"fixed {name}", *where, [*arguments, 512]]


def gated(rows: int, size: int, inner: int, narrow: bool, dtype: str = "bfloat16") -> list[Any]:
    return [
        f"gated {rows} {size}x{inner} narrow={narrow}",
        "pagegraph.kernels.linear.gated_gemm_hopper",
        "gated_gemm",
        [tensor(dtype, rows, inner), tensor(dtype, 2 * size, inner), 132, narrow],
    ]


def gemvs(rows: int, hidden: int, inner: int) -> list[list[Any]]:
    """Rows between attention and gate, and between gate and attention, with the tiles that are chosen."""

    def bf16(*shape: int) -> dict[str, Any]:
        return tensor("bfloat16", *shape)

    starts = tensor("int32", rows + 1)
    x, norm, residual = bf16(1, rows, hidden), bf16(hidden), bf16(1, rows, hidden)
    gate = [x, bf16(hidden, hidden), None, residual, norm, 1e-6, bf16(2 * inner, hidden), None, True, False, starts]
    down = [
        bf16(1, rows, inner),
        bf16(hidden, inner),
        None,
        residual,
        norm,
        1e-6,
        bf16(2 * hidden, hidden),
        None,
        False,
        True,
        starts,
    ]
    return [
        [f"{rows} rows of {hidden}, {inner}: {name}", "pagegraph.kernels.linear.cuda", "linear_norm_linear", arguments]
        for name, arguments in (("gate", gate), ("down", down))
    ]


def quantised(
    rows: int,
    out_size: int,
    size: int,
    kind: str,
    group: int,
    has_zero: bool = False,
    tile: Tile | None = None,
    dtype: str = "bfloat16",
) -> list[Any]:
    """The product by the given tile or the rule's, scales as a device holds them."""
    tile = tile or gemm_16bit_tile_by_rule(rows, out_size, size)
    name = f"{kind} {rows} {out_size}x{size}/{group} {dtype} {tile}"
    x, blocks = tensor(dtype, rows, size), (out_size // 64, size // 64)
    if kind == "fp8":
        weight = [
            tensor("float8_e4m3fn", out_size, size),
            tensor("float32", out_size, -(-size // group)),
            None,
            None,
            group,
            out_size,
        ]
        return [name, "pagegraph.kernels.quant.gemm_16bit", "gemm_16bit", [x, {"weight": weight}, {"tile": tile}]]
    qweight = tensor("uint8", *blocks, 128, 16) if kind == "int4" else tensor("int8", *blocks, 256, 16)
    scale = tensor(
        dtype if group < size else "float32", out_size // 64, size // max(group, 64), 32, 2 * max(1, 64 // group)
    )
    weight = [qweight, scale, scale if has_zero else None, None, group, out_size]
    return [name, "pagegraph.kernels.quant.gemm_16bit", "gemm_16bit", [x, {"weight": weight}, {"tile": tile}]]


def by_gemm_8bit(
    kind: str, rows: int, out_size: int, size: int, tile: Tile, symmetric: bool = False, dtype: str = "bfloat16"
) -> list[Any]:
    """The product of codes on both sides; with a bias where it is symmetric, which int8 is."""
    has_zero = kind == "int4" and not symmetric
    name, _, _, (x, weight, _) = quantised(
        rows, out_size, size, kind, 128 if kind == "int4" else size, has_zero, tile, dtype
    )
    weight["weight"][3] = None if has_zero else tensor(dtype, out_size)
    return [f"{name} on both sides", "pagegraph.kernels.quant.gemm_8bit", "gemm_8bit", [x, weight, {"tile": tile}]]


def rounded_rows(size: int) -> list[list[Any]]:
    """Alone, behind a gate, behind an addition and a norm."""
    x, residual = tensor("bfloat16", 256, size), {"norm": [256, size]}
    return [
        ["rows to e4m3", "pagegraph.kernels.quant.activations", "exchanged_e4m3_rows", [x]],
        [
            "gated rows to int8",
            "pagegraph.kernels.quant.activations",
            "int8_rows",
            [tensor("bfloat16", 256, 2 * size), 64, None, True],
        ],
        ["normed rows to e4m3 with sums", "pagegraph.kernels.quant.activations", "e4m3_rows", [x, 64, residual]],
    ]


def written_out(kind: str, group: int, has_zero: bool) -> list[Any]:
    """The weight on its own."""
    _, _, _, (_, weight, _) = quantised(8, 4096, 4096, kind, group, has_zero)
    return [
        f"{kind}/{group} written out",
        "pagegraph.kernels.quant.gemm_16bit",
        "dequantize_repacked",
        [weight, 4096, {"type": "bfloat16"}],
    ]


def quantised_rows(kind: str, group: int, tile: QuantGemvTile, has_zero: bool = False) -> list[list[Any]]:
    """Products of two rows without a gate and with one, scales as a device holds them."""
    hidden, launches = 4096, []
    for out_size, gated in ((hidden, False), (28672, True)):
        _, _, _, (x, weight, _) = quantised(2, out_size, hidden, kind, group or hidden, has_zero)
        cut = tile._replace(parts=max(2, tile.parts)) if gated else tile
        launches.append(
            [
                f"{kind}/{group} {out_size} {cut}",
                "pagegraph.kernels.quant.gemv",
                "quant_gemv",
                [x, weight, gated, {"by_gemv": cut}],
            ]
        )
    return launches


def experts(
    tokens: int,
    choices: int,
    size: tuple[int, int, int],
    form: Form = Form(),
    bias: bool = False,
    dtype: str = "bfloat16",
) -> list[Any]:
    """A padded step's experts of size (E, I, H), by the tiles of the rules that hold where `grouped_gemm_hopper` takes none."""
    count, inner, hidden = size
    columns = 2 * inner if form.gated else inner
    up, down = (columns, hidden), (hidden, inner)
    if form.transposed:
        up, down = up[::-1], down[::-1]
    arguments = [
        tensor(dtype, tokens, hidden),
        tensor("int64", tokens, choices),
        tensor(dtype, tokens, choices),
        tensor(dtype, count, *up),
        tensor(dtype, count, columns) if bias else None,
        tensor(dtype, count, *down),
        tensor(dtype, count, hidden) if bias else None,
        tensor("int32", tokens + 1),
        {"form": list(form)},
    ]
    tiles = {"grouped": [tokens, tokens * choices, form.transposed, *size, 4 if dtype == "float32" else 2]}
    return [
        f"experts {size} T={tokens} {dtype} {form}",
        "pagegraph.kernels.moe.cuda",
        "experts_by",
        [tiles, *arguments],
    ]


def hopper_experts(tokens: int, choices: int, size: tuple[int, int, int], form: Form, *others: Any) -> list[Any]:
    """`experts` by the products for Hopper."""
    name, module, function, (_, *arguments) = experts(tokens, choices, size, form, *others)
    return [f"hopper {name}", module, function, [{"hopper": [4]}, *arguments]]


def e4m3_experts(
    tokens: int, choices: int, size: tuple[int, int, int], form: Form, tiles: tuple[int, int]
) -> list[Any]:
    """`quantised_experts` of e4m3 with a scale a row by the products for Hopper, which round rows too; tiles: stages, columns."""
    name, module, _, given = quantised_experts(tokens, choices, size, "fp8", 0, form)
    columns, (inner, query_start, *_) = size[1] * (2 if form.gated else 1), given[13:]
    up, down = {"stack": [*given[3:7], columns, size[2]]}, {"stack": [*given[8:12], size[2], inner]}
    arguments = [{"hopper": tiles}, *given[:3], up, given[7], down, given[12], query_start, {"form": list(form)}]
    return [f"e4m3 {tiles} {name}", module, "repacked_experts_by", arguments]


def quantised_experts(
    tokens: int,
    choices: int,
    size: tuple[int, int, int],
    kind: str,
    group: int,
    form: Form = Form(),
    bias: bool = False,
    has_zero: bool = False,
) -> list[Any]:
    """`experts` of weights in the tensor cores' layout; group 0: one scale a row."""
    count, inner, hidden = size

    def weight(rows: int, columns: int) -> list[Any]:
        held = group or columns
        if kind == "fp8":
            scale = tensor("float32", count, rows, -(-columns // held))
            return [tensor("float8_e4m3fn", count, rows, columns), scale, None, held]
        values = tensor(
            "int8" if kind == "int8" else "uint8", count, rows // 64, columns // 64, 256 if kind == "int8" else 128, 16
        )
        groups = max(1, 64 // held) if group else 1
        dtype = "uint8" if kind == "mxfp4" else "bfloat16" if group else "float32"
        scale = tensor(dtype, count, rows // 64, -(-columns // (groups * held)), 32, 2 * groups)
        return [values, scale, scale if has_zero else None, held]

    columns = 2 * inner if form.gated else inner
    arguments = [
        tensor("bfloat16", tokens, hidden),
        tensor("int64", tokens, choices),
        tensor("bfloat16", tokens, choices),
        *weight(columns, hidden),
        tensor("bfloat16", count, columns) if bias else None,
        *weight(hidden, inner),
        tensor("bfloat16", count, hidden) if bias else None,
        inner,
        tensor("int32", tokens + 1),
        *form,
    ]
    case = f"{kind} {group} experts {size} T={tokens}"
    return [case, "pagegraph.kernels.moe.cuda", "repacked_experts", arguments]


def rope(heads: int, kv_heads: int, size: int, normed: bool) -> list[Any]:
    """Queries, keys and values as slices of a merged projection, with or without the norm."""
    wide = [{"slice": (256, n, size), "dtype": "bfloat16"} for n in (heads, kv_heads, kv_heads)]
    norms = [tensor("bfloat16", size) if normed else None] * 2
    caches = [tensor("bfloat16", 4096, 16, kv_heads, size)] * 2
    arguments = [*wide, *[tensor("bfloat16", 256, size)] * 2, *norms, 1e-6, *caches, tensor("int32", 256)]
    return [f"rope {heads}/{kv_heads} {size}", "pagegraph.kernels.attention.rope_kv_cache", "rope_write", arguments]


OF_128, OF_32 = (128, 768, 2048), (32, 2880, 2880)
GPT_OSS = Form("silu", 1.702, 7.0, 1.0, gated=True, interleaved=True, transposed=True)


def router(tokens: int, experts: int, k: int) -> list[Any]:
    arguments = [tensor("bfloat16", tokens, experts), k, False, {"type": "bfloat16"}]
    return [f"router {tokens} of {experts}", "pagegraph.kernels.moe.topk_softmax", "topk_softmax", arguments]


def one_shot(numel: int, rank: int, ranks: int, dtype: str) -> list[Any]:
    arguments = [tensor(dtype, numel), rank, tensor("int64", ranks), tensor("int64", 64), tensor("int32", 1)]
    return [f"sum of {numel} {dtype} over {ranks}", "pagegraph.kernels.collective.one_shot", "one_shot", arguments]


SUMS = [
    one_shot(4096, 0, 2, "bfloat16"),
    one_shot(131_072, 7, 8, "float32"),
    one_shot(1_048_576, 1, 2, "bfloat16"),
    one_shot(2880, 1, 4, "float16"),
]
ROUTERS = [router(8, 128, 8), router(4096, 512, 10)]
FEW_EXPERTS = [
    *(experts(tokens, 8, OF_128) for tokens in (1, 8)),
    experts(1, 4, OF_32, GPT_OSS, True),
    experts(2, 6, (64, 1408, 2048), Form("gelu", gated=False), True, "float16"),
]
GROUPED_EXPERTS = [
    *(experts(tokens, 8, OF_128) for tokens in (64, 1024, 4096)),
    *(experts(tokens, 4, OF_32, GPT_OSS, True) for tokens in (8, 256, 4096)),
    experts(256, 6, (64, 1408, 2048), Form("relu2", gated=False), True, "float16"),
]
MORE_GROUPED_EXPERTS = [
    experts(512, 8, OF_128),
    *(experts(tokens, 4, OF_32, GPT_OSS, True) for tokens in (64, 512)),
    experts(1024, 6, (64, 1408, 2048), Form("relu2", gated=False), True, "float16"),
]
HOPPER_EXPERTS = [
    hopper_experts(4096, 8, OF_128, Form()),
    hopper_experts(4096, 4, OF_32, GPT_OSS, True),
    hopper_experts(1024, 6, (64, 1400, 2048), Form("relu2", gated=False), True, "float16"),
]
MORE_HOPPER_EXPERTS = [
    hopper_experts(1024, 6, (64, 1400, 2048), GPT_OSS._replace(interleaved=False, transposed=False), True, "float16"),
    hopper_experts(1024, 6, (64, 1408, 2048), Form("gelu", gated=False), True),
]
E4M3_EXPERTS = [
    *(e4m3_experts(tokens, 8, OF_128, Form(), (4, 256)) for tokens in (64, 4096)),
    e4m3_experts(1024, 6, (64, 1408, 2048), Form("relu2", gated=False), (4, 256)),
    e4m3_experts(1024, 1, (64, 704, 1536), GPT_OSS, (4, 256)),
]
MORE_E4M3_EXPERTS = [e4m3_experts(4096, 8, OF_128, Form(), tiles) for tiles in ((6, 128), (3, 256))]
FEW_QUANTISED_EXPERTS, GROUPED_QUANTISED_EXPERTS, MORE_QUANTISED_EXPERTS = (
    [
        quantised_experts(tokens, choices, size, kind, group, form, bias, has_zero)
        for kind, group, has_zero, size, choices, form, bias, numbers in (
            ("fp8", 128, False, OF_128, 8, Form(), False, ((2,), (64,), (512, 4096))),
            ("int4", 128, True, OF_128, 8, Form(), False, ((2,), (512,), (64, 4096))),
            ("int8", 0, False, (64, 1408, 2048), 6, Form("relu2", gated=False), True, ((2,), (512,), (64, 4096))),
            ("int8", 16, True, (64, 1408, 2048), 6, Form("relu2", gated=False), True, ((2,), (), (64, 512, 4096))),
            ("mxfp4", 32, False, OF_32, 4, GPT_OSS, True, ((2,), (4096,), (64, 512))),
        )
        for tokens in numbers[which]
    ]
    for which in range(3)
)
ROPES = [rope(16, 8, 128, True), rope(32, 8, 128, False), rope(32, 32, 256, False)]
LINEARS = [linear(2, 6144, 1024), linear(64, 1024, 3072), linear(64, 4096, 14336)]
MORE_LINEARS = [linear(2, 1024, 3072), linear(2, 4096, 14336), linear(64, 6144, 1024)]
GATED = [
    gated(256, 14336, 4096, True),
    gated(8192, 14336, 4096, False),
    gemvs(128, 4096, 14336)[0],
    gemvs(2048, 4096, 12288)[0],
]
MORE_GATED = [gated(300, 9728, 2560, True, "float16")]
ROWS = [
    one
    for rows, sizes in ((2, (1024, 3072)), (2, (4096, 14336)), (4, (1024, 3072)), (4, (4096, 14336)), (4, (576, 1536)))
    for one in gemvs(rows, *sizes)
]
MORE_ROWS = gemvs(2, 576, 1536)
MANY_ROWS = ((128, 128, 1, 8, 3, 128), (64, 64, 2, 4, 4, 128), (256, 64, 1, 8, 3, 128), (128, 64, 1, 8, 3, 256))
WEIGHTS = (
    ("fp8", 4096), ("fp8", 128), ("int8", 4096), ("int8", 32, True), ("int4", 128, True), ("int4", 4096), ("int8", 16)
)  # fmt: skip
QUANTISED = [
    *(quantised(64, 6144, 4096, *weight) for weight in WEIGHTS),
    quantised(8, 4096, 4096, "fp8", 128),
    quantised(8, 4096, 4096, "int4", 32, True),
    *(quantised(256, 4096, 14336, "int4", 128, True, Tile(*tile)) for tile in MANY_ROWS[::2]),
    *(quantised(256, 4096, 14336, "int8", 14336, False, Tile(*tile)) for tile in MANY_ROWS[1::2]),
    quantised(256, 6144, 4096, "fp8", 4096),
    quantised(64, 4096, 4096, "int4", 128, True, dtype="float16"),
    *rounded_rows(4096),
    *rounded_rows(53248)[:1],
    *(
        by_gemm_8bit("int8", 256, 4096, 14336, Tile(*tile))
        for tile in ((64, 128, 4, 4, 4, 64), (64, 128, 1, 4, 3, 128), (128, 128, 1, 8, 3, 128))
    ),
    *(
        by_gemm_8bit("int4", 256, 4096, 14336, Tile(*tile))
        for tile in ((64, 128, 1, 4, 4, 128), (128, 128, 2, 4, 3, 64))
    ),
    by_gemm_8bit("int4", 256, 4096, 4096, Tile(64, 128, 1, 4, 4, 128), symmetric=True, dtype="float16"),
    *(
        written_out(kind, group, has_zero)
        for kind, group, has_zero in (("int4", 32, True), ("int8", 4096, False), ("fp8", 128, False))
    ),
]
MORE_QUANTISED = [
    *(quantised(rows, 6144, 4096, *weight) for rows in (8, 256) for weight in WEIGHTS),
    *(quantised(64, 4096, 14336, *weight) for weight in (("fp8", 14336), ("int8", 32, True), ("int4", 128, True))),
    *(quantised(256, 4096, 14336, "int4", 128, True, Tile(*tile)) for tile in MANY_ROWS[1::2]),
    *(quantised(256, 4096, 14336, "int8", 14336, False, Tile(*tile)) for tile in MANY_ROWS[::2]),
    *rounded_rows(14336),
    by_gemm_8bit("int8", 256, 4096, 14336, Tile(64, 128, 2, 4, 4, 128)),
    by_gemm_8bit("int4", 256, 4096, 14336, Tile(64, 128, 4, 4, 4, 64)),
    by_gemm_8bit("int8", 256, 4096, 4096, Tile(64, 128, 1, 4, 4, 128), symmetric=True, dtype="float16"),
]
HALF = [
    attention(64, 64, 8, 8, window=128, sinks=True),
    attention(80, 80, 8, 4),
    attention(128, 128, 8, 4),
    attention(128, 128, 8, 4, tokens=256, num_seqs=256),
    attention(128, 128, 8, 4, tokens=1024, num_seqs=256),
    attention(128, 128, 8, 4, tokens=1, num_seqs=1),
    attention(128, 128, 4, 8, tokens=16, num_seqs=16, window=1024, softcap=50.0, sinks=True),
    attention(192, 128, 8, 1),
    attention(256, 256, 4, 2, window=1024, softcap=50.0),
    attention(256, 256, 4, 4, tokens=8, num_seqs=8, chunk=8192),
]
MORE_HALF = [
    attention(64, 64, 8, 1),
    attention(96, 96, 8, 3),
    attention(128, 128, 8, 4, tokens=16, num_seqs=16),
    attention(128, 128, 4, 8, window=1024, softcap=50.0, sinks=True),
    attention(256, 256, 2, 8),
]
KV_8_BITS = [
    *(attention(128, 128, 8, 4, tokens=tokens, num_seqs=64, cache="float8_e4m3fn") for tokens in (64, 512)),
    *(
        attention(size, size, 8, 4, dtype, tokens=64, num_seqs=64, cache="float8_e4m3fn", sinks=True)
        for size, dtype in ((64, "bfloat16"), (64, "float32"))
    ),
]
MORE_KV_8_BITS = [
    attention(128, 128, 8, 2, tokens=256, num_seqs=64, cache="float8_e4m3fn"),
    *(attention(size, size, 8, 4, tokens=64, num_seqs=64, cache="float8_e4m3fn", sinks=True) for size in (16, 80, 256)),
]
SINGLE = [attention(64, 64, 8, 3, "float32"), attention(256, 256, 4, 2, "float32")]
MORE_SINGLE = [attention(128, 128, 8, 4, "float32")]
WIDE = {
    size: [
        attention(size, size, 8, group, dtype, tokens, 32, *features)
        for group, dtype, tokens, features in itertools.product(
            (1, 3, 4, 8),
            ("bfloat16", "float16", "float32"),
            (32, 256),
            ((False, 0, 0.0, 0), (True, 128, 0.0, 0), (False, 0, 30.0, 8192)),
        )
    ]
    for size in (64, 80, 96, 128, 256)
}
# Nothing asks for it: the assembler itself keeps some kernels to few registers, with which one more program shares a
# multiprocessor, and puts a few of them into local memory for that. Where registers run out there are 255, and it is many bytes.
HELD_BACK = 32  # bytes a thread
# Three warp groups of 168 registers fill a multiprocessor: what else there is goes to memory, once a tile of rows.
ONCE_A_TILE = 640  # bytes a thread
# Three decode programs likewise: where a part lies goes to memory, once a part.
ONCE_A_PART = 128  # bytes a thread

FIXED = [
    *(
        fixed(rows, *shape)
        for rows, shape in (
            (1, (6144, 4096)), (32, (1024, 3072)), (64, (4096, 14336)), (256, (1024, 3072)),
            (256, (6144, 4096)), (256, (151936, 1024)), (2048, (1024, 3072)),
        )
    ),
    *(fixed(rows, 6144, 1024, gated=True) for rows in (1, 128, 8192)),
    *(fixed_attention(64, 64, 8, 1, tokens=tokens) for tokens in (16, 512)),
    fixed_attention(128, 128, 8, 4, tokens=16),
    fixed_attention(128, 128, 8, 2, tokens=2, num_seqs=2),  # whose sections are shared out
    fixed_attention(64, 64, 3, 3, tokens=16, num_seqs=4, sinks=True),
    fixed_attention(128, 128, 8, 4, cache="float8_e4m3fn"),
    fixed_attention(256, 256, 4, 2, window=512, softcap=30.0),
]  # fmt: skip
MORE_FIXED = [
    *(
        fixed(rows, *shape)
        for rows in (1, 32, 64, 256, 2048)
        for shape in ((6144, 4096), (4096, 14336), (151936, 1024), (1024, 3072))
    ),
    *(fixed(rows, 6144, 1024, gated=True) for rows in (64, 256)),
    *(fixed_attention(size, size, 8, group, tokens=512) for size, group in ((64, 4), (128, 1), (128, 4))),
]

QUANTISED_ROWS = [
    quantised_rows("int4", 128, QuantGemvTile(1, 8, 2, 4), True)[0],
    quantised_rows("int4", 32, QuantGemvTile(2, 4, 2, 4), True)[1],
    quantised_rows("int4", 0, QuantGemvTile(4, 2, 2, 4))[1],
    quantised_rows("int8", 0, QuantGemvTile(2, 2, 2, 6))[1],
    quantised_rows("int8", 128, QuantGemvTile(1, 4, 2, 6))[0],
    quantised_rows("fp8", 0, QuantGemvTile(2, 2, 2, 6))[1],
    quantised_rows("fp8", 128, QuantGemvTile(1, 4, 2, 6))[0],
]
MORE_QUANTISED_ROWS = [
    launch
    for kind, group, has_zero, tile in (
        ("int4", 128, True, QuantGemvTile(4, 2, 2, 4)), ("int4", 32, True, QuantGemvTile(4, 4, 2, 4)), ("int8", 0, False, QuantGemvTile(1, 4, 4, 3)),
        ("int8", 128, False, QuantGemvTile(1, 4, 4, 3)), ("fp8", 0, False, QuantGemvTile(1, 8, 1, 6)), ("fp8", 128, False, QuantGemvTile(2, 16, 1, 3)),
    )
    for launch in quantised_rows(kind, group, tile, has_zero)
]  # fmt: skip

every_size = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["each_form", "every_size"]
)


class Compiler:
    """The process that compiles for one compute capability, and what it has compiled."""

    def __init__(self, capability: int) -> None:
        environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__).with_name("ahead_of_time.py")), str(capability)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def compiled(self, launches: list[list[Any]]) -> list[dict[str, Any]]:
        print(json.dumps(launches), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the compiler ended with {self._process.wait(10)}"
        kernels = json.loads(answer)
        assert isinstance(kernels, list), kernels
        return kernels

    def close(self) -> None:
        self._process.kill()  # it would take seconds to free what it holds
        self._process.wait(10)


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """The launches compiled for a compute capability; a launch that tests share is compiled once."""
    compilers: dict[int, Compiler] = {}

    def of(launches: list[list[Any]], capability: int = 90) -> list[dict[str, Any]]:
        if capability not in compilers:
            compilers[capability] = Compiler(capability)
        return compilers[capability].compiled(launches)

    yield of
    for compiler in compilers.values():
        compiler.close()


def check_fits(kernels: list[dict[str, Any]], held_back: int = 0) -> None:
    allowed = {"prefill_hopper_kernel": ONCE_A_TILE, "decode_kernel": ONCE_A_PART}
    spilling = [
        k for k in kernels if k["spilled_bytes"] > allowed.get(k["kernel"], held_back if k["registers"] < 255 else 0)
    ]
    assert not spilling
    assert all(k["registers"] <= REGISTERS for k in kernels)
    assert all(k["shared_bytes"] <= SHARED_MEMORY for k in kernels)


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["each_form", "every_size"]
)
def half(request: pytest.FixtureRequest, compiled) -> list[dict[str, Any]]:
    """The launches of models in bfloat16, and sampling."""
    launches = [
        *HALF,
        *ROPES,
        *LINEARS,
        *GATED,
        *FIXED,
        *ROWS,
        *unpack(2, 2),
        *unpack(2048, 256),
        *drafting(64, 64),
        *rows(1, 1024),
        *rows(256, 4096),
        *rows(8192, 16384),
        *gated_norms(256, 1024),
        sampling(151936, "float32"),
        sampling(128256, "bfloat16"),
        bitmask(151936, "float32"),
        bitmask(128256, "bfloat16"),
        sampling_allowed(151936, "float32"),
        sampling_allowed(128256, "bfloat16"),
    ]
    return compiled(
        launches + [*MORE_HALF, *MORE_LINEARS, *MORE_GATED, *MORE_FIXED, *MORE_ROWS] if request.param else launches
    )


def test_every_kernel_is_compiled(half: list[dict[str, Any]]) -> None:
    names = {k["kernel"] for k in half}
    assert names == {
        "kv_write_kernel", "decode_kernel", "prefill_kernel", "prefill_hopper_kernel", "skinny_gemm_kernel", "fixed_gemm_kernel", "fixed_attention_kernel", "rope_write_kernel", "best_of_parts_kernel", "best_of_row_kernel",
        "update_tables_kernel", "unpack_kernel", "rms_norm_kernel", "gated_rms_norm_kernel", "silu_mul_kernel", "gemv_kernel", "gated_gemm_hopper_kernel",
        "accept_kernel", "propose_ngram_kernel", "bitmask_kernel", "best_allowed_of_parts_kernel", "best_allowed_of_row_kernel",
    }  # fmt: skip


def test_nothing_spills(half: list[dict[str, Any]]) -> None:
    check_fits(half)


def test_kernels_of_a_decode_step_wait_for_those_before(half: list[dict[str, Any]]) -> None:
    """All but those of prefill and of masks are launched while the one before still runs."""
    assert {k["kernel"] for k in half if not k["waits"]} == {
        "kv_write_kernel",
        "prefill_kernel",
        "prefill_hopper_kernel",
        "bitmask_kernel",
    }


def test_nothing_is_touched_before_the_wait(half: list[dict[str, Any]]) -> None:
    """But weights, which no kernel of a step writes."""
    waiting = [k for k in half if k["waits"]]
    assert {k["kernel"] for k in waiting if k["early"]} == {"rms_norm_kernel", "gated_rms_norm_kernel", "gemv_kernel"}
    for kernel in waiting:
        assert set(kernel["early"]) <= {"LDG"}, kernel


def test_weights_of_several_tiles_are_asked_for_before_the_wait(half: list[dict[str, Any]]) -> None:
    tile = gemv_tile_of(2, 1024, 3072)
    assert tile is not None and tile.ahead > 1
    product = next(k for k in half if k["case"] == "2 rows of 1024, 3072: down")
    assert len(product["early"]) > tile.ahead  # and the count of live rows


def test_attention_is_pipelined_on_matrix_units(half: list[dict[str, Any]]) -> None:
    """A block-table load that keys wait for in the same iteration would leave the pipeline fewer buffers."""
    kernels = [k for k in half if k["kernel"] in ("decode_kernel", "prefill_kernel", "skinny_gemm_kernel")]
    assert kernels
    assert all(k["tensor_cores"] and k["buffers"] >= 2 for k in kernels), kernels


def test_products_of_any_rows_are_summed_by_one_instruction(half: list[dict[str, Any]]) -> None:
    """The bits of a row follow from how it sums: Hopper's asynchronous tensor-core instruction, for a row as for thousands."""
    kernels = [k for k in half if k["kernel"] == "fixed_gemm_kernel"]
    assert kernels and all(k["wgmma"] and k["buffers"] >= 4 for k in kernels), kernels


def test_prefill_runs_on_warp_groups(half: list[dict[str, Any]]) -> None:
    """Tiles of 64 rows or more reach Hopper's asynchronous tensor-core instruction."""
    kernels = [k for k in half if k["kernel"].startswith("prefill_")]
    assert kernels and all(k["wgmma"] for k in kernels)


def test_prefill_with_a_producer_fills_a_multiprocessor(half: list[dict[str, Any]]) -> None:
    kernels = [k for k in half if k["kernel"] == "prefill_hopper_kernel"]
    # Of HALF: head sizes of 64, 128 and 256, steps with prompts.
    assert len(kernels) == 4 + 3 * any(k["case"] == MORE_HALF[0][0] for k in half)
    assert all(k["registers"] * 3 * 128 <= 65536 for k in kernels), kernels


def test_gated_products_with_a_producer_fill_a_multiprocessor(half: list[dict[str, Any]]) -> None:
    """Those that the op chooses among them: from 65 rows on where they are faster than cuBLAS."""
    kernels = [k for k in half if k["kernel"] == "gated_gemm_hopper_kernel"]
    assert len(kernels) == len(GATED) + any(k["case"] == MORE_GATED[0][0] for k in half)
    assert all(k["wgmma"] and k["registers"] * 3 * 128 <= 65536 and not k["spilled_bytes"] for k in kernels), kernels


def test_decode_programs_share_a_multiprocessor(half: list[dict[str, Any]]) -> None:
    """Decode hides memory latency with other programs' loads: shared memory and registers of two must fit, of three where
    many sequences take equal shares, and one of eight warps does for a step of one."""
    kernels = [k for k in half if k["kernel"] == "decode_kernel"]
    assert len(kernels) == len({k["case"] for k in half} & {case for case, *_ in HALF + MORE_HALF})
    for kernel in kernels:
        programs = 3 if "T=1024" in kernel["case"] else 1 if "T=1 " in kernel["case"] else 2
        threads = 256 if programs == 1 else 128
        assert programs * (kernel["shared_bytes"] + 1024) <= SHARED_MEMORY, kernel
        assert programs * threads * kernel["registers"] <= 65536, kernel


@every_size
def test_quantised_products(compiled, every: bool) -> None:
    """No spills, on Hopper's tensor-core instruction, the weight in two buffers at least, and nothing but a norm's weight touched before the wait."""
    kernels = compiled(QUANTISED + MORE_QUANTISED if every else QUANTISED)
    check_fits(kernels)
    assert {k["kernel"] for k in kernels} == {
        "gemm_16bit_kernel",
        "gemm_8bit_kernel",
        "rows_kernel",
        "dequantize_repacked_kernel",
    }
    assert all(
        k["waits"] and not k["early"]
        for k in kernels
        if k["kernel"] != "dequantize_repacked_kernel" and "normed" not in k["case"]
    )
    assert {kind for k in kernels if "normed" in k["case"] for kind in k["early"]} == {"LDG"}  # the norm's weight
    products = [k for k in kernels if k["kernel"].startswith("gemm_")]
    assert all(k["wgmma"] and k["buffers"] >= 2 for k in products)
    three = [
        k
        for k in products
        if k["kernel"] == "gemm_8bit_kernel"
        and k["case"].startswith("int8")
        and "num_warps=4, num_stages=3" in k["case"]
    ]
    assert three and all(
        3 * (k["shared_bytes"] + 1024) <= SHARED_MEMORY and k["registers"] * 128 * 3 <= 65536 for k in three
    )
    assert not any(k["exchanged"] for k in products), (
        "a weight takes a way through shared memory on its way to the tensor cores"
    )


def test_quantised_products_on_gpus_before_hopper(compiled) -> None:
    """Products that such a GPU is given, with what is ahead of them: of e4m3 only where it knows them."""
    rows_to_e4m3, rows_to_int8, rows_with_sums = rounded_rows(4096)
    tile = QuantGemvTile(1, 4, 2, 3)
    integers = [
        *(quantised(300, 512, 512, kind, group) for kind, group in (("int4", 32), ("int8", 32), ("int8", 512))),
        *(quantised(64, 512, 512, "int4", 128, True, dtype=dtype) for dtype in ("bfloat16", "float16")),
        quantised_rows("int4", 128, tile)[1],
        quantised_rows("int8", 0, tile)[0],
        by_gemm_8bit("int8", 128, 512, 512, Tile(64, 128, 1, 4, 3, 64)),
        rows_to_int8,
        written_out("int4", 32, True),
    ]
    e4m3 = [
        rows_to_e4m3,
        rows_with_sums,
        quantised(64, 512, 512, "fp8", 512),
        *quantised_rows("fp8", 0, tile),
        by_gemm_8bit("int4", 128, 512, 512, Tile(64, 128, 1, 4, 3, 64)),
    ]
    for capability, launches, count in ((80, integers, 11), (89, e4m3, 7)):
        kernels = compiled(launches, capability)
        assert len(kernels) == count
        products = [k for k in kernels if k["kernel"] not in ("rows_kernel", "dequantize_repacked_kernel")]
        assert not any(k["waits"] or k["spilled_bytes"] > 16 for k in kernels)
        assert all(k["tensor_cores"] for k in products)


@every_size
def test_quantised_products_of_few_rows(compiled, every: bool) -> None:
    """On tensor cores, pipelined, no weight by a way of shared memory of its own; before the wait lines are asked for, and what no kernel writes."""
    kernels = compiled(QUANTISED_ROWS + MORE_QUANTISED_ROWS if every else QUANTISED_ROWS)
    check_fits(kernels)
    assert all(
        k["tensor_cores"] and k["buffers"] >= 2 and k["waits"] and {"CCTL"} <= set(k["early"]) <= {"CCTL", "LDG"}
        for k in kernels
    ), kernels
    assert not any(k["exchanged"] for k in kernels), kernels


def test_sums_over_ranks(compiled) -> None:
    """Counts go out behind the parts, and parts are read behind the counts, for all GPUs to see; nothing is touched before the wait."""
    kernels = compiled(SUMS)
    check_fits(kernels)
    assert len(kernels) == len(SUMS)
    assert all(k["waits"] and not k["early"] and not k["spilled_bytes"] for k in kernels), kernels


@every_size
def test_experts(compiled, every: bool) -> None:
    """No spills, nothing touched before the wait, pipelined, and tiles of 64 rows on Hopper's tensor-core instruction."""
    grouped = GROUPED_EXPERTS + MORE_GROUPED_EXPERTS if every else GROUPED_EXPERTS
    kernels = compiled([*ROUTERS, *FEW_EXPERTS, *grouped])
    check_fits(kernels)
    assert {k["kernel"] for k in kernels} == {
        "experts_up_kernel",
        "experts_down_kernel",
        "topk_softmax_kernel",
        "route_kernel",
        "count_kernel",
        "order_kernel",
        "grouped_gemm_kernel",
        "weighted_sum_kernel",
    }
    assert all(k["waits"] and not k["early"] and not k["spilled_bytes"] for k in kernels), kernels
    products = [k for k in kernels if k["kernel"] == "grouped_gemm_kernel"]
    assert len(products) == 2 * len(grouped)
    assert all(k["tensor_cores"] and k["buffers"] >= 2 for k in products), products
    assert all(k["wgmma"] == (tokens_of(k) >= 256) for k in products), products
    for kernel in products:  # as many programs share a multiprocessor as the rule counts on
        size, choices = next(
            (size, choices)
            for size, choices in ((OF_32, 4), (OF_128, 8), ((64, 1408, 2048), 6))
            if str(size) in kernel["case"]
        )
        tiles = grouped_tiles_of(tokens_of(kernel) * choices, (*size, 2))
        threads = 32 * tiles.up.num_warps
        assert tiles.programs * (kernel["shared_bytes"] + 1024) <= SHARED_MEMORY, kernel
        assert tiles.programs * threads * kernel["registers"] <= 65536, kernel


def tokens_of(kernel: dict[str, Any]) -> int:
    return int(kernel["case"].partition("T=")[2].split()[0])


@every_size
def test_experts_on_hopper(compiled, every: bool) -> None:
    """Three warp groups fill a multiprocessor, and all of a tile is copied by the copy engine."""
    launches = HOPPER_EXPERTS + MORE_HOPPER_EXPERTS if every else HOPPER_EXPERTS
    kernels = compiled(launches)
    check_fits(kernels)
    assert all(k["waits"] and not k["early"] and not k["spilled_bytes"] for k in kernels), kernels
    products = [k for k in kernels if k["kernel"] == "grouped_gemm_hopper_kernel"]
    assert len(products) == 2 * len(launches)
    assert all(k["wgmma"] and k["buffers"] == 4 and k["registers"] * 3 * 128 <= 65536 for k in products), products
    others = {k["kernel"] for k in kernels} - {"grouped_gemm_hopper_kernel"}
    assert others == {"route_kernel", "count_kernel", "order_kernel", "sorted_rows_kernel", "weighted_sum_kernel"}


@every_size
def test_experts_of_e4m3_on_hopper(compiled, every: bool) -> None:
    """As `test_experts_on_hopper`; one kernel rounds rows, and one brings them and their scales into the order of experts."""
    launches = E4M3_EXPERTS + MORE_E4M3_EXPERTS if every else E4M3_EXPERTS
    kernels = compiled(launches)
    check_fits(kernels)
    assert all(k["waits"] and not k["early"] and not k["spilled_bytes"] for k in kernels), kernels
    products = [k for k in kernels if k["kernel"] == "grouped_gemm_hopper_kernel"]
    assert len(products) == 2 * len(launches)
    assert all(k["wgmma"] and k["registers"] * 3 * 128 <= 65536 for k in products), products
    others = [k["kernel"] for k in kernels if k not in products]
    sorting = {"route_kernel", "count_kernel", "order_kernel"}
    assert sorting < set(others)
    assert [one for one in others if one not in sorting] == len(launches) * [
        "rows_kernel", "sorted_rows_kernel", "rows_kernel", "weighted_sum_kernel"
    ]  # fmt: skip


@every_size
def test_quantised_experts(compiled, every: bool) -> None:
    """As `test_experts`, and no weight takes a way through shared memory of its own; programs share a multiprocessor as the rule counts on."""
    many = GROUPED_QUANTISED_EXPERTS + MORE_QUANTISED_EXPERTS if every else GROUPED_QUANTISED_EXPERTS
    kernels = compiled(FEW_QUANTISED_EXPERTS + many)
    check_fits(kernels)
    others = ("route_kernel", "count_kernel", "order_kernel", "weighted_sum_kernel")
    products = [k for k in kernels if k["kernel"] not in others]
    names = ("quant_experts_up_kernel", "quant_experts_down_kernel", "quant_grouped_gemm_kernel")
    assert {k["kernel"] for k in products} == set(names)
    assert all(k["waits"] and not k["early"] for k in kernels), kernels
    assert all(k["tensor_cores"] and k["buffers"] >= 2 and not k["exchanged"] for k in products), products
    grouped = [k for k in products if k["kernel"] == names[2]]
    assert len(grouped) == 2 * len(many) and all(k["wgmma"] for k in grouped)
    for kernel in grouped:
        choices, experts = next((c, e) for c, e in ((8, 128), (4, 32), (6, 64)) if f"({e}, " in kernel["case"])
        tiles = quant_grouped_tiles_of(tokens_of(kernel) * choices, ("int8", experts, 0, 0), False)
        assert tiles.programs * (kernel["shared_bytes"] + 1024) <= SHARED_MEMORY, kernel
        assert tiles.programs * 32 * tiles.up.num_warps * kernel["registers"] <= 65536, kernel


def test_experts_on_gpus_before_hopper(compiled) -> None:
    quantised = [quantised_experts(tokens, 4, OF_32, "mxfp4", 32, GPT_OSS, True) for tokens in (2, 64)]
    kernels = compiled([*(experts(tokens, 8, OF_128) for tokens in (2, 64)), *quantised], 80)
    assert not any(k["waits"] or k["spilled_bytes"] for k in kernels)
    products = [k for k in kernels if k["kernel"].endswith("grouped_gemm_kernel")]
    assert len(products) == 4 and all(k["tensor_cores"] for k in products)


STATES_BY_ROWS = {
    "sequences_kernel", "tokens_kernel", "gated_delta_kernel", "selective_scan_kernel", "scan_prompts_kernel", "time_steps_kernel",
}  # fmt: skip


def recurrent(tokens: int, seqs: int, dtype: str = "bfloat16", most_drafts: int = 0) -> list[list[Any]]:
    """A step of Qwen3-Next's sizes, Kimi Linear's, Mamba 2's and Mamba 1's."""
    place = [tensor("int32", seqs), tensor("int32", seqs + 1), tensor("int32", seqs)]
    keys, heads = ({"slice": (tokens, count, 128), "dtype": dtype} for count in (16, 32))
    one = [tensor(dtype, tokens, 32)]
    conv = [tensor(dtype, tokens, 8192), tensor(dtype, 8192, 4), tensor(dtype, 8192), tensor(dtype, 257, 3, 8192)]
    state, module = tensor("float32", 257, 32, 128, 128), "pagegraph.kernels.state"
    mamba2 = [{"slice": (tokens, 128, 64), "dtype": dtype}, tensor(dtype, tokens, 128), tensor(dtype, 128)]
    mamba2 += [{"slice": (tokens, 8, 128), "dtype": dtype}] * 2 + [tensor(dtype, 128)] * 2 + [True, 0.001, None, True]
    mamba2 += [tensor("float32", 257, 128, 64, 128)]
    mamba1 = [tensor(dtype, tokens, 8192, 1), tensor("float32", tokens, 8192), tensor("float32", 8192, 16)]
    mamba1 += [{"slice": (tokens, 1, 16), "dtype": dtype}] * 2 + [None, None, False, None, None, False]
    mamba1 += [tensor("float32", 257, 8192, 1, 16)]
    said = f"T={tokens} S={seqs} {dtype} K={most_drafts}"

    def drafts(wide: int, kept: str = "float32") -> list[Any]:
        return [tensor(kept, 256, 2 * most_drafts + 1, wide), tensor("int32", 257)] if most_drafts else []

    return [
        [f"convolution {said}", f"{module}.conv", "causal_conv", [*conv, *place, True, *drafts(8192, dtype)]],
        *(
            [f"delta of {len(decay)} sizes {said}", f"{module}.cuda", "gated_delta",
             [shared, shared, heads, tensor("float32", *decay), *one, state, *place, True, *drafts(32 * (256 + (decay[2:] or (1,))[0] + 1))]]
            for decay, shared in (((tokens, 32), keys), ((tokens, 32, 128), heads))
        ),
        [f"delta as projected {said}", f"{module}.cuda", "gated_delta",
         [keys, keys, heads, *one, *one, state, *place, True, *(drafts(32 * (256 + 1 + 1)) or [None, None]),
          tensor("float32", 32), tensor(dtype, 32)]],
        [f"Mamba 2 {said}", f"{module}.cuda", "selective_scan", [*mamba2, *place, *drafts(128 * 64 + 128 + 8 * 128)]],
        [f"Mamba 1 {said}", f"{module}.cuda", "selective_scan", [*mamba1, *place, *drafts(8192 + 8192 + 16)]],
    ]  # fmt: skip


def check_nothing_early_but_weights(kernels: list[dict[str, Any]]) -> None:
    """Before the wait convolutions ask for their taps, and no other kernel over recurrent state touches anything."""
    assert {what for k in kernels for what in k["early"]} == {"LDG"}
    assert {k["kernel"] for k in kernels if k["early"]} == {"sequences_kernel", "tokens_kernel"}


@every_size
def test_recurrent_states(compiled, every: bool) -> None:
    """States stay in registers, chunks are multiplied by tensor cores, and nothing but weights is touched before the wait."""
    launches = [*recurrent(64, 64), *recurrent(4096, 64)]
    kernels = compiled(launches + recurrent(64, 64, "float32") if every else launches)
    check_fits(kernels)
    assert all(k["waits"] for k in kernels), kernels
    check_nothing_early_but_weights(kernels)
    chunks = {"delta_pairs_kernel", "delta_chunks_kernel", "delta_states_kernel", "scan_chunks_kernel"}
    assert {k["kernel"] for k in kernels if k["tensor_cores"]} == chunks
    assert {k["kernel"] for k in kernels if not k["tensor_cores"]} == STATES_BY_ROWS
    assert all(
        k["wgmma"] for k in kernels if k["kernel"] in chunks - {"delta_pairs_kernel"}
    )  # whose tiles have 16 rows


@every_size
def test_recurrent_states_with_draft_tokens(compiled, every: bool) -> None:
    """As `test_recurrent_states`, the kernels that take rows one by one, of which prompts have two; counts of states besides."""
    place = [tensor("int32", 64), tensor("int32", 65), tensor("int32", 64)]
    count = ["counts", "pagegraph.kernels.state.drafts", "count_states", [tensor("int32", 257), *place]]
    prompts = recurrent(4096, 64, "float32", 8)
    alone = [one for one in prompts if one[0].startswith(("convolution", "Mamba 1"))]  # by kernels of their own
    kernels = compiled([*recurrent(64, 64, most_drafts=5), *(prompts if every else alone), count])
    check_fits(kernels)
    assert all(k["waits"] and not k["spilled_bytes"] for k in kernels), kernels
    check_nothing_early_but_weights(kernels)
    assert {k["kernel"] for k in kernels} == STATES_BY_ROWS | {"count_states_kernel"}


@every_size
def test_an_8_bit_kv_cache(compiled, every: bool) -> None:
    """On tensor cores and pipelined as those of 16; a tile of half the bytes leaves room for programs that make up for it.

    Four of them would not fit if keys or values were written back to shared memory once they are float16.
    """
    kernels = compiled(KV_8_BITS + MORE_KV_8_BITS if every else KV_8_BITS)
    check_fits(kernels)
    decodes = [
        k
        for k in kernels
        if k["kernel"] == "decode_kernel" and k["case"].startswith("128/128 8x") and "bfloat16" in k["case"]
    ]
    threads = 32 * TILES[OTHERS_TAKE][1, 128].num_warps
    assert len(decodes) == 2 + every and all(k["buffers"] >= 2 for k in decodes)
    assert all(
        4 * (k["shared_bytes"] + 1024) <= SHARED_MEMORY and k["registers"] * threads * 4 <= 65536 for k in decodes
    ), decodes
    attends = [k for k in kernels if k["kernel"] in ("decode_kernel", "prefill_kernel")]
    assert {k["kernel"] for k in attends} == {"decode_kernel", "prefill_kernel"}
    assert all(k["tensor_cores"] and k["buffers"] >= 2 for k in attends), attends


@every_size
def test_float32_fits(compiled, every: bool) -> None:
    check_fits(compiled(SINGLE + MORE_SINGLE if every else SINGLE))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", WIDE)
def test_wide_grid_fits(compiled, size: int) -> None:
    check_fits(compiled(WIDE[size]), HELD_BACK)


def test_no_kernel_is_compiled_anew_for_another_number_of_rows() -> None:
    """Triton has a variant for sizes that 16 divides, and one for 1, unless told not to: seconds of a start each."""
    found = 0
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            sizes = {one.arg for one in node.args.args if re.fullmatch("num_(?!.*_ptr).*", one.arg)}
            told = {one.value for one in ast.walk(node.decorator_list[0]) if isinstance(one, ast.Constant)}
            assert sizes <= told, f"{path.name}: {node.name} specialises on {sizes - told}"
            found += bool(sizes)
    assert found >= 8
