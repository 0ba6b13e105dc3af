"""Clients of the field against a real server, each case by the client's own judgement: `make clients`.

What a client reported of the server started here is stored in `results`, which docs/clients.md shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.clients import LIMIT_S, RESULTS, Client, all_clients
from tests.clients.server import Server, running_elsewhere, started

pytestmark = [pytest.mark.clients, pytest.mark.timeout(LIMIT_S + 60)]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that the environment names, or one that is started for this session."""
    if (elsewhere := running_elsewhere()) is not None:
        yield elsewhere
        return
    with started(tmp_path_factory.mktemp("server")) as ours:
        yield ours


@pytest.mark.parametrize("client", all_clients(), ids=lambda client: client.name)
def test_client(client: Client, server: Server, tmp_path: Path) -> None:
    if not client.installed:
        pytest.skip(f"{client.name} is not installed; `make clients CLIENT={client.name}` installs and runs it")
    found = client.run(server.environment(), tmp_path / "report.json")
    log = found.pop("log")
    if server.ours:
        (RESULTS / f"{client.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    failed = [f"{case['feature']}, {case['name']}: {case['error']}" for case in found["cases"] if not case["ok"]]
    assert found["cases"], f"{client.name} has no cases"
    assert not failed, "\n".join([*failed, log])
