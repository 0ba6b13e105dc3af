"""The parts of an answer as items of /v1/responses, whole and as a stream's events.

Both come from the same steps: an answer that is not streamed makes the events too and drops them. Knows the shapes of
items, events and the response object. Knows no fields of requests but what a response holds of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from pagegraph.runtime.text.chat_output import CallArguments, CallBegin, Content, Part, Reasoning
from pagegraph.runtime.text.output import Piece, TextOutput
from pagegraph.web.cache_miss import cache_miss
from pagegraph.web.errors import ApiError
from pagegraph.web.message import message_of
from pagegraph.web.openai_responses.items import Item, new_id
from pagegraph.web.openai_responses.request import ResponsesRequest
from pagegraph.web.responses import token_entries
from pagegraph.web.service import Service
from pagegraph.web.stream import KEEP_ALIVE

Event = dict[str, Any]


class Items:
    """The output's items while parts come; methods give the events that tell of them, without their numbers."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] | None = None
        self._open = False

    def add(self, part: Part, logprobs: list[dict[str, Any]] | None = None) -> Iterator[Event]:
        """One more part; `logprobs` are those of its tokens."""
        if isinstance(part, CallBegin):
            yield from self.close()
            call = {"call_id": part.id, "name": part.name, "arguments": ""}
            yield self._begin("function_call", call)
            return
        if isinstance(part, CallArguments):
            self._texts.append(part.text)
            yield self._event("response.function_call_arguments.delta", delta=part.text)
            return
        kind = "reasoning" if isinstance(part, Reasoning) else "message"
        if not self._open or self.items[-1]["type"] != kind:
            yield from self.close()
            yield from self._begin_text(kind)
        self._texts.append(part.text)
        if kind == "reasoning":
            yield self._event("response.reasoning_text.delta", content_index=0, delta=part.text)
            return
        if logprobs is not None:
            self._logprobs = (self._logprobs or []) + logprobs
        yield self._event("response.output_text.delta", content_index=0, delta=part.text, logprobs=logprobs or [])

    def close(self, status: str = "completed") -> Iterator[Event]:
        """End the open item, if there is one."""
        if not self._open:
            return
        item, text = self.items[-1], "".join(self._texts)
        if item["type"] == "function_call":
            item["arguments"] = text
            done = {"arguments": text, "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **done)
        else:
            part = _text_part(item["type"], text, self._logprobs)
            done = {"content_index": 0, "text": text}
            if item["type"] == "message":
                done["logprobs"] = self._logprobs or []
            yield self._event(f"response.{part['type']}.done", **done)
            yield self._event("response.content_part.done", content_index=0, part=part)
            item["content"] = [part]
        item["status"] = status
        self._open = False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}

    def _begin_text(self, kind: str) -> Iterator[Event]:
        yield self._begin(kind, {"summary": []} if kind == "reasoning" else {"role": "assistant"}, content=[])
        part = _text_part(kind, "", None)
        yield self._event("response.content_part.added", content_index=0, part=part)

    def _begin(self, kind: str, facts: dict[str, Any], **more: Any) -> Event:
        item = {"id": new_id(kind), "type": kind, "status": "in_progress", **facts, **more}
        self.items.append(item)
        self._open, self._texts, self._logprobs = True, [], None
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}

    def _event(self, type: str, **facts: Any) -> Event:
        return {"type": type, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **facts}


class ResponsesAnswer:
    """One response. `keep` is told of the whole one when it has ended, whichever way."""

    end = b""  # of a stream: its last event says that it is
    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        asked: ResponsesRequest,
        service: Service,
        prompt_ids: list[int],
        output: TextOutput,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._message = message_of(service.chat, asked.chat, prompt_ids)
        self._tokenizer = service.tokenizer
        self._num_prompt_tokens = len(prompt_ids)
        self._output = output
        self._keep = keep
        self._items = Items()
        self._sequence = 0
        self._pending_logprobs: list[dict[str, Any]] | None = None
        self._finish_reason: str | None = None
        self._head = {
            "id": new_id("resp"), "object": "response", "created_at": int(time.time()),
            "model": service.settings.served_model_name, **asked.echo, "store": asked.store, "service_tier": "default",
        }  # fmt: skip

    @staticmethod
    def encode(event: Any) -> bytes:
        """One event as it is sent: named, too."""
        return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"

    def add(self, index: int, piece: Piece) -> None:
        """Take one piece of the one sequence."""
        for _ in self._events(piece):
            pass

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        for _ in self._close():
            pass
        return self._end()

    def first(self) -> list[Event]:
        """That it is there, and under way."""
        begun = self.response("in_progress")
        return self._numbered([{"type": f"response.{word}", "response": begun} for word in ("created", "in_progress")])

    def events(self, index: int, piece: Piece) -> list[Event]:
        """What a piece brought."""
        return self._numbered(list(self._events(piece)))

    def last(self) -> list[Event]:
        """The end of the open item, and the whole response."""
        events = list(self._close())
        ended = self._end()
        return self._numbered([*events, {"type": f"response.{ended['status']}", "response": ended}])

    def failed(self, error: ApiError) -> list[Event]:
        """The error by itself, and the response that it ended."""
        told = {"type": "error", "code": error.code or "server_error", "message": error.message, "param": error.param}
        return self._numbered([told, {"type": "response.failed", "response": self.fail(error)}])

    def fail(self, error: ApiError) -> dict[str, Any]:
        """The response that ended with an error."""
        for _ in self._items.close("incomplete"):
            pass
        ended = self.response("failed", error={"code": "server_error", "message": error.message})
        self._keep(ended)
        return ended

    def response(self, status: str, **facts: Any) -> dict[str, Any]:
        """The response object as it stands."""
        return {
            **self._head, "status": status, "error": None, "incomplete_details": None, "usage": None,
            "output": [dict(item) for item in self._items.items], **facts,
        }  # fmt: skip

    def _events(self, piece: Piece) -> Iterator[Event]:
        self._finish_reason = piece.finish_reason or self._finish_reason
        if piece.logprobs is not None:
            self._pending_logprobs = (self._pending_logprobs or []) + token_entries(self._tokenizer, piece.logprobs)
        for part in self._message.parts(piece):
            # Log-probabilities of tokens of reasoning and calls have no place in these shapes.
            logprobs, self._pending_logprobs = self._pending_logprobs, None
            yield from self._items.add(part, logprobs if isinstance(part, Content) else None)

    def _close(self) -> Iterator[Event]:
        if not self._items.items:
            yield from self._items.add(Content(""))
        yield from self._items.close("incomplete" if self._finish_reason == "length" else "completed")

    def _usage(self) -> dict[str, Any]:
        given = {"input_tokens": self._num_prompt_tokens, "output_tokens": self._output.num_tokens}
        return {
            **given,
            "total_tokens": sum(given.values()),
            "input_tokens_details": {"cached_tokens": self._output.cached_tokens, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": self._message.reasoning_tokens},
        }

    def _end(self) -> dict[str, Any]:
        usage = self._usage()
        if self._finish_reason == "length":
            reason = {"reason": "max_output_tokens"}
            ended = self.response("incomplete", incomplete_details=reason, usage=usage)
        else:
            ended = self.response("completed", completed_at=int(time.time()), usage=usage)
        ended |= cache_miss([self._output])
        self._keep(ended)
        return ended

    def _numbered(self, events: list[Event]) -> list[Event]:
        for event in events:
            event["sequence_number"] = self._sequence
            self._sequence += 1
        return events


def _text_part(kind: str, text: str, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}
