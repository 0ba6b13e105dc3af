"""An explanation as a picture: memory as one stacked bar, the time of steps over their sizes. Plain SVG, no packages.

Colours are told apart without their hue too: each part of the bar is named beside it, and series have their own marks.
Knows no compiler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from pagegraph.runtime.explain.explanation import Explanation
from pagegraph.runtime.explain.text import size

WIDTH, HEIGHT = 960, 640
LEFT, RIGHT = 72, 912  # of the plots
BAR_TOP, BAR_HEIGHT = 96, 44
PLOT_TOP, PLOT_BOTTOM = 296, 568
INK, FAINT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
PARTS = {
    "embedding": "#334e68", "attention": "#486581", "recurrence": "#7a5195", "MLP": "#627d98", "experts": "#829ab1", "norms": "#9fb3c8",
    "head": "#bcccdc", "other": "#d9e2ec", "step": "#e8a33d", "graphs": "#f0c47a", "CUDA": "#b44d12",
    "slots": "#bc8fd0", "blocks": "#2f8f6b", "free": "#f5f7fa",
}  # fmt: skip
DECODE, PROMPT, MEASURED = "#2f6fb0", "#c2410c", "#1f2933"


def svg_of(one: Explanation) -> str:
    """The whole file."""
    several = f"{one.gpus} × " if one.gpus > 1 and one.machine.device_type == "cuda" else ""
    cache = f", KV cache {one.cache_dtype}" if one.cache_dtype != one.dtype else ""
    title = f"{one.model} in {one.dtype}{cache} on {several}{one.machine.name}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 38, title, 18, weight=600),
        _text(LEFT, 60, _summary(one), 13, FAINT),
        *_bar(one),
        *_plot(one),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _summary(one: Explanation) -> str:
    held = one.ledger
    if held.refusal:
        missing = f": {size(-held.available)} are missing" if held.available < 0 else ""
        return f"does not fit{missing}"
    fits = ", ".join(f"{count:,} of {tokens:,}" for tokens, count in one.sequences().items())
    return f"sequences that fit, by tokens: {fits}; max_num_seqs {one.max_num_seqs:,}"


def _bar(one: Explanation) -> Iterator[str]:
    """Memory of one device, to scale; names of thin parts stand in the legend alone."""
    parts = _memory_parts(one)
    total = sum(number for _, number in parts)
    each = " of each rank" * (one.gpus > 1)
    yield _text(LEFT, BAR_TOP - 10, f"memory{each}: {size(total)}", 13, INK, weight=600)
    at = float(LEFT)
    for name, number in parts:
        width = (RIGHT - LEFT) * number / total
        if width > 0.2:
            edge = ' stroke="#9aa5b1" stroke-dasharray="4 3"' if name == "free" else ' stroke="white" stroke-width="1"'
            yield (
                f'<rect x="{at:.1f}" y="{BAR_TOP}" width="{width:.1f}" height="{BAR_HEIGHT}"'
                f' fill="{PARTS[name]}"{edge}><title>{_label(one, name)}: {size(number)}</title></rect>'
            )
        at += width
    if one.machine.device_type == "cuda" and not one.ledger.refusal:
        limit = LEFT + (RIGHT - LEFT) * one.ledger.allowed / total
        yield f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{BAR_TOP - 4}" y2="{BAR_TOP + BAR_HEIGHT + 4}" stroke="{INK}"/>'
        share = one.ledger.allowed / one.machine.memory
        yield _text(limit, BAR_TOP - 10, f"gpu_memory_utilization {share:.3g}", 11, FAINT, "end")
    columns, width = 4, (RIGHT - LEFT) / 4
    for place, (name, number) in enumerate(parts):
        x, y = LEFT + place % columns * width, BAR_TOP + BAR_HEIGHT + 28 + place // columns * 22
        yield f'<rect x="{x:.1f}" y="{y - 10}" width="11" height="11" rx="2" fill="{PARTS[name]}" stroke="#9aa5b1"/>'
        yield _text(x + 18, y, f"{_label(one, name)}  {size(number)}", 12)


def _memory_parts(one: Explanation) -> list[tuple[str, int]]:
    """Names of PARTS with bytes, in the order of the bar."""
    held = one.ledger
    weights: dict[str, int] = {}
    for kind in held.weights:
        weights[kind.kind] = weights.get(kind.kind, 0) + kind.bytes
    parts = [(name, number) for name, number in weights.items() if number >= 1 << 12]
    parts += [("step", held.step.peak), ("graphs", held.graphs), ("CUDA", held.context), ("slots", held.slots)]
    parts.append(("blocks", held.blocks))
    if one.machine.device_type == "cuda":
        parts.append(("free", max(one.machine.memory - sum(number for _, number in parts), 0)))
    return [part for part in parts if part[1]]


def _label(one: Explanation, name: str) -> str:
    return {
        "step": "largest step", "graphs": "CUDA graphs", "CUDA": "CUDA itself",
        "slots": "recurrent states", "blocks": f"{one.ledger.num_blocks:,} KV blocks", "free": "left free",
    }.get(name, name)  # fmt: skip


def _plot(one: Explanation) -> Iterator[str]:
    """Milliseconds over tokens of a step, both in powers of ten."""
    decode = [(step.tokens, 1e3 * step.floor_s) for step in one.steps if step.decode]
    prompt = [(step.tokens, 1e3 * step.floor_s) for step in one.steps if not step.decode]
    found = [(step.tokens, ms) for step in one.steps if (ms := one.measured_ms(step)) is not None]
    if not decode and not prompt:
        return
    expected = {
        kind: [(step.tokens, 1e3 * step.predicted_s) for step in one.steps if step.decode == kind and step.predicted_s]
        for kind in (True, False)
    }
    every = [*decode, *prompt, *expected[True], *expected[False], *found]
    x_of = _Scale([tokens for tokens, _ in every], LEFT, RIGHT)
    y_of = _Scale([ms for _, ms in every], PLOT_BOTTOM, PLOT_TOP)
    predicted = any(expected.values())
    title = "a step takes at least (as predicted: dashed)" if predicted else "a step takes at least"
    title += f": milliseconds by tokens in it, sequences of {one.context:,} tokens"
    yield _text(LEFT, PLOT_TOP - 28, title, 13, INK, weight=600)
    for tick in y_of.ticks():
        y = y_of(tick)
        yield f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
        yield _text(LEFT - 8, y + 4, f"{tick:g}", 11, FAINT, "end")
    for tokens in _spaced([*(tokens for tokens, _ in decode), *(tokens for tokens, _ in prompt)], x_of):
        x = x_of(tokens)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{PLOT_BOTTOM}" y2="{PLOT_BOTTOM + 5}" stroke="{FAINT}"/>'
        yield _text(x, PLOT_BOTTOM + 20, f"{tokens:,}", 11, FAINT, "middle")
    yield _text((LEFT + RIGHT) / 2, PLOT_BOTTOM + 40, "tokens in the step", 12, FAINT, "middle")
    yield f'<line x1="{LEFT}" x2="{RIGHT}" y1="{PLOT_BOTTOM}" y2="{PLOT_BOTTOM}" stroke="{FAINT}"/>'
    for points, colour, square in ((decode, DECODE, False), (prompt, PROMPT, True)):
        line = " ".join(f"{x_of(tokens):.1f},{y_of(ms):.1f}" for tokens, ms in points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield from (_mark(x_of(tokens), y_of(ms), colour, square) for tokens, ms in points)
        line = " ".join(f"{x_of(tokens):.1f},{y_of(ms):.1f}" for tokens, ms in expected[not square])
        if line:
            yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="6 4"/>'
    for tokens, ms in found:
        x, y = x_of(tokens), y_of(ms)
        yield f'<path d="M{x - 4:.1f} {y - 4:.1f} l8 8 m0 -8 l-8 8" stroke="{MEASURED}" stroke-width="2"/>'
    yield from _legend(bool(decode), bool(prompt), bool(found))


def _legend(decode: bool, prompt: bool, measured: bool) -> Iterator[str]:
    x, y = LEFT + 8, PLOT_TOP - 8
    for there, name, colour, square in (
        (decode, "decodes, a token of each sequence", DECODE, False),
        (prompt, "prompts", PROMPT, True),
    ):
        if there:
            yield _mark(x, y - 4, colour, square)
            yield _text(x + 12, y, name, 12)
            x += 30 + 6.6 * len(name)
    if measured:
        yield f'<path d="M{x - 4:.1f} {y - 8} l8 8 m0 -8 l-8 8" stroke="{MEASURED}" stroke-width="2"/>'
        yield _text(x + 12, y, "measured", 12)


def _mark(x: float, y: float, colour: str, square: bool) -> str:
    if square:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'


def _text(
    x: float, y: float, words: str, points: int, colour: str = INK, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{points}" fill="{colour}" text-anchor="{anchor}"'
        f' font-weight="{weight}">{escape(words)}</text>'
    )


def _spaced(tokens: Sequence[int], x_of: _Scale) -> list[int]:
    """Sizes whose labels do not touch."""
    kept: list[int] = []
    for one in sorted(set(tokens)):
        if not kept or x_of(one) - x_of(kept[-1]) > 40:
            kept.append(one)
    return kept


class _Scale:
    """Values to places, by their logarithms."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self._low, self._high = math.log10(min(values)), math.log10(max(values))
        room = max(0.06 * (self._high - self._low), 0.05)
        self._low, self._high = self._low - room, self._high + room
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each power of ten; of a long scale the powers alone."""
        steps = (1, 2, 5) if self._high - self._low < 3 else (1,)
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        found = [step * 10.0**power for power in powers for step in steps]
        return [one for one in found if self._low <= math.log10(one) <= self._high]
