"""gunicorn with the app as it is deployed, and raw connections to it."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class WebProcess:
    """A gunicorn that serves `web.app`: its port and its processes."""

    port: int
    master: subprocess.Popen[bytes]

    @property
    def worker(self) -> int:
        """The pid of its one worker."""
        children = Path(f"/proc/{self.master.pid}/task/{self.master.pid}/children").read_text().split()
        return int(children[0])

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        return connect(self.port, 20, receive_buffer)

    def ask(self, request: bytes) -> bytes:
        """All that is answered to some bytes until the server closes."""
        with self.connect() as connection:
            connection.sendall(request)
            return read_to_end(connection)

    def stop(self) -> float:
        """Seconds that a stop takes."""
        asked = time.monotonic()
        self.master.send_signal(signal.SIGTERM)
        self.master.wait(20)
        return time.monotonic() - asked


def read_to_end(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(65536):
            data += more
    return data


@contextlib.contextmanager
def web_process(settings: Path, threads: int) -> Iterator[WebProcess]:
    """gunicorn with one worker on a free port, ready."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        command = [sys.executable, "-m", "gunicorn", f"pagegraph.web.app:create_app({json.dumps(str(settings))})",
                   "--config", "python:pagegraph.web.gunicorn_conf", "--bind", f"fd://{listener.fileno()}",
                   "--workers", "1", "--threads", str(threads)]  # fmt: skip
        process = WebProcess(listener.getsockname()[1], subprocess.Popen(command, pass_fds=[listener.fileno()]))
        try:
            assert eventually(lambda: b" 200 " in process.ask(b"GET /health/ready HTTP/1.0\r\n\r\n"), 30)
            yield process
        finally:
            if process.master.poll() is None:
                process.stop()


def connect(port: int, timeout: float, receive_buffer: int | None = None) -> socket.socket:
    """A new connection; `receive_buffer` bytes of unread answer fit into its socket."""
    connection = socket.socket()
    connection.settimeout(timeout)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    return connection


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
