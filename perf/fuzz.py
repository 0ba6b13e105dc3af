"""A hundred thousand requests, most of them broken somehow: no 5xx, no status that is not described, no crash.

    nice python -m perf.fuzz --requests 100000 --out perf/results/cpu-DAY-fuzz.json

Each begins as the example of a route in the table that /openapi.json is made of. Then fields get values of their schema, at
and beyond its bounds, of other types, deep, long or no Unicode; or fields go, or come that nobody knows; or the bytes of the
body, its headers, its method or its path are spoiled. Against a tiny random model in real processes. An answer has to come,
whole, with a status that the table has for its route, or that the HTTP server itself gives, and an error has to say what is
wrong; 503 counts as failure, too, for the queue has room. At the end the same engine and the same web processes are there,
nothing runs or holds a block, and the log has no unforeseen error. Ends with status 1 where one of this does not hold.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import http.client
import json
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pagegraph.web.openapi.routes import ROUTES, Route
from perf.compare import record
from perf.soak import settled
from perf.tiny import processes, resident, tiny_server

THREADS = 8
# Statuses of what is no request of a route any more; 304 is of a page.
OF_NO_ROUTE = {304, 400, 404, 405, 408, 411, 413, 414, 415, 417, 431, 501, 505}
WRONG_SHOWN = 20
STRINGS = (
    "",
    " ",
    "a",
    "null",
    "\x00",
    "\ud800",
    "é" * 50,
    "\U0001f600",
    "a" * 3000,
    "{{ x }}",
    "../../etc/passwd",
    "%s%n",
    "1e999",
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 2**31, -(2**31) - 1, 2**63, 2**64, 10**30, [], {}, [None], [[]], {"": None},
    ["a"] * 200, [0] * 200, {"type": "object"}, {"type": "text", "text": "a"}, [{"role": "user", "content": "a"}],
)  # fmt: skip
HEADERS = (
    b"X-Request-Id: \xff", b"Content-Type: text/plain", b"Content-Encoding: gzip", b"Transfer-Encoding: chunked", b"Content-Length: 3",
    b"Content-Length: -1", b"Content-Length: 99999999999", b"Expect: 100-continue", b"Expect: nothing", b"Authorization: Bearer \xe9",
    b"Host:", b"Connection: close", b"Connection: upgrade", b"traceparent: 00-x", b"Accept: */nothing", b"X" * 300 + b": y",
    b"Cookie: " + b"c" * 5000, b"Range: bytes=5-", b"If-None-Match: *", b"X-HTTP-Method-Override: DELETE", b"no colon",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "get", "PROPFIND", "M" * 50)
PATHS = (
    "/",
    "//",
    "/v1",
    "/v1/",
    "/%00",
    "/%ff",
    "/..",
    "/v1/models/%2e%2e",
    "/v1//models",
    "/V1/models",
    "/docs?x=%zz",
    "*",
    "/" + "a" * 9000,
)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--requests", type=int, default=100_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="pagegraph-fuzz-") as folder:
        found = fuzz(args.requests, args.seed, Path(folder))
    result = record(args, **found)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["holds"] else 1)


def fuzz(requests: int, seed: int, folder: Path) -> dict[str, Any]:
    """What came of so many requests, and whether all of it held."""
    server = tiny_server(
        folder,
        max_model_len=64,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        max_queue=4000,
        threads=64,
        kv_cache_memory=16 << 20,
    )
    try:
        before, memory = processes(server.pid), resident(server.pid)
        attack, begin = Attack(server.address), time.perf_counter()
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda part: attack.run(range(part, requests, THREADS), seed), range(THREADS)))
        seconds, left = time.perf_counter() - begin, settled(server.address)
        same = processes(server.pid) == before
        memory = {name: [memory[name], kib] for name, kib in resident(server.pid).items()}
    finally:
        server.stop()
    unforeseen = server.text().count("unforeseen error") + server.text().count("a step failed")
    holds = same and not attack.wrong and not unforeseen and not any(left.values())
    return dict(
        requests=sum(attack.statuses.values()), seconds=seconds, by_status=dict(sorted(attack.statuses.items())),
        by_kind=dict(attack.kinds), wrong=attack.wrong[:WRONG_SHOWN], num_wrong=len(attack.wrong), unforeseen=unforeseen,
        same_processes=same, left=left, kib_before_and_after=memory, holds=holds,
    )  # fmt: skip


class Attack:
    """Sends requests and judges answers. Thread-safe: each thread calls `run` once."""

    def __init__(self, address: str) -> None:
        self.statuses: collections.Counter[int] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._address = address
        self._lock = threading.Lock()

    def run(self, numbers: range, seed: int) -> None:
        """The requests of these numbers; the same ones for the same seed."""
        with contextlib.ExitStack() as open_:
            connection: socket.socket | None = None
            for number in numbers:
                draw = random.Random(f"{seed} {number}")
                kind, route, request = made(draw)
                if connection is None:
                    host, port = self._address.split(":")
                    connection = open_.enter_context(socket.create_connection((host, int(port)), 60))
                status, keeps, fault = asked(connection, request, route)
                if not keeps:
                    connection.close()
                    connection = None
                with self._lock:
                    self.statuses[status] += 1
                    self.kinds[kind] += 1
                    if fault:
                        self.wrong.append(f"{number}, {kind}, {request[:160]!r}: {fault}")


def made(draw: random.Random) -> tuple[str, Route | None, bytes]:
    """(kind, whose route it is still a request of, its bytes)."""
    route = draw.choice([one for one in ROUTES if one.fields] * 4 + list(ROUTES))
    path = re.sub(
        r"\{\w+\}", lambda _: draw.choice(("resp_1", "a%20b", "m", "%F0%9F%98%80", "chat.js", "x" * 300)), route.path
    )
    body = json.dumps(spoiled(copy.deepcopy(route.example), route, draw)).encode() if route.fields else b""
    kind = draw.choice(("fields",) * 6 + ("bytes", "headers", "method", "path"))
    method, headers, of = route.method, [b"Content-Type: application/json"] if body else [], route
    if kind == "bytes":
        body = _bytes_spoiled(body, draw)
    elif kind == "headers":
        headers += draw.sample(HEADERS, draw.randrange(1, 4))
    elif kind == "method":
        method, of = draw.choice(METHODS), None
    elif kind == "path":
        path, of = draw.choice(PATHS), None
    head = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", *headers]
    if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in headers):
        head.append(b"Content-Length: %d" % len(body))
    return kind, None if kind == "headers" else of, b"\r\n".join(head) + b"\r\n\r\n" + body


def spoiled(body: dict[str, Any], route: Route, draw: random.Random) -> dict[str, Any]:
    """The body with some fields set, dropped or added."""
    for _ in range(draw.choice((0, 1, 1, 2, 3, 6))):
        name = draw.choice([*route.fields, "nobody", draw.choice(STRINGS)])
        how = draw.randrange(10)
        if how == 0:
            body.pop(name, None)
        elif how < 5 and name in route.fields:
            body[name] = fitting(route.fields[name][0], draw)
        else:
            body[name] = anything(draw)
    if not isinstance(body.get("n", 1), int) or body.get("n", 1) > 4:
        body["n"] = draw.choice(
            (1, 2, 129, -1, "2")
        )  # a hundred answers of one request take their time, and tell no more
    if body.get("best_of") is not None:
        body["best_of"] = draw.choice((2, 129, 0))
    return body


def fitting(schema: dict[str, Any], draw: random.Random) -> Any:
    """A value as the schema has it, often at a bound or just beyond."""
    if "anyOf" in schema:
        return fitting(draw.choice(schema["anyOf"]), draw)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", -5), schema.get("maximum", 5)
        value = draw.choice((low, high, low - 1, high + 1, draw.uniform(low, min(high, low + 100))))
        return int(value) if kind == "integer" else value
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "array":
        return [fitting(schema.get("items", {}), draw) for _ in range(draw.choice((0, 1, 2, 5)))]
    if kind == "object":
        return {name: fitting(one, draw) for name, one in schema.get("properties", {}).items() if draw.random() < 0.5}
    return draw.choice(STRINGS)


def anything(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON at all."""
    how = draw.randrange(8)
    if how == 0 and depth < 6:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    if how == 1 and depth < 6:
        return {
            draw.choice(("type", "content", "role", "a", "text", "name")): anything(draw, depth + 1) for _ in range(3)
        }
    if how == 2 and not depth:
        return nested(draw.choice((5, 40, 300)))
    return draw.choice(STRINGS) if how < 5 else draw.choice(VALUES)


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _bytes_spoiled(body: bytes, draw: random.Random) -> bytes:
    changes: tuple[Callable[[bytes], bytes], ...] = (
        lambda data: data[: draw.randrange(len(data) + 1)],
        lambda data: data + draw.choice((b"}", b"\x00", b",", b"{}", b"\xff\xfe")),
        lambda data: data.replace(b'"', draw.choice((b"'", b"", b'""'))),
        lambda data: bytes(byte ^ (draw.random() < 0.02) * draw.randrange(256) for byte in data),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.decode().encode("utf-16"),
        lambda data: b"[" * draw.choice((10, 5000, 100_000)),
        lambda data: data.replace(b":", draw.choice((b": NaN, ", b": 1e9999, ", b": -", b"::"))),
        lambda data: draw.randbytes(draw.randrange(1, 400)),
    )
    return draw.choice(changes)(body)


