"""The model's vocabulary as llguidance takes it: the bytes of each token, and which tokens end a text.

Building it holds Python's lock for 0.4 s at 50,000 tokens, so it is done once, in idle time or by whoever first compiles
a grammar. Knows no grammar.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from pagegraph.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Sets of tokens whose bits are known at once where a string may go on with any of them: whitespace, and characters of JSON
# strings, so many at most. A string near its `maxLength` is dear but for those; llguidance's own are of 10, 30 and more.
_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30)
SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_CHARACTER}{{1,{length}}}" for length in _LENGTHS), f"{_CHARACTER}+"]

_SHORTENS = re.compile(r'"(truncation|padding)":\s*\{')


class NoVocabulary(ValueError):
    """A model whose vocabulary grammars cannot be matched with; the message is for the user."""


def load_vocabulary(folder: Path, vocab_size: int, eos_ids: frozenset[int]) -> LLTokenizer:
    """Of the tokenizer in a model folder; `vocab_size` is the width of the logits. Raises NoVocabulary.

    Ids that the tokenizer does not know are never allowed. Where it knows more than the model, masks are wider than the
    logits.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    if not eos_ids:
        raise NoVocabulary("structured output needs a model with an end-of-sequence token; this one has none")
    text = _tokenizer_json(folder / "tokenizer.json")
    known = tokenizers.Tokenizer.from_str(text).get_vocab_size(with_added_tokens=True)
    size, ends = max(vocab_size, known), sorted(eos_ids)
    try:
        return LLTokenizer(text, n_vocab=size, eos_token=ends, slices=SLICES)
    except ValueError:  # a decoder that it does not know
        wrapped = TokenizerWrapper(_Pieces(Tokenizer.load(folder), size, ends[0]))
        return LLTokenizer(wrapped, n_vocab=size, eos_token=ends, slices=SLICES)


class _Pieces:
    """A tokenizer of any kind, by what each of its tokens adds to a text; in the form that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_id, None
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(one) for one in range(size)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _tokenizer_json(path: Path) -> str:
    """A tokenizer that neither cuts a text short nor pads it."""
    text = path.read_text(encoding="utf-8")
    if not _SHORTENS.search(text):
        return text
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()
