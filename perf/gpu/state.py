"""Ops over recurrent state on one CUDA machine: against the reference first, then decodes and prompts against their floors.

Layers are those of Qwen3-Next and Nemotron-H by their sizes, with random activations. Decodes are checked and timed with draft tokens
too, of which half were accepted in the step before. Prompts are timed in chunks by each of some tiles and row by row; a tile whose
numbers are wrong is not timed. Knows no model and no jobs. On a CPU, under TRITON_INTERPRET=1, it
runs its control flow alone.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagegraph.kernels.costs import StepRows, cost_of
from pagegraph.kernels.state import conv, cuda, reference
from perf.gpu.report import Report, graph_seconds
from tests.kernels.interpreter_process import replaced

BANDWIDTH, FLOPS = 4.3e12, 790e12  # of an H200: bytes a second read, operations a second of bfloat16
DECODES = (1, 32, 256)  # sequences
DRAFTED = (1, 32)  # sequences with DRAFTS draft tokens each
DRAFTS = 4
CHUNKED = "pagegraph.kernels.state.cuda.CHUNKED"
DELTA, SCAN, BY_ROWS = (f"pagegraph.kernels.state.{name}" for name in ("delta_chunks", "scan_chunks", "scan_prompts"))
# Of the largest number expected. In float32 products of chunks are sums of TF32 numbers.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-4}
# Rows and tokens before of each sequence.
STEPS = {
    "decodes": ([1] * 5, [9, 0, 3, 1, 7]),
    "prompts": ([70, 1, 17, 129, 9], [0, 0, 5, 64, 0]),
    "mixed": ([1, 300, 1, 0, 64], [4, 16, 0, 0, 1]),
}
REPLAYED = ([64, 200, 1, 1, 32], [0, 5, 9, 0, 0])  # as many rows and sequences as "mixed" has with its padding
TRIED = {"decodes": ([1] * 3, [9, 0, 3]), "mixed": ([1, 12, 0], [4, 0, 0])}  # where only the control flow is
PADDING = 3
ASIDE = 1e-2  # of a number put aside: a beta is rounded to bfloat16 behind its sigmoid
WEIGHTS_AT = {"conv": (1,), "scan": (2, 5, 6), "scan of channels": (2, 5, 6)}  # arguments that are not of rows
# Constants of the modules of chunks, beside those they have.
DELTA_TILES = [
    dict(COLUMNS=32, STATES_WARPS=4, STATES_STAGES=2),
    dict(COLUMNS=32, STATES_WARPS=4, STATES_STAGES=1),
    dict(COLUMNS=32, STATES_WARPS=4, STATES_STAGES=3),
    dict(COLUMNS=64, STATES_WARPS=4, STATES_STAGES=2),
    dict(COLUMNS=64, STATES_WARPS=8, STATES_STAGES=2),
    dict(CHUNKS_WARPS=8),
]
SCAN_TILES = [
    dict(CHANNELS=64, NUM_WARPS=4, NUM_STAGES=2),
    dict(CHANNELS=32, NUM_WARPS=4, NUM_STAGES=2),
    dict(CHANNELS=64, NUM_WARPS=4, NUM_STAGES=1),
    dict(CHANNELS=64, NUM_WARPS=8, NUM_STAGES=2),
]
ROWS_TILES = [
    dict(ELEMENTS=256, BLOCK_T=16, NUM_WARPS=4),
    dict(ELEMENTS=256, BLOCK_T=16, NUM_WARPS=8),
    dict(ELEMENTS=128, BLOCK_T=16, NUM_WARPS=4),
    dict(ELEMENTS=128, BLOCK_T=32, NUM_WARPS=4),
    dict(ELEMENTS=256, BLOCK_T=8, NUM_WARPS=4),
]


@dataclass
class Step:
    """Whose rows are which; `rows` with padding."""

    slots: Tensor
    query_start: Tensor
    seq_lens: Tensor
    rows: int
    live: int
    state_lens: Tensor | None = None  # by slot, of steps with draft tokens

    @classmethod
    def drafted(cls, seqs: int, device: str) -> Step:
        """Of each sequence its last token and its draft tokens; from one to the next, one more of those before was accepted."""
        counts, before = [1] * (seqs * (1 + DRAFTS)), [9 + at for at in range(1 + DRAFTS)] * seqs
        step = cls.of(counts, before, device)
        step.slots = torch.arange(seqs, dtype=torch.int32, device=device).repeat_interleave(1 + DRAFTS)
        accepted = torch.arange(seqs + 1, dtype=torch.int32, device=device) % (1 + DRAFTS)
        step.state_lens = 9 - accepted
        return step

    @classmethod
    def of(cls, counts: list[int], before: list[int], device: str, padding: int = 0) -> Step:
        ends = np.cumsum([0, *counts])
        lengths = [count + had if count else 0 for count, had in zip(counts, before)]
        slots = list(range(len(counts), 0, -1))
        made = (torch.tensor(one, dtype=torch.int32, device=device) for one in (slots, ends, lengths))
        return cls(*made, rows=int(ends[-1]) + padding, live=int(ends[-1]))

    def become(self, other: Step) -> None:
        """Another's rows, in the same tensors: what a replayed graph reads."""
        for mine, its in zip(
            (self.slots, self.query_start, self.seq_lens), (other.slots, other.query_start, other.seq_lens)
        ):
            mine.copy_(its)
        self.live = other.live


