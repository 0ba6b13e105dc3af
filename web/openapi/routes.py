"""The table of routes: what each does, the fields of its body, an example that works.

A test holds it against the routes of the app.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pagegraph.web.openapi import chat_like, fields
from pagegraph.web.openapi.fields import Described


class Route(NamedTuple):
    """One method of one path. `fields` and `required` are of its JSON body, which it has if there are any."""

    method: str
    path: str
    summary: str
    fields: Described = {}
    required: tuple[str, ...] = ()
    example: dict[str, Any] = {}
    media: str = "application/json"  # of the answer
    streams: bool = False  # the answer may be server-sent events
    open: bool = False  # needs no key
    refuses: bool = False  # what a request without a body asks may be wrong
    asks_engine: bool = False  # beside those with a body, all of which do

    @property
    def errors(self) -> list[int]:
        """The statuses of its refusals and failures, keys of ERRORS."""
        found = set() if self.open else {401}
        found |= {404} if "{" in self.path else set()
        found |= {400} if self.refuses else set()
        found |= {503} if self.asks_engine else set()
        if self.fields:
            found |= {400, 404, 408, 413, 415, 503}
        if self.computes:
            found |= {429, 500}
        return sorted(found)

    @property
    def computes(self) -> bool:
        """Whether the engine computes something for it."""
        return self.streams or self.path == "/v1/embeddings"


ERRORS = {
    400: "The request is wrong: `param` is the field, the message a value that works",
    401: "The API key is missing or wrong",
    404: "No such model, response, item or file",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "A limit of the key is reached; `Retry-After` says when to come back",
    500: "The engine failed for this request, and would again",
    503: "The server is full, starts, restarts its engine or ends; `Retry-After` says when to come back",
}
_HELLO = [{"role": "user", "content": "Hello"}]
_TEXT = "text/plain"

ROUTES = (
    Route(
        "POST", "/v1/chat/completions", "The assistant's next message", fields.CHAT, ("messages",),
        {"messages": _HELLO, "max_tokens": 64}, streams=True,
    ),
    Route(
        "POST", "/v1/completions", "Text that goes on from prompts", fields.COMPLETION, ("prompt",),
        {"prompt": "Once upon a time", "max_tokens": 64}, streams=True,
    ),
    Route(
        "POST", "/v1/responses", "The model's response to items", chat_like.RESPONSES, ("input",),
        {"input": "Hello", "max_output_tokens": 64}, streams=True,
    ),
    Route("GET", "/v1/responses/{id}", "A stored response", refuses=True),
    Route("DELETE", "/v1/responses/{id}", "Forget a stored response"),
    Route("POST", "/v1/responses/{id}/cancel", "End a response that is made in the background", refuses=True),
    Route("GET", "/v1/responses/{id}/input_items", "The items of a stored response's input", refuses=True),
    Route(
        "POST", "/v1/responses/input_tokens", "How many tokens a request's prompt has", chat_like.RESPONSES, ("input",),
        {"input": "Hello"},
    ),
    Route(
        "POST", "/v1/messages", "The assistant's next message, as Anthropic has it", chat_like.MESSAGES,
        ("messages", "max_tokens"), {"messages": _HELLO, "max_tokens": 64}, streams=True,
    ),
    Route(
        "POST", "/v1/messages/count_tokens", "How many tokens a request's prompt has", chat_like.MESSAGES,
        ("messages",), {"messages": _HELLO},
    ),
    Route(
        "POST", "/v1/embeddings", "A vector for each input", fields.EMBEDDINGS, ("input",),
        {"input": ["Hello", "Good day"]},
    ),
    Route("GET", "/v1/models", "The served model, as a list"),
    Route("GET", "/v1/models/{name}", "One model by name"),
    Route("POST", "/tokenize", "Token ids of a text or a chat", fields.TOKENIZE, (), {"prompt": "Hello"}),
    Route("POST", "/detokenize", "The text of token ids", fields.DETOKENIZE, ("tokens",), {"tokens": [1, 2, 3]}),
    Route("GET", "/tokenizer_info", "The tokenizer's special tokens and chat template"),
    Route("GET", "/health", "200: requests are taken now", open=True, asks_engine=True),
    Route("GET", "/health/live", "503: only a restart helps", open=True, asks_engine=True),
    Route("GET", "/health/ready", "The same as /health", open=True, asks_engine=True),
    Route("GET", "/ping", "The same as /health", open=True, asks_engine=True),
    Route("POST", "/ping", "The same as /health", open=True, asks_engine=True),
    Route("GET", "/recent_requests", "Sizes and times of the key's last requests", asks_engine=True),
    Route("GET", "/load", "How many sequences run and wait", asks_engine=True),
    Route("GET", "/version", "The version of pagegraph"),
    Route("GET", "/metrics", "The engine's metrics as Prometheus reads them", media=_TEXT, asks_engine=True),
    Route("GET", "/openapi.json", "This description"),
    Route("GET", "/", "A page to chat", media="text/html", open=True),
    Route("GET", "/dashboard", "A page that draws the metrics", media="text/html", open=True),
    Route("GET", "/static/{name}", "What the pages load", media="text/javascript", open=True),
    Route("GET", "/docs", "A page that shows it and sends requests", media="text/html", open=True),
)  # fmt: skip
