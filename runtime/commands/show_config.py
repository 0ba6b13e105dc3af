"""`runtime config`: every setting of a run, and of requests that do not say, and where its value came from.

Loads no model and fetches nothing: of a model it reads generation_config.json, where that is on this machine.
"""

from __future__ import annotations

from pathlib import Path

import click

from pagegraph.compiler.model.files import json_object
from pagegraph.runtime.cli import config_command
from pagegraph.runtime.config import FIELDS, GROUPS, Config, ConfigError, Resolved, load_config, shown
from pagegraph.runtime.config_groups import is_local_path
from pagegraph.runtime.sampling_params import FROM_GENERATION_CONFIG, SamplingParams, model_defaults


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
        resolved = load_config(config, overrides)
        click.echo(setting_lines(resolved))
        click.echo(sampling_lines(resolved.config))


def key_lines() -> str:
    """Every key with its help text."""
    width = max(map(len, FIELDS))
    return "\n".join(f"{key:<{width}}  {option.metadata['help']}" for key, option in FIELDS.items())


def setting_lines(resolved: Resolved) -> str:
    """The settings as aligned lines under their groups; the API key is not shown."""
    values = {key: shown(key, getattr(resolved.config, key)) for key in FIELDS}
    key_width, value_width = max(map(len, values)), min(48, max(map(len, values.values())))
    lines: list[str] = []
    for group, keys in GROUPS.items():
        lines += ["", f"# {group}"]
        lines += [f"{key:<{key_width}}  {values[key]:<{value_width}}  # {resolved.sources[key]}" for key in keys]
    return "\n".join(lines[1:])


def sampling_lines(config: Config) -> str:
    """How requests are sampled that do not say: field, value and source, one a line, under a heading."""
    folder, unknown = _folder(config)
    own = sampling_defaults(config)
    lines = ["", f"# sampling where a request does not say{unknown}"]
    for name in FROM_GENERATION_CONFIG.values():
        value = f"{own.get(name, getattr(SamplingParams(), name)):.10g}"
        if name == "max_tokens" and name not in own:
            value = "16 of a prompt, all that fit of a chat"
        source = "default" if folder is None or name not in own else folder / "generation_config.json"
        lines.append(f"{name:<18}  {value:<6}  # {source}")
    return "\n".join(lines)


def sampling_defaults(config: Config) -> dict[str, int | float]:
    """The model's defaults of requests, where its file is on this machine; raises ConfigError for a bad value."""
    folder, _ = _folder(config)
    if folder is None:
        return {}
    try:
        return model_defaults(json_object(folder / "generation_config.json"))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _folder(config: Config) -> tuple[Path | None, str]:
    """The folder whose generation_config.json counts, and what to say where only loading the model tells."""
    if config.generation_config == "none":
        return None, ""
    path = Path(config.model).expanduser()
    if config.gguf_file is None and (path / "config.json").is_file():
        return path, ""
    if not config.is_gguf and not is_local_path(config.model):
        from huggingface_hub import try_to_load_from_cache  # here: it takes longer than all the rest

        found = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
        if isinstance(found, str):
            return Path(found).parent, ""
    return None, ", as far as is known before the model is loaded; then a line of the log says it"
