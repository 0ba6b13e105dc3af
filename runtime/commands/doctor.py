"""`runtime doctor`: what a server lacks on this machine, and what the metrics of a running one tell."""

from __future__ import annotations

import http.client
import os
import textwrap
import urllib.error
import urllib.request

import click

from pagegraph.runtime.cli import CONTEXT
from pagegraph.runtime.config import API_KEY_VARIABLE, ConfigError, first_key, load_config

TIMEOUT_S = 10


@click.command("doctor", context_settings=CONTEXT)
@click.argument("url", required=False)
@click.option("--config", "path", metavar="CONFIG", help="Check the machine for this configuration.")
def doctor(url: str | None, path: str | None) -> None:
    """Check this machine or, with the URL of a server, such as http://127.0.0.1:8000, what its /metrics tell.
    The key of one that asks for it comes from PAGEGRAPH_API_KEY. Exits with 1 where something is to be done.
    """
    if url is None:
        _machine(path)
    else:
        _server(url.rstrip("/").removesuffix("/metrics").removesuffix("/v1"))


def _machine(path: str | None) -> None:
    from pagegraph.runtime.doctor.machine import checks

    try:
        config = None if path is None else load_config(path).config
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    bad = 0
    for name, check in checks(config).items():
        try:
            said, fine = check(), True
        except ValueError as error:
            said, fine = str(error), False
        bad += not fine
        click.echo(_lines(f"{'ok  ' if fine else 'BAD '} {name:<12}", said))
    if bad:
        raise click.exceptions.Exit(1)


def _server(url: str) -> None:
    from pagegraph.runtime.doctor.rules import RULES, diagnose

    try:
        asked = urllib.request.Request(f"{url}/metrics")
        if key := first_key(os.environ):
            asked.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            found = diagnose(answer.read().decode())
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    except urllib.error.HTTPError as error:
        hint = (
            f"give its key in {API_KEY_VARIABLE}"
            if error.code == 401
            else "name a server, such as http://127.0.0.1:8000"
        )
        raise click.ClickException(f"{url}/metrics: {error}; {hint}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise click.ClickException(f"{url}/metrics: {error}; name a server, such as http://127.0.0.1:8000") from error
    for one in found:
        click.echo(_lines(f"{one.rule}: ", one.advice))
    if found:
        raise click.exceptions.Exit(1)
    click.echo(f"none of {len(RULES)} rules holds: {', '.join(RULES)}")


def _lines(start: str, said: str) -> str:
    return textwrap.fill(start + said, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
