"""The parent of a server: starts the engine and gunicorn, watches them, starts an engine that ends anew, drains at the end.

Imports no torch and nothing of web: both children are started by name. Its own port answers
`/health/live`, `/health/ready` and `/metrics` even when every web thread holds a stream.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagegraph.runtime.askers import LIMITS
from pagegraph.runtime.config import API_KEY_VARIABLE, Config
from pagegraph.runtime.ipc import protocol
from pagegraph.runtime.ipc.client import EngineClient, EngineDead
from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.server import comeback, logs, pulse
from pagegraph.runtime.server.child import Child, module_command, stop
from pagegraph.runtime.server.engine_settings import (
    FACTS_FILE,
    REQUIRED_COMPILATION_FAILED,
    STACKS_FILE,
    EngineSettings,
)
from pagegraph.runtime.server.health import DRAINING, LOADING, NO_ENGINE, RESTARTING, Health, engine_health
from pagegraph.runtime.server.listen import Unserved, bind, connectable
from pagegraph.runtime.server.probes import Probes, fetch
from pagegraph.runtime.server.restarts import Restarts, ServerMetrics
from pagegraph.runtime.server.run_dir import RunDir
from pagegraph.runtime.server.start_errors import REASON_FILE
from pagegraph.runtime.server.start_report import process_age, table
from pagegraph.runtime.server.web_gate import SETTINGS_VARIABLE

log = logging.getLogger("pagegraph.supervisor")

ENGINE_COMMAND = module_command("pagegraph.runtime.server.engine_process")
WEB_COMMAND = module_command("gunicorn")

WEB_SETTINGS_FILE = "web-settings.json"  # written once the engine answers; the web processes wait for it
HEARTBEAT_S = 0.25  # of the supervisor's own client
UNHEALTHY_S = 2.0  # an engine that ends is not heard either: for so long it is not taken for a hung one
LOOK_S = 0.1  # between looks at the children
FROZEN_S = 1.0  # between two looks: this process did not run either, and what it sees may be the machine's pause
HELD_S = 30.0  # that a driver may hold a killed engine, and its memory, before the next one is started
DUMP_S = 1.0  # for a hung engine to write where its threads stand
IDLE_S = 1.5 * protocol.HEARTBEAT_S  # without work before a drain is over: web processes learn of it from a heartbeat
IDLE_CONNECTIONS = 4000  # that a web process holds open beside those with a request; then the longest idle is closed
COMPILE_STATES = {
    "off": "not compiled", "compiling": "compiling, serving uncompiled until then", "compiled": "compiled",
    "failed": "serving uncompiled, because the compilation failed: see the log",
}  # fmt: skip
ABORTED = 130  # exit status after a second signal, as a shell reports an interrupt


class Supervisor:
    """One server from start to exit. `run` returns the exit status."""

    def __init__(
        self,
        config: Config,
        engine_command: Sequence[str] = ENGINE_COMMAND,
        web_command: Sequence[str] = WEB_COMMAND,
    ) -> None:
        self.config = config
        self._engine_command = engine_command
        self._web_command = web_command
        try:
            self._run_dir = RunDir()
        except OSError as error:
            raise Unserved(str(error)) from error
        self._engine_address = f"ipc://{self._run_dir.socket}"
        self._client = EngineClient(self._engine_address, heartbeat_s=HEARTBEAT_S, silence_s=config.watchdog_timeout_s)
        self._signals = 0
        self._ready = False
        self._restarts = Restarts(config.max_engine_restarts, config.restart_window_s)
        self._new_engine_at: float | None = None  # of the monotonic clock, expected; while one is being started
        self._start_s = 0.0  # that the engine's last start took
        self._told: tuple[bool, float | None] | None = None  # the web processes, of a new engine
        self._engine: Child | None = None
        self._web: Child | None = None

    def run(self) -> int:
        """Serve until a signal or the death of a child. Main thread only: it owns the signal handlers.

        Returns 0 after a drain, ABORTED when a second signal cut it short. Raises Unserved when the address
        is taken or a child ends by itself.
        """
        previous = {number: signal.signal(number, self._on_signal) for number in _stopping_signals()}
        probes: Probes | None = None
        listener: socket.socket | None = None
        try:
            listener = bind(self.config.host, self.config.port, "port")
            own = ServerMetrics(self._restarts, self.config.model_name, lambda: self.health().ready)
            probes = Probes(
                self.config.probe_host, self.config.probe_port or 0, self.health, self._metrics_url, own.render
            )
            started = self._start_engine()
            command_s = process_age()
            # Imports while the engine loads, and waits for its settings before it listens. In a folder of ours, because
            # gunicorn makes its folder the first place where modules are looked for.
            settings = self._run_dir.path / WEB_SETTINGS_FILE
            self._web = Child(
                "web",
                [*self._web_command, *web_arguments(self.config, settings, listener.fileno())],
                (listener.fileno(),),
                self._run_dir.path,
                {
                    **self._secrets(),
                    **web_malloc(os.environ),
                    SETTINGS_VARIABLE: str(settings),
                    logs.FORMAT_VARIABLE: self.config.log_format,
                    logs.LEVEL_VARIABLE: self.config.log_level,
                },
            )
            if info := self._wait_for_engine():
                loaded_s = process_age()
                self._start_s = time.monotonic() - started
                self._write_web_settings(probes.address)
                if self._wait_for_web(listener):
                    self._ready = True
                    self._tell_comeback()
                    self._report(command_s, process_age() - loaded_s)
                    self._greet(banner(self.config, info, listener.getsockname(), probes.address))
                    self._watch()
            return self._drain()
        finally:
            self._close(probes, listener)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _greet(self, text: str) -> None:
        if self.config.log_format == "text":
            print(text, file=sys.stderr, flush=True)
        else:
            log.info("%s", text.strip())

    def health(self) -> Health:
        """What both ports tell probes."""
        if self._web is not None and self._web.exit_code is not None:
            return NO_ENGINE
        new_engine_at = self._new_engine_at  # once: the main thread takes it away
        if self._ready and new_engine_at is not None:
            return replace(RESTARTING, retry_after_s=new_engine_at - time.monotonic())
        if self._engine is not None and self._engine.exit_code is not None:
            return RESTARTING if self._follows else NO_ENGINE
        if not self._ready:
            return LOADING
        found = self._engine_health()
        if self._signals and found.live:
            return DRAINING
        return replace(found, live=found.live or self._follows)

    def _facts(self) -> dict[str, Any]:
        """What the engine told once it was loaded."""
        return json.loads((self._run_dir.path / FACTS_FILE).read_text())

    def _metrics_url(self) -> str | None:
        try:
            return f"http://127.0.0.1:{self._facts()['metrics_port']}/metrics"
        except FileNotFoundError:  # it loads
            return None

    def _engine_health(self) -> Health:
        due = pulse.read(self._run_dir.path / pulse.FILE)
        return engine_health(self._client, self.config.watchdog_timeout_s, due)

    @property
    def _follows(self) -> bool:
        """Whether a new engine follows if this one ends now."""
        return self._ready and not self._signals and self._restarts.num_recent < self._restarts.most

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1
        if self._signals > 1:
            for child in (self._engine, self._web):
                if child is not None:
                    child.abort()

    def _info(self) -> EngineInfo | None:
        try:
            return self._client.info(timeout=0.0)
        except EngineDead:
            return None

    @property
    def _drain_flag(self) -> Path:
        return self._run_dir.path / "draining"

    def _write_engine_settings(self) -> Path:
        settings = EngineSettings(
            config=self.config,
            engine_address=self._engine_address,
            drain_flag=self._drain_flag,
            pulse=self._run_dir.path / pulse.FILE,
        )
        return self._run_dir.write("engine-settings.json", settings.to_json())

    def _write_web_settings(self, probe_address: str) -> Path:
        """The web processes' settings, once the engine said which folder holds the tokenizer; see web/settings.py."""
        engine = self._facts()
        settings = {
            "engine_address": self._engine_address,
            # Absolute: the web processes run elsewhere.
            "model": os.path.abspath(self.config.tokenizer or engine["model_dir"]),
            "served_model_name": self.config.model_name,
            "probe_address": probe_address,
            "threads": self.config.web_threads,
            "enough_threads": self.config.enough_threads,
            "silence_s": self.config.watchdog_timeout_s,
            "comeback": str(self._run_dir.path / comeback.FILE),
            "pulse": str(self._run_dir.path / pulse.FILE),
            "response_store": str(self._run_dir.path / "responses.sqlite"),
            "response_store_bytes": self.config.response_store_size,
            **{name: getattr(self.config, name) for name in (*LIMITS, "prefix_cache_per_key")},
            "allowed_origins": self.config.allowed_origins,
            "otlp_traces_endpoint": self.config.otlp_traces_endpoint,
            "log_requests": self.config.log_requests,
            "tool_call_parser": self.config.tool_call_parser,
            "reasoning_parser": self.config.reasoning_parser,
        }
        return self._run_dir.write(WEB_SETTINGS_FILE, json.dumps(settings, indent=1))

    def _secrets(self) -> dict[str, str | None]:
        """What only the environment of the web processes holds: no file does, no list of processes shows it."""
        return {API_KEY_VARIABLE: self.config.api_key}

    def _wait_for_engine(self) -> EngineInfo | None:
        """The engine's facts once it is loaded and answers; None if a signal came first."""
        while not self._signals:
            self._check(self._engine, self._web)
            if info := self._answers():
                return info
            time.sleep(0.05)
        return None

    def _answers(self) -> EngineInfo | None:
        """The facts of an engine that is loaded and answers."""
        return self._info() if (self._run_dir.path / FACTS_FILE).exists() else None

    def _wait_for_web(self, listener: socket.socket) -> bool:
        """Until a web process answers over HTTP, whatever the status; False if a signal came first."""
        url = f"http://{connectable(listener.getsockname())}/health/live"
        while not self._signals:
            self._check(self._engine, self._web)
            try:
                with fetch(url, timeout=1.0):
                    return True
            except urllib.error.HTTPError:
                return True
            except (OSError, urllib.error.URLError):
                time.sleep(0.05)
        return False

    def _report(self, command_s: float, web_s: float) -> None:
        """Log where the time of the start went."""
        engine = self._facts()
        seconds = {"command": command_s, **engine.get("seconds", {}), "web": web_s}
        log.info("%s", table(process_age(), seconds, engine.get("parts", {})))

    def _watch(self) -> None:
        """Until a signal. Raises Unserved when the web processes end, or the engine too often."""
        looked = lived = time.monotonic()
        while not self._signals:
            now = time.monotonic()
            self._check(self._web)
            if self._engine is not None and self._engine.exit_code is not None:
                self._restart_engine("died", self._how_it_ended(self._engine))
                lived = time.monotonic()
            elif self._engine_health().live or now - looked > FROZEN_S:
                lived = now
            elif now - lived > UNHEALTHY_S:
                self._restart_engine("hung", self._dump_hung_engine())
                lived = time.monotonic()
            self._tell_comeback()  # a window may have passed
            looked = time.monotonic()
            time.sleep(LOOK_S)

    def _dump_hung_engine(self) -> str:
        """Log where the threads of the engine stand -> what to tell of it."""
        limit = self.config.watchdog_timeout_s
        assert self._engine is not None
        self._engine.send(signal.SIGUSR1)  # faulthandler answers, whatever the threads do
        time.sleep(DUMP_S)
        stacks = (self._run_dir.path / STACKS_FILE).read_text(errors="replace").strip()
        silent = "it does not say: it is stopped, held by the kernel, or was about to start"
        log.critical("the engine hangs; where its threads stand:\n%s", stacks or silent)
        return (
            "the engine hung: its loop has not moved on in time, and it is ended; if a step of this model may"
            f" take longer, raise watchdog_timeout_s={limit:g} or lower max_num_batched_tokens"
        )

    def _start_engine(self) -> float:
        """Start an engine process -> when, of the monotonic clock."""
        for name in (FACTS_FILE, REASON_FILE, pulse.FILE):
            (self._run_dir.path / name).unlink(missing_ok=True)
        self._run_dir.write(STACKS_FILE, "")
        self._engine = Child("engine", [*self._engine_command, str(self._write_engine_settings())])
        return time.monotonic()

    def _restart_engine(self, why: str, told: str) -> None:
        """Start the engine anew until one answers, or a signal comes. Raises Unserved where it has ended too often."""
        while not self._signals:
            assert self._engine is not None
            if self._engine.exit_code == REQUIRED_COMPILATION_FAILED:
                raise Unserved(told)
            if not self._restarts.take(why):
                raise Unserved(told if not self._restarts.most else f"{told}; {self._too_often()}")
            self._new_engine_at = time.monotonic() + self._start_s
            self._tell_comeback(self._start_s)
            self._engine.kill()  # what it started, too
            self._engine.ends_by(time.monotonic() + HELD_S)
            recent, most = self._restarts.num_recent, self._restarts.most
            log.critical(
                "%s; the engine is started anew (%d of %d within %g s)", told, recent, most, self._restarts.window_s
            )
            started = self._start_engine()
            failed = self._wait_for_new_engine(started + self._start_s + self.config.watchdog_timeout_s)
            if self._signals:
                return
            if failed is None:
                self._new_engine_at = None
                self._start_s = time.monotonic() - started
                self._tell_comeback()
                log.warning("the new engine serves after %.1f s", self._start_s)
                return
            why, told = failed

    def _wait_for_new_engine(self, deadline: float) -> tuple[str, str] | None:
        """None once it answers, or a signal came; else for which of REASONS it does not, and what to tell of it."""
        assert self._engine is not None
        while not self._signals and not self._answers():
            self._check(self._web)
            if self._engine.exit_code is not None:
                return "died", self._how_it_ended(self._engine)
            if time.monotonic() > deadline:
                return "hung", self._dump_hung_engine()
            time.sleep(0.05)
        return None

    def _too_often(self) -> str:
        most, window = self._restarts.most, self._restarts.window_s
        return (
            f"it had been started anew {most} times within {window:g} s, so the server ends; the log says what ended each"
            f" (max_engine_restarts={most}, restart_window_s={window:g})"
        )

    def _tell_comeback(self, expected_s: float | None = None) -> None:
        """Tell the web processes whether a new engine follows, and where one is being started, when it is expected."""
        told = (self._follows or expected_s is not None, expected_s)
        if told != self._told:
            self._run_dir.write(comeback.FILE, comeback.text(*told))
            self._told = told

    def _check(self, *children: Child | None) -> None:
        """Raise Unserved if one of them has ended."""
        for child in children:
            if child is not None and child.exit_code is not None and self._signals < 2:
                raise Unserved(self._how_it_ended(child))

    def _how_it_ended(self, child: Child) -> str:
        """The reason that it left, else a pointer to what it wrote."""
        child.finish_output()
        reason = self._run_dir.path / REASON_FILE
        if child is self._engine and reason.is_file():
            return reason.read_text()
        assert child.exit_code is not None
        return f"the {child.name} process ended with {_status(child.exit_code)}; what it wrote stands above"

    def _drain(self) -> int:
        """Refuse new requests, let running ones end, then stop the engine and the web processes, both at once.

        Streams that are cut see the engine's end through their own connections and end with an error.
        """
        self._drain_flag.touch()
        self._tell_comeback()
        log.info("draining: new requests get 503, running ones have %g s", self.config.drain_timeout_s)
        if self._ready and self._engine is not None and self._engine.exit_code is None:
            self._wait_until_idle(time.monotonic() + self.config.drain_timeout_s)
        stop(self._engine, self._web)
        return ABORTED if self._signals > 1 else 0

    def _wait_until_idle(self, deadline: float) -> None:
        idle_since = time.monotonic()
        while self._signals < 2:
            self._check(self._engine, self._web)
            info, now = self._info(), time.monotonic()
            unfinished = info.num_running + info.num_waiting if info else 0
            if unfinished:
                idle_since = now
            if now - idle_since > IDLE_S:
                return
            if now > deadline:
                log.warning("drain_timeout_s is over: requests cut: %d", unfinished)
                return
            time.sleep(0.1)

    def _close(self, probes: Probes | None, listener: socket.socket | None) -> None:
        self._ready = False
        self._drain_flag.touch()
        self._tell_comeback()
        if self._engine is not None:
            self._engine.kill()
        if self._web is not None:
            # Streams see the engine's end through their own connection and close with an error first.
            stop(self._web)
        self._client.close()
        if probes is not None:
            probes.close()
        if listener is not None:
            listener.close()
        self._run_dir.close()


