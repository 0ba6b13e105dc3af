"""The parts of an answer as content blocks of /v1/messages, whole and as a stream's events.

Both come from the same steps: an answer that is not streamed makes the events too and drops them. Knows the shapes of
blocks, events and the message; knows no fields of requests.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
from flask import g

from pagegraph.runtime.text.chat_output import CallArguments, CallBegin, Part, Reasoning
from pagegraph.runtime.text.output import Piece, TextOutput
from pagegraph.web.anthropic.errors import body_of
from pagegraph.web.cache_miss import cache_miss
from pagegraph.web.errors import ApiError
from pagegraph.web.message import message_of
from pagegraph.web.schema import GenerationRequest
from pagegraph.web.service import Service

Event = dict[str, Any]


def encode(event: Any) -> bytes:
    """One event as it is sent: named, too."""
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class Blocks:
    """The content while parts come; methods give the events that tell of it."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._texts: list[str] = []  # of the open block
        self._open = False

    def add(self, part: Part) -> Iterator[Event]:
        """One more part."""
        if isinstance(part, CallBegin):
            yield from self.close()
            yield self._begin({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
            return
        if isinstance(part, CallArguments):
            delta = {"type": "input_json_delta", "partial_json": part.text}
        elif isinstance(part, Reasoning):
            yield from self._ensure({"type": "thinking", "thinking": "", "signature": ""})
            delta = {"type": "thinking_delta", "thinking": part.text}
        else:
            yield from self._ensure({"type": "text", "text": ""})
            delta = {"type": "text_delta", "text": part.text}
        self._texts.append(part.text)
        yield self._event("content_block_delta", delta=delta)

    def close(self) -> Iterator[Event]:
        """End the open block, if there is one."""
        if not self._open:
            return
        block, text = self.blocks[-1], "".join(self._texts)
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            block[block["type"]] = text
        self._open = False
        yield self._event("content_block_stop")

    def _ensure(self, block: dict[str, Any]) -> Iterator[Event]:
        """The open block is of this one's type."""
        if not self._open or self.blocks[-1]["type"] != block["type"]:
            yield from self.close()
            yield self._begin(block)

    def _begin(self, block: dict[str, Any]) -> Event:
        self.blocks.append(block)
        self._open, self._texts = True, []
        return self._event("content_block_start", content_block=dict(block))

    def _event(self, type: str, **facts: Any) -> Event:
        return {"type": type, "index": len(self.blocks) - 1, **facts}


class MessagesAnswer:
    """One message of the assistant."""

    end = b""  # of a stream: its last event says that it is
    keep_alive = encode({"type": "ping"})
    encode = staticmethod(encode)

    def __init__(self, checked: GenerationRequest, service: Service, prompt_ids: list[int], output: TextOutput) -> None:
        self._message = message_of(service.chat, checked, prompt_ids)
        self._num_prompt_tokens = len(prompt_ids)
        self._max_tokens = checked.max_tokens
        self._output = output
        self._request_id = g.request_id
        self._blocks = Blocks()
        self._begun = False
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._head = {
            "id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant",
            "model": service.settings.served_model_name,
        }  # fmt: skip

    def add(self, index: int, piece: Piece) -> None:
        """Take one piece of the one sequence."""
        for _ in self._events(piece):
            pass

    def whole(self) -> dict[str, Any]:
        """The message that is not streamed."""
        for _ in self._blocks.close():
            pass
        return {**self._head, "content": self._blocks.blocks, **self._stop, "usage": self._usage(), **self._miss()}

    def first(self) -> list[Event]:
        """Nothing: how much of the prompt was cached, which the first event tells, comes with the first token."""
        return []

    def events(self, index: int, piece: Piece) -> list[Event]:
        """What a piece brought."""
        events = [] if self._begun else [self._start()]
        self._begun = True
        return [*events, *self._events(piece)]

    def last(self) -> list[Event]:
        """The end of the open block and of the message."""
        delta = {"type": "message_delta", "delta": self._stop, "usage": self._usage()}
        return [*self._blocks.close(), delta, {"type": "message_stop"}]

    def failed(self, error: ApiError) -> list[Event]:
        """In place of the end."""
        return [body_of(error, self._request_id)]

    def _start(self) -> Event:
        unfinished = {"stop_reason": None, "stop_sequence": None}
        usage = self._usage() | {"output_tokens": 0}
        return {
            "type": "message_start",
            "message": {**self._head, "content": [], **unfinished, "usage": usage, **self._miss()},
        }

    def _miss(self) -> dict[str, str]:
        return cache_miss([self._output])

    def _events(self, piece: Piece) -> Iterator[Event]:
        for part in self._message.parts(piece):
            yield from self._blocks.add(part)
        if piece.finish_reason:
            self._stop = self._stopped(piece)

    def _stopped(self, piece: Piece) -> dict[str, Any]:
        """Why it ended, in Anthropic's words."""
        reason = self._message.finish_reason(piece.finish_reason)
        if isinstance(piece.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": piece.stop_reason}
        if reason == "length":
            whole = self._max_tokens is not None and self._output.num_tokens >= self._max_tokens
            return {"stop_reason": "max_tokens" if whole else "model_context_window_exceeded", "stop_sequence": None}
        return {"stop_reason": "tool_use" if reason == "tool_calls" else "end_turn", "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """`input_tokens` are those that were computed: cached ones are counted beside them."""
        cached = self._output.cached_tokens
        return {
            "input_tokens": self._num_prompt_tokens - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self._output.num_tokens,
        }


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call; {} for what was cut off before it was an object, which `stop_reason` tells of."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
