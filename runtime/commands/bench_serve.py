"""`runtime bench serve`: sends work to a server of the OpenAI protocol, ours or another, and says how it was answered.

Imports no torch. Flags are those of `vllm bench serve`.
"""

from __future__ import annotations

import json
import math
import os
import ssl
import urllib.request
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from pagegraph.runtime.bench import client, measures, report
from pagegraph.runtime.bench.arrivals import Ramp, arrival_times
from pagegraph.runtime.bench.files import Count
from pagegraph.runtime.bench.outcome import Outcome
from pagegraph.runtime.bench.stream import Target
from pagegraph.runtime.bench.work import FIRST_ID, SMALL_VOCABULARY, Request
from pagegraph.runtime.cli import CONTEXT
from pagegraph.runtime.commands.bench_options import POSITIVE, WorkFlags, work_options
from pagegraph.runtime.commands.bench_report import report_option, write_report
from pagegraph.runtime.commands.bench_values import ManyValues, Number, fields, metrics, objectives, pairs, percentiles

ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
BUSY = 0.8  # of a processor, from which on the client may be what is measured
SHOWN_ERRORS = 5


@click.command("serve", cls=ManyValues, context_settings=CONTEXT)
@click.option(
    "--backend",
    type=click.Choice(list(ENDPOINTS)),
    default="openai",
    show_default=True,
    help="openai or vllm: completions; openai-chat: chats.",
)
@click.option("--base-url", help="Address of the server, as http://127.0.0.1:8000.  [default: --host and --port]")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--endpoint", help="Path of the API.  [default: /v1/completions, or of chats]")
@click.option("--model", help="Name in requests.  [default: the first of /v1/models]")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    help="Folder with tokenizer.json: counts tokens of files, and sets --vocab-size.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=FIRST_ID + 1),
    help=f"Ids of made-up prompts are below it.  [default: the tokenizer's, else {SMALL_VOCABULARY}]",
)
@click.option("--header", multiple=True, callback=pairs, metavar="KEY=VALUE", help="HTTP headers of each request.")
@click.option("--insecure", is_flag=True, help="Accept any TLS certificate.")
@work_options
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of work and arrivals.")
@click.option(
    "--request-rate",
    type=Number(0, min_open=True),
    default=math.inf,
    show_default=True,
    help="Requests a second; inf: all at once.",
)
@click.option(
    "--burstiness",
    type=Number(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of arrivals: 1 Poisson, less in bursts, more evenly.",
)
@click.option("--max-concurrency", type=POSITIVE, help="Requests in flight at most; others wait in the client.")
@click.option("--ramp-up-strategy", type=click.Choice(["linear", "exponential"]), help="Let the rate change.")
@click.option("--ramp-up-start-rps", type=float, help="Requests a second of the first request.")
@click.option("--ramp-up-end-rps", type=float, help="Requests a second of the last request.")
@click.option(
    "--goodput",
    multiple=True,
    callback=objectives,
    metavar="METRIC:MS ...",
    help="Objectives of a good request, as ttft:200 tpot:30 (also itl, of 99 of 100 of its gaps, and e2el).",
)
@click.option("--temperature", type=Number(0), default=0.0, show_default=True)
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=None,
    help="Send ignore_eos, which keeps answers at their length.  [default: for made-up work]",
)
@click.option("--extra-body", callback=fields, metavar="JSON", help="Fields of every request's body.")
@click.option(
    "--num-warmups",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Requests before those that count, beside the one that tries the server.",
)
@click.option(
    "--request-timeout",
    type=Number(0, min_open=True),
    default=3600.0,
    show_default=True,
    help="Seconds of one request, after which it counts as failed.",
)
@click.option("--processes", type=POSITIVE, default=1, show_default=True, help="Of this client.")
@click.option("--percentile-metrics", callback=metrics, default=",".join(measures.METRICS), show_default=True)
@click.option("--metric-percentiles", callback=percentiles, default="90,99", show_default=True)
@click.option("--save-result", is_flag=True, help="Write the figures as JSON.")
@click.option("--save-detailed", is_flag=True, help="With times, lengths and texts of each request.")
@click.option(
    "--result-dir", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Folder of the file."
)
@click.option("--result-filename", help="Name of the file.  [default: of label, rate, model and time]")
@report_option
@click.option("--label", help="Begins the file's name.  [default: --backend]")
@click.option("--metadata", multiple=True, callback=pairs, metavar="KEY=VALUE", help="Written into the file.")
@click.option("--disable-tqdm", is_flag=True, help="Show no progress.")
def serve(**flags: Any) -> None:  # fmt: skip
    """Send requests to a server at their times, and measure how it answers."""
    work = WorkFlags.taken_from(flags, flags["seed"])
    ramp = _ramp(flags)
    target = _target(flags)
    model = flags["model"] or _first_model(target)
    requests, warmups = _requests(work, flags, target)
    times = arrival_times(
        len(requests), flags["request_rate"], burstiness=flags["burstiness"], seed=work.seed, ramp=ramp
    ).tolist()
    ignore_eos = work.is_made_up if flags["ignore_eos"] is None else flags["ignore_eos"]
    body = {"temperature": flags["temperature"], **({"ignore_eos": True} if ignore_eos else {})} | flags["extra_body"]
    plan = client.Plan(target, model, requests, times, flags["max_concurrency"], body, flags["request_timeout"])
    _try(replace(plan, requests=warmups, times=[0.0] * len(warmups)))
    with report.progress(len(requests), "requests", not flags["disable_tqdm"]) as tick:
        sent = client.run(plan, flags["processes"], tick)
    found = _traffic(flags, work, model) | measures.figures(
        sent.outcomes,
        sent.duration,
        percentiles=flags["metric_percentiles"],
        metrics=flags["percentile_metrics"],
        slos=flags["goodput"],
    )
    found["client_busy"] = sent.busy
    click.echo(report.serve_text(found, flags["percentile_metrics"], flags["metric_percentiles"]))
    _say_what_to_doubt(sent)
    if flags["save_result"] or flags["save_detailed"]:
        _save(flags, model, found, sent.outcomes)
    write_report(flags["report_file"], found | measures.detail(sent.outcomes), flags["label"] or model)
    if not found["completed"]:
        raise click.ClickException("no request was answered")


