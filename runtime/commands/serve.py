"""`runtime serve`: check the configuration, then hand over to the supervisor. Imports no torch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from pagegraph.runtime.cli import config_command
from pagegraph.runtime.commands.show_config import sampling_defaults
from pagegraph.runtime.config import API_KEY_VARIABLE, flag_of, load_config, require_local_files

if TYPE_CHECKING:
    from pagegraph.runtime.ipc.protocol import EngineInfo

log = logging.getLogger("pagegraph.serve")


@config_command("serve")
@click.argument("config")
def serve(config: str, overrides: dict[str, str]) -> None:
    """Serve CONFIG until SIGTERM or Ctrl-C; a second signal stops at once."""
    from pagegraph.runtime.server.listen import Unserved

    try:
        sys.exit(run_server(config, overrides))
    except Unserved as error:
        raise click.ClickException(str(error)) from error


def run_server(
    config: str,
    overrides: Mapping[str, Any],
    on_serving: Callable[[EngineInfo, str, str], None] = lambda info, address, probe_address: None,
) -> int:
    """Serve until a signal, or be a node other than the first until that ends -> the exit status; main thread only. `on_serving`: as `Supervisor` has it.

    Raises ConfigError, and Unserved.
    """
    resolved = load_config(config, overrides)
    settings = resolved.config
    require_local_files(settings)
    sampling_defaults(settings)  # what is wrong with them is said before the model is loaded
    from pagegraph.runtime.server import logs
    from pagegraph.runtime.server.supervisor import Supervisor

    logs.configure(settings.log_level, settings.log_format, "supervisor")
    if resolved.sources["api_key"] == flag_of("api_key"):
        log.warning(
            "other users see --api-key in the list of processes; api_key_file or %s keeps it to itself",
            API_KEY_VARIABLE,
        )
    if settings.node_rank:
        from pagegraph.runtime.engine.node_process import follow_node_0

        return follow_node_0(settings)
    return Supervisor(settings, on_serving=on_serving).run()