@dataclass(frozen=True)
class Layer:
    """One op with the sizes of a layer; `tiles`: of its chunks, in module `chunks`."""

    name: str
    op: Any
    run: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    heads: int
    width: int = 0  # of keys, or N
    size: int = 0  # of values, or P
    groups: int = 1  # heads of keys, or of B and C
    kind: str = ""
    chunks: str = ""
    tiles: tuple[dict[str, int], ...] = ()

    def given(
        self, rows: int, device: str, dtype: torch.dtype
    ) -> tuple[list[Any], tuple[int, ...], torch.dtype, list[Any]]:
        """Arguments before the states, sizes and dtype of a slot's state, arguments behind."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(rows, *shape, device=device).to(dtype)

        if self.kind == "conv":
            weight = torch.randn(self.heads, self.width, device=device).to(dtype)
            columns = normal(self.heads + self.heads // 2)[:, : self.heads]  # of a wider product, as layers have them
            return [columns, weight, None], (self.width - 1, self.heads), dtype, [True]
        if self.kind.startswith("delta"):
            shape = (self.heads, self.width) if self.kind == "delta of channels" else (self.heads,)
            decay = -torch.nn.functional.softplus(torch.randn(rows, *shape, device=device)) / 8
            made = [
                normal(self.groups, self.width),
                normal(self.groups, self.width),
                normal(self.heads, self.size),
            ]
            projected = self.kind == "delta as projected"
            made += normal(2, self.heads).unbind(1) if projected else [decay, normal(self.heads).sigmoid()]
            return made, (self.heads, self.width, self.size), torch.float32, [True]
        dt = torch.nn.functional.softplus(torch.randn(rows, self.heads, device=device) - 2)
        of_channels = self.kind == "scan of channels"
        rates = torch.rand(self.heads, *([self.width] if of_channels else []), device=device)
        A, (D, bias) = -rates.exp() if of_channels else rates, torch.randn(2, self.heads, device=device).to(dtype)
        made = [normal(self.heads, self.size), dt, A, normal(self.groups, self.width), normal(self.groups, self.width)]
        made += [D, bias - 2, True, None, None, not of_channels]
        return made, (self.heads, self.size, self.width), torch.float32, []

    def drafts(self, given: list[Any], slots: int, dtype: torch.dtype) -> Tensor:
        """Rows put aside, of so many slots: as they are in the step."""
        inputs = (
            given[:1]
            if self.kind == "conv"
            else [reference.of_each_head(given[1], self.heads), *given[2:5]]
            if self.kind.startswith("delta")
            else [given[at] for at in (0, 1, 3)]
        )
        rows = torch.cat([one.flatten(1).to(dtype) for one in inputs], 1)
        return rows[torch.randint(len(rows), (slots, 2 * DRAFTS + 1), device=rows.device)]

    def floor(self, given: list[Any], states: Tensor, out: Tensor, counts: list[int]) -> float:
        """Seconds: states read and written and rows read and written once, or all operations of the recurrence."""
        rows = np.array(counts)
        names = ("x", "weight") if self.kind == "conv" else ()
        cost = cost_of(self.op, dict(zip(names, given)) | {"states": states}, None, [], StepRows(rows, rows))
        assert cost is not None
        moved = cost.cache_bytes + out.nbytes + sum(one.nbytes for one in given if isinstance(one, Tensor))
        return max(moved / BANDWIDTH, cost.flops / FLOPS)


@functools.cache
def _gates(heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A_log and dt_bias."""
    return torch.linspace(-3, 1, heads, device=device), torch.linspace(-2, 1, heads, device=device)


