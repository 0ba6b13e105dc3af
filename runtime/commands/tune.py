"""`runtime tune`: measures which settings serve a workload best on this machine, and writes them to a YAML file."""

from __future__ import annotations

import difflib
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from pagegraph.runtime.bench import measures, report
from pagegraph.runtime.bench.work import Request
from pagegraph.runtime.cli import config_command
from pagegraph.runtime.commands.bench_options import WorkFlags, work_options_of
from pagegraph.runtime.commands.bench_values import Number
from pagegraph.runtime.config import Config, load_config, require_local_files, require_one_process
from pagegraph.runtime.server.start_errors import as_one_sentence, load_tokenizer

if TYPE_CHECKING:
    from pagegraph.runtime.tune.tuning import Tuned

CHAT_INPUT, CHAT_OUTPUT, CHAT_SPREAD = 256, 128, 0.5  # tokens, of made-up work without lengths: those of short chats
NUM_PROMPTS = 64
WARM_REQUESTS = 4
SECONDS = {"s": 1, "m": 60, "h": 3600}


class Duration(click.ParamType):
    """Seconds, or text such as 90s, 10m or 1h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value} is not a duration such as 90s, 10m or 1h", param, ctx)
        return float(match[1]) * SECONDS[match[2] or "s"]


def objectives(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, float]:
    """`ttft=500,itl=50` as milliseconds by metric."""
    found: dict[str, float] = {}
    for one in (value or "").split(",") if value else ():
        name, _, limit = (part.strip() for part in one.partition("="))
        if name not in measures.METRICS:
            near = difflib.get_close_matches(name, measures.METRICS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise click.BadParameter(f"{name!r} is none of {', '.join(measures.METRICS)}{hint}", ctx, param)
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < math.inf:
            raise click.BadParameter(f"{name} needs milliseconds above 0, as {name}=500", ctx, param)
    return found


@config_command("tune")
@click.argument("config")
@click.option(
    "--slo",
    "slos",
    callback=objectives,
    metavar="METRIC=MS,...",
    help="Objectives of a good request, as ttft=500,itl=50 (also tpot, e2el); itl: of 99 of 100 of its gaps."
    " Without any: the most output tokens a second.",
)
@click.option(
    "--workload",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="A dataset by its file alone: a JSON list is sharegpt, lines are custom.",
)
@work_options_of(f"{CHAT_INPUT}, give or take half", f"{CHAT_OUTPUT}, give or take half", NUM_PROMPTS)
@click.option(
    "--request-rate",
    type=Number(0, min_open=True),
    help="Requests a second.  [default: with --slo what the baseline answers if all come at once, else inf]",
)
@click.option(
    "--burstiness", type=Number(0, min_open=True), default=1.0, show_default=True, help="Of arrivals: 1 is Poisson."
)
@click.option("--budget", type=Duration(), default="10m", show_default=True, help="For all of it, the start included.")
@click.option("--repeats", type=click.IntRange(min=2), default=3, show_default=True, help="Runs of the baseline.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("tuned.yaml"),
    show_default=True,
    help="The configuration found.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="File of all figures.")
@click.option("--disable-tqdm", is_flag=True, help="Show no progress.")
def tune(config: str, overrides: dict[str, str], **flags: Any) -> None:
    """Find the settings of CONFIG that serve a workload best on this machine: measure, change a key, measure again.

    A key is changed only if that is better by more than the same run differs from itself. Exits with 0 where nothing
    better was found, too: the file then has CONFIG as it was.
    """
    started = time.monotonic()
    resolved = load_config(config, overrides)
    settings = resolved.config
    require_local_files(settings)
    require_one_process(settings, "runtime tune")
    work = _work(flags, settings.seed)
    with as_one_sentence(settings.log_level):
        # here and not above: importing torch takes seconds, a bad flag should not
        from pagegraph.runtime.tune.measurement import Objective
        from pagegraph.runtime.tune.text import text_of
        from pagegraph.runtime.tune.tuning import Asked, tune
        from pagegraph.runtime.tune.written import has_secrets, write, yaml_of

        asked = Asked(
            objective=Objective(flags["slos"]),
            rate=flags["request_rate"],
            burstiness=flags["burstiness"],
            started=started,
            budget_s=flags["budget"],
            repeats=flags["repeats"],
        )
        with _Bar(started, flags["budget"], not flags["disable_tqdm"]) as bar:
            found = tune(
                settings, lambda vocab_size: _requests(work, settings, vocab_size), made_up=work.is_made_up,
                asked=asked, say=bar.say, tick=bar.tick,
            )  # fmt: skip
        head = _head(found, work)
        text = yaml_of(found.found.config, resolved.sources, found.found.changes, found.objective, head)
        write(flags["output"], text, found.found.config)
        if flags["json_file"] is not None:
            report.write_json(flags["json_file"], found.as_json() | {"output": str(flags["output"])})
    click.echo(f"{head}\n\n{text_of(found)}")
    click.echo(f"written, and read again: {flags['output']}", err=True)
    if has_secrets(settings):
        click.echo(f"{flags['output']} has no API key: give it in PAGEGRAPH_API_KEY or api_key_file", err=True)


def _work(flags: dict[str, Any], seed: int) -> WorkFlags:
    """The work that is meant: a file by its name alone, or chats of usual lengths."""
    path: Path | None = flags.pop("workload")
    if path is not None:
        if flags["dataset_path"] is not None:
            raise click.UsageError("--workload and --dataset-path both name the dataset; give one of them")
        first = path.read_bytes().lstrip()[:1]
        flags |= {"dataset_path": path, "dataset_name": "sharegpt" if first == b"[" else "custom"}
    work = WorkFlags.taken_from(flags, seed)
    if not work.is_made_up:
        return work
    if work.input_len is None and work.output_len is None and not work.range_ratio:
        work = replace(work, range_ratio=CHAT_SPREAD)
    return replace(work, input_len=work.input_len or CHAT_INPUT, output_len=work.output_len or CHAT_OUTPUT)


def _requests(work: WorkFlags, config: Config, vocab_size: int) -> tuple[list[Request], list[Request]]:
    """Those that are measured and those that warm up, all with ids for prompts."""
    if work.is_made_up:
        given: dict[str, Any] = dict(vocab_size=vocab_size, count_tokens=None)
        return work.requests(**given), work.warmups(WARM_REQUESTS, **given)
    tokenizer = load_tokenizer(config)

    def as_ids(one: Request) -> Request:
        return replace(one, prompt=tokenizer.encode(one.prompt)) if isinstance(one.prompt, str) else one

    given = dict(vocab_size=vocab_size, count_tokens=lambda text: len(tokenizer.encode(text)))
    return [as_ids(one) for one in work.requests(**given)], [
        as_ids(one) for one in work.warmups(WARM_REQUESTS, **given)
    ]


def _head(found: Tuned, work: WorkFlags) -> str:
    """What was measured, where, and what counts as better."""
    shape = work.shape()
    lengths = f" of {shape.input_len} in, {shape.output_len} out" if work.is_made_up else f" of {work.dataset_path}"
    spread = f" give or take {shape.range_ratio:.0%}" if work.is_made_up and shape.range_ratio else ""
    rate = "all at once" if math.isinf(found.rate) else f"at {found.rate:g} requests/s"
    slos = ", ".join(f"{name} {limit:g} ms" for name, limit in found.objective.slos.items())
    return (
        f"runtime tune, {found.machine}: {work.num_prompts} requests ({work.dataset_name}{lengths}{spread}) {rate};"
        f" the most {f'requests/s within {slos}' if slos else 'output tokens/s'}. Runs of the configuration as it was"
        f" differed by {found.found.spread.value:.1%}. Took {found.seconds:.0f} s."
    )


class _Bar:
    """The budget as a bar on standard error, if it is a terminal; lines of results go above it."""

    def __init__(self, began: float, seconds: float, shown: bool) -> None:
        self._began = began
        self._bar = tqdm(
            total=round(seconds), desc="budget", unit="s", leave=False, disable=not (shown and sys.stderr.isatty()),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of {total} s",
        )  # fmt: skip

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tick(self) -> None:
        self._bar.update(time.monotonic() - self._began - self._bar.n)

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)
