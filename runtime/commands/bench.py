"""`runtime bench`: the group of the benches, each in a module of its own that is imported when it is run."""

from __future__ import annotations

import click

from pagegraph.runtime.cli import CONTEXT, LazyGroup

COMMANDS: dict[str, tuple[str, str, str]] = {
    "serve": ("pagegraph.runtime.commands.bench_serve", "serve", "Measure any server of the OpenAI protocol."),
    "throughput": (
        "pagegraph.runtime.commands.bench_offline",
        "throughput",
        "How fast the offline engine does many requests.",
    ),
    "latency": ("pagegraph.runtime.commands.bench_offline", "latency", "How long one batch of requests takes."),
    "startup": ("pagegraph.runtime.commands.bench_startup", "start", "How long the engine takes to start."),
    "report": ("pagegraph.runtime.commands.bench_report", "make", "Plots of stored runs as one HTML page."),
}


@click.group(cls=LazyGroup, commands_by_name=COMMANDS, context_settings=CONTEXT)
def bench() -> None:
    """Measure a server or this engine. Flags and JSON keys are those of vLLM's benches; see docs/bench.md."""
