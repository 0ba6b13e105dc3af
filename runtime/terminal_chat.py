"""A chat with a server of the OpenAI protocol, for a terminal: its history, and one answer after another as it streams.

Knows HTTP and the protocol's events; knows no engine and, but for dim text, no terminal.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

CONNECT_S = 10.0  # for an answer's headers to begin; tokens may take longer
ANSWER_S = 600.0  # between two reads of an answer

_BROKEN = (OSError, http.client.HTTPException)  # a connection that is, or whose other end speaks no HTTP
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError)  # JSON of another shape

Show = Callable[[str, bool], None]  # (text, whether it is reasoning)


class ChatError(Exception):
    """The server refused, is not there, or its answer broke off; the message is for people."""


@dataclass
class Answer:
    """What was said, and figures of it. Times in seconds; tokens are 0 where the server tells none."""

    text: str = ""
    first_s: float = 0.0
    seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    stopped: bool = False

    def __str__(self) -> str:
        if not self.tokens:
            return "stopped" if self.stopped else ""
        rest = self.seconds - self.first_s
        rate = f", {(self.tokens - 1) / rest:.1f} tokens/s" if self.tokens > 1 and rest > 0 else ""
        cached = f", {self.cached_tokens} of it cached" if self.cached_tokens else ""
        return f"{self.tokens} tokens{rate}, first after {self.first_s:.2f} s; prompt {self.prompt_tokens}{cached}"


@dataclass
class TerminalChat:
    """A conversation with the server at `base_url`, without /v1. `params`: fields of each request, such as temperature."""

    base_url: str
    api_key: str | None = None
    model: str | None = None
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    unanswered: str | None = None  # the message that was said last, if its answer failed

    def find_model(self) -> str:
        """The model that is talked to: the given one, or the server's first. Raises ChatError."""
        if self.model is None:
            try:
                with self._ask("/v1/models", None, CONNECT_S) as answer:
                    models = json.load(answer).get("data") or []
                self.model = models[0]["id"] if models else None
            except (*_BROKEN, *_MALFORMED) as error:
                raise ChatError(f"{self.base_url} lists its models as no server of this protocol does") from error
            if self.model is None:
                raise ChatError(f"{self.base_url} serves no model")
        return self.model

    def say(self, text: str, show: Show) -> Answer:
        """Send a message; parts of the answer go to `show` as they come. KeyboardInterrupt ends the answer, which is kept.

        Raises ChatError, after which the message is not in the history; `again` says it again.
        """
        self.unanswered = text
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            "model": self.find_model(), "stream": True, "stream_options": {"include_usage": True}, **self.params,
            "messages": [*system, *self.messages, {"role": "user", "content": text}],
        }  # fmt: skip
        answer, begun = Answer(), time.perf_counter()
        try:
            for event in self._events(body):
                try:
                    self._take(event, answer, begun, show)
                except _MALFORMED as error:
                    raise ChatError(
                        f"the answer holds an event that is none of this protocol: {event!r:.200}"
                    ) from error
        except KeyboardInterrupt:
            answer.stopped = True
        answer.seconds = time.perf_counter() - begun
        self.unanswered = None
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        return answer

    def forget(self) -> None:
        """Begin anew."""
        self.messages.clear()
        self.unanswered = None

    def again(self, show: Show) -> Answer:
        """Another answer to the last message, or one at all if it failed. Raises ChatError if there is no message."""
        if self.unanswered is not None:
            return self.say(self.unanswered, show)
        if not self.messages:
            raise ChatError("there is no message to answer again")
        kept, self.messages = self.messages[-2:], self.messages[:-2]
        try:
            return self.say(kept[0]["content"], show)
        except ChatError:
            self.messages += kept
            self.unanswered = None  # the last message has its answer still
            raise

    def _take(self, event: dict[str, Any], answer: Answer, begun: float, show: Show) -> None:
        if (error := event.get("error")) is not None:
            raise ChatError(error.get("message", str(error)) if isinstance(error, dict) else str(error))
        if usage := event.get("usage"):
            answer.tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            thought, text = delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")
            for part, is_reasoning in ((thought, True), (text, False)):
                if part:
                    answer.first_s = answer.first_s or time.perf_counter() - begun
                    answer.text += "" if is_reasoning else part
                    show(part, is_reasoning)

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._ask("/v1/chat/completions", body, ANSWER_S) as answer:
            try:
                for line in answer:
                    data = line.removeprefix(b"data: ").strip() if line.startswith(b"data: ") else b""
                    if data == b"[DONE]":
                        return
                    if data:
                        yield _parsed(data)
            except _BROKEN as error:
                raise ChatError(f"the answer broke off: {error}") from error
        raise ChatError("the answer broke off: the connection was closed before its end")

    def _ask(self, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            if not (self.api_key.isascii() and self.api_key.isprintable()):
                raise ChatError("the API key holds characters that a header cannot carry; it must be printable ASCII")
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(self.base_url + path, data, headers), timeout=timeout)
        except urllib.error.HTTPError as error:
            raise ChatError(_message(error)) from error
        except (http.client.InvalidURL, ValueError) as error:
            raise ChatError(f"{self.base_url} is no URL ({error}); for example http://127.0.0.1:8000") from error
        except _BROKEN as error:
            reason = getattr(error, "reason", error)
            raise ChatError(f"{self.base_url} does not answer ({reason}); is `runtime serve` running there?") from error


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ChatError(f"the answer holds an event that is no JSON: {data.decode(errors='replace')!r:.200}") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code}: {json.load(error)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
