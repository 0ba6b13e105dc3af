"""Text to token ids and back, from the tokenizer files of a model folder.

Knows `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and
`chat_template.json`. Knows nothing of requests, sockets or torch: a web process imports this module and must stay light.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pagegraph.compiler.model.files import json_object, lfs_pointer
from pagegraph.runtime.bad_parameter import BadParameter
from pagegraph.runtime.text.chat_template import ChatTemplate, ChatTemplateError
from pagegraph.runtime.text.token_bound import TokenBound

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEMPLATE_ARGUMENTS = frozenset(
    {"conversations", "messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
     "continue_final_message", "return_assistant_tokens_mask", "self", *SPECIAL_NAMES}
)  # fmt: skip
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"
# Characters or tokens, about a millisecond; from here on without Python's lock, which only the library's batches give up.
_MANY = 4096
# Words of which each thread that encodes remembers the tokens. The library's own 10,000 took 3.4 MiB of a thread, measured with
# SmolLM2's tokenizer, these 0.1 MiB; every other text is as fast.
_REMEMBERED_WORDS = 250
_BEFORE = "a"  # a token that stands before another, which then keeps its leading space
_NEIGHBOURS = re.compile(r"\b(BPEDecoder|CTC)\(")  # decoders under which a token's text depends on its neighbours
# Byte-level decoders show wrong bytes as Python's "replace" does; of single byte tokens each is shown.
_EACH_BYTE = "pagegraph.each-byte"


def _show_each(error: UnicodeError) -> tuple[str, int]:
    """What stands for wrong bytes, and where to read on."""
    assert isinstance(error, UnicodeDecodeError)
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _show_each)


class Tokenizer:
    """A model's vocabulary, its special tokens and its chat template. Safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        class_name: str = "PreTrainedTokenizerFast",
    ) -> None:
        self.class_name = class_name  # of transformers
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        self.template = None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        if hasattr(backend.model, "_resize_cache"):  # of BPE and Unigram; others remember nothing
            backend.model._resize_cache(_REMEMBERED_WORDS)
        added = backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._byte_chars = _byte_level_chars() if "ByteLevel" in str(backend.decoder) else None
        self.pieces = _Pieces(backend, self._byte_chars)
        self.byte_errors = _EACH_BYTE if self._byte_chars is None else "replace"  # of a codec, for text from bytes
        if unfit := _NEIGHBOURS.search(str(backend.decoder)):
            raise ValueError(
                f"the tokenizer's decoder {unfit[1]} is not served: a token's text would depend on its neighbours"
            )
        self._bos_id = self._missing_bos(add_bos)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer from a model folder.

        Raises FileNotFoundError when there is no `tokenizer.json`, ValueError when it does not parse.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json; point `tokenizer` at a folder that does")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(
                f"{path} is not a tokenizer of the tokenizers library: {lfs_pointer(path) or error}"
            ) from error
        config = json_object(folder / "tokenizer_config.json")
        return cls(
            backend,
            special_tokens=_special_tokens(json_object(folder / "special_tokens_map.json") | config),
            chat_template=_chat_template(folder, config),
            add_bos=config.get("add_bos_token"),
            class_name=str(config.get("tokenizer_class") or "PreTrainedTokenizerFast"),
        )

    @functools.cached_property
    def min_tokens(self) -> TokenBound:
        """How many tokens a text has at least. Making it takes a moment: 0.1 s for 50,000 tokens."""
        return TokenBound(self._backend, self._byte_chars)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to ids, with the model's opening and closing tokens when `add_special_tokens`.

        A long text holds up no other thread. Raises UnicodeEncodeError on text with lone surrogates.
        """
        try:
            if len(text) < _MANY:
                ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            else:
                ids = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:  # the library's word for a string that has no UTF-8 form
            text.encode()
            raise
        if add_special_tokens and self._bos_id is not None:
            return [self._bos_id, *ids]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD. Many ids hold up no other thread."""
        ids = list(token_ids)
        if len(ids) < _MANY:
            return self._backend.decode(ids, skip_special_tokens=skip_special)
        return self._backend.decode_batch([ids], skip_special_tokens=skip_special)[0]

    def vocabulary_entries(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary writes them ("Ġhello"); "" for an id outside of it."""
        return [self._backend.id_to_token(one) or "" for one in token_ids]

    @property
    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """Tokens beside those of the model proper by their id, in the words of tokenizer_config.json."""
        names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        added = self._backend.get_added_tokens_decoder()
        return {str(id): {name: getattr(token, name) for name in names} for id, token in added.items()}

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> str:
        """Messages to the text the model was trained on; `arguments` are extra variables of the template.

        Content is a string or a list of text parts, whatever the template wants. Raises ChatTemplateError when the
        model has no template, the template refuses the messages, or what the user said is not in its text;
        BadParameter where `arguments` has a name that is not the request's to set.
        """
        if self.template is None:
            raise ChatTemplateError("this model has no chat template; use /v1/completions with a prompt")
        extra = arguments or {}
        if taken := _TEMPLATE_ARGUMENTS & extra.keys():
            raise BadParameter("chat_template_kwargs", f"may not set {sorted(taken)[0]}; leave it out there")
        return self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            **extra,
        )

    def apply_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Messages to ids: `render_chat`, then `encode` with no further special tokens."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id outside the vocabulary."""
        piece = self.pieces[token_id]
        return piece.encode() if isinstance(piece, str) else piece

    def _missing_bos(self, add_bos: bool | None) -> int | None:
        """The opening token's id when the config asks for one and `tokenizer.json` does not add it."""
        bos = self.special_tokens.get("bos_token")
        bos_id = self._backend.token_to_id(bos) if bos else None
        if not add_bos or bos_id is None or bos_id in self._backend.encode("").ids:
            return None
        return bos_id


class _Pieces(dict[int, str | bytes]):
    """What each token adds to text that stands before it, worked out when it is first asked for.

    Text where the token is whole characters, else bytes. "" for an id outside the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, byte_chars: dict[str, int] | None) -> None:
        self._backend = backend
        self._byte_chars = byte_chars

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._backend.id_to_token(token_id)
        piece = self[token_id] = "" if token is None else self._piece(token)
        return piece

    def _piece(self, token: str) -> str | bytes:
        decoder = self._backend.decoder
        if decoder is None:  # then the library puts a space between tokens
            return " " + token
        text = decoder.decode([_BEFORE, token]).removeprefix(_BEFORE)
        if _REPLACEMENT not in text:
            return text
        data = self._bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    def _bytes(self, token: str) -> bytes:
        """Of a token whose text has U+FFFD."""
        if self._byte_chars is not None and all(char in self._byte_chars for char in token):
            return bytes(self._byte_chars[char] for char in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match.group(1), 16)])
        return token.encode()


def _byte_level_chars() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, turned round (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; the files write them as a string or as an object with `content`."""
    values = {name: config.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The default chat template: its own file first, then the entry of the tokenizer's config."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = json_object(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
