"""The lower bound against what tokenizers make of any text: never above, and close where texts are plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from pagegraph.runtime.text.tokenizer import Tokenizer
from tests.paths import ROOT

# Runs of one character, words, marks that compose, jamo, signs of SentencePiece, white space of all kinds, special
# tokens.
PIECES = st.sampled_from(
    ["hello", " world", "=", "-" * 64, "\n", " " * 9, "\u3000", "\u00a0", "é", "e\u0301", "ά\u0345\u0300", "각", "한", "漢字",
     "🦙", "\u2581", "<s>", "<|end|>", "<mask>", "<0x0A>", "\x00", "\x7f", "caf\ufffd", "0123456789", "\u212a"]
)  # fmt: skip
RUNS = st.tuples(PIECES, st.integers(1, 400)).map(lambda run: run[0] * run[1])
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=30).map("".join) | RUNS


def byte_level(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def composing(folder: Path) -> tokenizers.Tokenizer:
    backend = byte_level(folder)
    backend.normalizer = normalizers.Sequence([normalizers.NFC()])
    return backend


def greedy(folder: Path) -> tokenizers.Tokenizer:
    """With tokens that take all white space beside them."""
    backend = byte_level(folder)
    backend.add_special_tokens(
        [AddedToken("<mask>", lstrip=True, special=True), AddedToken("<sep>", rstrip=True, special=True)]
    )
    return backend


def lacking(folder: Path) -> tokenizers.Tokenizer:
    """Without a token for the byte of `h` alone: it is dropped where no merge takes it."""
    described = json.loads((folder / "tokenizer.json").read_text())
    del described["model"]["vocab"]["h"]
    described["model"]["merges"] = [pair for pair in described["model"]["merges"] if "h" not in "".join(pair)]
    described["model"]["vocab"] = {token: id for token, id in described["model"]["vocab"].items() if "h" not in token}
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def sentencepiece(folder: Path) -> tokenizers.Tokenizer:
    """Llama 2's kind: spaces written as a sign, bytes for what is in no token."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("_", "_"), ("__", "__"), ("_", "hello")]
    merges = [(left.replace("_", "\u2581"), right.replace("_", "\u2581")) for left, right in merges]
    tokens = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"\u2581helo",
        *("".join(pair) for pair in merges),
    ]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def words(folder: Path) -> tokenizers.Tokenizer:
    """Any word is one token, and white space none."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def lower_case(folder: Path) -> tokenizers.Tokenizer:
    backend = byte_level(folder)
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    return backend


KINDS = [byte_level, composing, greedy, lacking, sentencepiece, words, lower_case]


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_fewer_tokens(kind: Callable[[Path], tokenizers.Tokenizer], tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(kind(tokenizer_folder))

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))

    check()


@pytest.mark.parametrize("kind", [byte_level, composing, sentencepiece])
def test_a_long_text_is_known_to_be_long(kind: Callable[[Path], tokenizers.Tokenizer], tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(kind(tokenizer_folder))
    for text in ("hello " * 5000, "漢字" * 5000, "hello\n" * 5000):
        assert tokenizer.min_tokens(text) > len(tokenizer.encode(text)) / 12


@pytest.mark.parametrize("kind", [words, lower_case])
def test_where_bytes_may_be_dropped_nothing_is_known(
    kind: Callable[..., tokenizers.Tokenizer], tokenizer_folder: Path
) -> None:
    assert Tokenizer(kind(tokenizer_folder)).min_tokens("HELLO" * 1000) == 0


def test_megabytes_are_read_as_far_as_needed(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert tokenizer.min_tokens("") == 0
    text = "hello " * 1_300_000
    assert tokenizer.min_tokens(text) > 100_000
    assert 500 < tokenizer.min_tokens(text, enough=500) < 100_000  # read no further than that is known


def test_half_of_a_surrogate_pair_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        Tokenizer.load(tokenizer_folder).min_tokens("\ud800")


@pytest.mark.slow
def test_no_text_has_fewer_tokens_of_the_served_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(str(ROOT / "models"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    converted.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.min_tokens("hello " * 1000) > 200

    @settings(max_examples=1000, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))

    check()
