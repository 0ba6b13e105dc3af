"""The server behind a replica: started, waited for, ended. Knows processes; no Ray and no HTTP."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pagegraph.runtime.server.child import Child, module_command
from pagegraph.runtime.server.listen import Unserved
from pagegraph.web.cluster.server_process import ADDRESSES

LOOK_S = 0.1  # between looks at the process
ENDED = "the server ended before it served; what it wrote stands in the log"
OWN_KEYS = (*ADDRESSES, "api_key")  # of the configuration, that nobody may give for all replicas


@dataclass(frozen=True)
class Serving:
    """Where a server is reached, as host:port, and how many tokens the KV cache of one of its engines holds."""

    address: str
    probe_address: str
    cached_tokens: int


class Server:
    """`runtime serve` of a configuration, until `stop`."""

    def __init__(self, config: str, keys: Mapping[str, Any], on_end: Callable[[str], None]) -> None:
        """Start it; returns once it answers, which may take minutes.

        config: a YAML file or a model, as `runtime serve` has it. keys: of the configuration, which come after the file's.
        on_end: called, on a thread of its own, with how it ended, where that is before `stop`. Raises Unserved where it does
        not come to answer.
        """
        self._on_end = on_end
        self._stopping = threading.Event()
        self._ended = threading.Event()
        told, tell = os.pipe()
        settings = json.dumps({"config": config, "keys": dict(keys)})
        command = module_command("pagegraph.web.cluster.server_process", settings, str(tell))
        # The kernel ends a child with the thread that has started it, and who calls this may leave its thread.
        self._keeper = threading.Thread(target=self._keep, args=(command, tell), name="server", daemon=True)
        self._keeper.start()
        with os.fdopen(told) as pipe:
            text = pipe.read()
        found: dict[str, Any] = json.loads(text) if text else {"error": ENDED}
        if "error" in found:
            self.stop()
            raise Unserved(found["error"])
        self.serving = Serving(**found)

    def stop(self) -> None:
        """Let running requests end, as `drain_timeout_s` says, and end it; may be called again."""
        self._stopping.set()
        self._ended.wait()

    def _keep(self, command: list[str], tell: int) -> None:
        child = Child("server", command, (tell,))
        os.close(tell)
        while child.exit_code is None and not self._stopping.wait(LOOK_S):
            pass
        if self._stopping.is_set():
            child.send(signal.SIGTERM)
            while not child.ends_by(time.monotonic() + LOOK_S):
                pass
        child.kill()  # what is left of its session
        self._ended.set()
        if not self._stopping.is_set():
            self._on_end(child.how_it_ended())
