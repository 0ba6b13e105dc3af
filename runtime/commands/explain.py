"""`runtime explain`: what a configuration costs and where a step's time goes, before anything is loaded, and after."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pagegraph.runtime.cli import config_command
from pagegraph.runtime.config import load_config, require_local_files
from pagegraph.runtime.server.start_errors import as_one_sentence


@config_command("explain")
@click.argument("config")
@click.option("--gpu", metavar="NAME", help="A GPU that need not be here: h200, h100, a100, l4, rtx4090 and others.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens of each sequence of a step.  [default: 1024, or max_model_len if that is less]",
)
@click.option("--all-sizes", is_flag=True, help="Every capture size instead of a few.")
@click.option(
    "--quick",
    is_flag=True,
    help="Do not trace the graph: seconds instead of half a minute, no passes and no predicted times.",
)
@click.option("--measure", is_flag=True, help="Then build the model, run the steps, and show both.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output instead of the text.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="File of a picture.")
def explain(
    config: str,
    gpu: str | None,
    context: int | None,
    all_sizes: bool,
    quick: bool,
    measure: bool,
    as_json: bool,
    svg: Path | None,
    overrides: dict[str, str],
) -> None:
    """Say what CONFIG costs: memory, sequences that fit, the least and on a GPU the predicted time of steps. Loads no weights.

    Exits with 1 where it does not fit, after saying what would.
    """
    settings = load_config(config, overrides).config
    require_local_files(settings)
    with as_one_sentence(settings.log_level):
        # here and not above: importing torch takes seconds, a bad flag should not
        from pagegraph.runtime.explain.explanation import Asked, explain
        from pagegraph.runtime.explain.picture import svg_of
        from pagegraph.runtime.explain.text import text_of

        asked = Asked(gpu=gpu, context=context, every_size=all_sizes, quick=quick, measure=measure)
        found = explain(settings, asked, lambda line: click.echo(f"{line} ...", err=True))
        if svg is not None:
            svg.write_text(svg_of(found), encoding="utf-8")
    click.echo(json.dumps(found.as_json(), indent=1) if as_json else text_of(found))
    if svg is not None:
        click.echo(f"written: {svg}", err=True)
    if found.ledger.refusal:
        raise click.exceptions.Exit(1)
