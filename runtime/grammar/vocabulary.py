"""The model's vocabulary as llguidance takes it: the bytes of each token, and which tokens end a text.

Building it holds Python's lock for 0.4 s at 50,000 tokens, so it is done once, in idle time or by whoever first compiles
a grammar. Knows no grammar.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_SHORTENS = re.compile(r'"(truncation|padding)":\s*\{')


class NoVocabulary(ValueError):
    """A model whose vocabulary grammars cannot be matched with; the message is for the user."""


def load_vocabulary(folder: Path, vocab_size: int, eos_ids: frozenset[int]) -> LLTokenizer:
    """Of the tokenizer in a model folder; `vocab_size` is the width of the logits. Raises NoVocabulary.

    Ids that the tokenizer does not know are never allowed. Where it knows more than the model, masks are wider than the
    logits.
    """
    from llguidance import LLTokenizer

    if not eos_ids:
        raise NoVocabulary("structured output needs a model with an end-of-sequence token; this one has none")
    text = _tokenizer_json(folder / "tokenizer.json")
    known = tokenizers.Tokenizer.from_str(text).get_vocab_size(with_added_tokens=True)
    try:
        return LLTokenizer(text, n_vocab=max(vocab_size, known), eos_token=sorted(eos_ids))
    except ValueError as error:
        raise NoVocabulary(
            f"structured output is not served for this model: its tokenizer is not read: {error}"
        ) from error


def _tokenizer_json(path: Path) -> str:
    """A tokenizer that neither cuts a text short nor pads it."""
    text = path.read_text(encoding="utf-8")
    if not _SHORTENS.search(text):
        return text
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()
