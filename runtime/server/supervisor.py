"""The parent of a server: starts its engines and gunicorn, watches them, drains at the end.

What becomes of an engine that ends is `replica`'s to say. Imports no torch and nothing of web: children are started by name. Its own port answers
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pagegraph.runtime.askers import LIMITS
from pagegraph.runtime.config import API_KEY_VARIABLE, Config
from pagegraph.runtime.ipc import protocol
from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.scheduler.block_hashes import new_key
from pagegraph.runtime.server import comeback, devices, logs, pulse
from pagegraph.runtime.server.child import Child, module_command, stop
from pagegraph.runtime.server.engine_settings import EngineSettings
from pagegraph.runtime.server.health import DRAINING, NO_ENGINE, Health, of_all
from pagegraph.runtime.server.listen import Unserved, bind, connectable
from pagegraph.runtime.server.probes import Probes, fetch
from pagegraph.runtime.server.replica import LOOK_S, Replica
from pagegraph.runtime.server.restarts import ServerMetrics
from pagegraph.runtime.server.run_dir import RunDir
from pagegraph.runtime.server.start_report import process_age, table
from pagegraph.runtime.server.web_gate import SETTINGS_VARIABLE

log = logging.getLogger("pagegraph.supervisor")

ENGINE_COMMAND = module_command("pagegraph.runtime.server.engine_process")
WEB_COMMAND = module_command("gunicorn")

WEB_COUNTS_FOLDER = "web-counts"  # of `web.request_metrics`
WEB_SETTINGS_FILE = "web-settings.json"  # written once the engine answers; the web processes wait for it
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
        on_serving: Callable[[EngineInfo, str, str], None] = lambda info, address, probe_address: None,
    ) -> None:
        """on_serving: called once the server answers, with an engine's facts and where this machine reaches the API and the
        probe port, as host:port."""
        self.config = config
        self._on_serving = on_serving
        self._web_command = web_command
        try:
            self._run_dir = RunDir()
        except OSError as error:
            raise Unserved(str(error)) from error
        self._signals = 0
        self._closing = False
        self._ready = False
        self._web: Child | None = None
        self._block_hash_key = new_key()  # of this server's engines, and of the web processes that choose among them
        self._replicas = [self._replica(rank, engine_command) for rank in range(config.data_parallel_size)]

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
            web_counts = self._run_dir.path / WEB_COUNTS_FOLDER
            web_counts.mkdir(mode=0o700)
            own = ServerMetrics(
                self.config.model_name,
                [(one.restarts, lambda one=one: self._health_of(one).ready) for one in self._replicas],
                web_counts,
            )
            probes = Probes(
                self.config.probe_host, self.config.probe_port or 0, self.health, self._metrics_urls, own.render
            )
            devices.require_one_each(self.config)
            for replica in self._replicas:
                replica.start()
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
                    "PROMETHEUS_MULTIPROC_DIR": str(web_counts),  # which prometheus-client reads
                    logs.FORMAT_VARIABLE: self.config.log_format,
                    logs.LEVEL_VARIABLE: self.config.log_level,
                },
            )
            if info := self._wait_for_engines():
                loaded_s = process_age()
                self._write_web_settings(probes.address)
                if self._wait_for_web(listener):
                    self._ready = True
                    for replica in self._replicas:
                        replica.watch()
                    self._report(command_s, process_age() - loaded_s)
                    self._greet(banner(self.config, info, listener.getsockname(), probes.address))
                    self._on_serving(info, connectable(listener.getsockname()), probes.address)
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
        """What both ports tell probes: ready while one engine is."""
        return of_all([self._health_of(one) for one in self._replicas])

    def _health_of(self, replica: Replica) -> Health:
        if self._web is not None and self._web.exit_code is not None:
            return NO_ENGINE
        found = replica.health()
        return DRAINING if self._signals and found.live and self._ready and replica.is_alive else found

    def _metrics_urls(self) -> list[str]:
        return [url for one in self._replicas if (url := one.metrics_url()) is not None]

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1
        if self._signals > 1:
            for child in (*(replica.child for replica in self._replicas), self._web):
                if child is not None:
                    child.abort()

    @property
    def _drain_flag(self) -> Path:
        return self._run_dir.path / "draining"

    def _replica(self, rank: int, command: Sequence[str]) -> Replica:
        folder = self._run_dir.path / f"engine-{rank}"
        folder.mkdir(mode=0o700)
        several = self.config.data_parallel_size > 1
        settings = EngineSettings(
            config=self.config,
            engine_address=f"ipc://{self._run_dir.socket(rank)}",
            drain_flag=self._drain_flag,
            pulse=folder / pulse.FILE,
            rank=rank,
            block_hash_key=self._block_hash_key.hex(),
            accounts=self._run_dir.path / "accounts.sqlite" if several else None,
            compile_lock=self._run_dir.path / "compiling" if several else None,
        )
        variables = devices.variables_of(rank, self.config.tensor_parallel_size, os.environ) if several else {}
        return Replica(folder, command, settings, variables, lambda: bool(self._signals or self._closing))

    def _write_web_settings(self, probe_address: str) -> Path:
        """The web processes' settings, once the engine said which folder holds the tokenizer; see web/settings.py."""
        engine = self._replicas[0].facts()
        folders = [replica.folder for replica in self._replicas]
        settings = {
            "engine_addresses": [f"ipc://{self._run_dir.socket(rank)}" for rank in range(len(folders))],
            "block_hash_key": self._block_hash_key.hex() if self.config.enable_prefix_caching else None,
            # Absolute: the web processes run elsewhere.
            "model": os.path.abspath(self.config.tokenizer or engine["model_dir"]),
            "served_model_name": self.config.model_name,
            "probe_address": probe_address,
            "threads": self.config.web_threads,
            "enough_threads": self.config.enough_threads,
            "silence_s": self.config.watchdog_timeout_s,
            "comebacks": [str(folder / comeback.FILE) for folder in folders],
            "pulses": [str(folder / pulse.FILE) for folder in folders],
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

    def _wait_for_engines(self) -> EngineInfo | None:
        """The first engine's facts once all are loaded and answer; None if a signal came first."""
        while not self._signals:
            self._check_all()
            infos = [replica.answers() for replica in self._replicas]
            if all(infos):
                return infos[0]
            time.sleep(0.05)
        return None

    def _wait_for_web(self, listener: socket.socket) -> bool:
        """Until a web process answers over HTTP, whatever the status; False if a signal came first."""
        url = f"http://{connectable(listener.getsockname())}/health/live"
        while not self._signals:
            self._check_all()
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
        engine = self._replicas[0].facts()
        seconds = {"command": command_s, **engine.get("seconds", {}), "web": web_s}
        log.info("%s", table(process_age(), seconds, engine.get("parts", {})))

    def _watch(self) -> None:
        """Until a signal. Raises Unserved when the web processes end, or every engine too often."""
        while not self._signals:
            self._check_web()
            reasons = [replica.given_up for replica in self._replicas]
            if all(reasons):
                raise Unserved(reasons[-1] or "")
            time.sleep(LOOK_S)

    def _check_web(self) -> None:
        """Raise Unserved if the web processes have ended."""
        if self._web is not None and self._web.exit_code is not None and self._signals < 2:
            raise Unserved(self._web.how_it_ended())

    def _check_all(self) -> None:
        """Raise Unserved if any child has ended."""
        for replica in self._replicas:
            if self._signals < 2:
                replica.check()
        self._check_web()

    def _drain(self) -> int:
        """Refuse new requests, let running ones end, then stop the engine and the web processes, both at once.

        Streams that are cut see the engine's end through their own connections and end with an error.
        """
        self._drain_flag.touch()
        for replica in self._replicas:
            replica.tell_comeback()
        log.info("draining: new requests get 503, running ones have %g s", self.config.drain_timeout_s)
        for replica in self._replicas:
            replica.retire()
        if self._ready and any(replica.is_alive for replica in self._replicas):
            self._wait_until_idle(time.monotonic() + self.config.drain_timeout_s)
        stop(*(replica.child for replica in self._replicas), self._web)
        return ABORTED if self._signals > 1 else 0

    def _wait_until_idle(self, deadline: float) -> None:
        idle_since = time.monotonic()
        while self._signals < 2:
            self._check_web()
            if not any(replica.is_alive for replica in self._replicas) and self._signals < 2:
                self._replicas[-1].check()
            infos, now = [replica.info() for replica in self._replicas], time.monotonic()
            unfinished = sum(info.num_running + info.num_waiting for info in infos if info)
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
        self._closing = True
        self._drain_flag.touch()
        for replica in self._replicas:
            replica.end()
        if self._web is not None:
            # Streams see the engines' end through their own connections and close with an error first.
            stop(self._web)
        for replica in self._replicas:
            replica.retire()
            replica.end()  # one that was being started
            replica.client.close()
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
    several = f"{config.data_parallel_size} engines, each: " if config.data_parallel_size > 1 else ""
    return "\n".join([
        "",
        f"  {url}  serves {config.model_name}",
        f"  {several}device {info.device}, {info.dtype}, {COMPILE_STATES[info.compile_state]}",
        f"  KV cache {info.num_blocks:,} blocks of {info.block_size} = {tokens:,} tokens;"
        f" max_model_len {info.max_model_len:,}",
        f"  probes and metrics http://{probe_address}/health/ready /health/live /metrics",
        "",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        "",
    ])  # fmt: skip
