"""Whether the server lives and takes requests: one answer for the probe port and for the API's.

Knows what the engine says of itself, for how long it may say nothing, and what probes are told. Knows no processes and
no sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pagegraph.runtime.ipc.client import EngineClient, EngineDead


@dataclass(frozen=True)
class Health:
    """A word for people, and the answers to probes: restart it if not live, send it no requests if not ready."""

    status: str
    live: bool
    ready: bool

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """(HTTP status, body, headers) for a probe of `path`, one of PATHS."""
        good = getattr(self, PATHS[path])
        headers = {"Content-Type": "application/json"} | ({} if good else {"Retry-After": str(RETRY_AFTER_S)})
        return 200 if good else 503, msgspec.json.encode({"status": self.status}), headers


# Of probes, and what each asks.
PATHS = {"/health": "ready", "/health/live": "live", "/health/ready": "ready", "/ping": "ready"}
RETRY_AFTER_S = 1  # for whoever was refused now
UNREADY_S = 30.0
OVERDUE_S = 5.0  # beyond the limit, within which silence should have been noticed

READY = Health("ready", live=True, ready=True)
LOADING = Health("loading", live=True, ready=False)
DRAINING = Health("draining", live=True, ready=False)
NO_ENGINE = Health("no engine", live=False, ready=False)  # it ended, or has been silent for too long
SLOW = Health("no progress", live=True, ready=False)  # for long enough that new requests better go elsewhere
STALLED = Health("stalled", live=False, ready=False)  # it answers, has work, and finishes no step


def engine_health(engine: EngineClient, limit_s: float, wait_s: float = 0.0) -> Health:
    """What the engine's newest facts mean: it is live for `limit_s` without progress, and ready for UNREADY_S.

    `engine` counts silence up to the limit itself, unless the thread that does so hangs; `wait_s`: for the first facts of
    a new connection.
    """
    try:
        info = engine.info(wait_s)
    except EngineDead:
        return NO_ENGINE
    if engine.silent_s > limit_s + OVERDUE_S:
        return NO_ENGINE
    if info.stalled_s > limit_s:
        return STALLED
    if max(info.stalled_s, engine.silent_s) > UNREADY_S:
        return SLOW
    return DRAINING if info.draining else READY
