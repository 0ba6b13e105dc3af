"""What a section finds: rows printed as they come and kept in a JSON file after each, and device timing.

Knows no engine. A file of rows survives the process that wrote it, whatever ends that process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pagegraph.compiler.profile.device_time import median_seconds
from pagegraph.runtime.bench.report import write_text
from perf.floors import Ceilings


class Report:
    """Rows of the sections of one process. `seconds` is what a section may take before it skips the rest."""

    def __init__(self, path: Path, machine: dict[str, object], seconds: float) -> None:
        self.path = path
        self.machine = machine
        self.seconds = seconds
        self.sections: list[dict] = []
        self._columns: list[str] = []
        self._deadline = 0.0

    @contextmanager
    def section(self, name: str, model: str | None) -> Iterator[None]:
        """Rows until the end belong to it; it counts as failed unless it comes to its end."""
        print(f"\n== {name} {model or ''}".rstrip(), flush=True)
        start = time.perf_counter()
        self._deadline = start + self.seconds
        self._columns = []
        self.sections.append(
            {"section": name, "model": model, "ok": False, "error": "did not end", "facts": {}, "rows": []}
        )
        self._save()
        try:
            yield
            self.sections[-1].update(ok=not self.sections[-1].get("failures"), error="")
        except Exception as error:
            self.sections[-1]["error"] = f"{type(error).__name__}: {error}"[:2000]
            raise
        finally:
            self.sections[-1]["seconds"] = round(time.perf_counter() - start, 2)
            self._save()
        print(
            f"-- {name} {'ok' if self.sections[-1]['ok'] else 'FAILED'}, {self.sections[-1]['seconds']} s", flush=True
        )

    def row(self, *, show: bool = True, **values: object) -> None:
        """One line of the table; a new header where the columns change."""
        self.sections[-1]["rows"].append(values)
        self._save()
        if not show:
            return
        if list(values) != self._columns:
            self._columns = list(values)
            print("  ".join(f"{name:>10}" for name in values))
        print("  ".join(f"{_text(value):>10}" for value in values.values()), flush=True)

    def fact(self, **values: object) -> None:
        """Something that holds for the whole section."""
        self.sections[-1]["facts"].update(values)
        self._save()
        print("  ".join(f"{name} {_text(value)}" for name, value in values.items()), flush=True)

    def failure(self, text: str) -> None:
        """A wrong result: the section goes on and counts as failed."""
        failures = self.sections[-1].setdefault("failures", [])
        failures.append(text[:2000])
        self._save()
        if len(failures) <= 20:
            print(f"FAILED {text[:600]}", flush=True)

    def time_is_over(self) -> bool:
        """Whether the section has used the seconds it was given."""
        return time.perf_counter() > self._deadline

    def out_of_time(self, left: object) -> bool:
        """`time_is_over`; where it is, says what is `left` out from here on."""
        if self.time_is_over():
            self.fact(skipped_for_time=f"from {left} on")
            return True
        return False

    def _save(self) -> None:
        write_text(self.path, json.dumps({"machine": self.machine, "sections": self.sections}, default=str))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_text(one)}" for key, one in value.items()) + "}"
    return str(value)


def graph_seconds(calls: Sequence[Callable[[], object]], budget_s: float = 0.03, replays: int | None = None) -> float:
    """Median seconds of one call, all of them captured in one CUDA graph that is replayed back to back.

    replays: a number instead of what fits in `budget_s`.
    """
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    return median_seconds(graph.replay, budget_s, replays) / len(calls)


def ceilings(size: int = 1 << 30) -> Ceilings:
    """Copy bandwidth over `size` bytes and the rate of an 8192-cubed bf16 product on random data."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    bandwidth = (
        2 * size / graph_seconds([lambda: torch.mul(source, 1.0, out=target)] * 4)
    )  # a kernel: graphs copy by a slower engine
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(bandwidth, 2 * 8192**3 / graph_seconds([lambda: torch.mm(a, b)] * 2, 0.2))
