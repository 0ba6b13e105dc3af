"""Text becomes the ids that the keys of a GGUF file define, by a plain statement of the rules."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, trainers

from pagegraph.compiler.gguf.file import GgufError, open_gguf, read_once
from pagegraph.compiler.gguf.tokenizer import CUTS, Vocabulary, read_tokenizer, save_tokenizer
from pagegraph.compiler.model.source import resolve_model
from pagegraph.runtime.text.tokenizer import Tokenizer
from tests.compiler.gguf.files import CONTROL, NORMAL, PIECES, USER_DEFINED, spm_keys, write
from tests.paths import MODELS

SMOLLM2, GEMMA = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf", MODELS / "gemma-3-270m-q4_k_m.gguf"
CORPUS = [
    "the cat sat on the mat and then the other cat ate the hat  of  them", "aaaa aaa aa a bababab abab  ab\n\nba\n",
    "Der Fluß fließt über größere Flüsse", "тихий океан и тихая река", "日本語の本と日本の本屋", "שלום עולם שלום", "ไทยไทยไทย",
]  # fmt: skip
LETTERS = "".join(sorted(set("".join(CORPUS)))) + "Zé🦙\u2581<>"


def spm_by_hand(text: str, scores: dict[str, float], ids: dict[str, int]) -> list[int]:
    """SentencePiece's rule: merge the neighbours that make the token of the best score, leftmost of equals; repeat."""
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (-scores[joined], place)
            for place in range(len(parts) - 1)
            if (joined := parts[place] + parts[place + 1]) in scores
        ]
        if not pairs:
            break
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


def tokenizer_of(tmp_path: Path, keys: dict[str, Any]) -> tuple[tokenizers.Tokenizer, Vocabulary]:
    return read_tokenizer(open_gguf(write(tmp_path / "words.gguf", "llama", keys, {})))


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """Keys of a vocabulary trained on several scripts: a piece's score falls with the order in which it was found."""
    words = tokenizers.Tokenizer(models.BPE())
    words.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, max_token_length=8)
    words.train_from_iterator(CORPUS * 3, trainer)
    return spm_keys([words.id_to_token(index) for index in range(words.get_vocab_size())])