def _target(flags: dict[str, Any]) -> Target:
    """The address of requests; the key of OPENAI_API_KEY goes with them."""
    host = f"[{flags['host']}]" if ":" in flags["host"] else flags["host"]
    base = (flags["base_url"] or f"http://{host}:{flags['port']}").rstrip("/")
    key = os.environ.get("OPENAI_API_KEY")
    headers = ({"Authorization": f"Bearer {key}"} if key else {}) | flags["header"]
    try:
        return Target(base + (flags["endpoint"] or ENDPOINTS[flags["backend"]]), headers, flags["insecure"])
    except ValueError as error:
        raise click.UsageError(f"--base-url: {error}") from None


def _ramp(flags: dict[str, Any]) -> Ramp | None:
    strategy, start, end = (flags[f"ramp_up_{what}"] for what in ("strategy", "start_rps", "end_rps"))
    if strategy is None and start is None and end is None:
        return None
    if strategy is None or start is None or end is None:
        raise click.UsageError("a ramp needs --ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps")
    try:
        return Ramp(strategy, start, end)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _first_model(target: Target) -> str:
    """The first name of /v1/models, beside the endpoint."""
    base, _, _ = target.url.partition("/v1/")
    asked = urllib.request.Request(f"{base}/v1/models", headers=target.headers)
    try:
        with urllib.request.urlopen(asked, timeout=30, context=target.tls()) as answer:
            return json.load(answer)["data"][0]["id"]
    except (OSError, ValueError, LookupError, TypeError, ssl.SSLError) as error:
        raise click.ClickException(
            f"{base}/v1/models names no model ({error}); is the server there? Else give --model"
        ) from error


