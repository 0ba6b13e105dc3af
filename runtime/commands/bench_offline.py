"""`runtime bench throughput` and `runtime bench latency`: work through an engine in this process, without a server.

Flags are those of vLLM's commands and every key of the configuration.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pagegraph.runtime.bench import report
from pagegraph.runtime.bench.work import Request, Shape, made_up
from pagegraph.runtime.cli import config_command
from pagegraph.runtime.commands.bench_engine import (
    config_argument,
    disable_tqdm,
    engine,
    named_config,
    output_json,
    temperature,
    write,
)
from pagegraph.runtime.commands.bench_options import POSITIVE, WorkFlags, work_options
from pagegraph.runtime.commands.bench_report import report_option, write_report

WARM_REQUESTS, WARM_OUTPUT = 32, 8  # at most, of what warms up throughput


@config_command("throughput")
@config_argument
@work_options
@temperature
@output_json
@report_option
@disable_tqdm
def throughput(path: str | None, overrides: dict[str, str], **flags: Any) -> None:
    """Do all requests at once, and say how many and how many tokens a second."""
    from pagegraph.runtime.bench import offline

    named, config = named_config(path, overrides)
    work = WorkFlags.taken_from(flags, config.seed)
    with engine(config, not flags["disable_tqdm"]) as llm:

        def count_tokens(text: str) -> int:
            return len(llm.tokenizer.encode(text))

        vocab_size = min(llm.built.vocab_size, llm.tokenizer.vocab_size)
        requests = work.requests(vocab_size=vocab_size, count_tokens=count_tokens)
        warm = work.warmups(min(len(requests), WARM_REQUESTS), vocab_size=vocab_size, count_tokens=count_tokens)
        warm = [replace(one, output_len=min(one.output_len, WARM_OUTPUT)) for one in warm]
        given: dict[str, Any] = dict(ignore_eos=work.is_made_up, temperature=flags["temperature"])
        offline.run(llm, warm, **given)
        with report.progress(len(requests), "requests", not flags["disable_tqdm"]) as tick:
            done = offline.run(llm, requests, **given, tick=tick)
    found = offline.throughput_figures(done, len(requests))
    click.echo(
        f"Throughput: {found['requests_per_second']:.2f} requests/s, {found['tokens_per_second']:.2f} total tokens/s,"
        f" {found['output_tokens_per_second']:.2f} output tokens/s"
    )
    click.echo(f"{found['num_requests']} requests, {found['total_num_tokens']} tokens in {found['elapsed_time']:.2f} s")
    write(flags["output_json"], found)
    write_report(flags["report_file"], found, Path(named).name)


@config_command("latency")
@config_argument
@click.option("--input-len", "--input-tokens", type=POSITIVE, default=32, show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", "--output-tokens", type=POSITIVE, default=128, show_default=True, help="Of an answer.")
@click.option("--batch-size", type=POSITIVE, default=8, show_default=True, help="Requests at once.")
@click.option("--num-iters-warmup", type=click.IntRange(min=0), default=10, show_default=True)
@click.option("--num-iters", type=POSITIVE, default=30, show_default=True)
@temperature
@output_json
@report_option
@disable_tqdm
def latency(path: str | None, overrides: dict[str, str], **flags: Any) -> None:
    """Time one batch of requests from its start to its last token, again and again.

    Prefix caching is off unless it is asked for: it would have the prompts of every batch but the first.
    """
    from pagegraph.runtime.bench import offline

    named, config = named_config(path, {"enable_prefix_caching": "false"} | overrides)
    shape = Shape(input_len=flags["input_len"], output_len=flags["output_len"])
    warmups, iterations = flags["num_iters_warmup"], flags["num_iters"]
    with engine(config, not flags["disable_tqdm"]) as llm:
        vocab_size = min(llm.built.vocab_size, llm.tokenizer.vocab_size)
        batch: list[Request] = made_up(flags["batch_size"], shape, seed=config.seed, vocab_size=vocab_size)
        with report.progress(warmups + iterations, "batches", not flags["disable_tqdm"]) as tick:
            seconds = offline.latencies(
                lambda: offline.run(llm, batch, ignore_eos=True, temperature=flags["temperature"]),
                warmups,
                iterations,
                tick,
            )
    found = offline.latency_figures(seconds)
    click.echo(f"Avg latency: {found['avg_latency']:.4f} seconds")
    click.echo(f"Std latency: {found['std_latency']:.4f} seconds")
    for at, value in found["percentiles"].items():
        click.echo(f"{at}% percentile latency: {value:.4f} seconds")
    write(flags["output_json"], found)
    write_report(flags["report_file"], found, Path(named).name)