def _as_projected(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The delta rule of decays and betas as they were projected."""

    def call(*given: Any) -> Tensor:
        value, no_drafts = given[2], [None] * (12 - len(given))
        return rule(*given, *no_drafts, *_gates(value.shape[1], value.device))

    return call


ours = torch.ops.pagegraph
CONV = (ours.causal_conv.default, conv.causal_conv, reference.causal_conv)
DELTA_RULE = (ours.gated_delta.default, cuda.gated_delta, reference.gated_delta)
PROJECTED = (ours.gated_delta.default, _as_projected(cuda.gated_delta), _as_projected(reference.gated_delta))
STATE_SPACE = (ours.selective_scan.default, cuda.selective_scan, reference.selective_scan)
LAYERS = (
    Layer("qwen3_next conv", *CONV, heads=8192, width=4, kind="conv"),
    Layer("qwen3_next delta", *PROJECTED, 32, 128, 128, 16, kind="delta as projected", chunks=DELTA, tiles=tuple(DELTA_TILES)),
    Layer("nemotron_h conv", *CONV, heads=10240, width=4, kind="conv"),
    Layer("nemotron_h scan", *STATE_SPACE, 128, 128, 64, 8, kind="scan", chunks=SCAN, tiles=tuple(SCAN_TILES)),
    Layer("kimi_linear delta", *DELTA_RULE, 32, 128, 128, 32, kind="delta of channels", chunks=DELTA, tiles=(dict(VECTOR_CHUNKS_WARPS=8),)),
    Layer("mamba scan", *STATE_SPACE, 8192, 16, 1, kind="scan of channels", chunks=BY_ROWS, tiles=tuple(ROWS_TILES)),
)  # fmt: skip


def state(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Correctness of all layers, then their times."""
    on_device, layers, decodes, prompt = args.device == "cuda", LAYERS, DECODES, 4096
    dtypes = (torch.bfloat16, torch.float32) if on_device else (torch.float32,)  # whose products the interpreter knows
    if not on_device or args.tiny:
        layers = tuple(
            replace(one, heads=min(one.heads, 2 * min(one.groups, 2)), groups=min(one.groups, 2), width=min(one.width, 16), size=min(one.size, 16))
            for one in LAYERS
        )  # fmt: skip
        decodes, prompt = (1, 3), 16
    wrong: set[str] = set()
    with torch.inference_mode():
        for dtype in dtypes:
            for layer in layers:
                small = replace(layer, heads=min(layer.heads, max(2 * layer.groups, 8)))
                if report.out_of_time(("checks", layer.name)):
                    return
                _check(report, small, dtype, args.device, wrong)
        for layer in layers:
            _measure(report, layer, wrong, args.device, decodes, prompt)


def _check(report: Report, layer: Layer, dtype: torch.dtype, device: str, wrong: set[str]) -> None:
    """The worst errors over all steps, of results and states; float32 in chunks too, to tell their error from that of bfloat16."""
    worst: dict[str, float] = {}
    cases = [(name, *of) for name, of in (STEPS if device == "cuda" else TRIED).items()]
    cases += [("replayed", *STEPS["mixed"]), ("long", [1500, 1], [70, 9])] if device == "cuda" else []
    with replaced({CHUNKED: (torch.bfloat16, torch.float32)}):
        for name, counts, before in cases:
            torch.manual_seed(0)
            step = Step.of(counts, before, device, PADDING)
            try:
                errors = _errors(layer, step, dtype, name == "replayed", device)
            except Exception as problem:  # a kernel that is not compiled leaves the others to be tried
                report.failure(f"{layer.name} {dtype} {name}: {problem!r}"[:600])
                errors = {"out": float("inf"), "states": float("inf")}
            for what, error in errors.items():
                worst[what] = max(worst.get(what, 0.0), error)
                if not error < TOLERANCE[dtype]:
                    wrong.add(f"{layer.name} {dtype}")
                    report.failure(f"{layer.name} {dtype} {name}: {what} off by {error:.3g}")
    torch.manual_seed(0)
    errors = _drafted_errors(layer, dtype, device)
    worst |= errors
    for what, error in errors.items():
        if not error < TOLERANCE[dtype]:
            wrong.add(f"{layer.name} {dtype}")
            report.failure(f"{layer.name} {dtype}: {what} off by {error:.3g}")
    report.row(checked=f"{layer.name:18}", dtype=str(dtype).removeprefix("torch."), **worst)


def _errors(layer: Layer, step: Step, dtype: torch.dtype, replays: bool, device: str) -> dict[str, float]:
    """Of results and states, relative to the largest number; inf where padding or another slot shows, or one is no number."""
    given, shape, state_dtype, more = layer.given(step.rows, device, dtype)
    pool = torch.randn(len(step.slots) + 2, *shape, device=device).to(state_dtype)
    metadata = step.slots, step.query_start, step.seq_lens
    if replays:
        layer.run(*given, pool.clone(), *metadata, *more)
        torch.cuda.synchronize()
        graph, mine = torch.cuda.CUDAGraph(), pool.clone()
        with torch.cuda.graph(graph):
            out = layer.run(*given, mine, *metadata, *more)
        step.become(Step.of(*REPLAYED, device=device))
    for place, one in enumerate(given):
        if isinstance(one, Tensor) and place not in WEIGHTS_AT.get(layer.kind, ()):
            one[step.live :] = torch.nan
    counts = step.query_start.diff()
    fresh = step.slots[(counts == 0) | (step.seq_lens == counts)].long()
    pool[fresh] = torch.nan
    if replays:
        mine.copy_(pool)
        graph.replay()
    else:
        mine = pool.clone()
        out = layer.run(*given, mine, *metadata, *more)
    exact = [one.float() if isinstance(one, Tensor) else one for one in given]
    expected = pool.float()
    wanted = layer.oracle(*exact, expected, *metadata, *more)
    touched = step.slots[counts > 0].long()
    others = torch.ones(len(pool), dtype=torch.bool, device=device)
    others[touched] = False
    if not torch.equal(mine[others].nan_to_num(7.0), pool[others].nan_to_num(7.0)):
        return {"out": float("inf"), "states": float("inf")}
    return {"out": _error(out[: step.live], wanted[: step.live]), "states": _error(mine[touched], expected[touched])}


def _drafted_errors(layer: Layer, dtype: torch.dtype, device: str) -> dict[str, float]:
    """As `_errors`, of a step with draft tokens; rows put aside have to be those of the oracle, but for roundings of gates."""
    step = Step.drafted(3 if device == "cpu" else 7, device)
    given, shape, state_dtype, more = layer.given(step.rows, device, dtype)
    pool = torch.randn(len(step.slots), *shape, device=device).to(state_dtype)
    slots = step.slots.unique().numel()
    mine, drafts = pool.clone(), layer.drafts(given, slots, state_dtype)
    expected, wanted_drafts = pool.float(), drafts.float()
    metadata = step.slots, step.query_start, step.seq_lens
    out = layer.run(*given, mine, *metadata, *more, drafts, step.state_lens)
    exact = [one.float() if isinstance(one, Tensor) else one for one in given]
    wanted = layer.oracle(*exact, expected, *metadata, *more, wanted_drafts, step.state_lens)
    aside = 0.0 if torch.allclose(drafts.float(), wanted_drafts, rtol=ASIDE, atol=0) else float("inf")
    return {"drafted": _error(out, wanted), "drafted_states": _error(mine[:slots], expected[:slots]), "aside": aside}


def _error(got: Tensor, expected: Tensor) -> float:
    error = ((got.float() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def _measure(report: Report, layer: Layer, wrong: set[str], device: str, decodes: tuple[int, ...], prompt: int) -> None:
    """Decodes, prompts as the engine takes them, a step of both, then prompts by other tiles and row by row."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    steps = [(f"decode {count}", [1] * count, [9] * count) for count in decodes]
    drafted = [
        (f"drafted {count} x {1 + DRAFTS}", [1 + DRAFTS] * count, None)
        for count in (DRAFTED if device == "cuda" else (2,))
    ]
    prompts = [
        (f"prompt {count} x {prompt}", [prompt] * count, [0] * count) for count in (1, 16 if device == "cuda" else 2)
    ]
    steps += [
        *prompts,
        (f"{decodes[-1]} + {3 * prompt // 16}", [1] * decodes[-1] + [3 * prompt // 16], [9] * (decodes[-1] + 1)),
    ]
    ways: list[tuple[str, list[tuple[str, list[int], list[int] | None]], dict[str, Any]]] = [
        ("rule", [*steps, *drafted], {})
    ]
    for tile in layer.tiles:
        ways.append(
            (
                " ".join(map(str, tile.values())),
                prompts,
                {f"{layer.chunks}.{name}": value for name, value in tile.items()},
            )
        )
    if layer.tiles and layer.chunks != BY_ROWS:
        ways.append(("rows", prompts, {CHUNKED: ()}))
    if f"{layer.name} {dtype}" in wrong:
        report.fact(not_timed=f"{layer.name}: it is wrong")
        return
    for way, of_way, constants in ways:
        for name, counts, before in of_way:
            if report.out_of_time((layer.name, way, name)):
                return
            chunked = {} if device == "cuda" else {CHUNKED: (torch.float32,)}
            with replaced(chunked | constants):
                try:
                    seconds, floor = _timed(layer, counts, before, device, dtype)
                except Exception as error:  # no room for it
                    report.row(
                        show=False, layer=layer.name, step=name, way=way, error=f"{type(error).__name__}: {error}"[:300]
                    )
                    continue
            report.row(
                layer=f"{layer.name:18}",
                step=f"{name:16}",
                way=way,
                us=1e6 * seconds,
                floor_us=1e6 * floor,
                of_floor=seconds / floor,
            )


def _timed(
    layer: Layer, counts: list[int], before: list[int] | None, device: str, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of a call, states of small steps coming from memory, and its floor. before None: counts are of `Step.drafted`."""
    step = Step.drafted(len(counts), device) if before is None else Step.of(counts, before, device)
    given, shape, state_dtype, more = layer.given(step.rows, device, dtype)
    if before is None:
        more = [*more, layer.drafts(given, len(counts), state_dtype), step.state_lens]
    copies = 16 if device == "cuda" and len(counts) < 64 and step.rows < 256 else 1
    pools = [torch.zeros(len(counts) + 1, *shape, dtype=state_dtype, device=device) for _ in range(copies)]
    metadata = step.slots, step.query_start, step.seq_lens
    calls: list[Callable[[], Tensor]] = [lambda pool=pool: layer.run(*given, pool, *metadata, *more) for pool in pools]
    floor = layer.floor(given, pools[0], calls[0](), counts)
    if device == "cuda":
        return graph_seconds(calls), floor
    start = time.perf_counter()
    calls[0]()
    return time.perf_counter() - start, floor
