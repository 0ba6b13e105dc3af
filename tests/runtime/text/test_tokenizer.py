"""Ids, what a token stands for, and templates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pagegraph.runtime.bad_parameter import BadParameter
from pagegraph.runtime.text.tokenizer import ChatTemplateError, Tokenizer

EMOJI = "caf\u00e9 \U0001f600 \u65e5\u672c"


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
        "import sys; from pagegraph.runtime.text.tokenizer import Tokenizer; t = Tokenizer.load(sys.argv[1]);"
        "t.apply_chat([{'role': 'user', 'content': 'x'}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tokenizer_folder)], timeout=60).returncode == 0


def test_a_thread_keeps_little_of_what_it_encodes(tmp_path: Path) -> None:
    """A web process has a hundred threads, and each may meet every word. By glibc's count: in a process of its own."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    run = subprocess.run([sys.executable, "-c", KEPT, str(tmp_path)], capture_output=True, text=True, timeout=60)
    if run.returncode == 77:
        pytest.skip("another C library")
    assert int(run.stdout) < 400 << 10, run.stderr


KEPT = """
import ctypes, sys, threading
from pagegraph.runtime.text.tokenizer import Tokenizer
class Used(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks bytes free keep".split()]
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2"):
    sys.exit(77)
libc.mallinfo2.restype = Used
tokenizer = Tokenizer.load(sys.argv[1])
def encode():
    tokenizer.encode("a b c")
    before = libc.mallinfo2().bytes
    for first in range(0, 8000, 100):
        tokenizer.encode(" ".join(f"w{number:09}" for number in range(first, first + 100)))
    print(libc.mallinfo2().bytes - before)
thread = threading.Thread(target=encode)
thread.start()
thread.join()
"""


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
    with pytest.raises(ChatTemplateError, match="no critics here"):
        tokenizer.apply_chat([{"role": "critic", "content": "x"}])
    for name in ("messages", "tokenize", "bos_token", "self", "chat_template"):
        with pytest.raises(BadParameter, match=f"chat_template_kwargs may not set {name}"):
            tokenizer.apply_chat([{"role": "user", "content": "x"}], arguments={name: []})


def test_any_other_argument_is_the_template_s(tokenizer: Tokenizer) -> None:
    """Names of Python's and jinja's own, and of the functions on the way, among them."""
    names = [
        "cls",
        "args",
        "kwargs",
        "arguments",
        "options",
        "source",
        "parts",
        "context",
        "environment",
        "loop",
        "a b",
    ]
    plain = tokenizer.apply_chat([{"role": "user", "content": "x"}])
    for name in [*names, "range", "namespace", "raise_exception", "__class__", "", "tool_schemas", "conversation"]:
        assert tokenizer.apply_chat([{"role": "user", "content": "x"}], arguments={name: 1}) == plain, name


def test_template_file_wins_and_bos_is_added(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}x")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.render_chat([]) == "<s>x"
    assert tokenizer.decode(tokenizer.encode("a"), skip_special=False) == "<s>a"
    assert tokenizer.decode(tokenizer.encode("a", add_special_tokens=False), skip_special=False) == "a"


def test_token_bytes(tokenizer: Tokenizer, byte_fallback: Tokenizer) -> None:
    for each in (tokenizer, byte_fallback):
        ids = each.encode(EMOJI)
        assert b"".join(map(each.token_bytes, ids)).decode().strip() == EMOJI
    assert tokenizer.token_bytes(1) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""


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
