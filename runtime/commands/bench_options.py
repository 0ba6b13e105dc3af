"""Flags that several benches share: which work, how long. vLLM's names, and `--input-tokens`, `--output-tokens`.

Knows flags and the work they mean; knows no server and no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from pagegraph.runtime.bench import files
from pagegraph.runtime.bench.work import Request, Shape, made_up
from pagegraph.runtime.commands.bench_values import Number

MADE_UP = ("random", "prefix", "prefix_repetition", "conversation")
DATASETS = (*MADE_UP, "sharegpt", "custom")
INPUT_LEN, OUTPUT_LEN, PREFIX_LEN, NUM_PREFIXES, NUM_TURNS = 1024, 128, 256, 10, 4
NUM_PROMPTS = 1000
WARM = 1 << 40  # set in the seed of what warms up
POSITIVE = click.IntRange(min=1)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class WorkFlags:
    """The values of the flags above; None: not given."""

    dataset_name: str
    dataset_path: Path | None
    input_len: int | None
    output_len: int | None
    range_ratio: float
    prefix_len: int | None
    num_prefixes: int | None
    num_turns: int | None
    num_prompts: int
    seed: int

    @classmethod
    def taken_from(cls, values: dict[str, Any], seed: int) -> WorkFlags:
        """Out of a command's values, which then lack them. Flags that do not go together are a usage error."""
        names = [field.name for field in fields(cls) if field.name != "seed"]
        flags = cls(**{name: values.pop(name) for name in names}, seed=seed)
        if flags.is_made_up == (flags.dataset_path is not None):
            needs = "takes no" if flags.is_made_up else "needs a"
            raise click.UsageError(f"--dataset-name {flags.dataset_name} {needs} --dataset-path")
        if flags.num_turns is not None and flags.dataset_name != "conversation":
            raise click.UsageError("--num-turns goes with --dataset-name conversation")
        shaped = (flags.input_len, flags.prefix_len, flags.num_prefixes, flags.range_ratio or None)
        if not flags.is_made_up and any(value is not None for value in shaped):
            raise click.UsageError(
                f"--dataset-name {flags.dataset_name} takes its prompts as the file has them;"
                " leave --input-len, --prefix-len, --num-prefixes and --random-range-ratio out"
            )
        return flags

    @property
    def is_made_up(self) -> bool:
        """Whether answers have the length that is asked for, whatever the model would say."""
        return self.dataset_name in MADE_UP

    def shape(self) -> Shape:
        shares = self.dataset_name.startswith("prefix")
        return Shape(
            input_len=self.input_len or INPUT_LEN,
            output_len=self.output_len or OUTPUT_LEN,
            prefix_len=self.prefix_len if self.prefix_len is not None else PREFIX_LEN if shares else 0,
            num_prefixes=self.num_prefixes or (NUM_PREFIXES if shares else 1),
            range_ratio=self.range_ratio,
            num_turns=(self.num_turns or NUM_TURNS) if self.dataset_name == "conversation" else 1,
        )

    def requests(self, *, vocab_size: int | None, count_tokens: files.Count | None) -> list[Request]:
        """The work: made up of ids below `vocab_size` (None: as text), or read from the file."""
        if self.is_made_up:
            return made_up(self.num_prompts, self.shape(), seed=self.seed, vocab_size=vocab_size)
        assert self.dataset_path is not None
        try:
            if self.dataset_name == "custom":
                return files.custom(
                    self.dataset_path, self.num_prompts, count_tokens=count_tokens, output_len=self.output_len
                )
            return files.sharegpt(
                self.dataset_path,
                self.num_prompts,
                seed=self.seed,
                count_tokens=count_tokens,
                output_len=self.output_len,
            )
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error

    def warmups(self, count: int, *, vocab_size: int | None, count_tokens: files.Count | None) -> list[Request]:
        """`count` requests alike, none of a conversation; made-up ones have other tokens, which no cache then holds."""
        other = replace(self, num_prompts=count, num_turns=1, seed=self.seed ^ WARM)
        return other.requests(vocab_size=vocab_size, count_tokens=count_tokens)


def work_options_of(input_len: object, output_len: object, num_prompts: int) -> Decorator:
    """A decorator: the flags of work, in this order in the help, which says these defaults."""
    flags = (
        click.option("--dataset-name", type=click.Choice(DATASETS), default="random", show_default=True,
                     help="random tokens; prefix (also prefix_repetition): groups that share their first tokens;"
                     " conversation: turns on the answers before them; sharegpt, custom: of --dataset-path."),
        click.option("--dataset-path", type=click.Path(dir_okay=False, exists=True, path_type=Path),
                     help="JSON of ShareGPT's form, or lines such as {\"prompt\": \"Hello\", \"output_tokens\": 64}."),
        click.option("--input-len", "--input-tokens", "--random-input-len", type=POSITIVE,
                     help=f"Tokens of a prompt beyond what it shares.  [default: {input_len}]"),
        click.option("--output-len", "--output-tokens", "--random-output-len", "--sharegpt-output-len",
                     "--custom-output-len", type=POSITIVE,
                     help=f"Tokens of an answer.  [default: {output_len}; what a file says]"),
        click.option("--random-range-ratio", "range_ratio", type=Number(0, 1, max_open=True), default=0.0,
                     help="r: lengths evenly from (1 - r) to (1 + r) of the given.  [default: 0]"),
        click.option("--prefix-len", "--random-prefix-len", "--prefix-repetition-prefix-len", type=click.IntRange(min=0),
                     help=f"Tokens that requests share.  [default: {PREFIX_LEN} for prefix, else 0]"),
        click.option("--num-prefixes", "--prefix-repetition-num-prefixes", type=POSITIVE,
                     help=f"Groups that share.  [default: {NUM_PREFIXES} for prefix, else 1]"),
        click.option("--num-turns", type=POSITIVE, help=f"Requests of a conversation.  [default: {NUM_TURNS}]"),
        click.option("--num-prompts", type=POSITIVE, default=num_prompts, show_default=True, help="Requests in all."),
    )  # fmt: skip

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


work_options = work_options_of(INPUT_LEN, OUTPUT_LEN, NUM_PROMPTS)
