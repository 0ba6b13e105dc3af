"""How many tokens a text has at least, told without tokenising it.

A token stands for so many bytes at most. So each byte of a text is at least that share of a token which the longest
token that holds such a byte leaves it, and the shares of a text add up to no more than its tokens. Long runs of one
character have long tokens of their own; therefore the share is each byte's, not one for all.

Knows the parts of the tokenizers library that keep every byte of a text; with any other part nothing is known.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers

_BYTES_AT_ONCE = 1 << 16  # numpy counts in 64-bit numbers, eight times the text
_METASPACE = "\u2581"  # stands for a space in the vocabularies of SentencePiece
# Bytes of all characters that count as white space in UTF-8.
_WHITESPACE = sorted({byte for char in map(chr, range(0x3001)) if char.isspace() for byte in char.encode()})
_KEEPING_PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"})


class TokenBound:
    """A lower bound for one tokenizer. `byte_chars`: what its vocabulary writes for each byte, if it is of bytes."""

    def __init__(self, backend: tokenizers.Tokenizer, byte_chars: Mapping[str, int] | None) -> None:
        normalizers = _parts(backend.normalizer, "normalizers")
        pre_tokenizers = _parts(backend.pre_tokenizer, "pretokenizers")
        kinds = {part["type"] for part in pre_tokenizers}
        self._composes = any(part["type"] == "NFC" for part in normalizers)
        self._has_metaspace = "Metaspace" in kinds or any(map(_writes_metaspace, normalizers))
        self._shares = np.zeros(256)
        of_bytes = "ByteLevel" in kinds
        if of_bytes == (byte_chars is not None) and _keeps_bytes(backend.model, of_bytes, normalizers, pre_tokenizers):
            self._shares = self._measured(backend, byte_chars)

    def __call__(self, text: str, enough: float = math.inf) -> int:
        """Tokens that `text` has at least; 0 where nothing is known. It is read only until they are more than `enough`.

        Raises UnicodeEncodeError on lone surrogates.
        """
        if self._composes and not text.isascii():
            text = unicodedata.normalize("NFC", text)
        if self._has_metaspace:
            text = text.replace(_METASPACE, " ")
        data = np.frombuffer(text.encode(), np.uint8)
        counts = np.zeros(256, np.int64)
        tokens = 0
        for start in range(0, len(data), _BYTES_AT_ONCE):
            counts += np.bincount(data[start : start + _BYTES_AT_ONCE], minlength=256)
            tokens = math.ceil(counts @ self._shares - 1e-6)  # a sum of shares is rounded, a number of tokens is whole
            if tokens > enough:
                break
        return tokens

    def _measured(self, backend: tokenizers.Tokenizer, byte_chars: Mapping[str, int] | None) -> np.ndarray:
        """Float64 [256]: each byte's share of a token; 0 for bytes that a token may take without limit."""
        added = backend.get_added_tokens_decoder()
        forms = {token.content.encode() for token in added.values()}
        vocabulary = backend.get_vocab(with_added_tokens=False)
        if byte_chars is not None:
            as_bytes = {ord(char): chr(byte) for char, byte in byte_chars.items()}
            forms.update(token.translate(as_bytes).encode("latin-1", "replace") for token in vocabulary)
        else:
            forms.update(token.replace(_METASPACE, " ").encode() for token in vocabulary)
            forms.update(bytes([byte]) for byte in range(256))  # <0x00> to <0xFF>
        shares = np.zeros(256)
        unseen = set(range(256))
        for form in sorted(forms, key=len, reverse=True):
            if found := unseen.intersection(form):
                shares[list(found)] = 1 / len(form)
                unseen -= found
        # A byte that is no token may be dropped, or taken for unknown together with others.
        shares[[byte for byte in range(256) if bytes([byte]) not in forms]] = 0.0
        if any(token.lstrip or token.rstrip for token in added.values()):
            shares[_WHITESPACE] = 0.0  # such a token takes all white space beside it
        return shares


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its parts in the form of tokenizer.json."""
    if component is None:
        return []
    described = json.loads(component.__getstate__())
    return _flat(described, name)


def _flat(described: dict[str, Any], name: str) -> list[dict[str, Any]]:
    if described["type"] != "Sequence":
        return [described]
    return [part for inner in described[name] for part in _flat(inner, name)]


def _writes_metaspace(normalizer: dict[str, Any]) -> bool:
    return (
        normalizer["type"] == "Replace"
        and normalizer["pattern"] == {"String": " "}
        and normalizer["content"] == _METASPACE
    )


def _keeps_bytes(
    model: Any, of_bytes: bool, normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]]
) -> bool:
    """Whether every byte of a text becomes part of exactly one token, and none is dropped or taken for unknown."""
    if not isinstance(model, tokenizers.models.BPE):
        return False
    if not all(part["type"] in ("NFC", "Prepend") or _writes_metaspace(part) for part in normalizers):
        return False
    for part in pre_tokenizers:
        if part["type"] not in _KEEPING_PRE_TOKENIZERS and part.get("behavior", "Removed") == "Removed":
            return False
    return (
        of_bytes or model.byte_fallback and all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    )
