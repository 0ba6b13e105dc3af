"""The server as its users start it: how fast 512 streams are against the same work offline, and how long a start takes.

`runtime serve` runs beside this process on loopback, in its process group, with random weights and a tokenizer made up for the
vocabulary; `runtime bench serve` drives it from processes of its own. Knows the server by its command line, log, and HTTP alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import yaml
from tokenizers import decoders, models, pre_tokenizers

from pagegraph.compiler.build import build_compiled
from pagegraph.runtime.engine.compiler_options import compiler_options
from perf.floors import MODELS
from perf.gpu.offline import Offline, config_of, random_prompts
from perf.gpu.report import Report

ROOT = Path(__file__).resolve().parents[2]
SERVE = ("-m", "pagegraph.runtime.cli", "serve")
PROMPT, OUTPUT = 128, 256
SIZES, TINY_SIZES = (512, 1024), (16, 48)  # streams, requests
READY_SECONDS = 200
SETTLE_SECONDS = 15  # idle, for the graphs that a start leaves out
LOADED, ADDRESS = re.compile(r"loaded: (.*)"), re.compile(r"http://(127\.0\.0\.1:\d+)")
POOL = re.compile(r"KV cache .* = ([\d,]+) tokens")
COUNTERS = ("engine_steps_total", "engine_step_tokens_total", "engine_padding_tokens_total", "graph_hit_ratio")


class Server:
    """`runtime serve` on a free loopback port; raises RuntimeError with the end of its log if it does not come up.

    `command`: what Python runs, with the configuration's file behind it.
    """

    def __init__(self, settings: dict[str, object], folder: Path, command: Sequence[str] = SERVE) -> None:
        path, self._log = folder / "config.yaml", folder / "server.log"
        path.write_text(yaml.safe_dump({**settings, "port": 0}))
        self.begin = time.perf_counter()
        with open(self._log, "w") as log:
            whole = [sys.executable, *command, str(path)]
            self._process = subprocess.Popen(whole, cwd=ROOT, stdout=log, stderr=log)
        try:
            self.wait_for(LOADED)
            self.loaded_s = time.perf_counter() - self.begin  # from here on a step can run
            self.address = self.wait_for(ADDRESS)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.perf_counter() - self.begin

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self._process.pid

    def wait_for(self, pattern: re.Pattern) -> str:
        """The first group of the pattern in its log, waited for."""
        while time.perf_counter() - self.begin < READY_SECONDS:
            if found := pattern.search(self.text()):
                return found[1]
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"the server did not come up: {self.text()[-1500:]}")

    def text(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    def phases(self) -> dict[str, float]:
        """Seconds by phase, as the engine's log says them."""
        return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s", LOADED.search(self.text())[1])}

    def counters(self) -> dict[str, float]:
        """The engine's metrics of the moment."""
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {name: float(re.search(rf"^pagegraph:{name}\{{[^}}]*\}} (\S+)$", text, re.M)[1]) for name in COUNTERS}

    def load(self, model: str, streams: int, requests: int, output: int, seed: int) -> dict:
        """What `runtime bench serve` found, under the names of the stored results; RuntimeError if a request failed."""
        name = f"load-{seed}.json"
        given = dict(model="m", max_concurrency=streams, num_prompts=requests, input_len=PROMPT, output_len=output,
                     vocab_size=MODELS[model]["vocab_size"], seed=seed, processes=min(6, os.cpu_count() or 1),
                     metric_percentiles="50,90,99", result_dir=self._log.parent, result_filename=name)  # fmt: skip
        flags = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        command = [
            sys.executable,
            "-m",
            "pagegraph.runtime.cli",
            "bench",
            "serve",
            "--base-url",
            f"http://{self.address}",
        ]
        done = subprocess.run(
            [*command, *flags, "--save-detailed"],
            cwd=ROOT,
            timeout=500,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if done.returncode:
            raise RuntimeError(f"the load failed: {done.stderr.decode(errors='replace')[-600:]}")
        found = json.loads((self._log.parent / name).read_text())
        if found["failed"] or found["total_output_tokens"] != requests * output:
            raise RuntimeError(f"{found['failed']} of {requests} requests failed: {max(found['errors'])[:600]}")
        return dict(
            requests=requests, wall_s=found["duration"], out_tokens=requests * output, out_tok_s=found["output_throughput"],
            tokens_an_event=requests * output / sum(1 + len(gaps) for gaps in found["itls"]),
            **{f"{metric}_p{at}_ms": found[f"p{at}_{metric}_ms"] for metric in ("ttft", "itl") for at in (50, 90, 99)},
            client_busy=found["client_busy"],
        )  # fmt: skip

    def answers(self, prompts: list[list[int]], output: int) -> list[str]:
        """Greedy answers of so many tokens, one prompt after the other."""
        texts = []
        for prompt in prompts:
            asked = dict(model="m", prompt=prompt, max_tokens=output, temperature=0, ignore_eos=True)
            request = urllib.request.Request(
                f"http://{self.address}/v1/completions",
                json.dumps(asked).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                texts.append(json.load(answer)["choices"][0]["text"])
        return texts

    def stop(self) -> None:
        """SIGTERM to the supervisor, which ends its children; SIGKILL after a minute, which its children do not outlive."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer.json in which every id stands for text: the bytes, then made-up words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [f"Ġ{id:x}" for id in range(len(letters), vocab_size)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def _settings(args: argparse.Namespace, model: str, folder: Path, streams: int) -> dict[str, object]:
    """The server's configuration: that of the offline run, and the web's."""
    base = config_of(args, model)
    write_tokenizer(folder, MODELS[model]["vocab_size"])
    return dict(
        model=base.model, tokenizer=str(folder), served_model_name="m", load_format="dummy", dtype=base.dtype, device=args.device,
        max_model_len=base.max_model_len, max_num_seqs=streams, max_num_batched_tokens=base.max_num_batched_tokens,
        enable_prefix_caching=False, compile=base.compile, kv_cache_memory=base.kv_cache_memory, workers=args.workers,
        threads=16 + streams, max_queue=2 * streams,  # connections do not spread evenly: each worker could take all
    )  # fmt: skip


def serve(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """Streams over HTTP, then the same number of like requests offline; both after a warm-up."""
    model = args.models[0]
    streams, requests = TINY_SIZES if args.tiny else SIZES
    folder = Path(tempfile.mkdtemp(prefix="pagegraph-serve-"))
    settings = _settings(args, model, folder, streams)
    server = Server(settings, folder)
    try:
        tokens = int(server.wait_for(POOL).replace(",", ""))
        report.fact(
            workers=args.workers,
            ready_s=server.ready_s,
            phases_s=server.phases(),
            pool_tokens=tokens,
            pool_seqs=tokens // (PROMPT + OUTPUT),
        )
        time.sleep(SETTLE_SECONDS if args.device == "cuda" else 0)
        server.load(model, streams, streams, 32, seed=1)
        before = server.counters()
        found = server.load(model, streams, requests, OUTPUT, seed=0)
        after = server.counters()
    finally:
        server.stop()
    steps, tokens, padding = (after[name] - before[name] for name in COUNTERS[:3])
    hits = (
        after["graph_hit_ratio"] * after["engine_steps_total"]
        - before["graph_hit_ratio"] * before["engine_steps_total"]
    )
    report.row(way="served", **found,
               steps=int(steps), in_graphs=hits / steps, padding=padding / (tokens + padding))  # fmt: skip
    config = config_of(args, model, max_num_seqs=streams)
    built = build_compiled(compiler_options(config), progress=False)
    offline = Offline(config, built)
    offline.run(random_prompts(1, [PROMPT] * streams, built.vocab_size), [32] * streams)
    run = offline.run(random_prompts(0, [PROMPT] * requests, built.vocab_size), [OUTPUT] * requests)
    rate = requests * OUTPUT / run.seconds
    report.row(
        way="offline",
        requests=requests,
        wall_s=run.seconds,
        out_tok_s=rate,
        steps=len(run.steps),
        in_graphs=run.graph_hits / len(run.steps),
    )
    report.fact(served_over_offline=found["out_tok_s"] / rate)
    built.step.close()


def startup(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """A server's start with empty and with filled caches, by phase, and the first token of the first request; seconds.

    Both have to give the same tokens, once the graphs that a start leaves out are captured: until then a size may run
    padded to another, with that one's kernels.
    """
    model = args.models[0]
    streams, _ = TINY_SIZES if args.tiny else SIZES
    cache = tempfile.mkdtemp(prefix="pagegraph-cache-")
    prompts = random_prompts(2, [40, 700], MODELS[model]["vocab_size"])
    answers = []
    for caches in ("cold", "warm"):
        folder = Path(tempfile.mkdtemp(prefix="pagegraph-start-"))
        settings = {**_settings(args, model, folder, 256 if not args.tiny else streams), "compile_cache_dir": cache}
        server = Server(settings, folder)
        try:
            first = server.load(model, 1, 1, 16, seed=0)
            phases = server.phases()
            report.row(
                caches=caches,
                first_bucket_s=server.loaded_s,
                ready_s=server.ready_s,
                first_request_ms=first["ttft_p50_ms"],
                **phases,
            )
            time.sleep(SETTLE_SECONDS if args.device == "cuda" else 0)
            answers.append(server.answers(prompts, 48))
        finally:
            server.stop()
    if answers[0] != answers[1]:
        report.failure("a start with filled caches answers with other tokens than one with empty caches")
