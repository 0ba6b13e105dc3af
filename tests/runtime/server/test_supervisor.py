"""The supervisor against real child processes that stand in for the engine and gunicorn."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pagegraph.runtime.config import Config
from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.server import run_dir
from pagegraph.runtime.server.child import child_environment, module_command
from pagegraph.runtime.server.engine_settings import REQUIRED_COMPILATION_FAILED
from pagegraph.runtime.server.health import DRAINING, LOADING, READY, Health
from pagegraph.runtime.server.listen import Unserved, bind
from pagegraph.runtime.server.probes import Probes
from pagegraph.runtime.server.supervisor import Supervisor, _stopping_signals, banner, web_malloc
from pagegraph.web.settings import WebSettings
from tests.paths import ROOT

ENGINE = """
    import faulthandler, json, signal, sys, threading, time
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from pathlib import Path
    from pagegraph.runtime.ipc.mailbox import Mailbox
    from pagegraph.runtime.ipc.protocol import Abort, Admitted, EngineInfo, Hello, SubmitGroup, TokenDelta, Tokens

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(b"fake_metric 1\\n")
        def log_message(self, *args): pass

    DEADLY = 666  # max_tokens of a request that ends the engine
    settings = json.loads(Path(sys.argv[1]).read_text())
    control = Path(settings["config"]["model"])  # relative to where the command was given
    assert "torch" not in sys.modules
    if (control / "refuse").exists():
        Path(sys.argv[1]).with_name("engine-refused.txt").write_text("a reason for refusing"); sys.exit(7)
    faulthandler.register(signal.SIGUSR1, open(Path(sys.argv[1]).with_name("engine-stacks.txt"), "w"))
    while (control / "slow-start").exists(): time.sleep(0.02)
    stubborn = (control / "stubborn").exists()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: ((control / "engine-stopped").touch(), sys.exit(0)))
    (control / "engine-pid").write_text(str(__import__("os").getpid()))
    mailbox = Mailbox(settings["engine_address"])
    metrics = HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=metrics.serve_forever, daemon=True).start()
    facts = {"model_dir": str(control), "metrics_port": metrics.server_port}
    Path(sys.argv[1]).with_name("engine.json").write_text(json.dumps(facts))
    left = {}  # (client, request id): tokens still to come, one a poll
    while True:
        if status := (control / "crash").exists() and (control / "crash").read_text():
            print("boom: the last line", flush=True); sys.exit(int(status))
        def wedged():
            while (control / "wedge").exists(): time.sleep(0.05)
        wedged()
        for client, message in mailbox.poll(block=True):
            match message:
                case Hello():
                    running = len(left) + (control / "busy").exists()
                    mailbox.send(client, EngineInfo("m", "cpu", "bfloat16", 3, 1000, 9, 16, "compiled",
                        draining=Path(settings["drain_flag"]).exists(), num_running=running,
                        stalled_s=100.0 if (control / "stall").exists() else 0.0))
                case SubmitGroup():
                    if message.members[0].params.max_tokens == DEADLY: signal.raise_signal(signal.SIGKILL)
                    with open(control / "submitted", "a") as log: log.write(f"{message.members[0].params.max_tokens} ")
                    mailbox.send(client, Admitted(message.members[0].request_id))
                    left.update({(client, member.request_id): member.params.max_tokens for member in message.members})
                case Abort():
                    left.pop((client, message.request_id), None)
        for (client, request_id), count in list(left.items()) if not (control / "hold").exists() else ():
            mailbox.send(client, Tokens([TokenDelta(request_id, [1], "length" if count == 1 else "")]))
            left[client, request_id] = count - 1
        left = {key: count for key, count in left.items() if count}
