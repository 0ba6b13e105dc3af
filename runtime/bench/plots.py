"""Plots of stored runs, drawn by matplotlib, which the extra `pagegraph[bench]` brings: as SVG within a page, or as PNG.

Each plot is a function over a matplotlib figure of any width; axes name their units. Knows runs; knows no page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pagegraph.runtime.bench.report import TITLES
from pagegraph.runtime.bench.runs import Answer, Run, load_axis, metrics_of, statistics_of

INK, MUTED, GRID, PAPER = "#24292f", "#59636e", "#d1d9e0", "#ffffff"
SERIES = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#1b7c83", "#cf222e")
# what a page may show another colour for: name of its CSS variable
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    color: f"series-{number}" for number, color in enumerate(SERIES, 1)
}
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "text.color": INK, "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED, "axes.titlecolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "legend.frameon": False, "figure.facecolor": PAPER, "axes.facecolor": "none", "svg.fonttype": "path", "lines.linewidth": 1.6,
    "lines.markersize": 4,
}  # fmt: skip
NARROW, WIDE = 4.0, 9.6  # inches
SHOWN_REQUESTS, SHOWN_EVENTS, SHOWN_DURATIONS = 48, 4000, 8  # at most, in a timeline; the last: of its mean request
FEWEST_SHOWN = 8  # requests, even so
LETTERS_AN_INCH = 12  # of a legend
SHORT_NAME = 24  # characters of a run's name in a plot
XLINK = "http://www.w3.org/1999/xlink"  # the name of a namespace, which nothing is fetched from
BINS = 60  # of tokens over time
POINTS = 400  # of a distribution's line


@dataclass(frozen=True)
class Plot:
    """`draw` fills a figure of `width` x `height` inches; a wide one is drawn anew for a narrow screen."""

    name: str  # of its file
    title: str
    caption: str
    draw: Callable[[Figure], None]
    height: float = 2.9
    is_wide: bool = False
    narrow_height: float = 4.2

    def svg(self, narrow: bool = True) -> str:
        """An `<svg>` element whose colours are CSS variables and whose ids are its own."""
        text = io.StringIO()
        with _style(f"{self.name}-{narrow}"):
            self._figure(narrow).savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _embedded(text.getvalue(), f"{self.name}-{'narrow' if narrow else 'wide'}", self.title)

    def write_png(self, folder: Path) -> Path:
        path = folder / f"{self.name}.png"
        with _style(self.name):
            self._figure(not self.is_wide).savefig(path, format="png", dpi=160)
        return path

    def _figure(self, narrow: bool) -> Figure:
        size = (NARROW, self.narrow_height if self.is_wide else self.height) if narrow else (WIDE, self.height)
        figure = Figure(figsize=size, layout="constrained")
        self.draw(figure)
        return figure


def plots_of(runs: Sequence[Run]) -> Iterator[Plot]:
    """All that these runs hold enough for, the kinds apart."""
    yield from _serve_plots([run for run in runs if run.kind == "serve"])
    if throughputs := [run for run in runs if run.kind == "throughput"]:
        shown = {"prompts and answers": "tokens_per_second", "answers": "output_tokens_per_second"}
        yield _bars("throughput-offline", "Tokens a second, offline", "tokens/s", throughputs, shown)
    if batches := [run for run in runs if run.kind == "latency"]:
        values = [np.asarray(run.figures["latencies"]) for run in batches]
        yield Plot("latency-batches", "Time of a batch", "Its spread says how quiet the machine was.",
                   lambda figure: _distribution(figure.subplots(), batches, values, "seconds of a batch"))  # fmt: skip
    if starts := [run for run in runs if run.kind == "startup"]:
        shown = {"empty caches": "avg_cold_startup_time", "filled caches": "avg_warm_startup_time"}
        yield _bars("startup", "Start of the engine, without imports", "seconds", starts, shown)


def _serve_plots(runs: list[Run]) -> Iterator[Plot]:
    if not runs:
        return
    metrics = metrics_of(runs)
    if load_axis(runs) is not None:
        for metric in metrics:
            short, title = TITLES[metric]
            yield Plot(f"load-{metric}", f"{title} over load", f"Where {short} turns upwards the server is full.",
                       lambda figure, metric=metric: _over_load(figure.subplots(), runs, metric))  # fmt: skip
        yield Plot("load-throughput", "Answered over asked",
                   "The server keeps up as long as the line rises with the load.",
                   lambda figure: _throughput_over_load(figure.subplots(), runs))  # fmt: skip
    detailed = [run for run in runs if run.is_detailed and run.answers()]
    timed = [run for run in detailed if np.isfinite(run.answers()[0].start)]
    for number, run in enumerate(timed if len(timed) < 3 else (timed[0], timed[-1])):
        shown = _window(run.answers())
        part = f"{len(shown)} of {len(run.answers())} requests. " if len(shown) < len(run.answers()) else ""
        yield Plot(f"timeline-{number + 1}", f"Token timeline of {run.name}",
                   f"{part}A bar is a request: waiting in the client, until its first token, until its last; a tick is an event"
                   " with tokens. A column without ticks is a step that all streams waited for.",
                   lambda figure, shown=shown: _timeline(figure.subplots(), shown), height=4.2, is_wide=True)  # fmt: skip
        yield Plot(f"over-time-{number + 1}", f"Tokens and requests over time of {run.name}",
                   "A number of requests in flight that keeps growing says that the rate is more than the server can do.",
                   lambda figure, run=run: _over_time(figure, run.answers()), height=3.2, is_wide=True)  # fmt: skip
    for metric in metrics if detailed else ():
        short, title = TITLES[metric]
        values = [1e3 * run.seconds(metric) for run in detailed]
        if all(map(len, values)):
            yield Plot(f"distribution-{metric}", title, "",
                       lambda figure, values=values, short=short: _distribution(figure.subplots(), detailed, values, f"{short} (ms)"))  # fmt: skip
    if len(runs) > 1:
        yield _bars("compare-throughput", "Output tokens a second", "tokens/s", runs, {"": "output_throughput"})
        for metric in metrics:
            names = statistics_of(runs, metric)
            shown = {name: f"{name}_{metric}_ms" for name in dict.fromkeys((names[0], names[-1]))}
            yield _bars(f"compare-{metric}", TITLES[metric][1], f"{TITLES[metric][0]} (ms)", runs, shown)


def _over_load(axes: Axes, runs: Sequence[Run], metric: str) -> None:
    """A line a statistic; with several series a colour each, median and the highest percentile only."""
    axis = load_axis(runs)
    assert axis is not None
    series = _by_series(runs, axis[1])
    names = statistics_of(runs, metric)
    if len(series) > 1:
        names = list(dict.fromkeys((names[0], names[-1])))
    for at, (label, points) in enumerate(series.items()):
        for number, name in enumerate(names):
            x = [load for load, _ in points]
            y = [run.figures[f"{name}_{metric}_ms"] for _, run in points]
            color = SERIES[(at if len(series) > 1 else number) % len(SERIES)]
            style = DASHES[number % len(DASHES)] if len(series) > 1 else "-"
            text = f"{_short(label)} {name}" if len(series) > 1 else name
            axes.plot(
                x, [np.nan if value is None else value for value in y], style, marker="o", color=color, label=text
            )
    axes.set(xlabel=axis[0], ylabel=f"{TITLES[metric][0]} (ms)")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _throughput_over_load(axes: Axes, runs: Sequence[Run]) -> None:
    axis = load_axis(runs)
    assert axis is not None
    series = _by_series(runs, axis[1])
    for at, (label, points) in enumerate(series.items()):
        x, prefix = [load for load, _ in points], f"{_short(label)} " if len(series) > 1 else ""
        color = SERIES[at % len(SERIES)]
        axes.plot(
            x,
            [run.figures["request_throughput"] for _, run in points],
            marker="o",
            color=color,
            label=f"{prefix}answered",
        )
        good = np.array([run.figures.get("request_goodput") for _, run in points], float)  # None: not asked for
        if not np.isnan(good).all():
            axes.plot(x, good, "--", marker="o", color=color, label=f"{prefix}within objectives")
    if axis[0].startswith("request rate"):
        loads = sorted(axis[1])
        axes.plot(loads, loads, ":", color=MUTED, label="asked")
    axes.set(xlabel=axis[0], ylabel="requests/s")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _timeline(axes: Axes, answers: Sequence[Answer]) -> None:
    rows = np.arange(len(answers))
    begin = min(one.start - one.queued for one in answers)
    starts = np.array([one.start for one in answers]) - begin
    queued, firsts = (
        np.array([value(one) for one in answers]) for value in (lambda one: one.queued, lambda one: one.ttft)
    )
    ends = np.array([one.events[-1] for one in answers]) - begin
    height = 0.8
    if queued.max() > 0.002 * ends.max():
        axes.barh(rows, queued, height, starts - queued, color=GRID, label="in the client")
    axes.barh(rows, firsts, height, starts, color=SERIES[0], alpha=0.35, linewidth=0, label="until the first token")
    axes.barh(
        rows,
        ends - starts - firsts,
        height,
        starts + firsts,
        color=SERIES[2],
        alpha=0.35,
        linewidth=0,
        label="until the last",
    )
    times = np.concatenate([one.events[1:] - begin for one in answers])
    owners = np.repeat(rows, [len(one.gaps) for one in answers])
    ticks = np.stack([np.stack([times, owners - height / 2], 1), np.stack([times, owners + height / 2], 1)], 1).reshape(
        -1, 2
    )
    if len(ticks):
        codes = np.tile([Outline.MOVETO, Outline.LINETO], len(times))
        axes.add_patch(PathPatch(Outline(ticks, codes), edgecolor=SERIES[2], linewidth=0.5, facecolor="none"))
    axes.plot(starts + firsts, rows, linestyle="none", marker="|", markersize=max(3, min(9, 160 / len(rows))), markeredgewidth=1.6,
              color=SERIES[1], label="first token")  # fmt: skip
    axes.set(
        xlabel="time from the first arrival shown (s)", ylabel="request, by its start", ylim=(len(rows) - 0.4, -0.6)
    )
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _legend(axes)


def _over_time(figure: Figure, answers: Sequence[Answer]) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    times = np.concatenate([one.events for one in answers])
    weights = np.concatenate([np.full(len(one.events), one.tokens / len(one.events)) for one in answers])
    end = max(times.max(), 1e-3)
    edges = np.linspace(0, end, BINS + 1)
    rates = np.histogram(times, edges, weights=weights)[0] / np.diff(edges)
    upper.stairs(rates, edges, color=SERIES[2], fill=True, alpha=0.5)
    upper.set_ylabel("tokens/s")
    changes = sorted([(one.start, 1) for one in answers] + [(one.events[-1], -1) for one in answers])
    lower.step([at for at, _ in changes], np.cumsum([change for _, change in changes]), where="post", color=SERIES[0])
    lower.set(xlabel="time from the first arrival (s)", ylabel="in flight")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    lower.set_xlim(0, end)
    figure.align_ylabels([upper, lower])


def _distribution(axes: Axes, runs: Sequence[Run], values: Sequence[np.ndarray], label: str) -> None:
    """A histogram of one run with its median and 99th percentile; of several the share of values up to each."""
    if len(runs) == 1:
        (one,) = values
        high = np.percentile(one, 99.5) if len(one) > 200 else one.max()
        axes.hist(
            one,
            bins=min(40, max(8, len(one) // 4)),
            range=(min(0.0, one.min()), max(high, 1e-9)),
            color=SERIES[0],
            alpha=0.6,
        )
        axes.set_xlim(left=0)
        for at, style in ((50, "-"), (99, "--")):
            value = float(np.percentile(one, at))
            axes.axvline(value, color=SERIES[1], linestyle=style, label=f"p{at}: {value:,.4g}")
        axes.set(xlabel=label, ylabel="how many")
    else:
        share = np.linspace(0, 1, POINTS)
        for at, (run, one) in enumerate(zip(runs, values, strict=True)):
            axes.plot(np.quantile(one, share), share, color=SERIES[at % len(SERIES)], linestyle=DASHES[at // len(SERIES) % len(DASHES)],
                      label=_short(run.name))  # fmt: skip
        longest = max(float(np.quantile(one, 0.995)) for one in values)
        axes.set(xlabel=label, ylabel="share up to here", ylim=(0, 1.02))
        axes.set_xlim(0, 1.05 * longest)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)


def _bars(name: str, title: str, unit: str, runs: Sequence[Run], shown: dict[str, str]) -> Plot:
    """Bars of each run, one below the other: name of a bar -> key of its figure."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows, height = np.arange(len(runs)), 0.8 / len(shown)
        largest = max((run.figures.get(key) or 0.0 for run in runs for key in shown.values()), default=0.0)
        for at, (label, key) in enumerate(shown.items()):
            values = [run.figures.get(key) for run in runs]
            places = rows + (at - (len(shown) - 1) / 2) * height
            drawn = axes.barh(
                places, [value or 0.0 for value in values], 0.9 * height, color=SERIES[at], alpha=0.75, label=label
            )
            axes.bar_label(drawn, list(map(_amount, values)), padding=3, fontsize=8)
        axes.set_yticks(rows, [_short(run.name) for run in runs])
        axes.set(xlabel=unit, ylim=(len(runs) - 0.5, -0.5))
        axes.set_xlim(0, 1.22 * largest or 1.0)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        if any(shown):
            _legend(axes)

    return Plot(name, title, "", draw, height=max(1.6, 0.9 + 0.26 * len(runs) * max(1.4, len(shown))))