def asked(connection: socket.socket, request: bytes, route: Route | None) -> tuple[int, bool, str]:
    """(status, whether the connection goes on, what is wrong with the answer)."""
    method = request.partition(b" ")[0].decode("latin-1")
    answer = http.client.HTTPResponse(connection, method=method)
    try:
        # One that ends early must not be waited for: what is sent behind it is its rest, or the next request.
        connection.sendall(request)
        if unfinished(request):
            connection.shutdown(socket.SHUT_WR)
        answer.begin()
        body = answer.read()
    except (http.client.HTTPException, OSError) as error:
        if unfinished(request) and isinstance(error, (http.client.RemoteDisconnected, ConnectionError)):
            return 0, False, ""  # whoever leaves in the middle of a request is told nothing
        return 0, False, f"{error!r}"
    keeps = not answer.will_close and not unfinished(request)
    return answer.status, keeps, _fault(answer.status, body, answer.getheader("Content-Type") or "", method, route)


def unfinished(request: bytes) -> bool:
    """Whether its headers promise another body than it has, or spoil where it ends."""
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = re.findall(rb"(?im)^content-length: *(\S+)", head)
    return b"Transfer-Encoding" in head or any(one != b"%d" % len(body) for one in lengths)


def _fault(status: int, body: bytes, media: str, method: str, route: Route | None) -> str:
    known = OF_NO_ROUTE if route is None else set(route.errors) - {500, 503}
    if status != 200 and status not in known:
        return f"status {status}: {body[:300]!r}"
    if status >= 400 and method != "HEAD":
        try:
            if not json.loads(body)["error"]["message"]:
                return f"status {status} without a message"
        except (ValueError, LookupError, TypeError):
            return f"status {status} without an error: {body[:300]!r}"
    if status == 200 and media.startswith("application/json") and method != "HEAD":
        try:
            json.loads(body)
        except ValueError:
            return f"no JSON: {body[:300]!r}"
    if status == 200 and media.startswith("text/event-stream") and b'"error"' in body:
        return f"a stream that failed: {body[-300:]!r}"
    return ""


if __name__ == "__main__":
    main()
