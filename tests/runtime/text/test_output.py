"""Text of tokens: decoding everything less decoding the prompt; never half a character or a stop string."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from pagegraph.runtime.ipc.protocol import TokenDelta, TokenLogprob
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.text.output import Detokenizer, StopStrings, TextOutput
from pagegraph.runtime.text.tokenizer import Tokenizer

SCRIPTS = [
    "the", " ", "  ", "a", "\n", " caf\u00e9", "\u65e5\u672c", "\u8a9e", "\U0001f999", "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1eb\U0001f1f7", "\u0645\u0631\u062d\u0628\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947", "\ufffd",
]  # fmt: skip
PARAMS = SamplingParams()


def byte_level() -> Tokenizer:
    """GPT-2's kind: tokens are bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["".join(SCRIPTS[:-1])] * 3 + ["the caf\u00e9"], trainer)
    return with_added(backend)


def byte_fallback(*end: decoders.Decoder) -> Tokenizer:
    """Llama's and Gemma's kind: unknown characters are byte tokens, words begin with U+2581."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    for piece in (
        *"thecaf\u2581\n\u00e9\u65e5\u0645\ufffd",
        "th",
        "the",
        "\u2581\u2581",
        "\u2581the",
        "\u2581caf",
        "\u2581a\u2581",
    ):
        vocab[piece] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return with_added(backend)


def unigram() -> Tokenizer:
    """T5's kind: no bytes; the decoder drops the first token's leading spaces."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        "\u2581\u2581",
        "\u2581the",
        *dict.fromkeys("".join(SCRIPTS).replace(" ", "")),
    ]
    backend = tokenizers.Tokenizer(models.Unigram([(piece, -1.0 - len(piece)) for piece in pieces], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>"])
    return with_added(backend)


def with_added(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_tokens([AddedToken("<tool>"), AddedToken("\u65e5 x"), AddedToken("  b")])
    return Tokenizer(backend)


KINDS = {
    "byte-level": byte_level(),
    "llama": byte_fallback(decoders.Strip(" ", 1, 0)),
    "gemma": byte_fallback(),
    "unigram": unigram(),
}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def unfinished(data: bytes) -> int:
    """Bytes at the end that only begin a character."""
    for n in (3, 2, 1):
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            if len(data) >= n and decoder.decode(data[-n:]) == "":
                return n
        except UnicodeDecodeError:
            pass
    return 0


def oracle(kind: str, ids: Sequence[int], skip: bool, cut: bool = False) -> str:
    """The text of a whole sequence; `cut`: without a character at the end that is not whole."""
    tokenizer = KINDS[kind]
    ids = [token_id for token_id in ids if not (skip and token_id in tokenizer.special_ids)]
    data = b"".join(map(tokenizer.token_bytes, ids))
    data = data[: len(data) - unfinished(data)] if cut else data
    if kind == "byte-level":
        text = data.decode("utf-8", "replace")
    elif kind == "unigram":
        return tokenizer.decode(ids, skip_special=False)
    else:
        text = "".join(
            "\ufffd" if "\udc80" <= char <= "\udcff" else char for char in data.decode("utf-8", "surrogateescape")
        )
        text = text[1:] if kind == "llama" and text.startswith(" ") else text
    if not cut and (kind == "byte-level" or "\ufffd" not in text):
        assert text == tokenizer.decode(ids, skip_special=False), "the oracle is wrong"
    return text


def expected(kind: str, prompt: Sequence[int], output: Sequence[int], skip: bool) -> str:
    """Decoding everything less decoding the prompt; a character that lies in both is the output's."""
    whole, before = oracle(kind, [*prompt, *output], skip), oracle(kind, prompt, skip)
    if whole.startswith(before):
        return whole.removeprefix(before)
    start = oracle(kind, prompt, skip, cut=True)
    assert whole.startswith(start)
    return whole.removeprefix(start)


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Encoded text, or any ids, also some outside the vocabulary."""
    tokenizer = KINDS[kind]
    texts = st.lists(st.sampled_from(SCRIPTS), max_size=5).map("".join)
    encoded = texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    specials = st.sampled_from(sorted(tokenizer.added_ids)).map(lambda token_id: [token_id])
    lone = st.integers(0, tokenizer.vocab_size + 2).map(lambda token_id: [token_id])
    parts = st.one_of(encoded, encoded, specials, lone, st.lists(lone, max_size=8).map(lambda ids: sum(ids, [])))
    return st.lists(parts, max_size=4).map(lambda parts: sum(parts, [])[:24])


@ALL_KINDS
@settings(max_examples=150)
@given(data=st.data())
def test_text_is_decoding_everything_less_decoding_the_prompt(kind: str, data: st.DataObject) -> None:
    """At every split into prompt and output, at every token that ends a character, and at the end."""
    ids, skip = data.draw(ids_of(kind)), data.draw(st.booleans())
    for split in range(len(ids) + 1):
        prompt, output = ids[:split], ids[split:]
        detokenizer, text = Detokenizer(KINDS[kind], prompt, skip), ""
        for count, token_id in enumerate(output, 1):
            text += detokenizer.push(token_id)
            assert expected(kind, prompt, output[:count], skip).startswith(text)
            if not detokenizer.inside_character:
                assert text == expected(kind, prompt, output[:count], skip)
        assert text + detokenizer.finish() == expected(kind, prompt, output, skip)


@ALL_KINDS
@settings(max_examples=60)
@given(data=st.data())
def test_chunks_make_no_difference(kind: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(kind))
    split = data.draw(st.integers(0, len(ids)))
    bounds = sorted({split, len(ids), *data.draw(st.lists(st.integers(split, len(ids)), max_size=5))})
    pieces = [ids[begin:end] for begin, end in itertools.pairwise(bounds)] or [[]]
    output = TextOutput(KINDS[kind], ids[:split], PARAMS)
    got = [output.add(TokenDelta("", one, "length" if one is pieces[-1] else "")) for one in pieces]
    assert "".join(piece.text for piece in got) == expected(kind, ids[:split], ids[split:], skip=True)
    assert sum((piece.token_ids for piece in got), []) == ids[split:]
    assert output.num_tokens == len(ids) - split


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
def test_a_prompt_of_characters_in_bytes_is_whole(kind: str) -> None:
    tokenizer = KINDS[kind]
    llamas = tokenizer.encode("\U0001f999\U0001f999", add_special_tokens=False)
    for prompt, text in ((llamas, "\U0001f999!a"), (tokenizer.encode("caf\ufffd"), "a")):
        output = tokenizer.encode(text, add_special_tokens=False)
        wanted = tokenizer.decode([*prompt, *output]).removeprefix(tokenizer.decode(prompt))
        assert whole(Detokenizer(tokenizer, prompt), output) == wanted
    assert whole(Detokenizer(tokenizer, llamas), llamas).strip(" ") == "\U0001f999\U0001f999"


def whole(detokenizer: Detokenizer, ids: Sequence[int]) -> str:
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


@pytest.mark.parametrize(("kind", "lost"), [("byte-level", "\ufffd"), ("llama", "\ufffd\ufffd")])
def test_a_prompt_that_ends_inside_a_character(kind: str, lost: str) -> None:
    """Completed, it is the output's; not completed, the prompt shows it already."""
    tokenizer = KINDS[kind]
    of_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    a, b, c, d, letter = (of_bytes[bytes([byte])] for byte in "\U0001f999a".encode())
    assert whole(Detokenizer(tokenizer, [a, b]), [c, d, letter]) == "\U0001f999a"
    assert whole(Detokenizer(tokenizer, [letter, a, b]), [letter]) == "a"
    assert whole(Detokenizer(tokenizer, [letter, a, b]), []) == ""
    assert whole(Detokenizer(tokenizer, [letter]), [a, b]) == lost, (
        "an unfinished character of the output's own is shown"
    )
    assert whole(Detokenizer(tokenizer, [letter]), [a, b, letter]) == lost + "a"


def test_wrong_bytes_are_told_at_once_and_do_not_undo_characters() -> None:
    tokenizer = KINDS["llama"]
    fire, e6, ff = [tokenizer.encode("\U0001f999")[-4:], 0xE6 + 3, 0xFF + 3]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"))
    wanted = ["", "", "", "\U0001f999", "\ufffd", "", "\ufffd\ufffd"]
    assert [detokenizer.push(token_id) for token_id in [*fire, ff, e6, ff]] == wanted


def test_whole_sequences_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there is text a token is looked up, and as little of a long prompt as tells how it ends."""
    for tokenizer in KINDS.values():
        ids = tokenizer.encode("the caf\u00e9 \U0001f999") * 20
        text = whole(Detokenizer(tokenizer, ids), ids)
        monkeypatch.setattr(Tokenizer, "decode", None)
        looked_up = []

        def look_up(pieces: dict, key: int) -> str:
            looked_up.append(key)
            return dict.__getitem__(pieces, key)

        monkeypatch.setattr(type(tokenizer.pieces), "__getitem__", look_up)
        detokenizer = Detokenizer(tokenizer, ids * 1000)
        assert len(looked_up) < 10
        assert whole(detokenizer, ids) == text and len(looked_up) < 10 + len(ids)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("decoder", "vocab", "text"),
    [
        (None, ["a", "b", "c"], "a b c"),
        (decoders.WordPiece(), ["a", "b", "##c", "."], "a bc."),
        (decoders.Metaspace(), ["\u2581a", "\u2581", "\u2581b"], "a  b"),
    ],
)
def test_other_decoders(decoder: decoders.Decoder | None, vocab: list[str], text: str) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocab)}, vocab[0]))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer, ids = Tokenizer(backend), list(range(len(vocab)))
    assert tokenizer.decode(ids) == text
    for split in range(len(ids) + 1):
        assert whole(Detokenizer(tokenizer, ids[:split]), ids[split:]) == text.removeprefix(
            tokenizer.decode(ids[:split])
        )


def test_a_decoder_that_looks_at_neighbours_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a</w>": 0}, "a</w>"))
    backend.decoder = decoders.BPEDecoder()
    with pytest.raises(ValueError, match="BPEDecoder"):
        Tokenizer(backend)


def test_special_tokens_are_skipped_unless_asked() -> None:
    tokenizer = KINDS["byte-level"]
    ids = [*tokenizer.encode("a"), 1, *tokenizer.encode("b")]
    assert whole(Detokenizer(tokenizer), ids) == "ab"
    assert whole(Detokenizer(tokenizer, skip_special=False), ids) == "a</s>b"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def singly(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token a character."""
    return [tokenizer.encode(char)[0] for char in text]


def run(output: TextOutput, tokenizer: Tokenizer, text: str, finish: str = "length") -> list[str]:
    """Add a delta a character of `text` until it ends -> the pieces' text."""
    got = []
    ids = singly(tokenizer, text)
    for count, token_id in enumerate(ids, 1):
        piece = output.add(TokenDelta("", [token_id], finish if count == len(ids) else ""))
        got.append(piece.text)
        if piece.finish_reason:
            break
    return got


def test_text_that_may_begin_a_stop_is_held_back(tokenizer: Tokenizer) -> None:
    output = TextOutput(tokenizer, [], PARAMS, ["abad"])
    assert run(output, tokenizer, "xabacabad", "") == ["x", "", "", "", "abac", "", "", "", ""]
    assert output.stopped_by == "abad"
    assert run(TextOutput(tokenizer, [], PARAMS, ["abad"]), tokenizer, "xaba") == ["x", "", "", "aba"]


def test_first_stop_by_position_and_include(tokenizer: Tokenizer) -> None:
    delta = TokenDelta("", tokenizer.encode("this world is near the end"))
    first = TextOutput(tokenizer, [], PARAMS, ["end", "world"]).add(delta)
    assert (first.text, first.finish_reason, first.stop_reason) == ("this ", "stop", "world")
    assert TextOutput(tokenizer, [], PARAMS, ["end", "world"], include_stop=True).add(delta).text == "this world"


def test_min_tokens_are_not_searched(tokenizer: Tokenizer) -> None:
    output = TextOutput(tokenizer, [], SamplingParams(min_tokens=3), ["ab"])
    piece = output.add(TokenDelta("", singly(tokenizer, "ababab")))
    assert (piece.text, output.num_tokens) == ("abab", 6)


def test_tokens_after_a_stop_string_were_not_asked_for(tokenizer: Tokenizer) -> None:
    """A step with draft tokens brings several: ids, log-probabilities and text end at the same token."""
    ids = singly(tokenizer, "xabyz")
    logprobs = [TokenLogprob(token_id, -1.0, 1) for token_id in ids]
    for reason, stop in (("", -1), ("length", -1), ("stop", ids[-1])):
        output = TextOutput(tokenizer, [], SamplingParams(stop_token_ids=[ids[-1]]), ["ab"])
        piece = output.add(TokenDelta("", ids, reason, stop, logprobs=logprobs))
        assert (piece.text, piece.token_ids, piece.logprobs, output.num_tokens) == ("x", ids[:3], logprobs[:3], 3)
        assert (piece.offsets, piece.finish_reason, piece.stop_reason) == ([0, 1, 1], "stop", "ab")


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_the_token_that_stopped_it(tokenizer: Tokenizer, include: bool, asked: bool) -> None:
    """It counts, is hidden unless asked for, and is a reason only where the request named it, not the model."""
    ids = singly(tokenizer, "ab")
    params = SamplingParams(stop_token_ids=ids[1:] if asked else [])
    logprobs = [TokenLogprob(token_id, -1.0, 1) for token_id in ids]
    piece = TextOutput(tokenizer, [], params, include_stop=include).add(
        TokenDelta("", ids, "stop", ids[1], logprobs=logprobs)
    )
    assert piece.text == ("ab" if include else "a")
    assert (piece.token_ids, piece.logprobs, piece.offsets) == (ids, logprobs, [0, 1])
    assert (piece.finish_reason, piece.stop_reason) == ("stop", ids[1] if asked else None)


@settings(max_examples=200)
@given(text=st.text("ab\u00e9", max_size=20), stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3),
       include=st.booleans(), sizes=st.lists(st.integers(1, 4)))  # fmt: skip
def test_stop_strings_against_a_character_wise_search(
    text: str, stops: list[str], include: bool, sizes: list[int]
) -> None:
    wanted, by = text, None
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            by = max(found, key=len)
            wanted = text[: end if include else end - len(by)]
            break
    if not stops:
        return
    search, got, at = StopStrings(stops, include), "", 0
    for size in [*sizes, *[1] * len(text)]:
        got += search.cut(text[at : at + size])
        assert wanted.startswith(got)
        at += size
    assert (got + search.release(), search.found) == (wanted, by)


@settings(max_examples=100)
@given(data=st.data())
def test_log_probabilities_come_with_the_text_of_their_tokens(data: st.DataObject) -> None:
    """Each says where that begins: behind what the tokens before it made certain, never past the text."""
    tokenizer = KINDS["byte-level"]
    ids = data.draw(ids_of("byte-level"))
    stops = data.draw(st.lists(st.sampled_from(["the caf", "\u65e5\u672c", "\U0001f999 ", "  "]), max_size=2))
    detokenizer, ends, begins, needs = Detokenizer(tokenizer), [0], [], []
    for token_id in ids:
        ends.append(ends[-1] + len(detokenizer.push(token_id)))
        begins.append(ends[-2] + detokenizer.num_replaced)
        needs.append(ends[-1] + detokenizer.inside_character)
    output, text, offsets, logprobs, left = TextOutput(tokenizer, [], PARAMS, stops), "", [], [], list(ids)
    while output.stopped_by is None and (left or not text):
        count = data.draw(st.integers(1, 4))
        entries = [TokenLogprob(token_id, -1.0, 1) for token_id in left[:count]]
        piece = output.add(TokenDelta("", left[:count], "" if left[count:] else "length", logprobs=entries))
        text, offsets, logprobs, left = (
            text + piece.text,
            offsets + piece.offsets,
            logprobs + piece.logprobs,
            left[count:],
        )
        if piece.finish_reason:
            break
        assert len(offsets) == sum(need <= len(text) for need in needs[: output.num_tokens]), (
            "with their text, no earlier or later"
        )
    assert [entry.token_id for entry in logprobs] == ids[: output.num_tokens]
    assert offsets == [min(begin, len(text)) for begin in begins[: output.num_tokens]]


def test_a_token_begins_behind_the_character_that_it_does_not_complete() -> None:
    tokenizer = KINDS["gemma"]
    ids = [*tokenizer.encode("\U0001f999")[-4:-2], *tokenizer.encode("the", add_special_tokens=False)]
    piece = TextOutput(tokenizer, [], PARAMS).add(
        TokenDelta("", ids, "length", logprobs=[TokenLogprob(one, -1.0, 1) for one in ids])
    )
    spoilt = piece.text.count("\ufffd")
    assert spoilt and piece.text.lstrip("\ufffd").strip() == "the" and piece.offsets[2] == spoilt


def test_log_probabilities_of_a_character_in_bytes_come_together() -> None:
    tokenizer = KINDS["gemma"]
    ids = [*tokenizer.encode("the", add_special_tokens=False), *tokenizer.encode("\U0001f999")[-4:]]
    output = TextOutput(tokenizer, [], PARAMS)
    got = [output.add(TokenDelta("", [token_id], logprobs=[TokenLogprob(token_id, -1.0, 1)])) for token_id in ids]
    assert [piece.offsets for piece in got[-4:]] == [[], [], [], [len(got[0].text)] * 4]
