"""One engine of a server as the supervisor keeps it: started, watched, and started anew where it ends or hangs.

Each has a folder of its own for what it is told and tells, and a thread that watches it, so that one which is being ended or
started holds up none of the others. Imports no torch. Knows no HTTP and no web processes: those read `comeback`.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagegraph.runtime.config import Config
from pagegraph.runtime.ipc.client import EngineClient, EngineDead
from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.server import comeback, pulse
from pagegraph.runtime.server.child import Child
from pagegraph.runtime.server.engine_settings import (
    FACTS_FILE,
    REQUIRED_COMPILATION_FAILED,
    STACKS_FILE,
    EngineSettings,
)
from pagegraph.runtime.server.health import LOADING, NO_ENGINE, RESTARTING, Health, engine_health
from pagegraph.runtime.server.listen import Unserved
from pagegraph.runtime.server.restarts import Restarts
from pagegraph.runtime.server.run_dir import write_private
from pagegraph.runtime.server.start_errors import REASON_FILE

log = logging.getLogger("pagegraph.supervisor")

HEARTBEAT_S = 0.25  # of the supervisor's own client
UNHEALTHY_S = 2.0  # an engine that ends is not heard either: for so long it is not taken for a hung one
LOOK_S = 0.1  # between looks at a child
FROZEN_S = 1.0  # between two looks: this process did not run either, and what it sees may be the machine's pause
HELD_S = 30.0  # that a driver may hold a killed engine, and its memory, before the next one is started
DUMP_S = 1.0  # for a hung engine to write where its threads stand


class Replica:
    """`folder`: its own; `settings`: of its process, with the path of its pulse; `stopping`: whether the server is ending."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        settings: EngineSettings,
        variables: Mapping[str, str | None],
        stopping: Callable[[], bool],
    ) -> None:
        self.folder = folder
        self.name = settings.name
        self.child: Child | None = None
        self.given_up: str | None = None  # why no other engine is started
        self._command = command
        self._settings = settings
        self._variables = variables
        self._stopping = stopping
        config = settings.config
        # The other nodes end with an engine: whoever has started the servers starts all of them anew.
        self.restarts = Restarts(config.max_engine_restarts if config.nnodes == 1 else 0, config.restart_window_s)
        self.client = EngineClient(
            settings.engine_address, heartbeat_s=HEARTBEAT_S, silence_s=config.watchdog_timeout_s
        )
        self._is_ready = False  # has served, and is to be started anew
        self._new_engine_at: float | None = None  # of the monotonic clock, expected; while one is being started
        self._start_s = 0.0  # that its last start took
        self._started = 0.0
        self._told: tuple[bool, float | None] | None = None  # the web processes, of a new engine
        self._telling = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._kept, self._ended = threading.Event(), threading.Event()

    @property
    def config(self) -> Config:
        return self._settings.config

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.child is not None and self.child.exit_code is None

    def facts(self) -> dict[str, Any]:
        """What it told once it was loaded. Raises FileNotFoundError while it loads."""
        return json.loads((self.folder / FACTS_FILE).read_text())

    def metrics_url(self) -> str | None:
        """Of its own metrics; None while it loads."""
        try:
            return f"http://127.0.0.1:{self.facts()['metrics_port']}/metrics"
        except FileNotFoundError:
            return None

    def info(self) -> EngineInfo | None:
        """Its newest facts; None where it does not answer."""
        try:
            return self.client.info(timeout=0.0)
        except EngineDead:
            return None

    def answers(self) -> EngineInfo | None:
        """The facts of an engine that is loaded and answers."""
        return self.info() if (self.folder / FACTS_FILE).exists() else None

    def health(self) -> Health:
        """What probes are told of it, but for a drain."""
        new_engine_at = self._new_engine_at  # once: the watcher takes it away
        if self.given_up is not None:
            return NO_ENGINE
        if self._is_ready and new_engine_at is not None:
            return replace(RESTARTING, retry_after_s=new_engine_at - time.monotonic())
        if self.child is not None and self.child.exit_code is not None:
            return RESTARTING if self.follows else NO_ENGINE
        if not self._is_ready:
            return LOADING
        found = self._engine_health()
        return replace(found, live=found.live or self.follows)

    @property
    def follows(self) -> bool:
        """Whether a new engine follows if this one ends now."""
        is_kept = self._is_ready and self.given_up is None and not self._stopping()
        return is_kept and self.restarts.num_recent < self.restarts.most

    def start(self) -> None:
        """Start its process."""
        for name in (FACTS_FILE, REASON_FILE, pulse.FILE):
            (self.folder / name).unlink(missing_ok=True)
        write_private(self.folder / STACKS_FILE, "")
        settings = write_private(self.folder / "engine-settings.json", self._settings.to_json())
        self.child = Child(self.name, [*self._command, str(settings)], variables=self._variables)
        self._started = time.monotonic()

    def watch(self) -> None:
        """It serves: from now on a thread starts it anew where it ends, until the server stops or it has ended too often."""
        self._start_s = time.monotonic() - self._started
        self._is_ready = True
        self.tell_comeback()
        self._watcher = threading.Thread(target=self._keep, name=f"{self.name}-watch", daemon=True)
        self._watcher.start()

    def retire(self) -> None:
        """The server stops: returns once no new engine is being started."""
        if self._watcher is not None:
            self._kept.wait()

    def end(self) -> None:
        """Kill what is left of it, and say that nothing follows."""
        self._is_ready = False
        self.tell_comeback()
        if self.child is not None:
            self.child.kill()
        self._ended.set()

    def check(self) -> None:
        """Raise Unserved if its process has ended."""
        if self.child is not None and self.child.exit_code is not None:
            raise Unserved(self._how_it_ended())

    def tell_comeback(self, expected_s: float | None = None) -> None:
        """Tell the web processes whether a new engine follows, and where one is being started, when it is expected."""
        with self._telling:
            told = (self.follows or expected_s is not None, expected_s)
            if told != self._told:
                write_private(self.folder / comeback.FILE, comeback.text(*told))
                self._told = told

    def _keep(self) -> None:
        """Until the server stops, or it has ended too often."""
        try:
            looked = lived = time.monotonic()
            while not self._stopping():
                now = time.monotonic()
                if not self.is_alive:
                    self._start_anew("died", self._how_it_ended())
                    lived = time.monotonic()
                elif self._engine_health().live or now - looked > FROZEN_S:
                    lived = now
                elif now - lived > UNHEALTHY_S:
                    self._start_anew("hung", self._dump_hung())
                    lived = time.monotonic()
                self.tell_comeback()  # a window may have passed
                looked = time.monotonic()
                time.sleep(LOOK_S)
        except Unserved as error:
            self._give_up(str(error))
        except Exception as error:
            log.exception("%s cannot be watched any more", self.name)
            self._give_up(f"{self.name} cannot be watched any more: {error}")
        self._kept.set()
        self._ended.wait()  # the kernel ends a child with the thread that started it, not with its process alone

    def _give_up(self, why: str) -> None:
        self.given_up = why
        self._new_engine_at = None
        self.tell_comeback()
        if self.config.data_parallel_size > 1:
            log.critical("%s; %s is not started again", why, self.name)

    def _start_anew(self, why: str, told: str) -> None:
        """Start it until it answers, or the server stops. Raises Unserved where it has ended too often."""
        while not self._stopping():
            assert self.child is not None
            if self.child.exit_code == REQUIRED_COMPILATION_FAILED:
                raise Unserved(told)
            if not self.restarts.take(why):
                raise Unserved(told if not self.restarts.most else f"{told}; {self._too_often()}")
            self._new_engine_at = time.monotonic() + self._start_s
            self.tell_comeback(self._start_s)
            self.child.kill()  # what it started, too
            self.child.ends_by(time.monotonic() + HELD_S)
            recent, most = self.restarts.num_recent, self.restarts.most
            window = self.restarts.window_s
            log.critical("%s; the %s is started anew (%d of %d within %g s)", told, self.name, recent, most, window)
            if self._stopping():
                return
            self.start()
            failed = self._wait_for_new(self._started + self._start_s + self.config.watchdog_timeout_s)
            if self._stopping():
                return
            if failed is None:
                self._new_engine_at = None
                self._start_s = time.monotonic() - self._started
                self.tell_comeback()
                log.warning("the new %s serves after %.1f s", self.name, self._start_s)
                return
            why, told = failed

    def _wait_for_new(self, deadline: float) -> tuple[str, str] | None:
        """None once it answers, or the server stops; else for which of `restarts.REASONS` it does not, and what to tell."""
        while not self._stopping() and not self.answers():
            if not self.is_alive:
                return "died", self._how_it_ended()
            if time.monotonic() > deadline:
                return "hung", self._dump_hung()
            time.sleep(0.05)
        return None

    def _engine_health(self) -> Health:
        due = pulse.read(self.folder / pulse.FILE)
        return engine_health(self.client, self.config.watchdog_timeout_s, due)

    def _dump_hung(self) -> str:
        """Log where its threads stand -> what to tell of it."""
        limit = self.config.watchdog_timeout_s
        assert self.child is not None
        self.child.send(signal.SIGUSR1)  # faulthandler answers, whatever the threads do
        time.sleep(DUMP_S)
        stacks = (self.folder / STACKS_FILE).read_text(errors="replace").strip()
        silent = "it does not say: it is stopped, held by the kernel, or was about to start"
        log.critical("the %s hangs; where its threads stand:\n%s", self.name, stacks or silent)
        return (
            f"the {self.name} hung: its loop has not moved on in time, and it is ended; if a step of this model may"
            f" take longer, raise watchdog_timeout_s={limit:g} or lower max_num_batched_tokens"
        )

    def _too_often(self) -> str:
        most, window = self.restarts.most, self.restarts.window_s
        ends = ", so the server ends" if self.config.data_parallel_size == 1 else ""
        return (
            f"it had been started anew {most} times within {window:g} s{ends}; the log says what ended each"
            f" (max_engine_restarts={most}, restart_window_s={window:g})"
        )

    def _how_it_ended(self) -> str:
        """The reason that it left, else a pointer to what it wrote."""
        assert self.child is not None
        self.child.finish_output()
        reason = self.folder / REASON_FILE
        return reason.read_text() if reason.is_file() else self.child.how_it_ended()
