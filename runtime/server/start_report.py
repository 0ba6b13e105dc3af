"""Where the time of a start went: the table in the log once the server answers.

Knows seconds by phase; knows nothing of what a phase does. Imports no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

# In this order; a phase that is not here stands behind those that are.
PHASES = {
    "command": "command line and settings",
    "imports": "imports of the engine process",
    "tokenizer": "tokenizer",
    "source": "model's files",
    "wrap": "model without weights, probe",
    "weights": "weights",
    "passes": "passes over modules",
    "memory": "memory profile, KV cache",
    "compile": "compiled forward",
    "graphs": "first CUDA graphs",
    "engine": "engine",
    "web": "web processes",
}


def process_age() -> float:
    """Seconds since this process began; since it asked first where the system does not say."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            began = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return max(float(uptime.read().split()[0]) - began, 0.0)
    except OSError:
        return time.perf_counter() - _FIRST


_FIRST = time.perf_counter()


def table(total: float, seconds: Mapping[str, float], parts: Mapping[str, Mapping[str, float]]) -> str:
    """One line a phase, those of a phase's parts below it, and what no phase took."""
    known = [*(name for name in PHASES if name in seconds), *(name for name in seconds if name not in PHASES)]
    lines = [f"ready after {total:.1f} s:"]
    for name in known:
        lines.append(f"{seconds[name]:8.1f} s  {PHASES.get(name, name)}")
        lines += [f"{part_s:12.1f} s  {part}" for part, part_s in parts.get(name, {}).items()]
    lines.append(f"{max(total - sum(seconds.values()), 0.0):8.1f} s  between them")
    return "\n".join(lines)
