"""The tuned configuration as a YAML file: what was given, what was changed with the figures that justify it.

A file that is written is read again, and has to give the configuration that it is of. API keys are not written.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pagegraph.runtime.bench.report import write_text
from pagegraph.runtime.config import FIELDS, Config, load_config
from pagegraph.runtime.tune.measurement import Measurement, Objective
from pagegraph.runtime.tune.search import Change

WIDTH = 118
SECRET = ("api_key", "api_key_file")  # the first holds what the second names
BYTES = ("kv_cache_memory", "response_store_size")
UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
PATHS = ("model", "tokenizer", "speculative_model")


def yaml_of(
    config: Config, sources: Mapping[str, str], changes: Mapping[str, Change], objective: Objective, head: str
) -> str:
    """Keys that were given, in the order of `runtime config`, and those that were changed, each below its reason."""
    lines = [f"# {line}" for line in textwrap.wrap(head, WIDTH)]
    for key in FIELDS:
        if key in SECRET or (sources[key] == "default" and key not in changes):
            continue
        if change := changes.get(key):
            lines += [f"# {line}" for line in textwrap.wrap(reason_of(key, change, objective), WIDTH)]
        lines.append(f"{key}: {shown(key, _placed(key, getattr(config, key)))}")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str, config: Config) -> None:
    """Write, and prove that it gives `config`, keys of the API aside. Raises ConfigError, OSError, or ValueError if not."""
    write_text(path, text)
    read = load_config(str(path), environment={}).config
    for key in FIELDS:
        ours, theirs = _placed(key, getattr(config, key)), _placed(key, getattr(read, key))
        if key not in SECRET and ours != theirs:
            raise ValueError(f"{path} was written, but gives {key}={theirs} and not {ours}")


def reason_of(key: str, change: Change, objective: Objective) -> str:
    """What the change brought, from the best run before it to the worse of two with it."""
    before, after = change.best, change.run
    figures = [_from_to(objective.name, objective.value(before), objective.value(after), objective.unit)]
    for name, title in (("ttft", "TTFT"), ("itl", "ITL")):
        was, now = (one.figures[f"p99_{name}_ms"] for one in (before, after))
        if was is not None and now is not None:
            figures.append(_from_to(f"{title} p99", was, now, "ms"))
    if _mib(before) != _mib(after):
        figures.append(_from_to("memory", _mib(before), _mib(after), "MiB"))
    return f"{key} was {shown(key, change.before)}: {', '.join(figures)}"


def shown(key: str, value: Any) -> str:
    """A value as YAML has it in one line."""
    if key in BYTES and value:
        unit, size = next(((unit, size) for unit, size in UNITS if value % size == 0), ("", 1))
        return f"{value // size}{unit}"
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _placed(key: str, value: Any) -> Any:
    """Paths hold wherever the file lies."""
    if key in PATHS and isinstance(value, str) and Path(value).expanduser().exists():
        return os.path.abspath(Path(value).expanduser())
    return value


def _from_to(what: str, before: float, after: float, unit: str) -> str:
    def short(number: float) -> str:
        return f"{number:.0f}" if number >= 100 else f"{number:.3g}"

    return f"{what} {short(before)} -> {short(after)} {unit}"


def _mib(one: Measurement) -> int:
    return round(one.memory / (1 << 20))


def has_secrets(config: Config) -> bool:
    """Whether the configuration has a key that the file lacks."""
    return any(getattr(config, key) for key in SECRET)
