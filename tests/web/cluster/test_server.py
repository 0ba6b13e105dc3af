"""The server behind a replica without Ray: where it is reached, how it stops, and what is told of one that does not start."""

from __future__ import annotations

import os
import queue
import signal
import urllib.request
from pathlib import Path

import pytest

from pagegraph.runtime.server.listen import Unserved
from pagegraph.web.cluster.messages import end_to_end
from pagegraph.web.cluster.server import Server
from tests.runtime.server.served_model import tiny_model

KEYS = dict(device="cpu", dtype="float32", compile=False, num_blocks=9, workers=1, num_threads=1, drain_timeout_s=0)


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set(map(int, (task / "children").read_text().split()))
    return found


@pytest.mark.slow
def test_a_server_tells_where_it_is_and_of_its_end(tmp_path: Path, tokenizer_folder: Path) -> None:
    model = tiny_model(tmp_path, tokenizer_folder)
    (tmp_path / "config.yaml").write_text(
        f"model: {model}\nhost: 0.0.0.0\nport: 8000\nprobe_port: 9000\nmax_model_len: 64\n"
    )
    ends: queue.Queue[str] = queue.Queue()
    before = children()
    server = Server(str(tmp_path / "config.yaml"), KEYS, ends.put)
    serving = server.serving
    assert serving.cached_tokens == 8 * 16
    for address in (
        serving.address,
        serving.probe_address,
    ):  # free ports of the loopback interface, whatever the file says
        assert address.startswith("127.0.0.1:") and address.rpartition(":")[2] not in ("8000", "9000")
        with urllib.request.urlopen(f"http://{address}/health", timeout=10) as answer:
            assert answer.status == 200
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    assert "signal SIGKILL" in ends.get(timeout=20)
    server.stop()

    another = Server(str(model), KEYS | {"max_model_len": 64}, ends.put)
    another.stop()
    assert children() == before and ends.empty()  # which was asked for


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(Unserved, match="model=/none does not exist"):
        Server("/none", KEYS, print)
    with pytest.raises(Unserved, match="did you mean max_num_seqs"):
        Server("/none", {"max_num_seq": 1}, print)


def test_headers_of_one_connection_are_not_passed_on() -> None:
    kept = [(b"Accept", b"*/*"), (b"x-request-id", b"1")]
    assert end_to_end([(b"Connection", b"close"), *kept, (b"Expect", b"100-continue"), (b"TE", b"trailers")]) == kept
