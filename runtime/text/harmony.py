"""Answers of gpt-oss, which are messages of their own ("harmony"): reasoning, text and calls by each one's header.

A header, up to <|message|>, names a channel and perhaps a recipient: functions.NAME is a call of NAME, the channel
analysis is reasoning, all else is content. Knows the format; knows no ids and no JSON shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from pagegraph.runtime.text.incoming import Incoming, Reading, Words

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
WORDS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
CALL = "<|call|>"
ANALYSIS = f"{CHANNEL}analysis{MESSAGE}"  # behind which a model thinks,
NEXT = f"<|end|>{START}assistant"  # what stands between two of its messages,
FINAL = f"{CHANNEL}final{MESSAGE}"  # and behind which it answers
_HEADER_ENDS = Words((MESSAGE, *ENDS))
_BODY_ENDS = Words((*ENDS, START))
_NO_ENDS = (CHANNEL, CONSTRAIN, MESSAGE)  # where they mean nothing
_CONTENT_ENDS = Words((*ENDS, START, *_NO_ENDS))
_BEGINS = (START, CHANNEL, CONSTRAIN, MESSAGE, "to=")  # with which a header begins
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


class Sink(Protocol):
    """Who is told what was read."""

    def begin_reasoning(self, at: int) -> None:
        """Behind so many characters reasoning begins."""
        ...

    def reasoning(self, text: str) -> None:
        """More of it."""
        ...

    def end_reasoning(self, at: int) -> None:
        """It ends."""
        ...

    def content(self, text: str) -> None:
        """More content."""
        ...

    def begin(self, name: str) -> None:
        """A call."""
        ...

    def arguments(self, text: str) -> None:
        """More of its arguments."""
        ...


def read_harmony(incoming: Incoming, sink: Sink, tools: Mapping[str, Any] | None, splits: bool) -> Reading[None]:
    """All messages. `tools` None: calls are content; not `splits`: reasoning is."""
    started = False  # the last message ended with <|start|>
    while started or (yield from incoming.peek()):
        header: list[str] = []
        yield from incoming.spaces()
        for word in _BEGINS:
            started = started or (yield from incoming.comes(word))
        message = not started or (yield from incoming.until(_HEADER_ENDS, header.append)) == MESSAGE
        started = message and (yield from _read_body(incoming, sink, "".join(header), tools, splits)) == START


def _read_body(
    incoming: Incoming, sink: Sink, header: str, tools: Mapping[str, Any] | None, splits: bool
) -> Reading[str]:
    """One message behind its header; the word that ends it."""
    recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
    name = recipient[1].removeprefix("functions.") if recipient else ""
    if tools is not None and recipient and recipient[1] != name and name:
        sink.begin(name)
        yield from incoming.spaces()
        if (yield from incoming.comes("{")):
            return (yield from incoming.until(_BODY_ENDS, sink.arguments))
        sink.arguments("{}")
    elif splits and channel and channel[1] == "analysis":
        sink.begin_reasoning(incoming.num_read)
        ended = yield from incoming.until(_BODY_ENDS, sink.reasoning)
        sink.end_reasoning(incoming.num_read)
        return ended
    while (ended := (yield from incoming.until(_CONTENT_ENDS, sink.content))) in _NO_ENDS:
        pass
    return ended


def written(name: str, arguments: str) -> str:
    """A call as gpt-oss writes it behind `<|start|>assistant`; `arguments` is JSON text."""
    return f"{CHANNEL}commentary to=functions.{name} {CONSTRAIN}json{MESSAGE}{arguments}{CALL}"
