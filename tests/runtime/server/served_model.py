"""A server of a tiny random model in real processes, whose engine is `faulty_engine`, and plain HTTP to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.paths import ROOT
from tests.web.web_process import eventually

DRIVER = """
import json, logging, sys
from pagegraph.runtime.config import Config
from pagegraph.runtime.server.listen import Unserved
from pagegraph.runtime.server.supervisor import Supervisor
logging.basicConfig(level="INFO")
try:
    sys.exit(Supervisor(Config(**json.loads(sys.argv[1])), [sys.executable, sys.argv[2]]).run())
except Unserved as error:
    sys.exit(f"UNSERVED {error}")
"""
START_S = 120.0


def tiny_model(folder: Path, tokenizer_folder: Path) -> Path:
    """Two layers with weights of their own, in float32."""
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    vocab = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ask(
    port: int, method: str, path: str, content: str | bytes | None, headers: dict[str, str]
) -> http.client.HTTPResponse:
    """The answer, whose body is still to be read; closing it closes the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    closes = answer.close

    def close() -> None:
        closes()
        connection.close()

    answer.close = close
    return answer


class ServedModel:
    """One server; keyword arguments are keys of its configuration."""

    def __init__(self, model: Path, step_s: float = 0.0, **settings: Any) -> None:
        ports = [_free_port(), _free_port()]
        self.port, self.probe_port = ports
        config = {
            "model": str(model), "served_model_name": "m", "device": "cpu", "dtype": "float32", "compile": False,
            "kv_cache_memory": 64 << 20, "max_model_len": 4096, "port": self.port, "probe_port": self.probe_port,
            "workers": 1, "num_threads": 1, **settings,
        }  # fmt: skip
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(config), str(Path(__file__).with_name("faulty_engine.py"))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PAGEGRAPH_TEST_STEP_S": str(step_s)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.wait(lambda: self.get("/health", self.probe_port)[0] == 200, START_S)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def engine_pid(self) -> int:
        (pid,) = self.engine_pids
        return pid

    @property
    def engine_pids(self) -> list[int]:
        """By rank."""
        found = [child for child in _children(self.process.pid) if "faulty_engine" in _command(child)]
        return sorted(found, key=_command)  # which ends with the folder of the rank

    @property
    def web_pids(self) -> list[int]:
        (master,) = [child for child in _children(self.process.pid) if "gunicorn" in _command(child)]
        return _children(master)

    def wait(self, condition: Callable[[], bool], seconds: float = 15.0) -> float:
        """Seconds until it came true."""
        asked = time.monotonic()
        met = eventually(lambda: condition() or self.process.poll() is not None, seconds)
        assert met and condition(), f"it did not come true:\n{self.output}"
        return time.monotonic() - asked

    def get(self, path: str, port: int = 0) -> tuple[int, bytes]:
        """Status and body; status 0 where nobody answers."""
        try:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=10)) as asked:
                asked.request("GET", path)
                answer = asked.getresponse()
                return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""

    def metric(self, name: str, engine: int | None = None) -> float:
        """Summed over its labels, or those of one engine; 0 where it is not there."""
        text = self.get("/metrics", self.probe_port)[1].decode()
        labels = "(?:{.*})?" if engine is None else f'{{.*engine="{engine}".*}}'
        return sum(float(value) for value in re.findall(rf"^pagegraph:{name}{labels} (\S+)$", text, re.M))

    def post(self, path: str, key: str | None = None, **body: Any) -> http.client.HTTPResponse:
        """The answer, whose body is still to be read; closing it closes the connection."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return ask(self.port, "POST", path, json.dumps({"model": "m"} | body), headers)

    def complete(self, **body: Any) -> http.client.HTTPResponse:
        return self.post("/v1/completions", **{"prompt": "hello", "ignore_eos": True, "temperature": 0} | body)

    def leaving(self, **body: Any) -> socket.socket:
        """A connection whose completion has been asked for and is not read; closing it is a client that leaves."""
        data = json.dumps({"model": "m", "ignore_eos": True} | body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        connection = socket.create_connection(("127.0.0.1", self.port), 20)
        connection.sendall(f"{head}\r\n\r\n".encode() + data)
        return connection

    def free(self) -> bool:
        """Whether nothing runs or waits, and no block is held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return self.metric("engine_up") == 1 and not any(map(self.metric, names))

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)


@contextlib.contextmanager
def served(model: Path, **settings: Any) -> Iterator[ServedModel]:
    server = ServedModel(model, **settings)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # two at once are one
        server.process.send_signal(signal.SIGTERM)  # ends the drain
        server.process.wait(40)


def first_event(answer: http.client.HTTPResponse) -> bytes:
    """The first line with data of a stream."""
    while not (line := answer.readline()).startswith(b"data:"):
        assert line, "the stream ended"
    return line


def _free_port() -> int:

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
