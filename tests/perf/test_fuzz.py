"""The fuzz of the whole server, shorter; and what it sends and takes for a failure."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pagegraph.web.openapi.routes import ROUTES
from perf import fuzz

(CHAT,) = (route for route in ROUTES if route.path == "/v1/chat/completions")
ERROR = b'{"error": {"message": "no", "type": "t", "param": null, "code": null}}'


@pytest.mark.slow
def test_a_server_withstands_broken_requests(tmp_path: Path) -> None:
    found = fuzz.fuzz(3000, seed=7, folder=tmp_path)
    assert found["holds"], found
    assert found["requests"] == 3000 and found["by_status"][200] > 300 < found["by_status"][400]


def test_the_same_requests_come_of_the_same_seed_and_others_of_another() -> None:
    def some(seed: int) -> list[bytes]:
        return [fuzz.made(random.Random(f"{seed} {number}"))[2] for number in range(200)]

    assert some(1) == some(1) != some(2) and len(set(some(1))) > 150


@pytest.mark.parametrize(
    ("status", "body", "media", "wrong"),
    [
        (200, b"{}", "application/json", ""),
        (200, b"{", "application/json", "no JSON"),
        (200, b'data: {"error": {}}', "text/event-stream", "a stream that failed"),
        (400, ERROR, "application/json", ""),
        (400, b"{}", "application/json", "without an error"),
        (400, ERROR.replace(b"no", b""), "application/json", "without a message"),
        (402, ERROR, "application/json", "status 402"),
        (500, ERROR, "application/json", "status 500"),
        (503, ERROR, "application/json", "status 503"),
    ],
)
def test_what_counts_as_a_failure(status: int, body: bytes, media: str, wrong: str) -> None:
    fault = fuzz._fault(status, body, media, "POST", CHAT)
    assert wrong in fault and bool(fault) == bool(wrong)


def test_a_request_whose_end_nobody_knows_ends_its_connection() -> None:
    head = b"POST / HTTP/1.1\r\nContent-Length: %s\r\n\r\nbody"
    assert not fuzz.unfinished(head % b"4")
    assert fuzz.unfinished(head % b"5") and fuzz.unfinished(head % b"-1")
    assert fuzz.unfinished(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nbody")
