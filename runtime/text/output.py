"""Tokens of one sequence to its text: whole characters, stop strings, which tokens count, how it ended.

The one owner of these rules; the web and the offline API both read text from here. Knows no sockets, no engine and no
shapes of answers.

The text of an output is what decoding prompt and output gives, less what decoding the prompt gives. A character that
the prompt began and the output completes is the output's, whole; one that stays unfinished is the prompt's. Bytes that
are no character become U+FFFD as soon as that is certain. Byte tokens of tokenizers that decode a run of them as a
whole, and to nothing but U+FFFD if any of it is wrong, are read one by one instead: a whole character stays one,
whatever bytes follow it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from pagegraph.runtime.ipc.protocol import PromptLogprobs, TokenDelta, TokenLogprob
from pagegraph.runtime.sampling_params import SamplingParams
from pagegraph.runtime.text.incoming import overlap
from pagegraph.runtime.text.tokenizer import Tokenizer

_MOST_UNFINISHED = 3  # bytes of a character that lacks its last


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delta brought: text that is now certain, the tokens that count, perhaps the end.

    Log-probabilities come with the text of their tokens; offsets[i] is where in the output's text that of logprobs[i]
    begins, and ends[i] where that of token_ids[i] ends, stop strings not cut off.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    offsets: list[int]
    finish_reason: str | None
    stop_reason: str | int | None  # the stop string, or the one of `stop_token_ids`, that ended it
    ends: list[int]


class TextOutput:
    """The output of one sequence as text, delta by delta.

    A stop string is cut off, and so is the token that stopped the sequence, unless `include_stop`. Tokens after the one
    that completed a stop string were never asked for: they are dropped. Text of the first `params.min_tokens` tokens is
    not searched. `kept_ids`: special tokens that are text all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.num_tokens = 0  # that count
        self.cached_tokens = 0  # of the prompt, served from the prefix cache
        self.cache_miss = ""  # why no more of them were, as `TokenDelta` has it
        self.accepted = 0  # draft tokens of the sequence that became its own
        self.rejected = 0  # and those that did not
        self.prompt_logprobs: list[PromptLogprobs] = []  # in order, as far as they have come
        self.embedding = b""  # of the prompt, as `TokenDelta` has it
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, skip_special, kept_ids)
        self._stop = StopStrings(stop, include_stop) if stop else None
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._include_stop = include_stop
        self._min_tokens = params.min_tokens
        self._num_chars = 0  # characters that are certain, held back or not
        self._num_emitted = 0  # characters in pieces so far
        # (begin, end of its text in the output, entry) of those that wait for their text.
        self._pending_logprobs: list[tuple[int, int, TokenLogprob]] = []

    def add(self, delta: TokenDelta) -> Piece:
        """Take in what a step brought. Nothing may be added after a piece with a finish reason."""
        self.count(delta)
        token_ids, before = delta.token_ids, self.num_tokens
        hidden = delta.finish_reason == "stop" and token_ids[-1:] == [delta.stop_reason] and not self._include_stop
        texts, places, ends = [], [], []
        for token_id in token_ids[:-1] if hidden else token_ids:
            before_it = self._num_chars
            texts.append(self._text_of(token_id))
            ends.append(self._num_chars)
            if delta.logprobs is not None:
                places.append(
                    (before_it + self._detokenizer.num_replaced, self._num_chars + self._detokenizer.inside_character)
                )
            if self.stopped_by is not None:
                break
        reason, stop_reason = delta.finish_reason or None, None
        if self.stopped_by is None:
            if hidden:
                self.num_tokens += 1
                ends.append(self._num_chars)
                places.append((self._num_chars, self._num_chars))
            if reason:
                texts.append(self._rest())
        if self.stopped_by is not None:
            reason, stop_reason = "stop", self.stopped_by
        elif delta.stop_reason in self._stop_token_ids:
            stop_reason = delta.stop_reason
        text = "".join(texts)
        self._num_emitted += len(text)
        logprobs, offsets = self._ready(delta.logprobs, places, ended=reason is not None)
        return Piece(text, token_ids[: self.num_tokens - before], logprobs, offsets, reason, stop_reason, ends)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the sequence."""
        return None if self._stop is None else self._stop.found

    def count(self, delta: TokenDelta) -> None:
        """Keep what a delta tells beside tokens, which few do; `add` does so itself."""
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        self.cache_miss = delta.cache_miss or self.cache_miss
        self.accepted = max(self.accepted, delta.accepted)
        self.rejected = max(self.rejected, delta.rejected)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs.append(delta.prompt_logprobs)
        self.embedding = delta.embedding or self.embedding

    def _text_of(self, token_id: int) -> str:
        """Text that may be emitted now that this token is there."""
        text = self._detokenizer.push(token_id)
        self.num_tokens += 1
        self._num_chars += len(text)
        return text if self._stop is None or self.num_tokens <= self._min_tokens else self._stop.cut(text)

    def _rest(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._detokenizer.finish()
        self._num_chars += len(text)
        return text if self._stop is None else self._stop.cut(text) + self._stop.release()

    def _ready(
        self, new: list[TokenLogprob] | None, places: list[tuple[int, int]], ended: bool
    ) -> tuple[list[TokenLogprob] | None, list[int]]:
        """Entries whose text has been emitted, and where it begins; at the end all, none beyond the text."""
        if new is None:
            return None, []
        self._pending_logprobs += [(begin, end, entry) for (begin, end), entry in zip(places, new)]
        count = 0
        while count < len(self._pending_logprobs) and (ended or self._pending_logprobs[count][1] <= self._num_emitted):
            count += 1
        ready, self._pending_logprobs = self._pending_logprobs[:count], self._pending_logprobs[count:]
        return [entry for _, _, entry in ready], [min(begin, self._num_emitted) for begin, _, _ in ready]


class Detokenizer:
    """Tokens of one sequence to whole characters. A token costs the same however long the sequence is."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special: bool = True,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._pieces = tokenizer.pieces
        self._errors = tokenizer.byte_errors
        self._dropped_ids = tokenizer.special_ids - kept_ids if skip_special else frozenset()
        # Characters that the last push gave for bytes before it, which its token did not complete.
        self.num_replaced = 0
        self._unfinished = b""  # of a character that is not whole
        self._prompt_part = ""  # what the prompt's text shows for those of them that are the prompt's
        # All tokens, while there is no text: a decoder may drop the first space.
        self._leading_ids: list[int] | None = None
        self._read_prompt(prompt_ids)

    @property
    def inside_character(self) -> bool:
        """Whether the last token ended inside a character."""
        return bool(self._unfinished)

    def push(self, token_id: int) -> str:
        """Text of the characters that this token completed."""
        self.num_replaced = 0
        if token_id in self._dropped_ids:
            return ""
        piece = self._pieces[token_id] if self._leading_ids is None else self._leading_piece(token_id)
        if isinstance(piece, str):
            if not self._unfinished:
                return piece
            piece = piece.encode()
        return self._join(piece)

    def finish(self) -> str:
        """U+FFFD for a character that stays unfinished."""
        return self._join(b"", final=True)

    def _join(self, data: bytes, final: bool = False) -> str:
        if self._unfinished and data and not 0x80 <= data[0] < 0xC0:  # it does not go on with that character
            self.num_replaced = len(self._unfinished.decode("utf-8", self._errors).removeprefix(self._prompt_part))
        data = self._unfinished + data
        text, used = codecs.utf_8_decode(data, self._errors, final)
        self._unfinished = data[used:]
        if used and self._prompt_part:  # now the prompt's last character is whole, or will never be
            text, self._prompt_part = text.removeprefix(self._prompt_part), ""
        return text

    def _leading_piece(self, token_id: int) -> str | bytes:
        """What a token adds that no text stands before."""
        piece = self._pieces[token_id]
        if not piece:
            return piece
        if isinstance(piece, str):
            assert self._leading_ids is not None
            self._leading_ids.append(token_id)
            piece = self._tokenizer.decode(self._leading_ids, skip_special=False)
        if piece:
            self._leading_ids = None
        return piece

    def _read_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Whether there is text, and how its last character stands, from the last tokens alone where they tell."""
        end, has_text, kept = b"", False, []
        for token_id in reversed(prompt_ids):
            if token_id in self._dropped_ids:
                continue
            kept.append(token_id)
            piece = self._pieces[token_id]
            has_text = has_text or isinstance(piece, bytes) or bool(piece.strip())
            if len(end) < _MOST_UNFINISHED:
                end = (piece if isinstance(piece, bytes) else piece.encode()) + end
            elif has_text:
                break
        if not has_text and not self._tokenizer.decode(kept[::-1], skip_special=False):
            self._leading_ids = kept[::-1]
        self._join(end[-_MOST_UNFINISHED:])
        self._prompt_part = self._unfinished.decode("utf-8", self._errors)


class StopStrings:
    """Cuts text off at a stop string, holding back what may begin one.

    The stop string whose last character comes first wins (the longest of those), whatever pieces the text comes in.
    """

    def __init__(self, words: Sequence[str], include: bool = False) -> None:
        self.found: str | None = None
        self._words = tuple(words)
        self._include = include
        self._held = ""

    def cut(self, new: str) -> str:
        """Text that may be emitted, of the held and the new; "" once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + new
        ends = ((at + len(word), -len(word), word) for word in self._words if (at := text.find(word)) >= 0)
        if found := min(ends, default=None):
            end, _, self.found = found
            self._held = ""
            return text[: end if self._include else end - len(self.found)]
        keep = max(overlap(text, word) for word in self._words)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def release(self) -> str:
        """The text held back, when no more comes."""
        text, self._held = self._held, ""
        return text
