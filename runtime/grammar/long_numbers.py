"""Numbers of JSON whose digits do not stop: behind `MAX_TOKENS` tokens of digits comes no digit if anything else may.

Neither JSON nor most schemas bound the digits of a number, and a model that falls into repeating one would go on to
`max_tokens`. No grammar that llguidance compiles of a schema can say it without losing exponents, so it is said in the
masks. A number is told from a string by what else may follow: never a quotation mark, and of letters only those of an
exponent. A number that may not end yet goes on. Knows masks and tokens; knows no grammars and no sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# More than any 64-bit integer or float needs, before the point or behind it, also where a token is a single digit.
MAX_TOKENS = 32

_DIGITS = frozenset(b"0123456789")
_OF_STRINGS = frozenset(b'"abcdfghijklmnopqrstuvwxyzABCDFGHIJKLMNOPQRSTUVWXYZ')  # without those of an exponent


class LongNumbers:
    """Of texts in the tokens of one vocabulary."""

    def __init__(self, vocabulary: LLTokenizer) -> None:
        size = vocabulary.vocab_size
        texts = [b"" if vocabulary.is_special_token(one) else vocabulary.decode_bytes([one]) for one in range(size)]
        self._is_digits = np.array([text.isdigit() for text in texts])
        self._digits = _words([text[:1] != b"" and text[0] in _DIGITS for text in texts])
        self._of_strings = _words([text[:1] != b"" and text[0] in _OF_STRINGS for text in texts])

    def end_with_digits(self, tokens: np.ndarray) -> np.ndarray:
        """Of each last token of a text, which may be no token at all, whether its number may be long."""
        return self._is_digits.take(tokens, mode="clip")

    def cut(self, said: np.ndarray, drafts: Sequence[int], masks: np.ndarray) -> None:
        """Let long numbers end: masks of int32 [n, words] are those behind the tokens `said`, and behind each draft token."""
        is_digits = self._is_digits[[*said[-MAX_TOKENS:].tolist(), *drafts]].tolist()
        first, run = len(is_digits) - len(drafts), 0
        for count, more in enumerate(is_digits, start=1):
            run = run + 1 if more else 0
            if run >= MAX_TOKENS and count >= first:
                self._end(masks[count - first])

    def _end(self, mask: np.ndarray) -> None:
        """Leave no digit in the mask of a number that may end."""
        others = mask & ~self._digits
        if others.any() and not (mask & self._of_strings).any():
            mask[:] = others


def _words(bits: list[bool]) -> np.ndarray:
    """Bits as the words of a mask."""
    packed = np.packbits(np.array(bits + [False] * (-len(bits) % 32)), bitorder="little")
    return packed.view(np.int32)
