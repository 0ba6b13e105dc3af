"""A number's digits come to an end where the number may, and nothing else is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from pagegraph.runtime.grammar import long_numbers
from pagegraph.runtime.grammar.long_numbers import MAX_TOKENS, LongNumbers
from pagegraph.runtime.structured_output import StructuredOutputs, grammar_text
from tests.runtime.engine.test_grammars import ran, submit_grammar, text
from tests.runtime.spec_decode.test_grammar_drafter import drafting, run

LONG = "7" * MAX_TOKENS


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder: Path) -> LLTokenizer:
    return LLTokenizer((tokenizer_folder / "tokenizer.json").read_text(), eos_token=0)


@pytest.fixture(scope="module")
def numbers(vocabulary: LLTokenizer) -> LongNumbers:
    return LongNumbers(vocabulary)


def follows(vocabulary: LLTokenizer, numbers: LongNumbers, schema: Any, said: str, drafted: str = "") -> str:
    """The characters that may follow, of those that are a token."""
    matcher = LLMatcher(vocabulary, grammar_text(StructuredOutputs(json=schema)))
    # Digit by digit, as most tokenizers have it.
    tokens, drafts = ([vocabulary.tokenize_str(one)[0] for one in part] for part in (said, drafted))
    masks = np.zeros((len(drafts) + 1, -(-vocabulary.vocab_size // 32)), np.int32)
    for row, taken in enumerate([tokens, *([draft] for draft in drafts)]):
        assert matcher.consume_tokens(taken), matcher.get_error()
        masks[row] = np.frombuffer(matcher.compute_bitmask(), np.int32)
    numbers.cut(np.array(tokens, np.int32), drafts, masks)
    bits = np.unpackbits(masks[-1].view(np.uint8), bitorder="little")
    found = [vocabulary.decode_bytes([token]) for token in np.flatnonzero(bits[: vocabulary.vocab_size]).tolist()]
    return "".join(sorted(one.decode("ascii", "replace") for one in found if len(one) == 1))


@pytest.mark.parametrize(
    ("schema", "said", "more"),
    [
        ({"type": "integer"}, LONG, ""),
        ({"type": "number"}, LONG, ".Ee"),
        ({"type": "number"}, f"-{LONG}.{LONG}", "Ee"),
        ({"type": "number"}, f"{LONG}.{LONG}e-{LONG}", ""),
        ({"type": "number", "minimum": 0}, f"0.{LONG}", ""),
        ({"type": ["number", "string"]}, LONG, ".Ee"),
        ({}, LONG, ".Ee"),
    ],
)
def test_a_long_number_ends(vocabulary: LLTokenizer, numbers: LongNumbers, schema: Any, said: str, more: str) -> None:
    assert set(follows(vocabulary, numbers, schema, said)) - set("\n ") == set(more)
    assert set(follows(vocabulary, numbers, schema, said[:-1])) >= {*"0123456789", *more}
    inside = {"type": "array", "items": schema}
    assert set(follows(vocabulary, numbers, inside, f"[1,{said}")) - set("\n ") == {*more, *",]"}


def test_draft_tokens_count(vocabulary: LLTokenizer, numbers: LongNumbers) -> None:
    for at in (0, 1, MAX_TOKENS - 1):
        assert follows(vocabulary, numbers, {"type": "number"}, LONG[at:], LONG[:at]).strip() == ".Ee"
    assert "7" in follows(vocabulary, numbers, {"type": "number"}, LONG[2:], "7")
    assert "7" in follows(vocabulary, numbers, {"type": "number"}, LONG, ".7")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string"}, f'"{LONG}'),
        ({"type": "string", "minLength": 99}, f'"{LONG}'),
        ({"type": "string", "pattern": "^[0-9]+$"}, f'"{LONG}'),
        ({"type": "string", "pattern": "^[0-9]{99}$"}, f'"{LONG}'),
        ({"type": "string", "pattern": "^[0-9a-f]{99}$"}, f'"{LONG}'),
        ({"enum": [10**40, 1]}, f"1{LONG[:-1]}".replace("7", "0")),
        ({"type": "integer", "multipleOf": 7}, f"1{LONG[:-1]}"),  # which is none yet
    ],
)
def test_strings_go_on_and_numbers_that_may_not_end(
    vocabulary: LLTokenizer, numbers: LongNumbers, schema: Any, said: str
) -> None:
    assert set(follows(vocabulary, numbers, schema, said)) & set("0123456789")


@pytest.mark.parametrize("options", [{}, {"budget": 9}, {"num_blocks": 14}, {"max_num_seqs": 2}, {"method": "host"}])
def test_they_end_in_the_loop_however_tokens_are_computed(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_numbers, "MAX_TOKENS", 2)
    grammar = f"start: %json {json.dumps({'type': 'integer', 'minimum': 0})}"
    submits = [submit_grammar(f"{seed}", grammar, seed=seed) for seed in range(8)]
    whole = ran(*submits)
    assert {text(tokens) for tokens in whole.tokens.values()} == {"1", "11"}
    cut = run(drafting("host"), submits) if "method" in options else ran(*submits, **options)
    assert cut.tokens == whole.tokens and cut.ended == whole.ended == dict.fromkeys(whole.ended, "stop")


def test_a_grammar_without_json_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_numbers, "MAX_TOKENS", 2)
    harness = ran(submit_grammar("one", "start: /1{3,}/"), submit_grammar("two", "start: /1{4}1?/"))
    assert all(len(text(tokens)) > 2 for tokens in harness.tokens.values())
