"""Texts that are compared: a dozen short ones, or those of a file. Knows no tokenizer.

The built-in ones are prose, lists, code, numbers and other languages, some of them with a text that repeats, which
drafted tokens need, and in varied lengths, so that steps are ragged.
"""

from __future__ import annotations

import json
from pathlib import Path

TEXTS = (
    "The capital of France is",
    "The tide came in. The tide went out. The tide came in. The tide went out. The tide came in. The tide",
    "def mean(values):\n    return sum(values) / len(values)\n\n\ndef variance(values):\n    m = mean(values)\n    return",
    "Bread needs flour, water, salt and yeast. The flour is weighed first, then the water is poured over it, and both are"
    " left to stand for half an hour. After that the salt and the yeast are kneaded in, and the dough rests under a cloth"
    " until it has risen to twice its size. In a cold kitchen this takes a night; beside a stove it takes",
    "1, 4, 9, 16, 25, 36,",
    "Question: Why does ice float on water?\nAnswer:",
    "Am Abend gingen die Kinder an den See und",
    "Il était une fois, dans une petite ville au bord de la mer,",
    "- apples\n- pears\n- plums\n-",
    '{"name": "Ada", "born": 1815, "wrote": ["notes", "letters"]}\n{"name": "Emmy", "born": 1882, "wrote":',
    "A letter to the editor. Sir, last week you wrote that the old bridge should be pulled down. I have crossed it every"
    " morning for thirty years, and I",
    "SELECT city, count(*) FROM readers WHERE joined > '2020-01-01' GROUP BY",
)
QUICK = 4  # of them


class PromptsError(ValueError):
    """A file of prompts that cannot be taken; the message says which line, and what it should be."""


def read_prompts(path: Path) -> list[str]:
    """Of a .jsonl file the `prompt` of each line's object, of another the lines. Empty lines count for nothing.

    Raises PromptsError.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PromptsError(f"{path} cannot be read: {reason}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        found = [_prompt(f"{path}:{number}", line) for number, line in numbered]
    else:
        found = [line for _, line in numbered]
    if not found:
        raise PromptsError(f"{path} holds no prompt; write one a line")
    return found


def _prompt(where: str, line: str) -> str:
    wanted = '{"prompt": "The capital of France is"}'
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise PromptsError(f"{where} is no JSON object with a prompt; write {wanted}") from error
    if not isinstance(prompt, str) or not prompt:
        raise PromptsError(f"{where}: prompt is not a text; write {wanted}")
    return prompt


def long_text(number: int) -> str:
    """The built-in texts as one, `number` times over, each time under another heading."""
    return "\n\n".join(f"Part {at + 1}.\n\n" + "\n\n".join(TEXTS) for at in range(number))
