"""What the benches of the offline engine share: the configuration that is named, the engine while it is measured, the file.

Knows no work and no figures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pagegraph.runtime.bench import report
from pagegraph.runtime.bench.measures import Figures
from pagegraph.runtime.config import Config, load_config, require_local_files
from pagegraph.runtime.server.start_errors import as_one_sentence

if TYPE_CHECKING:
    from pagegraph.runtime.llm import LLM

config_argument = click.argument("path", metavar="CONFIG", required=False)
output_json = click.option(
    "--output-json", type=click.Path(dir_okay=False, path_type=Path), help="File of the figures."
)
temperature = click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
disable_tqdm = click.option("--disable-tqdm", is_flag=True, help="Show no progress.")


def named_config(path: str | None, overrides: dict[str, str]) -> tuple[str, Config]:
    """Of the file or model that is named, as an argument or by --model."""
    named = overrides.get("model") if path is None else path
    if named is None:
        raise click.UsageError("name a model or a configuration, such as configs/smollm2-cpu.yaml")
    config = load_config(named, overrides).config
    require_local_files(config)
    return named, config


@contextmanager
def engine(config: Config, progress: bool) -> Iterator[LLM]:
    """An engine, closed at the end; what the model or the work cannot have is said in one sentence."""
    from pagegraph.runtime.llm import LLM  # here and not above: importing torch takes seconds, a bad flag should not

    with as_one_sentence(config.log_level):
        llm = LLM(config, progress=progress and sys.stderr.isatty())
        try:
            yield llm
        finally:
            llm.close()


def write(path: Path | None, found: Figures) -> None:
    """The file of `--output-json`, if it is asked for."""
    if path is None:
        return
    try:
        report.write_json(path, found)
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error
    click.echo(f"written: {path}", err=True)
