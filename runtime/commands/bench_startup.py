"""`runtime bench startup`: seconds until the offline engine can generate, with empty caches and with filled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pagegraph.runtime.bench import report, startup
from pagegraph.runtime.cli import config_command
from pagegraph.runtime.commands.bench_engine import config_argument, disable_tqdm, named_config, output_json, write
from pagegraph.runtime.commands.bench_options import POSITIVE
from pagegraph.runtime.commands.bench_report import report_option, write_report


@config_command("startup")
@config_argument
@click.option("--num-iters-cold", type=POSITIVE, default=3, show_default=True, help="Starts with an empty cache.")
@click.option(
    "--num-iters-warmup",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Starts between, which do not count.",
)
@click.option("--num-iters-warm", type=POSITIVE, default=3, show_default=True, help="Starts with a filled cache.")
@output_json
@report_option
@disable_tqdm
def start(path: str | None, overrides: dict[str, str], **flags: Any) -> None:  # fmt: skip
    """Start the engine again and again, each time in a new process.

    The cache of compiled code and converted models is a temporary folder; the user's is neither read nor written.
    """
    named, _ = named_config(path, overrides)
    if "compile_cache_dir" in overrides:
        raise click.UsageError("--compile-cache-dir: the bench makes folders of its own; leave it out")
    cold, warmups, warm = (flags[f"num_iters_{what}"] for what in ("cold", "warmup", "warm"))
    with report.progress(cold + warmups + warm, "starts", not flags["disable_tqdm"]) as tick:
        try:
            starts = startup.measure(named, overrides, cold=cold, warmups=warmups, warm=warm, tick=tick)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    found = startup.figures(*starts)
    for state in ("cold", "warm"):
        click.echo(f"{state.upper()} STARTUP:")
        for name in ("startup", "compilation", "import", "first_token"):
            label = f"Avg {name.replace('_', ' ')} time"
            click.echo(f"{label + ':':<24} {found[f'avg_{state}_{name}_time']:.2f} seconds")
        for at, value in found[f"{state}_startup_percentiles"].items():
            click.echo(f"  {at}%: {value:.2f} seconds")
    write(flags["output_json"], found)
    write_report(flags["report_file"], found, Path(named).name)
