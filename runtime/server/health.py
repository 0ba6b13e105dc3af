"""Whether the server lives and takes requests: one answer for the probe port and for the API's.

Knows what the engine says of itself, for how long it may say nothing, and what probes are told. Knows no processes and
no sockets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from pagegraph.runtime.ipc.client import EngineClient, EngineDead
from pagegraph.runtime.server.pulse import UNREADY_S, Due


@dataclass(frozen=True)
class Health:
    """A word for people, and the answers to probes: restart it if not live, send it no requests if not ready."""

    status: str
    live: bool
    ready: bool
    retry_after_s: float = 1.0  # for whoever is refused now
    engines: tuple[str, ...] = ()  # the word for each, where there are several

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """(HTTP status, body, headers) for a probe of `path`, one of PATHS."""
        good = getattr(self, PATHS[path])
        later = {} if good else {"Retry-After": retry_after(self.retry_after_s)}
        return (
            200 if good else 503,
            msgspec.json.encode({"status": self.status} | ({"engines": self.engines} if self.engines else {})),
            {"Content-Type": "application/json"} | later,
        )


# Of probes, and what each asks.
PATHS = {"/health": "ready", "/health/live": "live", "/health/ready": "ready", "/ping": "ready"}
OVERDUE_S = 5.0  # beyond the limit, within which silence should have been noticed

READY = Health("ready", live=True, ready=True)
LOADING = Health("loading", live=True, ready=False)
DRAINING = Health("draining", live=True, ready=False)
RESTARTING = Health("restarting", live=True, ready=False)  # the engine ended, and a new one follows
NO_ENGINE = Health("no engine", live=False, ready=False)  # it ended, or has been silent for too long
SLOW = Health("no progress", live=True, ready=False)  # for long enough that new requests better go elsewhere
STALLED = Health("stalled", live=False, ready=False)  # it answers, has work, and finishes no step


def engine_health(engine: EngineClient, limit_s: float, due: Due | None = None) -> Health:
    """What the engine's newest facts and its pulse mean; without a pulse it is live for `limit_s` without progress.

    `engine` counts silence up to the limit itself, unless the thread that does so hangs.
    """
    try:
        info = engine.info(0.0)
    except EngineDead as dead:
        return NO_ENGINE if dead.retry_after_s is None else replace(RESTARTING, retry_after_s=dead.retry_after_s)
    now = time.monotonic()
    if engine.silent_s > limit_s + OVERDUE_S:
        return NO_ENGINE
    if info.stalled_s > limit_s or (due is not None and now > due.hung):
        return STALLED
    if max(info.stalled_s, engine.silent_s) > UNREADY_S or (due is not None and now > due.late):
        return SLOW
    return DRAINING if info.draining else READY


def of_all(each: Sequence[Health]) -> Health:
    """Of a server with these engines: it is as the best of them is."""
    if len(each) == 1:
        return each[0]
    best = max(each, key=lambda one: (one.ready, one.live, -one.retry_after_s))
    return replace(best, engines=tuple(one.status for one in each))


def retry_after(seconds: float) -> str:
    """The header's value: whole seconds, at least 1."""
    return str(max(math.ceil(seconds), 1))
