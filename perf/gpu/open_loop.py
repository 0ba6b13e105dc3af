"""Poisson arrivals of chat lengths, a few long prompts among them, at our server and then at vLLM's.

Both get the peer folder's `load_open_loop.py` with the same seeds: TTFT, and the time between tokens of the streams that
run. Our server has its defaults. Knows the servers by command line, log and HTTP alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perf.floors import MAX_MODEL_LEN, MODELS
from perf.gpu.engine_steps import in_vllm, install_vllm
from perf.gpu.offline import config_of
from perf.gpu.report import Report
from perf.gpu.serve import SETTLE_SECONDS, Server, write_tokenizer

READY_SECONDS = 200
MAX_NUM_SEQS = 256
WARM_SEED, WARM_SECONDS = 999, 4
COMPARED = ("ttft_short_p50", "ttft_short_p90", "ttft_long_p50", "itl_p50", "itl_p99", "itl_p999", "out_tok_s")


def open_loop(report: Report, args: argparse.Namespace, shared: dict) -> None:
    """A row for each server and rate, milliseconds; then ours over vLLM's."""
    model = args.models[0]
    folder = Path(tempfile.mkdtemp(prefix="pagegraph-open-loop-"))
    (folder / "config.json").write_text(json.dumps(MODELS[model]))
    write_tokenizer(folder, MODELS[model]["vocab_size"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    found: dict[str, dict[float, dict]] = {}
    with _ours(report, args, folder, model) as port:
        found["pagegraph"] = _rates(report, args, "pagegraph", port, model)
    if "vllm" in args.engines:
        install_vllm(report, args)
        with _vllm(report, args, folder, model) as port:
            found["vllm"] = _rates(report, args, "vllm", port, model)
        for rate, ours in found["pagegraph"].items():
            theirs = found["vllm"][rate]
            report.row(rate=rate, **{f"{name}_ratio": ours[name] / theirs[name] for name in COMPARED if name in ours})


@contextmanager
def _ours(report: Report, args: argparse.Namespace, folder: Path, model: str) -> Iterator[int]:
    base = config_of(args, model)
    server = Server(
        dict(model=str(folder), served_model_name="m", load_format="dummy", dtype=base.dtype, device=args.device,
             max_model_len=base.max_model_len, max_num_seqs=base.max_num_seqs, compile=base.compile,
             kv_cache_memory=base.kv_cache_memory, workers=args.workers),
        folder,
    )  # fmt: skip
    try:
        report.fact(ready_s=server.ready_s)
        time.sleep(SETTLE_SECONDS if args.device == "cuda" else 0)
        yield int(server.address.rpartition(":")[2])
    finally:
        server.stop()


@contextmanager
def _vllm(report: Report, args: argparse.Namespace, folder: Path, model: str) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = in_vllm(
        args, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--load-format", "dummy", "--served-model-name", "m",
        "--max-num-seqs", MAX_NUM_SEQS, "--max-model-len", MAX_MODEL_LEN[model], "--host", "127.0.0.1", "--port", port,
    )  # fmt: skip
    begin, path = time.perf_counter(), folder / "vllm.log"
    with open(path, "w") as log:
        environment = {**os.environ, "PY": sys.executable}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while not _healthy(port):
            if process.poll() is not None or time.perf_counter() - begin > READY_SECONDS:
                raise RuntimeError(f"vLLM's server did not come up: {path.read_text(errors='replace')[-1500:]}")
            time.sleep(0.2)
        report.fact(vllm_ready_s=time.perf_counter() - begin)
        yield port
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its own group alone
        except ProcessLookupError:
            pass
        process.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def _rates(report: Report, args: argparse.Namespace, engine: str, port: int, model: str) -> dict[float, dict]:
    """A warm-up, then a row for each rate. Each rate has a seed of its own, or prompts would repeat."""
    _load(args, port, model, args.rates[-1], WARM_SECONDS, WARM_SEED)
    rows = {}
    for rate in args.rates:
        rows[rate] = _load(args, port, model, rate, args.load_seconds, round(rate))
        report.row(engine=engine, **rows[rate])
    return rows


def _load(args: argparse.Namespace, port: int, model: str, rate: float, seconds: float, seed: int) -> dict:
    given = dict(rate=rate, seconds=seconds, seed=seed, vocab=MODELS[model]["vocab_size"], port=port)
    flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, args.peer / "load_open_loop.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 200)
    if done.returncode:
        raise RuntimeError(f"the load failed: {done.stderr[-600:]}")
    found = json.loads(done.stdout)
    if found["bad"] or found["wrong_len"]:
        raise RuntimeError(f"{found['bad']} of {found['sent']} requests failed: {found['first_bad'][:600]}")
    short, long, gaps = (
        found[key] or [] for key in ("ttft_short_p50_p90_p99", "ttft_long_p50_p99", "itl_p50_p99_p999_max")
    )
    return dict(
        rate=rate, requests=found["ok"], out_tok_s=found["out_tok_s"],
        **dict(zip(("ttft_short_p50", "ttft_short_p90", "ttft_short_p99"), short)),
        **dict(zip(("ttft_long_p50", "ttft_long_p99"), long)),
        **dict(zip(("itl_p50", "itl_p99", "itl_p999", "itl_max"), gaps)),
    )  # fmt: skip
