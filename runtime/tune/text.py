"""What was found, as a text of at most 100 columns: before and after, what was tried, what was left out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from pagegraph.runtime.tune.measurement import Measurement
from pagegraph.runtime.tune.tuning import Tuned
from pagegraph.runtime.tune.written import shown

WIDTH = 100
# heading: figure, format
ROWS = {
    "goodput, requests/s": ("request_goodput", ".2f"),
    "requests/s": ("request_throughput", ".2f"),
    "output tokens/s": ("output_throughput", ".1f"),
    "TTFT p50, ms": ("p50_ttft_ms", ".0f"),
    "TTFT p99, ms": ("p99_ttft_ms", ".0f"),
    "ITL p50, ms": ("p50_itl_ms", ".1f"),
    "ITL p99, ms": ("p99_itl_ms", ".1f"),
}


def text_of(one: Tuned) -> str:
    """All sections."""
    return "\n\n".join("\n".join(lines) for section in (_table(one), _said(one)) if (lines := list(section)))


def _table(one: Tuned) -> Iterator[str]:
    before, after = one.found.baseline, one.found.best
    yield f"{'':<24}{'before':>12}{'after':>12}{'change':>10}"
    for title, (key, form) in ROWS.items():
        was, now = before.figures[key], after.figures[key]
        if was is not None and now is not None:
            yield _row(title, format(was, form), format(now, form), was, now)
    was, now = (_mib(run) for run in (before, after))
    yield _row("weights and KV, MiB", f"{was:.0f}", f"{now:.0f}", was, now)


def _row(title: str, was_text: str, now_text: str, was: float, now: float) -> str:
    change = f"{now / was - 1:+.0%}" if was else ""
    return f"{title:<24}{was_text:>12}{now_text:>12}{change:>10}"


def _said(one: Tuned) -> Iterator[str]:
    found = one.found
    if found.changes:
        keys = ", ".join(f"{key}: {shown(key, change.after)}" for key, change in found.changes.items())
        yield from _wrapped(f"changed: {keys}")
    else:
        yield from _wrapped(
            f"nothing better was found: the configuration stays as it is. Of {len(found.tried)} that were tried none was"
            f" better than it by more than {found.spread.value:.1%}, twice"
        )
    for title, lines in (
        ("tried", [f"{a.key}={shown(a.key, a.value)}: {a.outcome}{f' ({a.reason})' if a.reason else ''}" for a in found.tried]),
        ("left out", [f"{key}: {reason}" for key, reason in found.left_out]),
        ("not finished within the budget", found.not_reached),
    ):  # fmt: skip
        if lines:
            yield f"{title}:"
            for line in lines:
                yield from _wrapped(line, "  ")


def _wrapped(text: str, indent: str = "") -> Sequence[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False)


def _mib(one: Measurement) -> float:
    return one.memory / (1 << 20)
