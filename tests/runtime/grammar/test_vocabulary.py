"""The bytes of every token, in each kind of tokenizer, are those that its text is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from pagegraph.runtime.grammar.vocabulary import NoVocabulary, load_vocabulary
from tests.runtime.text.test_output import ALL_KINDS, KINDS

END, PAST = 2, 10  # the end of sequence, and ids of the model that the tokenizer does not know


def vocabulary(
    kind: str, folder: Path, vocab_size: int | None = None, eos_ids: frozenset[int] = frozenset([END])
) -> LLTokenizer:
    tokenizer = KINDS[kind]
    (folder / "tokenizer.json").write_text(tokenizer._backend.to_str())
    return load_vocabulary(folder, tokenizer.vocab_size + PAST if vocab_size is None else vocab_size, eos_ids)


def allowed(matcher: LLMatcher) -> set[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


@ALL_KINDS
def test_tokens_are_their_bytes(kind: str, tmp_path: Path) -> None:
    tokenizer, found = KINDS[kind], vocabulary(kind, tmp_path)
    for token in set(range(tokenizer.vocab_size)) - tokenizer.special_ids:
        if (data := tokenizer.token_bytes(token)) != b"\xff":  # no text has that byte
            assert found.decode_bytes([token]) == data, token


@ALL_KINDS
def test_any_text_may_hold_every_token_but_special_and_unknown_ones(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]
    tokens = allowed(LLMatcher(vocabulary(kind, tmp_path), r"start: /(?s:.*)/"))
    assert tokens & tokenizer.special_ids <= {END} and max(tokens) < tokenizer.vocab_size
    whole = [t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t).strip() == b"the"]
    assert whole and tokens >= set(whole)


@ALL_KINDS
def test_texts_of_several_scripts_match_themselves_alone(kind: str, tmp_path: Path) -> None:
    found = vocabulary(kind, tmp_path)
    for text in ("the caf\u00e9", "\u65e5\u672c", "a\n the"):
        ids = found.tokenize_str(text)
        if found.decode_str(ids) != text:  # a vocabulary without bytes lacks characters
            continue
        matcher = LLMatcher(found, f"start: {text!r}".replace("'", '"'))
        assert matcher.consume_tokens(ids) and matcher.is_stopped()
        other = LLMatcher(found, 'start: "x"', log_level=0)
        assert not other.consume_tokens(ids)


def test_every_end_of_sequence_ends_a_text(tmp_path: Path) -> None:
    found = vocabulary("gemma", tmp_path, eos_ids=frozenset([1, 2]))
    matcher = LLMatcher(found, 'start: "a"+')
    assert not allowed(matcher) & {1, 2}
    matcher.consume_tokens(found.tokenize_str("a"))
    assert allowed(matcher) >= {1, 2}


def test_a_tokenizer_that_knows_more_than_the_model_has_wider_masks(tmp_path: Path) -> None:
    assert vocabulary("gemma", tmp_path, vocab_size=100).vocab_size == KINDS["gemma"].vocab_size


def test_truncation_and_padding_are_left_out(tmp_path: Path) -> None:
    backend = KINDS["byte-level"]._backend
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    try:
        ids = vocabulary("byte-level", tmp_path).tokenize_str("the the the")
    finally:
        backend.no_truncation()
        backend.no_padding()
    assert KINDS["byte-level"].decode(ids) == "the the the"


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoVocabulary, match="end-of-sequence"):
        vocabulary("gemma", tmp_path, eos_ids=frozenset())
