"""How long the offline engine takes to stand ready, each time in a process of its own: with an empty cache and a filled one.

The cache is a folder made for the bench, never the user's. Run as `python -m pagegraph.runtime.bench.startup SETTINGS`,
this module is the process that starts one engine and prints what it took. Knows no flags and no printing for people.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pagegraph.runtime.bench.client import Tick
from pagegraph.runtime.bench.measures import Figures
from pagegraph.runtime.bench.offline import seconds_summary
from pagegraph.runtime.config import load_config
from pagegraph.runtime.server.child import child_environment, module_command

COMPILATION = "compile"  # the phase of that name
TOLD = 2000  # characters of what a process that failed wrote


@dataclass(frozen=True)
class Start:
    """Seconds of one start: of imports, of `LLM(...)` until it can generate, of its phases, of the first token then."""

    import_time: float
    total_startup_time: float
    first_token_time: float
    phases: dict[str, float]

    @property
    def compilation_time(self) -> float:
        return self.phases.get(COMPILATION, 0.0)


def measure(
    path: str, overrides: Mapping[str, str], *, cold: int, warmups: int, warm: int, tick: Tick = lambda: None
) -> tuple[list[Start], list[Start]]:
    """(`cold` starts, each with an empty cache; `warm` ones with what the last of those and `warmups` more left).

    Raises RuntimeError with the end of its output if a start fails.
    """
    found: list[Start] = []
    with tempfile.TemporaryDirectory(prefix="pagegraph-bench-") as folder:
        for index in range(cold + warmups + warm):
            cache = Path(folder, str(min(index, max(cold - 1, 0))))
            found.append(_start(path, {**overrides, "compile_cache_dir": str(cache)}))
            tick()
    return found[:cold], found[cold + warmups :]


def figures(cold: Sequence[Start], warm: Sequence[Start]) -> Figures:
    """Under the names of `vllm bench startup`, with imports, phases and first tokens beside them."""
    found: Figures = {}
    for state, starts in (("cold", cold), ("warm", warm)):
        for name, seconds in (
            ("startup", [one.total_startup_time for one in starts]),
            ("compilation", [one.compilation_time for one in starts]),
            ("import", [one.import_time for one in starts]),
            ("first_token", [one.first_token_time for one in starts]),
        ):
            mean, _, percentiles = seconds_summary(seconds)
            found |= {
                f"avg_{state}_{name}_time": mean,
                f"{state}_{name}_times": seconds,
                f"{state}_{name}_percentiles": percentiles,
            }
        found[f"{state}_phases"] = [one.phases for one in starts]
    return found


def _start(path: str, overrides: Mapping[str, str]) -> Start:
    settings = json.dumps({"path": path, "overrides": overrides})
    done = subprocess.run(
        module_command(__name__, settings), env=child_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"a start failed: {(done.stderr or done.stdout)[-TOLD:].strip()}")
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def _main(settings: Mapping[str, object]) -> None:
    """Start one engine and generate one token."""
    path, overrides = settings["path"], settings["overrides"]
    assert isinstance(path, str) and isinstance(overrides, dict)
    config = load_config(path, overrides).config
    begin = time.perf_counter()
    from pagegraph.runtime.llm import LLM  # its import is what is timed
    from pagegraph.runtime.sampling_params import SamplingParams

    imported = time.perf_counter()
    llm = LLM(config, progress=False)
    ready = time.perf_counter()
    llm.generate([[1]], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    answered = time.perf_counter()
    found = Start(imported - begin, ready - imported, answered - ready, dict(llm.built.timings.seconds))
    llm.close()
    print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