"""

WEB = """
    import json, os, re, signal, socket, sys, threading, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from pathlib import Path

    path = json.loads(re.search(r"create_app\\((.*)\\)", sys.argv[1])[1])
    while not Path(path).exists(): time.sleep(0.01)
    settings = json.loads(Path(path).read_text())
    control = Path(settings["model"])
    (control / "settings.json").write_text(json.dumps({**settings, "argv": sys.argv}))

    class App(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503 if Path(path).with_name("draining").exists() else 200); self.end_headers()
        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), App, bind_and_activate=False)
    server.socket = socket.socket(fileno=int(sys.argv[sys.argv.index("--bind") + 1].removeprefix("fd://")))
    server.server_activate()
    (control / "environment.json").write_text(json.dumps(dict(os.environ)))
    stubborn = (control / "stubborn").exists()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: ((control / "web-stopped").touch(), sys.exit(0)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True: time.sleep(0.05)  # a signal that comes right before a pause would not end it
"""

DRIVER = """
    import logging, os, sys
    from pagegraph.runtime.config import Config
    from pagegraph.runtime.server.listen import Unserved
    from pagegraph.runtime.server.supervisor import WEB_COMMAND, Supervisor
    control, port, probe_port, drain, web, restarts = sys.argv[1:]
    logging.basicConfig(level="INFO")
    config = Config(
        model=control, served_model_name="m", port=int(port), probe_port=int(probe_port), drain_timeout_s=float(drain),
        watchdog_timeout_s=2.0, api_key="secret", workers=1, max_engine_restarts=int(restarts),
    )
    web_command = WEB_COMMAND if web == "gunicorn" else [sys.executable, os.path.abspath(control) + "/fake_web.py"]
    try:
        supervisor = Supervisor(config, [sys.executable, control + "/fake_engine.py"], web_command)
        status = supervisor.run()
    except Unserved as error:
        print("UNSERVED", error)
        status = 1
    assert "torch" not in sys.modules
    sys.exit(status)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str) -> tuple[int, str]:
    """Status and body; status 0 when nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def bind_when_free(port: int) -> socket.socket:
    """A bound socket: the kernel closes the sockets of a process that is killed one after the other, and takes a moment."""
    bound: list[socket.socket] = []

    def try_it() -> bool:
        with contextlib.suppress(Unserved):
            bound.append(bind("127.0.0.1", port, "port"))
        return bool(bound)

    wait_for(try_it)
    return bound[0]


class Server:
    """A supervisor in a process of its own with a folder through which the test steers its children."""

    def __init__(
        self,
        control: Path,
        drain: float = 20.0,
        web: str = "fake",
        folder: Path = ROOT,
        restarts: int = 2,
        **environment: str,
    ) -> None:
        """`folder`: where the command is given."""
        self.control = control
        self.temporary = control / "tmp"
        self.temporary.mkdir()
        self.port, self.probe_port = free_port(), free_port()
        for name, text in {"fake_engine": ENGINE, "fake_web": WEB, "driver": DRIVER}.items():
            (control / f"{name}.py").write_text(textwrap.dedent(text))
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(control / "driver.py"),
                os.path.relpath(control, folder),
                *map(str, (self.port, self.probe_port, drain, web, restarts)),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
        )

    def api(self) -> int:
        return get(f"http://127.0.0.1:{self.port}/health/live")[0]

    def probe(self, path: str) -> tuple[int, str]:
        return get(f"http://127.0.0.1:{self.probe_port}{path}")

    def wait_ready(self) -> None:
        wait_for(lambda: self.probe("/health/ready")[0] == 200 or self.process.poll() is not None)
        assert self.process.poll() is None, self.end()[1]

    def wait_web_ready(self) -> None:
        """The supervisor hears of a new engine by a connection of its own."""
        wait_for(lambda: get(f"http://127.0.0.1:{self.port}/health/ready")[0] == 200)

    def flag(self, name: str) -> Path:
        return self.control / name

    @property
    def engine_pid(self) -> int:
        return int(self.flag("engine-pid").read_text())

    def kill_engine(self) -> None:
        os.kill(self.engine_pid, signal.SIGKILL)

    def restarts(self, reason: str) -> float:
        found = re.search(
            rf'^pagegraph:engine_restarts_total{{.*reason="{reason}"}} (.*)$', self.probe("/metrics")[1], re.M
        )
        return float(found[1])

    def end(self, seconds: float = 15.0) -> tuple[int, str]:
        """Exit status and all output."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # A short path: a unix socket's is at most 107 bytes.
    server = Server(tmp_path_factory.mktemp("s"))
    yield server
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=15)