def _amount(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _window(answers: Sequence[Answer]) -> Sequence[Answer]:
    """Neighbouring requests out of the middle, few enough for their events to be told apart."""
    mean = max(1.0, float(np.mean([len(one.events) for one in answers])))
    count = min(len(answers), int(np.clip(SHOWN_EVENTS / mean, FEWEST_SHOWN, SHOWN_REQUESTS)))
    duration = float(np.mean([one.events[-1] - one.start for one in answers]))
    begin = (len(answers) - count) // 2
    while count > FEWEST_SHOWN and answers[begin + count - 1].start - answers[begin].start > SHOWN_DURATIONS * duration:
        count -= 1
    return answers[begin : begin + count]


def _by_series(runs: Sequence[Run], loads: Sequence[float]) -> dict[str, list[tuple[float, Run]]]:
    found: dict[str, list[tuple[float, Run]]] = {}
    for load, run in sorted(zip(loads, runs, strict=True), key=lambda pair: pair[0]):
        found.setdefault(run.series, []).append((load, run))
    return found


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    room = LETTERS_AN_INCH * axes.get_figure(root=True).get_figwidth() - 4  # type: ignore[union-attr]
    columns = max(1, min(len(labels), int(room / (max(map(len, labels)) + 6))))
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.6
    )


def _short(name: str) -> str:
    return name if len(name) <= SHORT_NAME else f"{name[: SHORT_NAME // 2 - 1]}…{name[-(SHORT_NAME // 2) :]}"


def _style(salt: str) -> Any:
    """The style of every plot; ids within an SVG follow its salt, so that the same run gives the same file."""
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": salt}
    return matplotlib.rc_context(style)


def _embedded(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    view = re.search(r'<svg [^>]*\bviewBox="([^"]+)"[^>]*>', svg)
    assert view is not None
    opening = f'<svg viewBox="{view[1]}" role="img" aria-label="{html.escape(title)}" xmlns:xlink="{XLINK}">'
    return opening + svg[view.end() :]
