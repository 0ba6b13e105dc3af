"""Work from files: conversations as ShareGPT writes them, and prompts of one's own as JSON lines.

Knows both formats and how their lengths are found. Raises ValueError that names the file and what it lacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pagegraph.runtime.bench.work import Request

Count = Callable[[str], int]  # tokens of a text

# What ShareGPT is cut to by the benches of the field, so that its longest conversations do not decide the figures.
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048
OUTPUT_KEYS = ("output_tokens", "output_len", "max_tokens")


def sharegpt(path: Path, count: int, *, seed: int, count_tokens: Count | None, output_len: int | None) -> list[Request]:
    """The first question of `count` conversations, and as many tokens as its answer had unless `output_len` says.

    In the order of `seed`; those whose lengths are far out are left out where they can be counted.
    """
    if count_tokens is None and output_len is None:
        raise ValueError(f"{path}: how long its answers are needs --tokenizer, or say --output-len")
    pairs = [pair for entry in _read_json(path) if (pair := _first_pair(entry)) is not None]
    requests: list[Request] = []
    for index in np.random.default_rng([seed, 2]).permutation(len(pairs)):
        if len(requests) == count:
            break
        question, answer = pairs[index]
        asked = 0 if count_tokens is None else count_tokens(question)
        wanted = output_len if output_len is not None else count_tokens(answer) if count_tokens is not None else 0
        too_long = asked > LONGEST_PROMPT or asked + wanted > LONGEST
        if count_tokens is not None and (asked < SHORTEST or too_long or (output_len is None and wanted < SHORTEST)):
            continue
        requests.append(Request(question, wanted, asked))
    if not requests:
        raise ValueError(f'{path}: no entry has "conversations" of a question and an answer of usual length')
    return _repeated(requests, count)


def custom(path: Path, count: int, *, count_tokens: Count | None, output_len: int | None) -> list[Request]:
    """The prompts of `{"prompt": "...", "output_tokens": 64}`, one a line, in the file's order."""
    requests = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and len(requests) < count:
                requests.append(_custom_request(f"{path}:{number}", line, count_tokens, output_len))
    if not requests:
        raise ValueError(f'{path}: holds no line such as {{"prompt": "Hello", "output_tokens": 64}}')
    return _repeated(requests, count)


def _custom_request(where: str, line: str, count_tokens: Count | None, output_len: int | None) -> Request:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON ({error})") from None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'{where}: has no text "prompt", as in {{"prompt": "Hello", "output_tokens": 64}}')
    wanted = output_len
    if wanted is None:
        wanted = next((entry[key] for key in OUTPUT_KEYS if key in entry), None)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise ValueError(f'{where}: has no whole number "output_tokens" of at least 1; give it, or say --output-len')
    return Request(prompt, wanted, 0 if count_tokens is None else count_tokens(prompt))


def _read_json(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(entries, list):
        raise ValueError(f'{path}: is not a list of {{"conversations": [...]}}')
    return entries


def _first_pair(entry: Any) -> tuple[str, str] | None:
    """The texts of the first two turns; None for an entry that has no two."""
    turns = (entry.get("conversations") or entry.get("messages")) if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    question, answer = (turn.get("value", turn.get("content")) for turn in turns[:2])
    if not isinstance(question, str) or not isinstance(answer, str) or not question or not answer:
        return None
    return question, answer


def _repeated(requests: list[Request], count: int) -> list[Request]:
    """`count` requests: those of a short file come again in their order."""
    return [requests[index % len(requests)] for index in range(count)]
