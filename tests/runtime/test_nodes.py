"""nnodes: machines that share a model, here as process groups that meet over sockets alone: one answer, and one end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pagegraph.runtime.config import ConfigError, load_config
from pagegraph.runtime.engine import links, node_process
from pagegraph.runtime.engine.node_process import follow_node_0
from pagegraph.runtime.engine.ranks import refusal
from pagegraph.runtime.llm import LLM
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.server.listen import Unserved
from tests.compiler.architectures import tiny_config
from tests.compiler.model.test_paged import random_model
from tests.paths import ROOT
from tests.runtime.server.served_model import first_event, served
from tests.runtime.test_tensor_parallel import GREEDY, PROMPTS, SETTINGS, logprobs
from tests.web.web_process import eventually

pytestmark = pytest.mark.timeout(400)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> str:
    """Of a model whose heads four ranks can share."""
    shutil.copytree(tokenizer_folder, tmp_path / "llama")
    config = tiny_config("llama", num_key_value_heads=4, max_position_embeddings=4096)
    random_model(config).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


class Node:
    """`runtime serve` of a node other than the first."""

    def __init__(self, folder: str, size: int, port: int) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pagegraph.runtime.cli",
                "serve",
                folder,
                "--tensor-parallel-size",
                str(size),
                "--nnodes",
                "2",
            ],
            cwd=ROOT,
            env={**os.environ, "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._output: list[str] = []
        self._reader = threading.Thread(target=lambda: self._output.extend(self.process.stdout or ()), daemon=True)
        self._reader.start()

    @property
    def ranks(self) -> list[int]:
        return [
            int(path.name) for path in Path("/proc").iterdir()
            if path.name.isdigit() and (path / "status").exists()
            and f"PPid:\t{self.process.pid}\n" in (path / "status").read_text()
        ]  # fmt: skip

    def ends(self) -> tuple[int, str]:
        """Its status and what it wrote."""
        status = self.process.wait(60)
        self._reader.join(10)
        return status, "".join(self._output)


@contextlib.contextmanager
def node(folder: str, size: int, port: int) -> Iterator[Node]:
    running = Node(folder, size, port)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def meeting(port: int, size: int) -> dict[str, Any]:
    return dict(tensor_parallel_size=size, nnodes=2, master_addr="127.0.0.1", master_port=port)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_give_the_tokens_of_one_process(folder: str) -> None:
    expected = LLM(folder, progress=False, **SETTINGS).generate(PROMPTS, GREEDY)
    port = free_port()
    with node(folder, 4, port) as other:
        llm = LLM(folder, progress=False, **SETTINGS, **meeting(port, 4))
        try:
            got = llm.generate(PROMPTS, GREEDY)
            sampled = SamplingParams(max_tokens=8, temperature=0.8, seed=3)
            assert len(other.ranks) == 2
            assert len(llm.generate(PROMPTS[:1], sampled)[0].token_ids) == 8
        finally:
            llm.close()
        status, told = other.ends()
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    for one, right in zip(got, expected):
        assert logprobs(one) == pytest.approx(logprobs(right), abs=1e-4)
    assert status == 0, told  # the end of node 0 is no failure


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["node 1", "its rank", "the engine of node 0"])
def test_the_end_of_one_is_the_end_of_both(folder: str, victim: str) -> None:
    """Streams end with an error, and nobody hangs: the server ends too, for the other node has to be started with it."""
    port = free_port()
    with (
        node(folder, 2, port) as other,
        served(Path(folder), step_s=0.01, kv_cache_memory=8 << 20, **meeting(port, 2)) as server,
    ):
        (rank,) = other.ranks
        stream = server.complete(prompt=[5, 6, 7], stream=True, max_tokens=2000)
        assert stream.status == 200, stream.read()
        first_event(stream)
        os.kill({"node 1": other.process.pid, "its rank": rank}.get(victim, server.engine_pid), signal.SIGKILL)
        assert b"engine_dead" in stream.read()
        assert server.process.wait(60) != 0
        status, told = other.ends()
        assert status != 0
        if victim == "node 1":
            assert "node 1 of 2 has ended, or does not answer" in server.output
        elif victim == "its rank":
            assert "node 1 of 2: rank 1 of 2 ended with signal SIGKILL" in server.output
            assert "rank 1 of 2 ended with signal SIGKILL" in told
        else:
            assert "node 0 has ended, or does not answer" in told
        assert eventually(lambda: not Path(f"/proc/{rank}").exists(), 20)  # none is left behind


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_that_gets_a_signal_ends_well_and_node_0_says_so(
    folder: str, tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    elsewhere = str(shutil.copytree(folder, tmp_path / "another"))
    with (
        node(elsewhere, 2, port) as other,
        served(Path(folder), kv_cache_memory=8 << 20, **meeting(port, 2)) as server,
    ):
        os.kill(other.process.pid, number)
        status, told = other.ends()
        assert status == 0, told
        assert f"node 1 of 2 ends: it got {number.name}" in told
        assert f"model={folder} is node 0's, and counts; this node was given {elsewhere}" in told
        assert server.process.wait(60) != 0
        assert f"node 1 of 2: it got {number.name}" in server.output


@pytest.mark.slow
def test_a_port_in_use_is_one_sentence(folder: str) -> None:
    with links.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "pagegraph.runtime.cli", "serve", folder, "--device", "cpu", "--port", "0"]
        command += ["--tensor-parallel-size", "2", "--nnodes", "2"]
        ended = subprocess.run(
            [*command, "--master-addr", "127.0.0.1", "--master-port", str(port)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
    assert ended.returncode == 1
    assert f"Error: master_addr=127.0.0.1 master_port={port}: Address already in use; name an address" in ended.stdout
    assert "Traceback" not in ended.stdout


def answered_by(answer: Callable[[socket.socket], None]) -> int:
    """The port of who answers one node."""
    listener = links.listen("127.0.0.1", 0)

    def serve() -> None:
        connection, _ = listener.accept()
        with listener, connection:
            answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def test_a_node_that_node_0_does_not_want_or_that_is_left_alone_ends(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []

    def refuse(connection: socket.socket) -> None:
        said.append(links.heard(connection))
        links.send(connection, "refused", "node 0 has nnodes=3")

    config = load_config(folder, {**meeting(answered_by(refuse), 2), "node_rank": 1}).config
    with pytest.raises(Unserved, match="master_addr=127.0.0.1 master_port=.*: node 0 has nnodes=3"):
        follow_node_0(config)
    assert said == [["node", "1", "2", "2"]]
    config = load_config(folder, {**meeting(answered_by(lambda connection: None), 2), "node_rank": 1}).config
    with pytest.raises(Unserved, match="node 0 ended, or did not say within 300 s what to compute"):
        follow_node_0(config)
    monkeypatch.setattr(node_process, "REACH_S", 0.3)
    with links.listen("127.0.0.1", 0) as silent:  # another service, that waits for more
        config = load_config(folder, {**meeting(silent.getsockname()[1], 2), "node_rank": 1}).config
        with pytest.raises(Unserved, match="did not say within 0.3 s what to compute; is it node 0 that listens there"):
            follow_node_0(config)
    config = load_config(folder, {**meeting(free_port(), 2), "node_rank": 1}).config
    with pytest.raises(Unserved, match="node 0 does not answer there"):
        follow_node_0(config)


def test_a_node_that_does_not_go_with_node_0_is_told_what_both_have() -> None:
    told = refusal(2, 4, ["node", "1", "2", "8"])
    assert told.startswith(
        "node 0 has nnodes=2 and tensor_parallel_size=4, and waits for each node_rank from 1 to 1 once"
    )
    assert told.endswith("this one has node_rank=1, nnodes=2 and tensor_parallel_size=8")
    assert refusal(2, 4, ["hello"]).endswith("this one said hello")


def test_the_offline_api_is_node_0(folder: str) -> None:
    with pytest.raises(ConfigError, match="node_rank=1: node 0 has the engine; here, run `runtime serve`"):
        LLM(folder, progress=False, **SETTINGS, **meeting(free_port(), 2), node_rank=1)


def test_what_the_first_rank_is_told_are_words() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        links.say(ours, "failed", "no memory")
        assert links.heard(theirs) == ["failed", "no memory"]
        for content in (b"\x80\x04.", b"{}", b"[]", b"[1]"):
            links.put(ours, content)
            assert links.heard(theirs) is None
        ours.sendall((links.MOST_WORDS + 1).to_bytes(8, "little"))
        assert links.heard(theirs) is None


def test_nodes_that_do_not_go_together_are_refused_by_name() -> None:
    for given, told in (
        (
            dict(tensor_parallel_size=3, nnodes=2, master_addr="h"),
            "tensor_parallel_size=3 ranks .* nnodes=2 .* set it to 2 or 4",
        ),
        (dict(tensor_parallel_size=2, nnodes=2), "master_addr is missing: nnodes=2 meet at an address of node 0"),
        (
            dict(tensor_parallel_size=2, nnodes=2, node_rank=2, master_addr="h"),
            "node_rank=2 is none of nnodes=2: set nnodes .* one of 0 to 1",
        ),
        (dict(node_rank=1), "node_rank=1 is none of nnodes=1: set nnodes to the number of machines, or node_rank to 0"),
        (
            dict(tensor_parallel_size=2, nnodes=2, master_addr="10.0.0.1:4000"),
            "master_addr=10.0.0.1:4000 has a port; set master_addr to 10.0.0.1, and master_port to 4000",
        ),
        (
            dict(tensor_parallel_size=2, nnodes=2, master_addr="h", data_parallel_size=2),
            "data_parallel_size=2 .* set it to 1",
        ),
    ):
        with pytest.raises(ConfigError, match=told):
            load_config("org/m", given, {})
    variables = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    several = dict(tensor_parallel_size=4, nnodes=2)
    config = load_config("org/m", several, variables).config
    assert (config.node_rank, config.nodes_meet_at) == (1, ("10.0.0.1", 4000))
    assert load_config("org/m", {**several, "node_rank": 0}, variables).config.node_rank == 0  # a flag comes first
    assert load_config("org/m", {**several, "master_addr": "fd00::1"}, {}).config.nodes_meet_at == ("fd00::1", 29500)
    alone = load_config("org/m", {}, variables)  # a launcher's, which has nothing to do with this
    assert alone.config.nodes_meet_at is None and alone.config.node_rank == 0
    with pytest.raises(ConfigError, match="NODE_RANK: node_rank=x"):
        load_config("org/m", several, {**variables, "NODE_RANK": "x"})
