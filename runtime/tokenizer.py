"""Text to token ids and back, from the tokenizer files of a model folder.

Knows `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`.
Knows nothing of requests, sockets or torch: a web worker imports this module and must stay light.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from runtime.token_bound import TokenBound

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEMPLATE_ARGUMENTS = frozenset(
    {"conversations", "messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
     "continue_final_message", "return_assistant_tokens_mask", *_SPECIAL_NAMES}
)  # fmt: skip
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"
_MANY_CHARS = 4096  # about a millisecond; from here on without Python's lock, which only the library's batches give up
# A character is at most 4 bytes, so at most 4 tokens; past this many the bytes are not UTF-8 at all.
_MAX_HELD_TOKENS = 8
# Tokens of the prompt that stand before the first output token, so that its leading space is kept.
_PRIMING_TOKENS = 6


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the text is fit to show to the user."""


class Tokenizer:
    """A model's vocabulary, its special tokens and its chat template. Safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
    ) -> None:
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._byte_chars = _byte_level_chars() if "ByteLevel" in str(backend.decoder) else None
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
            raise ValueError(f"{path} is not a tokenizer of the tokenizers library: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        return cls(
            backend,
            special_tokens=_special_tokens(_read_json(folder / "special_tokens_map.json") | config),
            chat_template=_chat_template(folder, config),
            add_bos=config.get("add_bos_token"),
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
            if len(text) < _MANY_CHARS:
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
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> str:
        """Messages to the text the model was trained on; `arguments` are extra variables of the template.

        Raises ChatTemplateError when the model has no template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ChatTemplateError("this model has no chat template; use /v1/completions with a prompt")
        extra = arguments or {}
        if taken := _TEMPLATE_ARGUMENTS & extra.keys():
            raise ChatTemplateError(f"chat_template_kwargs may not set {sorted(taken)[0]}")
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **extra,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ChatTemplateError("the model's chat template cannot render these messages") from error
        return rendered[0]

    def apply_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Messages to ids: `render_chat`, then `encode` with no further special tokens."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id outside the vocabulary."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.added_ids:
            return token.encode()
        if self._byte_chars is not None and all(char in self._byte_chars for char in token):
            return bytes(self._byte_chars[char] for char in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match.group(1), 16)])
        return token.replace("\u2581", " ").encode()

    def _missing_bos(self, add_bos: bool | None) -> int | None:
        """The opening token's id when the config asks for one and `tokenizer.json` does not add it."""
        bos = self.special_tokens.get("bos_token")
        bos_id = self._backend.token_to_id(bos) if bos else None
        if not add_bos or bos_id is None or bos_id in self._backend.encode("").ids:
            return None
        return bos_id


class Detokenizer:
    """Text of one growing sequence: never half a character, never part of a stop string.

    The stop string whose last character comes first wins (the longest of those), whatever pieces the
    tokens cut the text into. Text of the first `min_tokens` tokens is not searched.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        *,
        prompt_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self.stopped_by: str | None = None
        self.num_tokens = 0  # tokens taken in, up to and with the one that completed a stop string
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._dropped_ids = tokenizer.special_ids if skip_special else frozenset()
        self._min_tokens = min_tokens
        self._held = ""  # text that may begin a stop string
        # `_ids[:_read]` has been turned into `_read_text`; the rest is not yet whole characters.
        self._ids = [id for id in prompt_ids[-_PRIMING_TOKENS:] if id not in self._dropped_ids]
        self._read = len(self._ids)
        self._read_text = self._decode(self._ids).rstrip(_REPLACEMENT)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take in new tokens and return the text that is now certain; "" after a stop string matched."""
        return "".join(self._push(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """The text still held back at the end of the sequence, without a trailing half character."""
        if self.stopped_by is not None:
            return ""
        rest = self._decode(self._ids)[len(self._read_text) :].rstrip(_REPLACEMENT)
        text = self._cut(rest) + self._held
        self._held = ""
        return text

    def _push(self, token_id: int) -> str:
        if self.stopped_by is not None:
            return ""
        self.num_tokens += 1
        if token_id in self._dropped_ids:
            return ""
        self._ids.append(token_id)
        text = self._advance()
        return text if self.num_tokens <= self._min_tokens else self._cut(text)

    def _advance(self) -> str:
        """Text of whole characters that the newest token completed."""
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._read < _MAX_HELD_TOKENS:
            return ""
        new = text[len(self._read_text) :]
        if new:
            # Only the tokens of the newest text are kept: they stand before the next token.
            self._ids = self._ids[self._read :]
            self._read_text = self._decode(self._ids)
        self._read = len(self._ids)
        return new

    def _cut(self, new: str) -> str:
        """Pass text on up to a stop string, holding back what may begin one."""
        if not self._stop:
            return new
        text = self._held + new
        ends = ((at + len(word), -len(word), word) for word in self._stop if (at := text.find(word)) >= 0)
        if found := min(ends, default=None):
            end, _, self.stopped_by = found
            self._held = ""
            return text[: end if self._include_stop else end - len(self.stopped_by)]
        keep = max(_overlap(text, word) for word in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special=False)


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `word`."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0


def _byte_level_chars() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, turned round (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or {} when the model has no such file."""
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; the files write them as a string or as an object with `content`."""
    values = {name: config.get(name) for name in _SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The default chat template: its own file first, then the entry of the tokenizer's config."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
