"""`runtime verify`: whether the engine gives what transformers gives on the same model, and whether it agrees with itself.

Exits with 0 where all is within the bands, 1 where something differs, 2 where it could not be asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pagegraph.runtime.cli import ConfigCommand, config_command
from pagegraph.runtime.config import load_config, require_local_files, require_one_process
from pagegraph.runtime.server.start_errors import as_one_sentence
from pagegraph.runtime.verify.prompts import read_prompts

DIFFERS = 1


class WrongUse(click.ClickException):
    """An error for a user: 1 is for what differs."""

    exit_code = 2


class VerifyCommand(ConfigCommand):
    """Every such error is a WrongUse."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            raise WrongUse(error.message) from error


@config_command("verify", cls=VerifyCommand)
@click.argument("config")
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Texts to compare on: one a line, or a .jsonl file of objects with a prompt.  [default: a dozen of our own]",
)
@click.option("--quick", is_flag=True, help="A few prompts, and fewer tokens of each.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="File of all figures.")
def verify(config: str, prompts: Path | None, quick: bool, json_file: Path | None, overrides: dict[str, str]) -> None:
    """Compare the engine with stock transformers on the model of CONFIG, pass by pass and layer by layer, and with itself.

    Exits with 0 where all is within the bands, with 1 where something differs, with 2 for wrong use.
    """
    settings = load_config(config, overrides).config
    require_local_files(settings)
    require_one_process(settings, "runtime verify")
    with as_one_sentence(settings.log_level):
        texts = None if prompts is None else read_prompts(prompts)
        # here and not above: importing torch takes seconds, a bad flag should not
        from pagegraph.runtime.verify.text import text_of
        from pagegraph.runtime.verify.verification import Asked, verify

        found = verify(settings, Asked(texts, quick), lambda line: click.echo(f"{line} ...", err=True))
        if json_file is not None:
            json_file.write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
    click.echo(text_of(found))
    if found.differs:
        raise click.exceptions.Exit(DIFFERS)
