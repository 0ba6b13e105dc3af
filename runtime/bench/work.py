"""Work of a bench: seeded requests of made-up tokens or words, which may share prefixes or go on with a conversation.

Prompts are ids, exact in number, or text of words that are one token each in most vocabularies, so that no tokenizer is
needed to write them; what they were in truth the server's usage says. Knows no engine and no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

SMALL_VOCABULARY = 1000  # ids that nearly every model has
FIRST_ID = 3  # below it are, in most vocabularies, the ids that begin, end and pad
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not"
    " what all were we when your can said there use an each which she do how their if will up other about out many then"
    " them these so some her would make like him into time has look two more write go see number no way could people my"
    " than first water been call who oil its now find long down day did get come made may part"
).split()

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how many tokens are asked for.

    `follows` is the number of the request whose prompt and answer this one goes on with: it waits for that answer.
    """

    prompt: Prompt
    output_len: int
    input_len: int = 0  # tokens that the prompt should have, its history left out; 0: not known
    follows: int | None = None


@dataclass(frozen=True)
class Shape:
    """Tokens of made-up requests: `prefix_len` that `num_prefixes` groups share, `input_len` of their own, and answers.

    `range_ratio` r draws lengths evenly from [(1 - r) n, (1 + r) n]. A conversation has `num_turns` requests.
    """

    input_len: int = 1024
    output_len: int = 128
    prefix_len: int = 0
    num_prefixes: int = 1
    range_ratio: float = 0.0
    num_turns: int = 1


def made_up(count: int, shape: Shape, *, seed: int = 0, vocab_size: int | None = SMALL_VOCABULARY) -> list[Request]:
    """`count` requests of that shape, as ids below `vocab_size`, or as text where it is None.

    Turn by turn: all first turns of conversations come before all second ones.
    """
    rng = np.random.default_rng([seed, 0])
    prefixes = draw(rng, [shape.prefix_len] * shape.num_prefixes, vocab_size)
    conversations = -(-count // shape.num_turns)
    inputs, outputs = (_lengths(rng, n, shape.range_ratio, count) for n in (shape.input_len, shape.output_len))
    own = draw(rng, inputs, vocab_size)
    requests = []
    for index in range(count):
        follows = index - conversations if index >= conversations else None
        shared = prefixes[index % len(prefixes)] if follows is None else empty(vocab_size)
        length = inputs[index] + (shape.prefix_len if follows is None else 0)
        requests.append(Request(join(shared, own[index]), outputs[index], length, follows))
    return requests


def draw(rng: np.random.Generator, sizes: Iterable[int], vocab_size: int | None) -> list[Prompt]:
    """A prompt of each size: ids below `vocab_size`, or words where it is None."""
    if vocab_size is None:
        return ["".join(f" {WORDS[i]}" for i in rng.integers(0, len(WORDS), size)) for size in sizes]
    return [*draw_ids(rng, sizes, vocab_size)]


def draw_ids(rng: np.random.Generator, sizes: Iterable[int], vocab_size: int) -> list[list[int]]:
    """Random ids of each size."""
    return [rng.integers(FIRST_ID, vocab_size, size).tolist() for size in sizes]


def empty(vocab_size: int | None) -> Prompt:
    return "" if vocab_size is None else []


def join(first: Prompt, second: Prompt) -> Prompt:
    """One behind the other; both are ids or both are text."""
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    raise TypeError("a prompt of ids and one of text do not go together")


def rounds(requests: Sequence[Request]) -> list[list[int]]:
    """Numbers of the requests by turn: those of a round follow requests of rounds before it."""
    turn: list[int] = []
    for request in requests:
        turn.append(0 if request.follows is None else turn[request.follows] + 1)
    found: list[list[int]] = [[] for _ in range(max(turn, default=-1) + 1)]
    for index, number in enumerate(turn):
        found[number].append(index)
    return found


def _lengths(rng: np.random.Generator, length: int, ratio: float, count: int) -> list[int]:
    if ratio == 0:
        return [length] * count
    low, high = max(1, int(length * (1 - ratio))), int(length * (1 + ratio))
    return rng.integers(low, high, count, endpoint=True).tolist()