def _requests(work: WorkFlags, flags: dict[str, Any], target: Target) -> tuple[list[Request], list[Request]]:
    """What is measured, and what tries the server and warms it up.

    Made-up completions are ids, exact in number; chats and conversations are text.
    """
    count_tokens: Count | None = None
    vocab_size = flags["vocab_size"] or SMALL_VOCABULARY
    if flags["tokenizer"] is not None:
        from pagegraph.runtime.text.tokenizer import Tokenizer

        try:
            tokenizer = Tokenizer.load(flags["tokenizer"])
        except (ValueError, OSError) as error:
            raise click.ClickException(f"--tokenizer: {error}") from error
        vocab_size = flags["vocab_size"] or tokenizer.vocab_size

        count_tokens = lambda text: len(tokenizer.encode(text))  # noqa: E731
    as_text = target.is_chat or work.dataset_name == "conversation"
    vocab_size = None if as_text else vocab_size
    warmups = work.warmups(1 + flags["num_warmups"], vocab_size=vocab_size, count_tokens=count_tokens)
    return work.requests(vocab_size=vocab_size, count_tokens=count_tokens), warmups


def _try(plan: client.Plan) -> None:
    """The first request has to succeed; the others warm up."""
    (outcome,) = client.run(replace(plan, requests=plan.requests[:1])).outcomes
    if outcome.error:
        raise click.ClickException(f"{plan.target.url} did not answer the first request: {outcome.error}")
    if len(plan.requests) > 1:
        client.run(replace(plan, requests=plan.requests[1:]))


def _traffic(flags: dict[str, Any], work: WorkFlags, model: str) -> dict[str, Any]:
    """What was asked for."""
    rate = flags["request_rate"]
    found = dict(
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
        endpoint_type=flags["backend"],
        backend=flags["backend"],
        label=flags["label"],
        model_id=model,
        tokenizer_id=None if flags["tokenizer"] is None else str(flags["tokenizer"]),
        num_prompts=work.num_prompts,
        dataset_name=work.dataset_name,
        seed=work.seed,
        request_rate="inf" if math.isinf(rate) else rate,
        burstiness="inf" if math.isinf(flags["burstiness"]) else flags["burstiness"],
        max_concurrency=flags["max_concurrency"],
    )
    if flags["ramp_up_strategy"] is not None:
        found |= {name: flags[name] for name in ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")}
    return flags["metadata"] | found


def _say_what_to_doubt(sent: client.Sent) -> None:
    """Reasons not to take the figures as they stand, on standard error."""
    failed = [outcome.error for outcome in sent.outcomes if outcome.error]
    for error in failed[:SHOWN_ERRORS]:
        click.echo(f"failed: {error}", err=True)
    if any(outcome.success and not outcome.has_usage for outcome in sent.outcomes):
        click.echo("the server sends no usage: events count as output tokens, and input tokens as meant", err=True)
    if sent.busy > BUSY:
        click.echo(
            f"this client used {sent.busy:.0%} of a processor, so that it may be what was measured;"
            " give it more --processes",
            err=True,
        )


def _save(flags: dict[str, Any], model: str, found: dict[str, Any], outcomes: list[Outcome]) -> None:
    label, most = flags["label"] or flags["backend"], flags["max_concurrency"]
    concurrency = "" if most is None else f"-concurrency{most}"
    name = f"{label}-{flags['request_rate']}qps{concurrency}-{model.rsplit('/', 1)[-1]}-{found['date']}.json"
    path = flags["result_dir"] / (flags["result_filename"] or name)
    try:
        report.write_json(path, found | (measures.detail(outcomes) if flags["save_detailed"] else {}))
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error
    click.echo(f"written: {path}", err=True)