def test_serves_then_stops_in_order_with_status_0(server: Server) -> None:
    server.wait_ready()
    assert server.api() == 200
    assert server.probe("/health/live")[0] == 200
    status, metrics = server.probe("/metrics")
    assert status == 200 and metrics.endswith("\nfake_metric 1\n")
    assert 'pagegraph:engine_up{engine="0",model_name="m"} 1.0\n' in metrics
    assert server.probe("/elsewhere")[0] == 404
    (run_dir,) = server.temporary.iterdir()
    assert run_dir.stat().st_mode & 0o777 == 0o700
    server.process.send_signal(signal.SIGTERM)
    status, output = server.end()
    assert status == 0, output
    assert server.flag("engine-stopped").exists() and server.flag("web-stopped").exists()
    assert f"curl http://127.0.0.1:{server.port}/v1/chat/completions" in output and "secret" not in output
    assert list(server.temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_CONF"])
def test_malloc_is_left_to_whoever_sets_it(name: str) -> None:
    assert web_malloc({"PATH": "/bin"}) and not web_malloc({"PATH": "/bin", name: "x"})


def test_web_processes_have_one_arena() -> None:
    """As glibc itself understands the variables."""
    code = textwrap.dedent("""
        import ctypes, sys, threading
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "malloc_info"):
            sys.exit(77)
        libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
        there = threading.Barrier(5)
        def take():
            there.wait()
            libc.malloc(1000)
            there.wait()
        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads: thread.start()
        there.wait(), there.wait()
        file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
        libc.malloc_info(0, file), libc.fclose(file)
    """)
    whole = {key: value for key, value in os.environ.items() if not key.startswith(("GLIBC_TUNABLES", "MALLOC_"))}
    arenas = []
    for variables in ({}, web_malloc(whole)):
        run = subprocess.run([sys.executable, "-c", code], env=whole | variables, capture_output=True, text=True)
        if run.returncode == 77:
            pytest.skip("another C library")
        arenas.append(run.stdout.count("<heap nr="))
    assert arenas[0] > 1 and arenas[1] == 1


def test_web_settings_are_what_the_web_takes(server: Server) -> None:
    server.wait_ready()
    written = json.loads(server.flag("settings.json").read_text())
    argv = written.pop("argv")
    assert "secret" not in str(written)
    settings = WebSettings.load(written)
    assert settings.model == str(server.control) and settings.served_model_name == "m"
    environment = json.loads(server.flag("environment.json").read_text())
    assert environment["PAGEGRAPH_API_KEY"] == "secret"
    assert web_malloc({}).items() <= environment.items()
    (private,) = server.temporary.iterdir()
    for path in (path for path in private.rglob("*") if not path.is_dir()):
        assert path.stat().st_mode & 0o077 == 0 or path.is_socket() or path.name in ("engine.json", "draining")
        assert path.is_socket() or "secret" not in path.read_text()
    # One process alone can fill the engine and its queue, whatever the number of processes.
    assert settings.threads == settings.enough_threads == 256 + 256 + 32 and argv[argv.index("--threads") + 1] == "544"
    assert "fake_metric 1\n" in get(f"http://{settings.probe_address}/metrics")[1]


def test_drain_refuses_new_requests_and_waits_for_running_ones(server: Server) -> None:
    server.wait_ready()
    server.flag("busy").touch()
    time.sleep(0.6)  # over two heartbeats: the supervisor has seen it
    server.process.send_signal(signal.SIGINT)
    wait_for(lambda: server.api() == 503)
    assert server.probe("/health/ready")[0] == 503 and server.probe("/health/live")[0] == 200
    time.sleep(1.5)
    assert server.process.poll() is None and not server.flag("engine-stopped").exists()
    server.flag("busy").unlink()
    assert server.end()[0] == 0


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    previous = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in _stopping_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert signal.SIGHUP not in _stopping_signals()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_second_signal_aborts(server: Server) -> None:
    server.wait_ready()
    server.flag("busy").touch()
    time.sleep(0.6)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.api() == 503)
    server.process.send_signal(signal.SIGTERM)
    status, output = server.end(4.0)
    assert status == 130, output
    assert not server.flag("engine-stopped").exists()


