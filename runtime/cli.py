"""The `runtime` command. Each subcommand lives in its own module, imported only when it is run.

Imports click and nothing of torch, so that `runtime --help` answers at once.
"""

from __future__ import annotations

import pagegraph.compiler.host.openmp_spin  # isort: skip  # noqa: F401  before a command loads torch

import difflib
import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from pagegraph.runtime.config import Resolved

# name: (module, its click command, one line of help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "serve": ("pagegraph.runtime.commands.serve", "serve", "Serve a model over HTTP with the OpenAI protocol."),
    "chat": ("pagegraph.runtime.commands.chat", "chat", "Chat in the terminal with a server, or with a model."),
    "generate": ("pagegraph.runtime.commands.generate", "generate", "Complete one prompt in the terminal."),
    "config": (
        "pagegraph.runtime.commands.show_config",
        "show_config",
        "Show every setting and where its value came from.",
    ),
    "explain": (
        "pagegraph.runtime.commands.explain",
        "explain",
        "Say what a configuration will cost, before it is loaded.",
    ),
    "verify": (
        "pagegraph.runtime.commands.verify",
        "verify",
        "Compare this engine with transformers, and with itself.",
    ),
    "doctor": (
        "pagegraph.runtime.commands.doctor",
        "doctor",
        "Check this machine, or a running server by its metrics.",
    ),
    "tune": (
        "pagegraph.runtime.commands.tune",
        "tune",
        "Find the settings that serve a workload best on this machine.",
    ),
    "bench": ("pagegraph.runtime.commands.bench", "bench", "Measure a server or this engine."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and help lines without importing them."""

    def __init__(
        self, *args: Any, commands_by_name: dict[str, tuple[str, str, str]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._known = COMMANDS if commands_by_name is None else commands_by_name

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._known)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._known:
            return None
        module, attribute, _ = self._known[cmd_name]
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, _, help_line) in self._known.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("--help="):
            _explain(ctx, [args[0].partition("=")[2]], None)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self._known:
            near = difflib.get_close_matches(args[0], self._known, n=1)
            ctx.fail(
                f"no command {args[0]}"
                + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self._known)}")
            )
        return super().resolve_command(ctx, args)


def _dashes(name: str) -> str:
    return name.replace("_", "-")


# `--max_num_seqs` is accepted as `--max-num-seqs`: the spelling of the YAML key works on the command line.
CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": _dashes, "max_content_width": 110}


class ConfigCommand(click.Command):
    """A command that takes every configuration key as `--key VALUE`; they arrive as the dict `overrides`.

    Values stay text here: `runtime.config` owns their types, so a flag and a YAML line fail alike.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from pagegraph.runtime.config import GROUPS

        super().__init__(*args, **kwargs)
        self.groups = {group: [_config_option(key) for key in keys] for group, keys in GROUPS.items()}
        for flags in self.groups.values():
            self.params += flags

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--help=KEY` explains a key, or a group of keys, with the figures of whatever else is given."""
        asked = [one.partition("=")[2] for one in args if one.startswith("--help=")]
        if not asked:
            return super().parse_args(ctx, args)
        others = [one for one in args if not one.startswith("--help=")]
        try:
            super().parse_args(ctx, others)
            resolved = self._resolved(ctx)
        except click.MissingParameter:
            resolved = None
        _explain(ctx, asked, resolved)

    @staticmethod
    def _resolved(ctx: click.Context) -> Resolved | None:
        from pagegraph.runtime.config import FIELDS, ConfigError, load_config

        path = ctx.params.get("config")
        if path is None:
            return None
        try:
            return load_config(path, {key: ctx.params[_parameter(key)] for key in FIELDS})
        except ConfigError as error:
            raise click.ClickException(str(error)) from error

    def invoke(self, ctx: click.Context) -> Any:
        from pagegraph.runtime.config import FIELDS, ConfigError

        ctx.params["overrides"] = {
            key: value for key in FIELDS if (value := ctx.params.pop(_parameter(key))) is not None
        }
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.ClickException(str(error)) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        ours = {id(option) for options in self.groups.values() for option in options}
        own = [
            record
            for p in self.get_params(ctx)
            if isinstance(p, click.Option) and id(p) not in ours and (record := p.get_help_record(ctx))
        ]
        with formatter.section("Options"):
            formatter.write_dl([*own, ("--help=KEY", "Explain a key below, or a group of them, with its arithmetic.")])
        for group, options in self.groups.items():
            with formatter.section(f"Configuration: {group}"):
                formatter.write_dl([record for option in options if (record := option.get_help_record(ctx))])


def _explain(ctx: click.Context, names: list[str], resolved: Resolved | None) -> NoReturn:
    from pagegraph.runtime.config_help import explain

    try:
        click.echo("\n\n".join(explain(name, resolved) for name in names))
    except ValueError as error:
        ctx.fail(str(error))
    ctx.exit()


def _parameter(key: str) -> str:
    """The Python name of a configuration flag, apart from a command's own parameters."""
    return f"config_{key}"


def _config_option(key: str) -> click.Option:
    from pagegraph.runtime.config import FIELDS, flag_of

    default = FIELDS[key].default
    shown = str(default).lower() if isinstance(default, bool) else default
    suffix = "" if default in (None, "") else f"  [default: {shown}]"
    return click.Option(
        [flag_of(key), _parameter(key)], metavar="VALUE", default=None, help=FIELDS[key].metadata["help"] + suffix
    )


def config_command(name: str, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorator: a subcommand that takes the configuration keys as flags."""
    return click.command(name, **{"cls": ConfigCommand, "context_settings": CONTEXT, **attributes})


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(package_name="pagegraph", message="%(package)s %(version)s")
def main() -> None:
    """pagegraph: an LLM inference engine and server.

    CONFIG is a YAML file (see configs/), a model folder, a .gguf file or a Hugging Face name.
    """


if __name__ == "__main__":
    sys.exit(main())
