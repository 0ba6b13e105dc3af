"""`runtime bench report`: stored runs become one HTML page and PNGs; and the flag `--report` of the other benches.

Knows files and flags; knows no plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pagegraph.runtime.bench import page, report, runs
from pagegraph.runtime.bench.measures import Figures
from pagegraph.runtime.cli import CONTEXT


@click.command("report", context_settings=CONTEXT)
@click.argument(
    "files", nargs=-1, required=True, metavar="RUN.json ...", type=click.Path(dir_okay=False, path_type=Path)
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"), show_default=True
)
@click.option("--png", type=click.Path(file_okay=False, path_type=Path), help="Folder for each plot as a PNG.")
def make(files: Sequence[Path], output: Path, png: Path | None) -> None:
    """Make one HTML page of stored runs: latency over load, timelines, distributions, runs beside each other."""
    require_plots()
    try:
        found = runs.read(files)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    _write(found, output, png)


def check(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Of `--report`: what it needs is asked for before the bench runs."""
    if value is not None:
        require_plots()
    return value


report_option = click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=check,
    help="HTML page of the run; see runtime bench report.",
)


def write_report(path: Path | None, figures: Figures, name: str) -> None:
    """The page of one run, if it is asked for."""
    if path is not None:
        _write([runs.of_figures(figures, name)], path, None)


def require_plots() -> None:
    try:
        page.require_plots()
    except page.PlotsMissing as error:
        raise click.ClickException(str(error)) from error


def _write(found: Sequence[runs.Run], output: Path, png: Path | None) -> None:
    written: list[Any] = [output]
    try:
        report.write_text(output, page.html(found))
        if png is not None:
            written += page.write_pngs(found, png)
    except OSError as error:
        raise click.ClickException(f"{error.filename or output}: {error.strerror}") from error
    for path in written:
        click.echo(f"written: {path}", err=True)
