"""An explanation as a text of at most 100 columns. Knows no compiler."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from pagegraph.compiler.explain.predict import FITTED
from pagegraph.runtime.explain.explanation import Explanation, by_kind

WIDTH = 100
BAR = 30  # columns of a full bar
UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def text_of(one: Explanation) -> str:
    """All sections."""
    sections = [_head(one), _memory(one), _sequences(one), _refusal(one), _steps(one), _passes(one), _kernels(one)]
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))


def size(number: float) -> str:
    """Bytes with three digits that count."""
    for unit, base in UNITS:
        if abs(number) >= base:
            return f"{number / base:.{2 if number / base < 100 else 1}f} {unit}"
    return f"{number:.0f} B"


def _amount(number: float) -> str:
    """Operations, in the unit that leaves up to four digits."""
    for unit, base in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= base:
            return f"{number / base:.4g} {unit}"
    return f"{number:.4g}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False)


def _head(one: Explanation) -> Iterator[str]:
    machine, several = one.machine, f"{one.gpus} x " if one.gpus > 1 and one.machine.device_type == "cuda" else ""
    cache = f", KV cache {one.cache_dtype}" if one.cache_dtype != one.dtype else ""
    yield f"{one.model} in {one.dtype}{cache}, max_model_len {one.ledger.max_model_len:,}"
    narrow = f", {machine.narrow_flops / 1e12:,.0f} in 8 bits" if machine.device_type == "cuda" else ""
    yield from _wrapped(
        f"on {several}{machine.name}: {size(machine.memory)}, {machine.bandwidth / 1e9:,.0f} GB/s,"
        f" {machine.flops / 1e12:.3g} TFLOP/s{narrow} ({machine.source})"
    )
    if one.gpus > 1:
        yield from _wrapped(
            f"Figures are of the first of {one.gpus} ranks, each with its share of the model (tensor_parallel_size); they sum up"
            f" {size(one.summed_bytes)} of hidden states a token."
            + (" Several GPUs have not been measured yet." if machine.device_type == "cuda" else "")
        )

    if one.engines > 1:
        where = "each on GPUs of its own" if machine.device_type == "cuda" else "all on this machine"
        yield from _wrapped(
            f"Figures are of one of {one.engines} engines (data_parallel_size), {where}, each with a copy of the model and a KV"
            f" cache of its own: {one.engines} x {size(one.all_bytes // one.engines)} = {size(one.all_bytes)}."
        )


def _memory(one: Explanation) -> Iterator[str]:
    held, measured = one.ledger, one.measured
    cuda = one.machine.device_type == "cuda"
    total = held.allowed or 1
    whose = " of each rank" * (one.gpus > 1) + " of each engine" * (one.engines > 1)
    yield f"MEMORY{whose}" + (f"{'predicted':>41}{'measured':>13}" if measured else "")

    def line(name: str, number: int, actual: int | None = None, note: str = "") -> str:
        bar = "#" * round(BAR * number / total)
        found = "" if actual is None else size(actual)
        shown = f"{found:>13}  {note}" if measured else f"  {bar:<{BAR}}  {note}"
        return f"  {name:<34}{size(number):>12}{shown}".rstrip()

    actual = {(w.kind, w.dtype): w.bytes for w in by_kind(measured.memory.weights)} if measured else {}
    for kind in by_kind(held.weights):
        part = kind.bytes
        if part >= 1 << 10 or kind.kind != "other":
            yield line(f"{kind.kind}, {kind.dtype}", part, actual.get((kind.kind, kind.dtype)) if measured else None)
    yield line("all weights", held.weight_bytes, measured.memory.weight_bytes if measured else None)
    if held.slots:
        yield line(
            f"{held.num_slots:,} slots of recurrent state",
            held.slots,
            measured.memory.slots if measured else None,
        )
    if held.state >= 1 << 20:
        yield line("tables and text of slots", held.state, measured.memory.state if measured else None)
    step = held.step
    yield line("largest step, estimated", step.peak, measured.memory.step if measured else None)
    if cuda:
        graphs = measured.memory.graphs if measured else None
        yield line(f"{held.num_graphs} CUDA graphs, estimated", held.graphs, graphs)
        yield line("CUDA itself", held.context)
    if held.block_bytes:
        blocks = f"{held.num_blocks:,} blocks of {held.block_size} tokens"
        yield line(blocks, held.blocks, measured.memory.blocks if measured else None)
    if measured:
        memory = measured.memory
        if cuda:
            yield line("all that stays once it is loaded", held.loaded, memory.resident)
        tensors = memory.weight_bytes + memory.slots + memory.state + memory.blocks
        gained = "of the device's memory are in use more than before" if cuda else "of resident memory"
        yield from _wrapped(
            f"The build took {size(measured.memory.resident)} {gained}: {size(tensors)} of weights, blocks and tables,"
            " the rest by steps, graphs, the compiler and its code.", "  "
        )  # fmt: skip
    if cuda:
        share = held.allowed / one.machine.memory
        yield f"  gpu_memory_utilization {share:.3g} allows {size(held.allowed)} of {size(one.machine.memory)}"
    blocks = f"Blocks as {held.source} has it. " * bool(held.block_bytes)
    yield from _wrapped(
        f"{blocks}The largest step has {step.tokens:,} tokens, {step.seqs:,} sequences,"
        " and all that requests can ask of sampling.", "  "
    )  # fmt: skip
    for layers in held.kv_layers:
        seen = f" in chunks of {layers.chunk:,}" * bool(layers.chunk) or f" in a window of {layers.window:,}" * bool(
            layers.window
        )
        kept = "; all of a sequence is kept all the same" * bool(seen)
        yield f"  {layers.layers} layers attend{seen or ' to all tokens'}: {layers.bytes_a_token:,} bytes a token{kept}"
    if held.block_bytes:
        per_token = held.block_bytes / held.block_size
        yield f"  KV cache: {per_token:,.0f} bytes a token, {size(per_token * held.max_model_len)} a sequence of {held.max_model_len:,}"
    if held.slots:
        kept = held.num_slots - one.max_num_seqs - 1
        yield f"  {held.state_layers} layers keep a state: {size(held.slots // held.num_slots)} a sequence of any length"
        yield f"  {kept:,} of the slots hold kept states of prefixes, as state_cache_memory has it"


def _sequences(one: Explanation) -> Iterator[str]:
    held = one.ledger
    if held.num_blocks < 2 or not held.block_bytes:
        return
    yield f"SEQUENCES that the blocks hold at a time (max_num_seqs lets {one.max_num_seqs:,} run)"
    for tokens, count in one.sequences().items():
        limit = "" if count >= one.max_num_seqs else "; of more, the last wait or are preempted"
        yield f"  {count:>8,} of {tokens:,} tokens{limit}"
    each = (held.num_blocks - 1) // one.max_num_seqs * held.block_size
    if each < held.max_model_len:
        yield f"  {one.max_num_seqs:>8,} of {each:,} tokens: all that max_num_seqs lets run, if equally long"


def _refusal(one: Explanation) -> Iterator[str]:
    if not one.ledger.refusal:
        return
    yield "DOES NOT FIT"
    held = one.ledger
    if held.available < 0:
        yield from _wrapped(
            f"{size(-held.available)} are missing before the first block: {size(held.weight_bytes)} of weights and"
            f" {size(held.step.peak + held.graphs + held.context + held.slots + held.state)} of steps, {'slots, ' * bool(held.slots)}graphs"
            " and CUDA, of"
            f" {size(held.allowed)} allowed.", "  "
        )  # fmt: skip
    else:
        yield from _wrapped(held.refusal, "  ")
    if one.advice:
        yield "  It would fit with one of:"
        yield from (f"    {advice}" for advice in one.advice)
    else:
        yield "  No single setting that is tried makes it fit: take a larger GPU (--gpu), or a smaller model."


def _steps(one: Explanation) -> Iterator[str]:
    counted = "products, attention and states" if one.ledger.slots else "products and attention"
    predicted = any(step.predicted_s is not None for step in one.steps)
    if predicted:
        yield f"STEPS in milliseconds, each sequence {one.context:,} tokens long; floor: {counted} alone"
    else:
        yield f"STEPS take at least, each sequence {one.context:,} tokens long ({counted} alone)"
    columns = ["tokens", "sequences", "FLOPs", "weights", "KV", "bound by"]
    columns += ["floor", "predicted"] if predicted else ["ms"]
    columns += ["measured"] * bool(one.measured)
    columns.append(("off" if predicted else "share") if one.measured else "tokens/s")
    rows = [columns]
    for step in one.steps:
        expected, found = step.predicted_s or step.floor_s, one.measured_ms(step)
        row = [
            f"{step.tokens:,}", f"{step.seqs:,}" if step.decode else "prompts", _amount(step.flops),
            size(step.weight_bytes), size(step.cache_bytes), step.bound, _ms(step.floor_s),
        ]  # fmt: skip
        row += [_ms(expected)] * predicted
        if one.measured:
            share = 0.0 if found is None else 1e5 * expected / found
            told = f"{share - 100:+.0f} %" if predicted else f"{share:.0f} %"
            row += ["", ""] if found is None else [f"{found:.4g}", told]
        else:
            row.append(f"{step.tokens / expected:,.0f}")
        rows.append(row)
    yield from _table(rows)
    if predicted:
        where = "".join(f", an estimate for {reasons}" for reasons in [" and ".join(one.unfitted)] if reasons)
        yield from _wrapped(f"Predicted: the kernels of the traced graph, by times fitted on an {FITTED}{where}.", "  ")
    if any(step.link_s for step in one.steps):
        yield f"  with what the GPUs exchange over their link at {one.machine.link / 1e9:.0f} GB/s each way"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        yield ("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths))).rstrip()


def _passes(one: Explanation) -> Iterator[str]:
    if one.passes is None:
        return
    token = "" if one.machine.device_type == "cuda" else " of a single token; larger steps are left to the compiler"
    yield f"PASSES over the graph{token}"
    for found in one.passes:
        yield f"  {found.name:<18}{found.hits:>5}  {found.what}"
        for reason, count in found.missed.items():
            yield from _wrapped(f"left {count}: {reason}", " " * 25)


def _kernels(one: Explanation) -> Iterator[str]:
    looked_at = [step for step in one.measured.steps if step.kernels] if one.measured else []
    if not looked_at:
        return
    yield (
        "KERNELS that take the most of a step"
        if one.machine.device_type == "cuda"
        else ("OPS that take the most of a step")
    )
    for step in looked_at:
        yield f"  tokens {step.tokens:,}, measured {step.ms:.4g} ms"
        for kernel in step.kernels[:5]:
            name = "the compiled graph, its own loops" if "CompiledFxGraph" in kernel.name else kernel.name[:70]
            yield f"  {kernel.ms:>9.3f} ms {kernel.calls:>5} x  {name}"
