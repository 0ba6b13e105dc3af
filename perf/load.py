"""A load generator for one server: streams of /v1/completions over plain sockets, one request a connection.

    python -m perf.load --address 127.0.0.1:8000 --streams 512 --requests 1024 --vocab 151936 --out load.json

Several processes share the streams and start together; each only counts events and notes times, so that it can say
from its own processor time whether it was what limited. Knows HTTP and server-sent events; knows no engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np

EVENT = b"data: {"
TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
START_SECONDS = 2.0  # for all processes to stand ready: the clock starts after it
TIMEOUT = 400  # seconds for the whole load


class Stream(asyncio.Protocol):
    """One request from its connection to the end of its answer."""

    def __init__(self, body: bytes, host: str, done: asyncio.Future) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self._request, self._done = head.encode() + body, done
        self._head, self._tail = b"", b""
        self.times: list[float] = []  # of each packet that held events
        self.started = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if len(self._head) < 64:
            self._head += data[:300]
        if EVENT in data:
            self.times.append(time.monotonic())
        self._tail = (self._tail + data)[-600:]

    def connection_lost(self, error: Exception | None) -> None:
        if self._done.done():
            return
        tokens = TOKENS.findall(self._tail)
        if b" 200 " in self._head[:16] and tokens and b"[DONE]" in self._tail:
            self._done.set_result((self.started, self.times, int(tokens[-1])))
        else:
            self._done.set_exception(RuntimeError(f"{error or ''} {self._head[:300]!r} ... {self._tail[-300:]!r}"))


async def _drive(args: argparse.Namespace, index: int, begin: float, left: Synchronized) -> dict[str, object]:
    """This process's share of the streams; each takes the next of the requests that all of them have `left`."""
    host, port = args.address.rsplit(":", 1)
    rng = np.random.default_rng(args.seed)  # the requests are the same whichever process takes them
    bodies = [
        json.dumps(
            dict(model=args.model, prompt=rng.integers(3, args.vocab, args.prompt).tolist(), max_tokens=args.output, temperature=0,
                 ignore_eos=True, stream=True, stream_options={"include_usage": True})
        ).encode() for _ in range(args.requests)
    ]  # fmt: skip
    await asyncio.sleep(max(0.0, begin - time.monotonic()))
    loop, found, errors, cpu = asyncio.get_running_loop(), [], [], time.process_time()

    async def worker() -> None:
        while (request := _take(left)) is not None:
            done = loop.create_future()
            try:
                await loop.create_connection(lambda: Stream(bodies[request], args.address, done), host, int(port))
                found.append(await done)
            except (OSError, RuntimeError) as error:
                errors.append(f"{type(error).__name__}: {error}"[:600])

    streams = len(range(index, args.streams, args.processes))
    async with asyncio.timeout(TIMEOUT):
        await asyncio.gather(*(worker() for _ in range(streams)))
    end = time.monotonic()
    return dict(found=found, errors=errors, end=end, busy=(time.process_time() - cpu) / (end - begin))


def _take(left: Synchronized) -> int | None:
    """The number of a request that no process has taken yet."""
    with left.get_lock():
        left.value -= 1
        return left.value if left.value >= 0 else None


def _run(args: argparse.Namespace, index: int, begin: float, left: Synchronized, queue: multiprocessing.Queue) -> None:
    try:
        queue.put(asyncio.run(_drive(args, index, begin, left)))
    except BaseException as error:  # the parent waits for one answer of each
        queue.put(dict(found=[], errors=[f"{type(error).__name__}: {error}"], end=time.monotonic(), busy=0.0))
        raise


def load(args: argparse.Namespace) -> dict[str, object]:
    """Rates over the wall time from the first request to the last answer; times in milliseconds."""
    context = multiprocessing.get_context("fork")
    queue, left, begin = context.Queue(), context.Value("q", args.requests), time.monotonic() + START_SECONDS
    processes = [
        context.Process(target=_run, args=(args, index, begin, left, queue)) for index in range(args.processes)
    ]
    for process in processes:
        process.start()
    parts = [queue.get(timeout=TIMEOUT + 30) for _ in processes]
    for process in processes:
        process.join()
    found, errors = [one for part in parts for one in part["found"]], [one for part in parts for one in part["errors"]]
    if not found:
        return dict(requests=0, errors=len(errors), first_error=errors[0] if errors else "")
    wall = max(part["end"] for part in parts) - begin
    first = 1e3 * np.array([times[0] - start for start, times, _ in found])
    gaps = 1e3 * np.concatenate([np.diff(times[:-1]) for _, times, _ in found])  # the last event is the usage
    tokens = sum(count for *_, count in found)
    return dict(
        requests=len(found), errors=len(errors), first_error=errors[0] if errors else "", wall_s=wall, out_tokens=tokens,
        out_tok_s=tokens / wall, tokens_a_packet=tokens / sum(len(times) for _, times, _ in found),
        **{f"ttft_p{at}_ms": float(np.percentile(first, at)) for at in (50, 90, 99)},
        **{f"itl_p{at}_ms": float(np.percentile(gaps, at)) for at in (50, 90, 99)},
        client_busy=max(part["busy"] for part in parts),
    )  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--address", required=True, help="host:port")
    p.add_argument("--model", default="m", help="the served model's name")
    p.add_argument("--streams", type=int, default=512, help="requests at a time")
    p.add_argument("--requests", type=int, default=1024)
    p.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    p.add_argument("--output", type=int, default=256, help="tokens of an answer")
    p.add_argument("--vocab", type=int, required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--processes", type=int, default=4)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    args.out.write_text(json.dumps(load(args)))


if __name__ == "__main__":
    main()