@pytest.fixture(scope="module")
def by_score(trained: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    keys = {**trained, "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    return tokenizer_of(tmp_path_factory.mktemp("words"), keys)[0]


@settings(max_examples=100)
@given(
    text=st.one_of(
        st.text(st.sampled_from(LETTERS), max_size=40),
        st.lists(st.sampled_from(" ".join(CORPUS).split()), max_size=8).map(" ".join),
    )
)
def test_pairs_are_joined_by_score(trained: dict[str, Any], by_score: tokenizers.Tokenizer, text: str) -> None:
    tokens = trained["tokenizer.ggml.tokens"]
    ids = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens[259:], trained["tokenizer.ggml.scores"][259:]))
    assert by_score.encode(text).ids == spm_by_hand(text, scores, ids)
    assert by_score.decode(by_score.encode(text).ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("changes, ids, text", [
    ({}, ["<s>", "\u2581the", "\u2581a"], "the a"),
    ({"add_bos_token": False, "add_space_prefix": False}, ["th", "e", "\u2581a"], "the a"),
    ({"add_eos_token": True}, ["<s>", "\u2581the", "</s>"], "the"),
    ({"bos_token_id": 2, "add_space_prefix": False}, ["</s>", "he"], "he"),
    ({"add_space_prefix": True}, ["<s>", "\u2581the", "</s>", "\u2581a"], "the</s>a"),
])  # fmt: skip
def test_what_stands_around_text(changes: dict[str, Any], ids: list[str], text: str, tmp_path: Path) -> None:
    pieces = [*PIECES]
    scores = [-float(len(pieces) - place) for place in range(len(pieces))]  # the longest are joined first
    keys = {**spm_keys(pieces, scores), **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    assert tokenizer_of(tmp_path, keys)[0].encode(text).tokens == ids


def test_types_of_tokens(tmp_path: Path) -> None:
    """Control tokens are special; user-defined ones are found as they are, spaces too; bytes stand for the rest."""
    keys = spm_keys([*PIECES, "<|turn|>", "  ", "<|tool|>"])
    keys["tokenizer.ggml.token_type"][-3:] = [CONTROL, USER_DEFINED, USER_DEFINED]
    backend, _ = tokenizer_of(tmp_path, {**keys, "tokenizer.ggml.add_space_prefix": False})
    assert backend.encode("a  b<|turn|><|tool|>\u00e9").tokens == [
        "<s>",
        "a",
        "  ",
        "b",
        "<|turn|>",
        "<|tool|>",
        "<0xC3>",
        "<0xA9>",
    ]
    assert backend.decode(backend.encode("a  b<|turn|><|tool|>\u00e9").ids) == "a  b<|tool|>\u00e9"


def gpt2_keys(pre: str | None, tokens: Sequence[str] = (), **own: Any) -> dict[str, Any]:
    """A vocabulary of all bytes, two merges, and further tokens, the last of which are control tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "12 3", "\u0120 a"]
    words = [*letters, "12", "123", "\u0120a", *tokens]
    types = [NORMAL] * (len(letters) + 3) + [CONTROL] * len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types, **{f"tokenizer.ggml.{key}": value for key, value in own.items()},
    }  # fmt: skip


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("gpt-2", ["1", "234", "5"]),
        ("llama-bpe", ["1", "234", "5"]),
        ("smollm", list("12345")),
        ("qwen2", list("12345")),
    ],
)
def test_text_is_cut_as_the_file_says(pre: str, expected: list[str], tmp_path: Path) -> None:
    """12 is joined where digits may stand together; llama-bpe takes three, and a piece that is a token without looking
    at merges.
    """
    backend, _ = tokenizer_of(tmp_path, gpt2_keys(pre, ["<|begin|>"], bos_token_id=259))
    joined = {"gpt-2": ["123", "4", "5"], "llama-bpe": ["<|begin|>", "123", "4", "5"]}.get(pre, expected)
    assert backend.encode("12345").tokens == joined
    assert backend.decode(backend.encode(" a\u00e9 12345\n").ids) == " a\u00e9 12345\n"


@pytest.mark.parametrize("pre", CUTS)
def test_every_way_of_cutting_loses_nothing(pre: str, tmp_path: Path) -> None:
    backend, _ = tokenizer_of(tmp_path, gpt2_keys(pre, ["<|begin|>"], bos_token_id=259))
    for text in [
        *CORPUS,
        "It's 1234567 o'clock,\r\n\r\n  isn't IT?  HTTPServer \t x\u0301 ...!?\n ",
        "\U0001f999\u200d 日本12",
    ]:
        assert backend.decode(backend.encode(text).ids) == text


def test_a_file_without_pre_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer_of(tmp_path, gpt2_keys(None))
    assert "words.gguf names no tokenizer.ggml.pre" in caplog.text


@pytest.mark.parametrize("tokens, own, expected", [
    (["<|endoftext|>", "<|im_end|>", "<|other|>"], dict(eos_token_id=259, eot_token_id=260), {259, 260}),
    (["<|endoftext|>", "<|im_end|>", "<|other|>"], dict(eos_token_id=259), {259, 260}),  # known by its text
    (["<a>", "<b>", "<c>"], dict(eos_token_id=259, eot_token_id=260, eom_token_id=261), {259, 260, 261}),
    (["<|end|>", "<|return|>", "<|call|>"], dict(eos_token_id=260), {260, 261}),
    (["<|end|>"], dict(eos_token_id=259), {259}),
])  # fmt: skip
def test_all_that_ends_text(tokens: list[str], own: dict[str, int], expected: set[int], tmp_path: Path) -> None:
    assert set(tokenizer_of(tmp_path, gpt2_keys("qwen2", tokens, **own))[1].endings) == expected


@pytest.mark.parametrize("changes, message", [
    ({"model": "t5"}, r"tokenizer\.ggml\.model = 't5' is not served; llama, gpt2, gemma4 are"),
    ({"pre": "some-new"}, r"tokenizer\.ggml\.pre = 'some-new' is not served; .*llama-bpe"),
    ({"no_such_key": 3}, r"tokenizer\.ggml\.no_such_key = 3 is not known here"),
    ({"suppress_tokens": [3]}, r"tokenizer\.ggml\.suppress_tokens"),
    ({"eot_token_id": 9999}, r"tokenizer\.ggml\.eot_token_id = 9999 is outside the vocabulary of"),
    ({"add_bos_token": True}, r"tokenizer\.ggml\.add_bos_token = True but the file has no tokenizer\.ggml\.bos_token_id"),
    ({"merges": ["a bc"]}, r"merges = 1 pairs do not belong to the vocabulary"),
    ({"tokens": ["a", "a"]}, r"tokens = 'a' is there twice"),
    ({"token_type": [1]}, r"token_type = 1 types belong to 259 tokens"),
])  # fmt: skip
def test_what_is_not_understood_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    keys = {**gpt2_keys("qwen2"), **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    with pytest.raises(GgufError, match=rf"words\.gguf: .*{message}"):
        tokenizer_of(tmp_path, keys)


def test_scores_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"tokenizer\.ggml\.scores = 0 scores belong to"):
        tokenizer_of(tmp_path, {**spm_keys(), "tokenizer.ggml.scores": None})


def test_the_folder_holds_what_serving_reads(tmp_path: Path) -> None:
    keys = {
        **spm_keys(),
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "tokenizer.chat_template.other": "x",
    }
    save_tokenizer(open_gguf(write(tmp_path / "words.gguf", "llama", keys, {})), tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert loaded.encode("the")[0] == 1 and loaded.encode("the", add_special_tokens=False)[0] != 1
    assert loaded.apply_chat([{"role": "user", "content": "the"}])[0] == 1


@pytest.mark.skipif(not SMOLLM2.is_file(), reason=f"{SMOLLM2.name} is not in models/; `make model` fetches it")
def test_ids_of_smollm2() -> None:
    with read_once():
        backend, vocabulary = read_tokenizer(open_gguf(SMOLLM2))
    assert vocabulary.endings == [0, 2]
    for text, ids in SMOLLM2_IDS.items():
        assert backend.encode(text).ids == ids
        assert backend.decode(ids, skip_special_tokens=False) == text


# Of everyday text, as ever; of numerals that are no digits (\u00bd) as the file's own way of cutting has it.
SMOLLM2_IDS: dict[str, list[int]] = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "<|im_start|>user\nWhat's 12345 + 67?<|im_end|>\n": [1, 4093, 198, 1780, 506, 216, 33, 34, 35, 36, 37, 1232, 216, 38, 39, 47, 2, 198],
    "  def f(x):\n\treturn x**2  # caf\u00e9 \U0001f999 \u65e5\u672c\u8a9e\n\n": [
        216, 753, 275, 24, 104, 727, 198, 197, 5406, 1792, 828, 34, 216, 907, 37366, 15107, 116, 243, 17097, 241, 115, 40993, 179,
        120, 248, 1116
    ],
    " 1 22 333 4444 a1b2 3.14\r\n": [
        216, 33, 216, 34, 34, 216, 35, 35, 35, 216, 36, 36, 36, 36, 253, 33, 82, 34, 216, 35, 30, 33, 36, 2738
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not GEMMA.is_file(), reason=f"{GEMMA.name} is not in models/; `make model-gemma` fetches it")
def test_real_gemma(tmp_path: Path) -> None:
    """Its own ids, the rule by hand on its quarter of a million pieces, and a fact that it knows."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve_model(str(GEMMA), cache_dir=tmp_path)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    with read_once():
        metadata = open_gguf(GEMMA).metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids = {token: index for index, token in enumerate(tokens)}
    scores = {
        token: score for token, score, kind in zip(tokens, metadata["tokenizer.ggml.scores"], kinds) if kind == NORMAL
    }
    for text in [*CORPUS[2:], "def f(x): return x**2 # 12345", "Ünïcödé 🦙 ₿", "x" * 50]:
        assert tokenizer.encode(text, add_special_tokens=False) == spm_by_hand(text, scores, ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.encode("The Eiffel Tower stands in the city of")
    found = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0].tolist()
    assert tokenizer.decode(found[len(prompt) :]) == " Paris, France."
    shutil.rmtree(folder)
