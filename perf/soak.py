"""A server under mixed requests for an hour, of which many are abandoned: is its memory flat, and is nothing left behind?

    nice python -m perf.soak --minutes 60 --out perf/results/cpu-DAY-soak.json

`runtime serve` of a tiny random model, uncompiled, on two web processes. Requests come at a fixed rate: read to their end,
left after some events, left before the answer, refused. Resident memory and threads of each process are sampled every ten
seconds; memory counts as flat where its median over the last sixth is within `--tolerance` of that over the second sixth. At the
end nothing may run, wait or hold a block. Ends with status 1 where one of this does not hold. Knows the server by its
command line, HTTP and /proc alone.

What stands before the second sixth is not counted: the first one, and a warm-up. A thread that a busy moment starts stays, with
a stack and what the tokenizer remembers for it, 0.1 MB. So that no later moment can start another, each web process is first
alone with as many requests as ever come at once, the others being stopped meanwhile; then they are asked some times over
together. Caches of a bounded size that fill slower than in the first sixth count as growth.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from pagegraph.runtime.doctor.rules import Metrics
from perf.compare import record
from perf.tiny import num_threads, processes, resident, tiny_server

SAMPLE_S = 10.0
BURSTS = 20  # of the warm-up
MOST_AT_ONCE = 64  # clients of the load: a server that stands still shows as requests that were not begun
WORDS = 400  # of a prompt at most, so that some take several chunks of a step
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--minutes", type=float, default=60.0)
    p.add_argument("--rate", type=float, default=3.0, help="requests a second")
    p.add_argument("--tolerance", type=float, default=0.02, help="share by which memory may grow")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="pagegraph-soak-") as folder:
        found = soak(args, Path(folder))
    result = record(args, **found)
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    sys.exit(0 if result["holds"] else 1)


def soak(args: argparse.Namespace, folder: Path) -> dict:
    """What came of the requests, memory by process, and whether all of it held."""
    server = tiny_server(
        folder,
        max_model_len=2048,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        kv_cache_memory=32 << 20,
    )
    try:
        load = Load(server.address, args.rate, args.seed)
        load.start_threads([pid for name, pid in processes(server.pid).items() if re.fullmatch(r"web \d+", name)])
        samples = load.run(60 * args.minutes, lambda: dict(kib=resident(server.pid), threads=num_threads(server.pid)))
        left = settled(server.address)
    finally:
        server.stop()
    growth = {name: grown([one["kib"][name] for one in samples]) for name in samples[-1]["kib"]}
    flat = all(abs(share) <= args.tolerance for share in growth.values())
    holds = flat and not any(left.values()) and not load.wrong and not load.not_begun
    return dict(
        requests=sum(load.counts.values()), by_kind=dict(load.counts), wrong=load.wrong[:20], not_begun=load.not_begun,
        growth=growth, flat=flat, left=left, holds=holds, samples=samples,
    )  # fmt: skip


class Load:
    """Requests at a fixed rate, each in a thread. `wrong`: answers that are not what was asked for."""

    def __init__(self, address: str, rate: float, seed: int) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.not_begun = 0
        self._address = address
        self._rate = rate
        self._draw = random.Random(seed)
        self._free = threading.BoundedSemaphore(MOST_AT_ONCE)
        self._kinds: dict[str, Callable[[dict, random.Random], None]] = {
            "read": self._read, "streamed": self._streamed, "left after some events": self._left_early,
            "left before the answer": self._left_at_once, "refused": self._refused,
        }  # fmt: skip

    def start_threads(self, web: list[int]) -> None:
        """Have each web process hold as many streams as there may be clients, while the others are stopped."""
        body = dict(model="m", prompt="a", max_tokens=1900, ignore_eos=True, stream=True)
        for alone in web:
            others = [pid for pid in web if pid != alone]
            for pid in others:
                os.kill(pid, signal.SIGSTOP)
            try:
                asked = [self._ask(body) for _ in range(MOST_AT_ONCE)]  # each is answered once it is admitted
                for connection, answer in asked:
                    answer.close()
                    connection.close()
            finally:
                for pid in others:
                    os.kill(pid, signal.SIGCONT)

    def run(self, seconds: float, sample: Callable[[], dict[str, dict[str, int]]]) -> list[dict]:
        """For so long -> samples, one every SAMPLE_S."""
        samples: list[dict] = []
        with ThreadPoolExecutor(MOST_AT_ONCE) as threads:
            for _ in range(BURSTS):
                for _ in range(MOST_AT_ONCE):
                    self._free.acquire()
                wait([self._begin(threads) for _ in range(MOST_AT_ONCE)])
            begin = time.monotonic()
            for number in range(int(seconds * self._rate)):
                time.sleep(max(begin + number / self._rate - time.monotonic(), 0.0))
                if time.monotonic() - begin >= SAMPLE_S * len(samples):
                    samples.append(dict(at_s=round(time.monotonic() - begin, 1), **sample()))
                    print(samples[-1], file=sys.stderr, flush=True)
                if not self._free.acquire(blocking=False):
                    self.not_begun += 1
                    continue
                self._begin(threads)
        return samples

    def _begin(self, threads: ThreadPoolExecutor) -> Future[None]:
        return threads.submit(self._one, self._draw.choice(list(self._kinds)), random.Random(self._draw.random()))

    def _one(self, kind: str, draw: random.Random) -> None:
        prompt = " ".join(f"{draw.randrange(256, 1000):x}" for _ in range(draw.randrange(1, WORDS)))
        body = dict(model="m", max_tokens=draw.randrange(1, 64), temperature=draw.choice((0, 1)), ignore_eos=True)
        body |= draw.choice(({}, {"n": 2, "temperature": 1}, {"stop": "zz"}, {"logprobs": 2}, {"priority": 1}))
        try:
            self._kinds[kind](body | {"prompt": prompt}, draw)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.wrong.append(f"{kind}: {error!r}")
        finally:
            self.counts[kind] += 1
            self._free.release()

    def _ask(self, body: dict) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._address, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def _read(self, body: dict, draw: random.Random) -> None:
        connection, answer = self._ask(body)
        usage = json.loads(answer.read())["usage"]
        connection.close()
        if "stop" not in body and usage["completion_tokens"] != body["max_tokens"] * body.get("n", 1):
            self.wrong.append(f"read: {usage} of {body['max_tokens']} tokens")

    def _streamed(self, body: dict, draw: random.Random) -> None:
        connection, answer = self._ask(body | {"stream": True})
        if not answer.read().endswith(b"data: [DONE]\n\n"):
            self.wrong.append("streamed: it did not end")
        connection.close()

    def _left_early(self, body: dict, draw: random.Random) -> None:
        connection, answer = self._ask(body | {"stream": True, "max_tokens": 1000})
        for _ in range(draw.randrange(1, 20)):
            answer.readline()
        answer.close()
        connection.close()

    def _left_at_once(self, body: dict, draw: random.Random) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=120)
        data = json.dumps(body | {"max_tokens": 1000})
        connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        time.sleep(draw.random() / 5)
        connection.close()

    def _refused(self, body: dict, draw: random.Random) -> None:
        connection, answer = self._ask(body | draw.choice(({"temperature": -1}, {"prompt": []}, {"n": 1000})))
        answer.read()
        connection.close()
        if answer.status != 400:
            self.wrong.append(f"refused: status {answer.status}")


def grown(kib: list[int]) -> float:
    """By what share memory grew: the medians of the last sixth and of the second one, the first being the warm-up."""
    sixth = max(len(kib) // 6, 1)
    return statistics.median(kib[-sixth:]) / statistics.median(kib[sixth : 2 * sixth] or kib) - 1


def settled(address: str) -> dict[str, float]:
    """What runs, waits and is held, once it has had ten seconds to end."""
    for _ in range(100):
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        metrics = Metrics(text)
        left = {name: metrics(name) for name in GAUGES}
        if not any(left.values()):
            break
        time.sleep(0.1)
    return left


if __name__ == "__main__":
    main()
