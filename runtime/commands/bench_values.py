"""Values of the benches' flags, from text; what is wrong with one is said with a value that works.

Knows click and the names of metrics; knows no bench.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import click

from pagegraph.runtime.bench import measures

MANY = ("--goodput", "--header", "--metadata")  # flags with several values behind them: --goodput ttft:200 tpot:30


class Number(click.FloatRange):
    """A number in a range, which nan, in no range, is not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number in the range {self._describe_range()}.", param, ctx)
        return number


class ManyValues(click.Command):
    """Takes `--flag a b` for `--flag a --flag b`, as scripts for vLLM write it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        flag, begins = "", False
        for word in args:
            if word.startswith("-"):
                flag, begins = (word if word in MANY else ""), True
            elif flag and not begins:
                spread.append(flag)
            else:
                begins = False
            spread.append(word)
        return super().parse_args(ctx, spread)


def pairs(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value} is not KEY=VALUE", ctx, param)
    return {name.strip(): text.strip() for name, _, text in (value.partition("=") for value in values)}


def objectives(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for value in values:
        metric, _, limit = value.partition(":")
        try:
            found[metric] = float(limit)
        except ValueError:
            found[metric] = math.nan
        if metric not in measures.METRICS or not found[metric] >= 0:
            raise click.BadParameter(
                f"{value} is not one of {', '.join(measures.METRICS)} with milliseconds, as ttft:200", ctx, param
            )
    return found


def percentiles(ctx: click.Context, param: click.Parameter, value: str) -> list[float]:
    try:
        found = [float(word) for word in value.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= at <= 100 for at in found):
        raise click.BadParameter(f"{value} is not numbers from 0 to 100, as 50,90,99", ctx, param)
    return found


def metrics(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    found = value.split(",")
    if unknown := [word for word in found if word not in measures.METRICS]:
        raise click.BadParameter(f"{unknown[0]} is none of {', '.join(measures.METRICS)}", ctx, param)
    return found


def fields(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, Any]:
    try:
        found = json.loads(value or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise click.BadParameter("""is not a JSON object such as '{"top_k": 20}'""", ctx, param)
    return found
