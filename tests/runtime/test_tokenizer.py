"""Tokenizer and Detokenizer: ids, templates, and text that never shows half a character or a stop string."""

from __future__ import annotations

import json
import threading
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from runtime.tokenizer import ChatTemplateError, Detokenizer, Tokenizer

EMOJI = "caf\u00e9 \U0001f600 \u65e5\u672c"
TEXTS = st.text(st.sampled_from("ab \u00e9\u65e5\U0001f600\nhelowrd"), max_size=30)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """A sentencepiece-like tokenizer: a leading space on words, bytes for unknown characters."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ("\u2581", "a", "b", "h", "e", "l", "o", "w", "r", "d", "\n"):
        vocab[piece] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


def test_loading_imports_no_torch(tokenizer_folder: Path) -> None:
    code = (
        "import sys; from runtime.tokenizer import Tokenizer; t = Tokenizer.load(sys.argv[1]);"
        "t.apply_chat([{'role': 'user', 'content': 'x'}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tokenizer_folder)], timeout=60).returncode == 0


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer"):
        Tokenizer.load(tmp_path)


def test_chat_has_the_template_s_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids, skip_special=False) == "<|user|>hello<|end|><|assistant|>"
    assert ids[0] in tokenizer.special_ids


def test_template_refusal_and_reserved_arguments(tokenizer: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="no functions here"):
        tokenizer.apply_chat([{"role": "function", "content": "x"}])
    with pytest.raises(ChatTemplateError, match="may not set messages"):
        tokenizer.apply_chat([{"role": "user", "content": "x"}], arguments={"messages": []})


def test_template_file_wins_and_bos_is_added(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}x")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.render_chat([]) == "<s>x"
    assert tokenizer.decode(tokenizer.encode("a"), skip_special=False) == "<s>a"
    assert tokenizer.decode(tokenizer.encode("a", add_special_tokens=False), skip_special=False) == "a"


@given(text=TEXTS)
def test_pieces_make_the_whole(tokenizer: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    for each in (tokenizer, byte_fallback):
        ids = each.encode(text, add_special_tokens=False)
        detokenizer = Detokenizer(each)
        pieces = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.finish()]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == each.decode(ids)


@given(ids=st.lists(st.integers(5, 349), max_size=40))
def test_any_byte_tokens_make_the_whole_but_a_cut_end(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = [i for i in ids if i < tokenizer.vocab_size]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.finish()
    assert text.rstrip("\ufffd") == tokenizer.decode(ids).rstrip("\ufffd")


def test_a_leading_space_after_the_prompt_is_kept(byte_fallback: Tokenizer) -> None:
    prompt, answer = byte_fallback.encode("hello"), byte_fallback.encode("world")
    detokenizer = Detokenizer(byte_fallback, prompt_ids=prompt)
    assert detokenizer.push(answer) + detokenizer.finish() == " world"


def test_half_a_character_is_never_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f600", add_special_tokens=False)
    assert len(ids) == 4
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "\U0001f600"]
    cut = Detokenizer(tokenizer)
    assert cut.push(ids[:3]) + cut.finish() == ""


def test_special_tokens_are_skipped_unless_asked(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), 1, *tokenizer.encode("b")]
    assert Detokenizer(tokenizer).push(ids) == "ab"
    assert Detokenizer(tokenizer, skip_special=False).push(ids) == "a<|end|>b"


def test_text_that_may_begin_a_stop_is_held_back(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(char)[0] for char in "xabacabad"]
    detokenizer = Detokenizer(tokenizer, ["abad"])
    assert [detokenizer.push([i]) for i in ids] == ["x", "", "", "", "abac", "", "", "", ""]
    assert detokenizer.stopped_by == "abad" and detokenizer.finish() == ""
    unfinished = Detokenizer(tokenizer, ["abad"])
    assert unfinished.push(ids[:4]) == "x" and unfinished.finish() == "aba"


def test_first_stop_by_position_and_include(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("this world is near the end")
    first = Detokenizer(tokenizer, ["end", "world"])
    assert first.push(ids) == "this " and first.stopped_by == "world"
    assert Detokenizer(tokenizer, ["end", "world"], include_stop=True).push(ids) == "this world"


def test_min_tokens_are_not_searched(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(char)[0] for char in "ababab"]
    detokenizer = Detokenizer(tokenizer, ["ab"], min_tokens=3)
    assert detokenizer.push(ids) == "aba" + "b"
    assert detokenizer.num_tokens == 6


@settings(max_examples=200)
@given(text=st.text("ab\u00e9", max_size=20), stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3),
       include=st.booleans())  # fmt: skip
def test_stop_strings_against_a_character_wise_search(
    tokenizer: Tokenizer, text: str, stops: list[str], include: bool
) -> None:
    expected, by = text, None
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            by = max(found, key=len)
            expected = text[: end if include else end - len(by)]
            break
    detokenizer = Detokenizer(tokenizer, stops, include)
    got = "".join(detokenizer.push([i]) for i in tokenizer.encode(text)) + detokenizer.finish()
    assert (got, detokenizer.stopped_by) == (expected, by)


def test_token_bytes(tokenizer: Tokenizer, byte_fallback: Tokenizer) -> None:
    for each in (tokenizer, byte_fallback):
        ids = each.encode(EMOJI)
        assert b"".join(map(each.token_bytes, ids)).decode().strip() == EMOJI
    assert tokenizer.token_bytes(1) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_garbage_does_not_hold_text_back_for_ever(tokenizer: Tokenizer) -> None:
    lone = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\x80")
    assert Detokenizer(tokenizer).push([lone] * 50).count("\ufffd") >= 40


def test_a_long_text_is_encoded_as_a_short_one_and_holds_nobody(tokenizer: Tokenizer) -> None:
    text = "hello world 0123456789\n" * 40_000
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    other = threading.Thread(target=tick)
    other.start()
    ids = tokenizer.encode(text)
    counted = ticks
    done.set()
    other.join()
    assert ids == tokenizer._backend.encode(text).ids and len(ids) > 40_000
    assert counted >= 10  # with Python's lock held it is 2 at most
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode(text + "\ud800")
