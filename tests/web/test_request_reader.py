"""Requests are the same wherever their bytes are cut; what is no request is an error of HTTP, not of ours."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagegraph.web.errors import ApiError
from pagegraph.web.request_reader import MAX_HEAD_BYTES, RequestReader

MAX_BODY = 2000
HEAD = b"POST /v1/x?y=1 HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

names = st.sampled_from(["X-A", "Accept", "x-stainless-os", "Cookie"])
values = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
headers = st.lists(st.tuples(names, values), max_size=4).map(
    lambda pairs: "".join(f"{n}: {v}\r\n" for n, v in pairs).encode()
)
bodies = st.binary(max_size=300)
pieces = st.lists(st.binary(min_size=1, max_size=60), max_size=6)


def of_length(head: bytes, body: bytes) -> bytes:
    return HEAD + head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def in_chunks(head: bytes, parts: list[bytes]) -> bytes:
    sent = b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in parts)
    return HEAD + head + b"Transfer-Encoding: chunked\r\n\r\n" + sent + b"0\r\nX-Trailer: 1\r\n\r\n"


requests = st.one_of(st.builds(of_length, headers, bodies), st.builds(in_chunks, headers, pieces))


def read(parts: list[bytes]) -> list[Any]:
    """What a reader makes of the bytes: its requests, and the status of the error that ended them."""
    reader, found = RequestReader(MAX_BODY), []
    try:
        for part in parts:
            reader.feed(part)
            while (request := reader.request()) is not None:
                body = request.body.read()
                found.append(
                    (request.method, request.path, request.query, request.headers, body, request.should_close())
                )
    except ApiError as error:
        found.append(error.status)
    return found


@given(st.data(), st.lists(requests, min_size=1, max_size=3))
def test_cuts_change_nothing(data: st.DataObject, sent: list[bytes]) -> None:
    stream = b"".join(sent) + GET
    whole = read([stream])
    assert len(whole) == len(sent) + 1 and whole[-1][1] == "/last" and whole[-1][-1]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    ends = [*cuts, len(stream)]
    assert read([stream[start:end] for start, end in zip([0, *cuts], ends)]) == whole
    assert read([bytes([byte]) for byte in stream]) == whole


begun = st.builds(lambda start, rest: start + rest, st.sampled_from([HEAD, CHUNKED, b"GET "]), st.binary(max_size=300))


@given(st.binary(max_size=400) | begun)
def test_garbage_is_refused_or_incomplete(garbage: bytes) -> None:
    found = read([garbage[start : start + 50] for start in range(0, len(garbage), 50)])
    assert all(not isinstance(answer, int) or 400 <= answer < 600 for answer in found)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (CHUNKED + b"ZZ\r\n", 400),
        (CHUNKED + b"5\r\nhelloXX", 400),
        (CHUNKED + b"1\r\na\r\n0\r\nContent-Length: 4\r\n\r\n", 400),
        (CHUNKED + b"1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n", 400),
        (CHUNKED + b"0\r\n" + b"X: %b\r\n" % (b"a" * MAX_HEAD_BYTES), 431),
        (CHUNKED + b"1;" + b"a" * MAX_HEAD_BYTES, 431),
        (CHUNKED + b"400\r\n" + b"a" * 1024 + b"\r\n400\r\n" + b"a" * 1024, 413),
        (CHUNKED + b"7d1\r\n", 413),
        (CHUNKED + b"400\r\n" + b"a" * 1024 + b"\r\n3d1;a=b\r\na", 413),
        (CHUNKED + b"f" * 20 + b"\r\n", 413),
        (HEAD + b"Content-Length: 2001\r\n\r\n", 413),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1, 2\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (HEAD + b"Host: b\r\n\r\n", 400),
        (HEAD + b"X y: 1\r\n\r\n", 400),
        (HEAD + b"Expect: a-miracle\r\n\r\n", 417),
        (HEAD + b"X: 1\r\n" * 101 + b"\r\n", 431),
        (HEAD + b"X: " + b"a" * MAX_HEAD_BYTES, 431),
        (HEAD + b"X: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * MAX_HEAD_BYTES, 414),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"ALLTHELETTERSOFTHEALPHABET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
def test_what_is_no_request_has_its_status(sent: bytes, status: int) -> None:
    assert read([sent]) == [status]


def test_a_chunk_that_is_too_long_is_refused_before_it_comes() -> None:
    reader = RequestReader(MAX_BODY)
    reader.feed(CHUNKED + b"7d0\r\n" + b"a" * 1000)  # 2000: as much as may be
    assert reader.request() is None and reader.received == 1000
    reader.feed(b"a" * 1000 + b"\r\n1")
    assert reader.request() is None
    with pytest.raises(ApiError) as refused:
        reader.feed(b"\r\n")
        reader.request()
    announced = RequestReader(MAX_BODY)
    announced.feed(HEAD + b"Content-Length: 2001\r\n\r\n")
    with pytest.raises(ApiError) as as_before:
        announced.request()
    assert (refused.value.status, refused.value.message) == (as_before.value.status, as_before.value.message)


def test_many_small_chunks_are_refused() -> None:
    reader = RequestReader(8 << 20)
    reader.feed(CHUNKED)
    assert reader.request() is None
    with pytest.raises(ApiError, match="chunks"):
        for _ in range(100):
            reader.feed(b"1\r\na\r\n" * 2000)
            assert reader.request() is None


def test_headers_cannot_stand_for_the_servers_variables() -> None:
    sent = HEAD + b"SCRIPT_NAME: /v1\r\nPATH_INFO: /v1\r\nREMOTE_USER: root\r\nX_Forwarded_For: 1\r\nX-Real: 2\r\n\r\n"
    ((_, path, _, found, _, _),) = read([sent])
    assert path == "/v1/x" and found == [("HOST", "a"), ("X-REAL", "2")]


def test_targets() -> None:
    sent = b"GET http://h/v1/models?x HTTP/1.1\r\nHost: h\r\n\r\n"
    sent += b"GET //v1 HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\n\r\n\r\nGET /0 HTTP/1.0\r\n\r\n"
    assert [(path, query, close) for _, path, query, _, _, close in read([sent])] == [
        ("/v1/models", "x", False), ("//v1", "", False), ("/0", "", True)
    ]  # fmt: skip


def test_a_body_is_let_go_once_read() -> None:
    reader = RequestReader(MAX_BODY)
    reader.feed(of_length(b"", b"hello"))
    request = reader.request()
    assert request is not None and request.body.read(2) == b"he" and request.body.getvalue() == b"hello"
    assert request.body.read() == b"llo" and request.body.getvalue() == b"" and request.body.read() == b""
