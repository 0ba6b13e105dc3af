"""What a bench found, as text for people and as a JSON file for scripts. Knows the figures' names and no engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pagegraph.runtime.bench.client import Tick
from pagegraph.runtime.bench.measures import Figures

WIDTH = 50
TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
# label of a line: key of its figure
SERVE_LINES = {
    "Successful requests": "completed",
    "Failed requests": "failed",
    "Maximum request concurrency": "max_concurrency",
    "Request rate configured (RPS)": "request_rate",
    "Benchmark duration (s)": "duration",
    "Total input tokens": "total_input_tokens",
    "Total generated tokens": "total_output_tokens",
    "Request throughput (req/s)": "request_throughput",
    "Request goodput (req/s)": "request_goodput",
    "Output token throughput (tok/s)": "output_throughput",
    "Peak output token throughput (tok/s)": "max_output_tokens_per_s",
    "Peak concurrent requests": "max_concurrent_requests",
    "Total token throughput (tok/s)": "total_token_throughput",
}
THROUGHPUT_LINES = {
    "Requests": "num_requests",
    "Duration (s)": "elapsed_time",
    "Requests a second": "requests_per_second",
    "Tokens a second, prompts too": "tokens_per_second",
    "Output tokens a second": "output_tokens_per_second",
    "Prompt tokens from the cache": "cached_prompt_tokens",
}
LATENCY_LINES = {"Mean of a batch (s)": "avg_latency", "Deviation (s)": "std_latency"}
STARTUP_LINES = {
    f"{title}, {state} (s)": f"avg_{state}_{name}_time"
    for state in ("cold", "warm")
    for name, title in {
        "startup": "Start",
        "compilation": "Of it compiling",
        "import": "Imports before it",
        "first_token": "First token after it",
    }.items()
}


def serve_text(found: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The lines of `bench serve`; those that were not asked for are left out."""
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    lines += [_line(label, found[key]) for label, key in SERVE_LINES.items() if found.get(key) is not None]
    names = ["mean", "median", *(f"p{at:g}" for at in percentiles)]
    for metric in metrics:
        short, title = TITLES[metric]
        lines.append(title.center(WIDTH, "-"))
        lines += [_line(f"{name.capitalize()} {short} (ms)", found[f"{name}_{metric}_ms"]) for name in names]
    return "\n".join([*lines, "=" * WIDTH])


def _line(label: str, value: Any) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label + ':':<40} {shown}"


def write_json(path: Path, found: Figures) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A whole file or none; raises OSError that says why."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextmanager
def progress(total: int, what: str, shown: bool) -> Iterator[Tick]:
    """A bar on standard error, if it is a terminal; gives the function that moves it on."""
    with tqdm(total=total, desc=what, disable=not (shown and sys.stderr.isatty()), leave=False) as bar:
        yield bar.update