def web_malloc(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep a web process's memory in one piece, unless `environment` says how malloc is to be.

    A request's thread is whichever is free. By glibc's own rules each would have an arena, up to eight a core, and keep small
    pieces for itself: what all of them free is then in as many places, and a process grows for hours until each has seen its
    most. Python's lock leaves next to nothing for several arenas to gain.
    """
    if any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in environment):
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0"}


def web_arguments(config: Config, settings: Path, descriptor: int) -> list[str]:
    """Arguments of gunicorn. `settings`: a file of WebSettings; `descriptor`: of a bound socket that it inherits."""
    return [
        f"pagegraph.web.app:create_app({json.dumps(str(settings))})",
        "--config", "python:pagegraph.web.gunicorn_conf",
        "--bind", f"fd://{descriptor}",
        "--workers", str(config.workers),
        "--threads", str(config.web_threads),
        "--worker-connections", str(config.web_threads + IDLE_CONNECTIONS),
        "--log-level", config.log_level,
    ]  # fmt: skip


def _stopping_signals() -> list[signal.Signals]:
    """Signals that end the server. A hang-up too, as when a terminal closes, unless it is ignored as under nohup."""
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def banner(config: Config, info: EngineInfo, address: tuple[Any, ...], probe_address: str) -> str:
    """What a user needs once the server answers: where, what, how much, and a line to paste."""
    url = f"http://{connectable(address)}"
    key = ' -H "Authorization: Bearer $API_KEY"' if config.api_key else ""
    body = json.dumps(
        {"model": config.model_name, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32}
    )
    tokens = (info.num_blocks - 1) * info.block_size
    return "\n".join([
        "",
        f"  {url}  serves {config.model_name}",
        f"  device {info.device}, {info.dtype}, {COMPILE_STATES[info.compile_state]}",
        f"  KV cache {info.num_blocks:,} blocks of {info.block_size} = {tokens:,} tokens;"
        f" max_model_len {info.max_model_len:,}",
        f"  probes and metrics http://{probe_address}/health/ready /health/live /metrics",
        "",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        "",
    ])  # fmt: skip


def _status(exit_code: int) -> str:
    return f"status {exit_code}" if exit_code >= 0 else f"signal {signal.Signals(-exit_code).name}"
