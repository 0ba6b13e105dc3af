"""`runtime config`: every setting of a run and where its value came from. Loads no model."""

from __future__ import annotations

import click

from runtime.cli import config_command
from runtime.config import FIELDS, Resolved, load_config


@config_command("config")
@click.argument("config", required=False)
@click.option("--keys", is_flag=True, help="List the known keys with their help instead.")
def show_config(config: str | None, keys: bool, overrides: dict[str, str]) -> None:
    """Print the resolved settings of CONFIG, one a line: key, value, source."""
    if keys:
        click.echo(key_lines())
    elif config is None:
        raise click.UsageError("name a configuration: a YAML file or a model")
    else:
        click.echo(setting_lines(load_config(config, overrides)))


def key_lines() -> str:
    """Every key with its help text."""
    width = max(map(len, FIELDS))
    return "\n".join(f"{key:<{width}}  {option.metadata['help']}" for key, option in FIELDS.items())


def setting_lines(resolved: Resolved) -> str:
    """The settings as aligned lines under their groups; the API key is not shown."""
    shown = {key: _shown(key, getattr(resolved.config, key)) for key in FIELDS}
    key_width, value_width = max(map(len, shown)), min(48, max(map(len, shown.values())))
    lines: list[str] = []
    group = ""
    for key, option in FIELDS.items():
        if option.metadata["group"] != group:
            group = option.metadata["group"]
            lines += ["", f"# {group}"]
        lines.append(f"{key:<{key_width}}  {shown[key]:<{value_width}}  # {resolved.sources[key]}")
    return "\n".join(lines[1:])


def _shown(key: str, value: object) -> str:
    if value is None:
        return FIELDS[key].metadata["unset"][-1]
    if key == "api_key":
        return "***"
    return str(value).lower() if isinstance(value, bool) else str(value)