def test_drain_ends_at_its_timeout(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = Server(tmp_path_factory.mktemp("s"), drain=2.0)  # over IDLE_S: a late heartbeat is still in time
    server.wait_ready()
    server.flag("busy").touch()
    time.sleep(0.6)
    server.process.send_signal(signal.SIGHUP)
    status, output = server.end(12.0)  # stopping may take 7 s
    assert status == 0 and "requests cut: 1" in output


@pytest.mark.slow
def test_children_that_do_not_stop_are_killed_together(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the default drain_timeout_s of 20 s this stays below the usual 30 s of grace."""
    control = tmp_path_factory.mktemp("s")
    (control / "stubborn").touch()
    server = Server(control, drain=1.0)
    server.wait_ready()
    server.flag("busy").touch()
    time.sleep(0.6)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status, output = server.end(20.0)
    assert status == 0 and "engine did not stop" in output and "web did not stop" in output
    assert time.monotonic() - started < 1.0 + (28.0 - 20.0)
    assert Config.drain_timeout_s == 20.0


SLOW = pytest.mark.slow


@pytest.mark.parametrize("sign", ["pulse", pytest.param("silence", marks=SLOW), pytest.param("stall", marks=SLOW)])
def test_a_hung_engine_is_replaced_and_its_stacks_are_told(server: Server, sign: str) -> None:
    """Its loop has not moved on by when it said; it answers no more; or it answers and finishes no step."""
    server.wait_ready()
    first = server.engine_pid
    (run_dir,) = server.temporary.iterdir()
    server.flag("stall" if sign == "stall" else "wedge").touch()
    if sign == "pulse":
        now = time.monotonic()
        (run_dir / "engine-0" / "engine-pulse").write_bytes(struct.pack("=dd", now, now + 0.5))
        wait_for(lambda: server.probe("/health/ready") == (503, '{"status":"no progress"}'))
    wait_for(lambda: server.probe("/health/ready")[0] == 503)
    assert server.probe("/health/live")[0] == 200
    wait_for(lambda: server.restarts("hung") == 1)
    for flag in ("stall", "wedge"):
        server.flag(flag).unlink(missing_ok=True)
    server.wait_ready()
    assert not (
        run_dir / "engine-0" / "engine-pulse"
    ).exists()  # that of the engine before is not taken for the new one's
    assert server.engine_pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    server.process.send_signal(signal.SIGTERM)
    status, output = server.end()
    assert status == 0, output
    assert "the engine hung" in output and "watchdog_timeout_s=2" in output
    if sign != "stall":
        stacks = output.partition("where its threads stand:\n")[
            2
        ]  # in the supervisor's own record, so in one of JSON too
        assert stacks.startswith(("Thread ", "Current thread ")) and "in wedged" in stacks


@pytest.mark.slow
def test_a_long_step_is_no_hang(server: Server) -> None:
    server.wait_ready()
    server.flag("wedge").touch()
    time.sleep(1.0)
    server.flag("wedge").unlink()
    time.sleep(2.0)
    assert server.probe("/health/live") == (200, '{"status":"ready"}') and server.process.poll() is None


@pytest.mark.slow
def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = Server(tmp_path_factory.mktemp("s"))
    server.wait_ready()
    (left,) = server.temporary.iterdir()
    server.process.kill()
    server.process.communicate()
    wait_for(lambda: server.flag("engine-stopped").exists() and server.flag("web-stopped").exists())
    assert left.is_dir()
    others = [Server(tmp_path_factory.mktemp("s"), TMPDIR=str(server.temporary)) for _ in range(2)]
    for other in others:
        other.wait_ready()
    assert not left.exists() and len(list(server.temporary.iterdir())) == 2  # those that live are left alone
    for other in others:
        other.process.send_signal(signal.SIGTERM)
        assert other.end()[0] == 0


def test_no_folder_for_the_socket_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("a" * 100)
    long.mkdir()
    monkeypatch.setattr(run_dir, "FALLBACKS", ())
    monkeypatch.setattr(run_dir.tempfile, "tempdir", str(long))
    with pytest.raises(Unserved, match=r"a{100}: AF_UNIX path too long\); set TMPDIR"):
        Supervisor(Config(model="m"))
    assert list(long.iterdir()) == []


def test_an_engine_that_dies_again_and_again_ends_the_server_with_the_reason(server: Server) -> None:
    server.wait_ready()
    server.flag("crash").write_text("4")
    status, output = server.end(30.0)
    assert status == 1
    (told,) = (line for line in output.splitlines() if line.startswith("UNSERVED"))
    assert told.startswith("UNSERVED the engine process ended with status 4; what it wrote stands above; it had been")
    assert "started anew 2 times within 600 s" in told and "max_engine_restarts=2" in told
    assert output.count("boom: the last line") == 3
    assert server.flag("web-stopped").exists()
    assert server.api() == 0


def test_a_new_engine_needs_no_port_that_somebody_took_meanwhile(server: Server) -> None:
    server.wait_ready()
    (run_dir,) = server.temporary.iterdir()
    port = json.loads((run_dir / "engine-0" / "engine.json").read_text())["metrics_port"]
    server.flag("slow-start").touch()
    server.kill_engine()
    wait_for(lambda: server.probe("/health/ready")[0] == 503)
    with bind_when_free(port) as taken:
        taken.listen()
        server.flag("slow-start").unlink()
        server.wait_ready()
        assert server.probe("/metrics")[1].endswith("\nfake_metric 1\n")
        assert server.restarts("died") == 1


def test_without_restarts_the_engines_death_ends_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = Server(tmp_path_factory.mktemp("s"), restarts=0)
    server.wait_ready()
    server.kill_engine()
    status, output = server.end()
    assert status == 1
    assert output.rstrip().endswith("UNSERVED the engine process ended with signal SIGKILL; what it wrote stands above")


def test_a_compilation_that_is_required_and_failed_is_not_tried_again(server: Server) -> None:
    server.wait_ready()
    server.flag("crash").write_text(str(REQUIRED_COMPILATION_FAILED))
    status, output = server.end()
    assert status == 1 and output.count("boom") == 1 and "started anew" not in output


def test_engine_that_refuses_at_start_leaves_one_sentence(tmp_path_factory: pytest.TempPathFactory) -> None:
    control = tmp_path_factory.mktemp("s")
    (control / "refuse").touch()
    status, output = Server(control).end()
    assert status == 1
    assert output.rstrip().splitlines()[-1] == "UNSERVED a reason for refusing" and output.count("a reason") == 1
    assert "status 7" not in output


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of three words, in the files that a model folder has."""
    words = WordLevel({"<unk>": 0, "la": 1, "end": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def stream(server: Server, max_tokens: int) -> http.client.HTTPResponse:
    return complete(server, max_tokens, stream=True)


def complete(server: Server, max_tokens: int, stream: bool = False) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = json.dumps({"model": "m", "prompt": "la la", "max_tokens": max_tokens, "stream": stream})
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    return connection.getresponse()


def first_data(response: http.client.HTTPResponse) -> bytes:
    """The first data line; comments that only keep the connection alive may come before it."""
    while (line := response.readline()).startswith(b":") or line == b"\n":
        pass
    return line


@pytest.fixture
def real_web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    control = tmp_path_factory.mktemp("s")
    write_tokenizer(control)
    server = Server(control, web="gunicorn")
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.communicate(timeout=15)


def test_gunicorn_streams_through_a_drain_and_refuses_new_requests(real_web: Server) -> None:
    real_web.wait_ready()
    running = stream(real_web, max_tokens=30)  # 3 s at a token each 0.1 s
    assert running.status == 200 and first_data(running).startswith(b"data: ")
    real_web.process.send_signal(signal.SIGTERM)
    wait_for(lambda: real_web.probe("/health/ready")[0] == 503)
    time.sleep(1.2)  # over a heartbeat of the web process
    assert stream(real_web, max_tokens=1).status == 503
    rest = running.read().decode()
    assert '"finish_reason":"length"' in rest.replace(" ", "") and rest.endswith("data: [DONE]\n\n")
    status, output = real_web.end()
    assert status == 0, output


@pytest.fixture
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds packages of our names, in one with a tokenizer."""
    control = tmp_path_factory.mktemp("s")
    write_tokenizer(control)
    for name in ("kernels", "compiler", "runtime", "web", "gunicorn", "ctypes"):
        package = control / "project" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise SystemExit('the wrong package')")
    return control / "project"


def test_children_import_our_packages_wherever_they_start(hostile: Path) -> None:
    command = module_command("pagegraph.runtime.config")  # which imports another of our packages
    subprocess.run(command, cwd=hostile, env=child_environment(), check=True)


@pytest.mark.slow
def test_served_from_a_folder_that_holds_packages_of_our_names(hostile: Path) -> None:
    server = Server(hostile.parent, web="gunicorn", folder=hostile)
    server.wait_ready()
    assert first_data(stream(server, max_tokens=1)).startswith(b"data: ")
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] == 0


@pytest.mark.slow
def test_two_hundred_requests_at_once_are_for_the_engine_to_queue(real_web: Server) -> None:
    """With one web process and no setting of threads."""
    real_web.wait_ready()
    body = json.dumps({"prompt": "la la", "max_tokens": 900, "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
    )
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", real_web.port), 20)) for _ in range(200)]
        for each in sockets:
            each.sendall(request)
        assert {each.recv(12) for each in sockets} == {b"HTTP/1.1 200"}
        started = time.monotonic()
        assert real_web.api() == 200 and time.monotonic() - started < 2.0


def test_a_killed_engine_ends_what_has_begun_and_the_next_one_gets_the_rest(real_web: Server) -> None:
    real_web.wait_ready()
    running = stream(real_web, max_tokens=900)
    assert first_data(running).startswith(b"data: ")
    real_web.flag("hold").touch()
    with ThreadPoolExecutor(4) as threads:
        waiting = []
        for count in (3, 2, 4, 1):
            waiting.append(threads.submit(complete, real_web, max_tokens=count))
            wait_for(lambda count=count: real_web.flag("submitted").read_text().endswith(f" {count} "))
        real_web.flag("submitted").unlink()
        real_web.flag("slow-start").touch()
        real_web.kill_engine()
        killed = time.monotonic()
        rest = running.read().decode()
        assert time.monotonic() - killed < 1.0
        assert '"code":"engine_dead"' in rest and rest.endswith("data: [DONE]\n\n") and '"length"' not in rest
        wait_for(lambda: real_web.probe("/health") == (503, '{"status":"restarting"}'))
        assert real_web.probe("/health/live")[0] == 200 and real_web.api() == 200
        assert get(f"http://127.0.0.1:{real_web.port}/health") == (503, '{"status":"restarting"}')
        refused = complete(real_web, max_tokens=1)
        assert refused.status == 503 and json.loads(refused.read())["error"]["code"] == "engine_dead"
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert "pagegraph:engine_up" in real_web.probe("/metrics")[1]
        assert not any(one.done() for one in waiting)
        real_web.flag("slow-start").unlink()
        real_web.flag("hold").unlink()
        answers = [one.result() for one in waiting]
    assert [json.loads(answer.read())["usage"]["completion_tokens"] for answer in answers] == [3, 2, 4, 1]
    assert real_web.flag("submitted").read_text() == "3 2 4 1 "
    assert real_web.restarts("died") == 1
    real_web.wait_ready()
    assert complete(real_web, max_tokens=2).status == 200
    text = real_web.probe("/metrics")[1]
    of_completions = 'handler="/v1/completions",method="POST"'
    assert f'http_requests_total{{{of_completions},status="5xx"}} 1.0\n' in text
    assert f"http_request_duration_seconds_count{{{of_completions}}} 7.0\n" in text
    assert float(re.search(r"^process_start_time_seconds (.*)$", text, re.M)[1]) == pytest.approx(time.time(), abs=600)  # type: ignore[index]


def test_a_request_that_ends_every_engine_is_given_up_with_the_second(real_web: Server) -> None:
    real_web.wait_ready()
    refused = complete(real_web, max_tokens=666)
    assert refused.status == 500 and "ended twice" in json.loads(refused.read())["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"
    wait_for(lambda: real_web.restarts("died") == 2)
    real_web.wait_ready()
    real_web.wait_web_ready()
    assert complete(real_web, max_tokens=2).status == 200


def test_what_waits_for_an_engine_that_does_not_come_ends_with_an_error(real_web: Server) -> None:
    real_web.wait_ready()
    real_web.flag("hold").touch()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(complete, real_web, max_tokens=5)
        wait_for(lambda: real_web.flag("submitted").exists())
        real_web.flag("slow-start").touch()
        real_web.kill_engine()
        wait_for(lambda: real_web.probe("/health") == (503, '{"status":"restarting"}'))
        real_web.process.send_signal(signal.SIGTERM)
        assert waiting.result().status == 503
    real_web.process.send_signal(signal.SIGTERM)
    assert real_web.end()[0] == 130


@pytest.mark.skipif(sys.platform != "linux", reason="children end with a killed parent on Linux only")
def test_children_end_with_a_killed_supervisor(server: Server) -> None:
    server.wait_ready()
    server.process.kill()
    wait_for(lambda: server.flag("engine-stopped").exists() and server.flag("web-stopped").exists())


def test_a_taken_port_is_refused_before_the_model_loads(tmp_path_factory: pytest.TempPathFactory) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(Unserved, match=rf"port={port} on 127.0.0.1.*--port"):
            bind("127.0.0.1", port, "port")
        with pytest.raises(Unserved, match=rf"probe_port={port}"):
            Probes("127.0.0.1", port, lambda: READY, list, bytes)
    with pytest.raises(Unserved, match="probe_host=192.0.2.1.*--probe-host"):
        Probes("192.0.2.1", 0, lambda: READY, list, bytes)


def test_a_probe_that_leaves_is_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    asked = threading.Semaphore(0)

    def health() -> Health:
        asked.release()
        time.sleep(0.1)
        return READY

    probes = Probes("127.0.0.1", 0, health, list, bytes)
    for _ in range(3):
        with socket.create_connection(probes.address.rsplit(":", 1), 5) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
            connection.sendall(b"GET /health/live HTTP/1.1\r\n\r\n")
            assert asked.acquire(timeout=5)
    time.sleep(0.3)
    probes.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::1"])
def test_probes_listen_where_they_are_told(host: str) -> None:
    probes = Probes(host, 0, lambda: DRAINING, list, bytes)
    assert probes.address.startswith("127.0.0.1:" if host == "0.0.0.0" else "[::1]:")
    assert get(f"http://{probes.address}/health/live") == (200, '{"status":"draining"}')
    assert get(f"http://{probes.address}/health/ready") == (503, '{"status":"draining"}')
    probes.close()


def test_bound_port_refuses_connections_until_it_listens() -> None:
    bound = bind("127.0.0.1", 0, "port")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname(), timeout=1)
    bound.close()


def test_without_an_engine_the_servers_own_metrics_stand_alone() -> None:
    unheard = f"http://127.0.0.1:{free_port()}/metrics"
    probes = Probes("127.0.0.1", 0, lambda: LOADING, lambda: [unheard], lambda: b"own 1\n")
    assert get(f"http://{probes.address}/metrics") == (200, "own 1\n")
    assert [get(f"http://{probes.address}/health/{asked}")[0] for asked in ("live", "ready")] == [200, 503]
    probes.close()


def test_banner_gives_capacity_and_hides_the_key() -> None:
    info = EngineInfo("m", "cpu", "bfloat16", 100, 8192, 1001, 16, "compiling")
    text = banner(Config(model="org/name", api_key="s3cret"), info, ("0.0.0.0", 8000), "127.0.0.1:9000")
    assert "1,001 blocks of 16 = 16,000 tokens" in text and "http://127.0.0.1:8000" in text
    assert "bfloat16, compiling, serving uncompiled" in text
    assert '"model": "org/name"' in text and "s3cret" not in text and "$API_KEY" in text


@pytest.mark.parametrize(
    "state, said",
    [("off", "float32, not compiled\n"), ("failed", "compilation failed"), ("compiled", "float32, compiled\n")],
)
def test_banner_says_what_the_steps_run(state: str, said: str) -> None:
    info = EngineInfo("m", "cpu", "float32", 100, 8192, 1001, 16, state)
    assert said in banner(Config(model="org/name"), info, ("127.0.0.1", 8000), "127.0.0.1:9000")
