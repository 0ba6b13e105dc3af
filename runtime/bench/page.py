"""One HTML file of stored runs: tables beside each other and plots, within it, so that it is read without a network.

Needs matplotlib, which the extra `pagegraph[bench]` brings; `require_plots` says so before a bench has run for minutes.
Knows the layout; knows neither how a figure is measured nor how a plot is drawn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from pagegraph.runtime.bench import report
from pagegraph.runtime.bench.runs import Run, metrics_of, statistics_of

TEMPLATE = Path(__file__).with_name("page.html")
HEADINGS = {
    "serve": "A server",
    "throughput": "The offline engine, all requests at once",
    "latency": "The offline engine, one batch",
    "startup": "Starts of the engine",
}
LINES = {
    "throughput": report.THROUGHPUT_LINES,
    "latency": report.LATENCY_LINES,
    "startup": report.STARTUP_LINES,
}


class PlotsMissing(Exception):
    """matplotlib is not installed; the message names what installs it."""

    def __init__(self) -> None:
        super().__init__("plots need matplotlib, which is not installed: pip install 'pagegraph[bench]'")


def require_plots() -> None:
    """Raises PlotsMissing where they could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotsMissing


def html(runs: Sequence[Run]) -> str:
    """The page of all runs. Raises PlotsMissing."""
    require_plots()
    from pagegraph.runtime.bench.plots import plots_of

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    undetailed = [run.name for run in runs if run.kind == "serve" and not run.is_detailed]
    return template.render(runs=runs, tables=list(_tables(runs)), plots=list(plots_of(runs)), undetailed=undetailed)


def write_pngs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Every plot as a file of its own. Raises PlotsMissing, and OSError that says why a file cannot be written."""
    require_plots()
    from pagegraph.runtime.bench.plots import plots_of

    folder.mkdir(parents=True, exist_ok=True)
    return [plot.write_png(folder) for plot in plots_of(runs)]


def _tables(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A table a kind: a column a run, behind the first the ratio to it."""
    for kind, heading in HEADINGS.items():
        if found := [run for run in runs if run.kind == kind]:
            rows = [(label, [run.figures.get(key) for run in found]) for label, key in _lines(kind, found).items()]
            yield dict(
                heading=heading,
                names=[run.name for run in found],
                rows=[(label, _cells(values)) for label, values in rows if any(value is not None for value in values)],
            )


def _lines(kind: str, runs: Sequence[Run]) -> dict[str, str]:
    if kind != "serve":
        return LINES[kind]
    lines = dict(report.SERVE_LINES)
    for metric in metrics_of(runs):
        for name in ("mean", *statistics_of(runs, metric)):
            lines[f"{name.capitalize()} {report.TITLES[metric][0]} (ms)"] = f"{name}_{metric}_ms"
    return lines


def _cells(values: Sequence[Any]) -> list[tuple[str, str]]:
    """(the value, its ratio to the first run's) of each run."""
    first = values[0]
    ratios = [
        f"{value / first:.2f} x" if at and _is_amount(value) and _is_amount(first) and first else ""
        for at, value in enumerate(values)
    ]
    return list(zip(map(_text, values), ratios, strict=True))


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if _is_amount(value) else str(value)
