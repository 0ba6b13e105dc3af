"""A replica's server as a process of its own: `runtime serve` on free ports of the loopback interface, which tells where they are.

Started by `web.cluster.server` with a configuration, keys of it, and a pipe to tell through. Knows no Ray.
"""

from __future__ import annotations

import pagegraph.compiler.host.openmp_spin  # isort: skip  # noqa: F401  before a command loads torch

import json
import os
import sys
from typing import Any

from pagegraph.runtime.commands.serve import run_server
from pagegraph.runtime.config import ConfigError
from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.server.listen import Unserved

# Whatever a file says: the front alone reaches a replica, and a machine may have several.
ADDRESSES = {"host": "127.0.0.1", "port": 0, "probe_host": "127.0.0.1", "probe_port": "auto"}


def main(settings: dict[str, Any], descriptor: int) -> int:
    """Serve until a signal -> the exit status. Tells one JSON object: `address`, `probe_address` and `cached_tokens`, or `error`."""

    def tell(**told: Any) -> None:
        with os.fdopen(descriptor, "w") as pipe:
            json.dump(told, pipe)

    def on_serving(info: EngineInfo, address: str, probe_address: str) -> None:
        tell(address=address, probe_address=probe_address, cached_tokens=(info.num_blocks - 1) * info.block_size)

    try:
        return run_server(settings["config"], {**settings["keys"], **ADDRESSES}, on_serving)
    except (ConfigError, Unserved) as error:
        try:
            tell(error=str(error))
        except OSError:  # it has told that it serves
            print(error, file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), int(sys.argv[2])))
