"""The OpenAI routes: models, completions and chat completions.

Knows OpenAI's shapes and the order check, take a thread, tokenize, submit, answer. Field checks are in `schema`, tokens
and text in `stream`, failures in `errors`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from flask import Blueprint, Response, current_app, request

from pagegraph.runtime.ipc.client import EngineClient
from pagegraph.runtime.ipc.protocol import EngineInfo, TokenLogprob
from pagegraph.runtime.sampling_params import SamplingParams, check_length, wrap_seed
from pagegraph.runtime.text.output import Piece, TextOutput
from pagegraph.runtime.text.tokenizer import ChatTemplateError, Tokenizer
from pagegraph.web.errors import ApiError, json_response
from pagegraph.web.schema import GenerationRequest, parse_body, parse_chat, parse_completion
from pagegraph.web.settings import WebSettings
from pagegraph.web.stream import ClientGone, EventStream, Generation, NoTokens, Sequence, client_probe

_STATUS_CLIENT_GONE = 499
_FREE_THREADS = 16  # of a worker's, kept free of generations so that short requests and probes are answered
_LONG_CHARS = 1 << 16  # characters of a request from which on it waits its turn to be tokenised: some 10 ms
_LARGE_BODY_BYTES = 1 << 20  # from which on a body waits its turn to be parsed
_PEEK_S = 0.1  # between looks whether a client that waits for its turn is still there

blueprint = Blueprint("openai", __name__)


class Service:
    """What the routes of one worker share: the engine, the tokenizer and the threads that requests hold."""

    def __init__(self, settings: WebSettings, tokenizer: Tokenizer, engine: EngineClient) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.engine = engine
        self.started = int(time.time())
        self._places = threading.BoundedSemaphore(settings.threads - min(_FREE_THREADS, settings.threads // 2))
        self._long_texts = threading.BoundedSemaphore(max(1, (os.cpu_count() or 1) // 2))
        _ = tokenizer.min_tokens  # made before the first request

    def admit(self, info: EngineInfo) -> Callable[[], None]:
        """Take one of this worker's threads for one request; returns what gives it back.

        Raises ApiError 503 while the engine drains, or when no thread is left. How many requests may run and wait is
        for the engine to say, and with `threads: auto` it says so first.
        """
        if info.draining:
            raise ApiError(503, "the server is shutting down")
        if not self._places.acquire(blocking=False):
            threads, enough = self.settings.threads, self.settings.enough_threads
            more = (
                f"; {enough} (auto) would be enough" if threads < enough else ", enough for all that may run and wait"
            )
            raise ApiError(503, f"all threads of this web process are taken: threads = {threads}{more}")
        return self._places.release

    @contextlib.contextmanager
    def long_text(self, client_gone: Callable[[], bool]) -> Iterator[None]:
        """One's turn to parse a large body or tokenise a long text: a few at a time, or they would take memory and CPUs.

        Raises ClientGone.
        """
        while not self._long_texts.acquire(timeout=_PEEK_S):
            if client_gone():
                raise ClientGone
        try:
            if client_gone():
                raise ClientGone
            yield
        finally:
            self._long_texts.release()

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a model that is not served; no name means the one that is."""
        served = self.settings.served_model_name
        if name is not None and name != served:
            raise ApiError(
                404, f"the model {name[:200]!r} is not served; {served!r} is", param="model", code="model_not_found"
            )


def service() -> Service:
    """The service of the current app."""
    return current_app.extensions["pagegraph"]


@blueprint.get("/v1/models")
def list_models() -> Response:
    """The one model, as a list."""
    return json_response({"object": "list", "data": [_model_card(service())]})


@blueprint.get("/v1/models/<path:name>")
def retrieve_model(name: str) -> Response:
    """One model by name."""
    service().check_model(name)
    return json_response(_model_card(service()))


@blueprint.post("/v1/completions")
def completions() -> Response:
    """Text from prompts."""
    return _generate(parse_completion, CompletionShape)


@blueprint.post("/v1/chat/completions")
def chat_completions() -> Response:
    """The assistant's next message."""
    return _generate(parse_chat, ChatShape)


def _generate(parse: Callable[..., GenerationRequest], shape_of: type[Shape]) -> Response:
    if request.mimetype != "application/json":
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    served = service()
    info = served.engine.info()
    try:
        checked, texts = _asked(parse, served, info)
    except ClientGone:
        return Response(status=_STATUS_CLIENT_GONE)
    release = served.admit(info)
    try:
        prompts = _token_prompts(served, texts, checked, info)
        generation = _submit(served, checked, prompts, info, release)
    except ClientGone:
        release()
        return Response(status=_STATUS_CLIENT_GONE)
    except BaseException:
        release()
        raise
    try:
        generation.wait_admitted()
        shape = shape_of(checked, served, info, prompts, generation)
        response = _streamed(generation, shape, served) if checked.stream else _whole(generation, shape)
    except ClientGone:
        generation.close()
        return Response(status=_STATUS_CLIENT_GONE)
    except BaseException:
        generation.close()
        raise
    if checked.ignored:
        response.headers["x-ignored-fields"] = _header_text(checked.ignored)
    return response


def _asked(
    parse: Callable[..., GenerationRequest], served: Service, info: EngineInfo
) -> tuple[GenerationRequest, list[str | list[int]]]:
    """The checked request and its prompts. A large body waits its turn, for it takes four times its size. Raises ClientGone."""
    is_large = (request.content_length or _LARGE_BODY_BYTES) >= _LARGE_BODY_BYTES  # one in chunks does not say
    with served.long_text(client_probe(request.environ)) if is_large else contextlib.nullcontext():
        checked = parse(parse_body(request.get_data(cache=False)), info.vocab_size, info.sampling_defaults)
        served.check_model(checked.model)
        texts = _texts(served.tokenizer, checked, info)
        return checked, texts


def _texts(tokenizer: Tokenizer, checked: GenerationRequest, info: EngineInfo) -> list[str | list[int]]:
    """The prompts, a chat rendered by its template. What is too long for the context by its characters alone is refused."""
    prompts = [_render(tokenizer, checked)] if checked.messages else checked.prompts
    try:
        for prompt in prompts:
            if isinstance(prompt, str):
                _check_chars(prompt, tokenizer, checked, info)
    except UnicodeEncodeError:
        raise ApiError(400, "the prompt holds half of a surrogate pair: not valid Unicode") from None
    return prompts


def _render(tokenizer: Tokenizer, checked: GenerationRequest) -> str:
    try:
        return tokenizer.render_chat(
            checked.messages,
            add_generation_prompt=checked.add_generation_prompt,
            continue_final_message=checked.continue_final_message,
            arguments=checked.template_arguments,
        )
    except ChatTemplateError as error:
        raise ApiError(400, str(error), param="messages") from None


def _check_chars(text: str, tokenizer: Tokenizer, checked: GenerationRequest, info: EngineInfo) -> None:
    """Refuse megabytes before they are tokenised, which takes seconds and hundreds of megabytes."""
    if at_least := tokenizer.min_tokens(text, enough=info.max_model_len):
        check_length(at_least, info.max_model_len, field=_prompt_field(checked), num_chars=len(text))


def _token_prompts(
    served: Service, texts: list[str | list[int]], checked: GenerationRequest, info: EngineInfo
) -> list[list[int]]:
    """Token ids of every prompt, each checked against the context. Raises ClientGone."""
    is_long = sum(len(text) for text in texts if isinstance(text, str)) >= _LONG_CHARS
    with served.long_text(client_probe(request.environ)) if is_long else contextlib.nullcontext():
        prompts = []
        for text in texts:
            ids = (
                text
                if isinstance(text, list)
                else served.tokenizer.encode(text, add_special_tokens=checked.add_special_tokens)
            )
            _check_length(len(ids), checked, info)
            prompts.append(ids)
    return prompts


def _check_length(num_prompt: int, checked: GenerationRequest, info: EngineInfo) -> None:
    """Raise BadParameter unless the prompt fits the context with the output that was asked for."""
    check_length(
        num_prompt,
        info.max_model_len,
        field=_prompt_field(checked),
        max_tokens=None if checked.max_tokens_is_default else checked.max_tokens,
        min_tokens=checked.params.min_tokens,
    )


def _prompt_field(checked: GenerationRequest) -> str:
    return "messages" if checked.messages else "prompt"


def _submit(
    served: Service, checked: GenerationRequest, prompts: list[list[int]], info: EngineInfo, release: Callable[[], None]
) -> Generation:
    """Submit n sequences for each prompt; sequence j of a prompt runs with seed + j."""
    each = [ids for ids in prompts for _ in range(checked.n)]
    if checked.max_tokens == 0:
        params, group = [checked.params] * len(each), NoTokens(len(each))
    else:
        params = [_params(checked, len(ids), index % checked.n, info.max_model_len) for index, ids in enumerate(each)]
        group = served.engine.submit_group(list(zip(each, params, strict=True)), checked.priority, checked.cache_salt)
    sequences = [
        Sequence(
            TextOutput(served.tokenizer, ids, one, checked.stop, checked.include_stop, checked.skip_special_tokens)
        )
        for ids, one in zip(each, params, strict=True)
    ]
    return Generation(group, sequences, client_probe(request.environ), release)


def _params(checked: GenerationRequest, num_prompt: int, rank: int, max_model_len: int) -> SamplingParams:
    room = max_model_len - num_prompt
    max_tokens = room if checked.max_tokens is None else min(checked.max_tokens, room)
    seed = checked.params.seed
    if seed is not None:
        seed = wrap_seed(seed + rank)
    return msgspec.structs.replace(checked.params, max_tokens=max_tokens, seed=seed)


def _streamed(generation: Generation, shape: Shape, served: Service) -> Response:
    stream = EventStream(generation, shape.events, shape.last, shape.first(), served.settings.keep_alive_s)
    response = Response(stream, mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def _whole(generation: Generation, shape: Shape) -> Response:
    try:
        for pieces in generation.batches(keep_alive_s=float("inf")):
            for index, piece in pieces:
                shape.add(index, piece)
    except ClientGone:
        return Response(status=_STATUS_CLIENT_GONE)
    finally:
        generation.close()
    return json_response(shape.whole())


@dataclass(slots=True)
class _Output:
    """One choice of a response that is not streamed."""

    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Shape:
    """One response in OpenAI's JSON, streamed or whole; the subclasses differ in what a choice looks like."""

    prefix: str
    object_whole: str
    object_chunk: str

    def __init__(
        self,
        checked: GenerationRequest,
        served: Service,
        info: EngineInfo,
        prompts: list[list[int]],
        generation: Generation,
    ) -> None:
        self._head = {
            "id": f"{self.prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.settings.served_model_name,
            "system_fingerprint": _fingerprint(info),
        }
        self._tokenizer = served.tokenizer
        self._include_usage = checked.include_usage
        self._continuous_usage = checked.continuous_usage
        self._n = checked.n
        self._num_prompt_tokens = sum(map(len, prompts))
        self._sequences = generation.sequences
        self._outputs = [_Output() for _ in generation.sequences]

    def add(self, index: int, piece: Piece) -> None:
        """Take one piece of a sequence into the whole response."""
        output = self._outputs[index]
        output.text += piece.text
        if piece.logprobs is not None:
            output.logprobs = output.logprobs or []
            output.logprobs += piece.logprobs
            output.offsets += piece.offsets
        if piece.finish_reason:
            output.finish_reason, output.stop_reason = piece.finish_reason, piece.stop_reason

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        choices = [self.choice(index, output) for index, output in enumerate(self._outputs)]
        return {**self._head, "object": self.object_whole, "choices": choices, "usage": self._usage()}

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any token."""
        return []

    def events(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Chunks of one piece; none when all its text is held back."""
        raise NotImplementedError

    def last(self) -> list[dict[str, Any]]:
        """Chunks after every sequence has ended."""
        return [self._chunk([], usage=self._usage())] if self._include_usage else []

    def choice(self, index: int, output: _Output) -> dict[str, Any]:
        """One choice of the whole response."""
        raise NotImplementedError

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.object_chunk, "choices": choices}
        if self._continuous_usage:
            usage = self._usage()
        return {**chunk, "usage": usage} if self._include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        completion = sum(sequence.output.num_tokens for sequence in self._sequences)
        cached = sum(sequence.cached_tokens for sequence in self._sequences[:: self._n])
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._num_prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(sequence.accepted for sequence in self._sequences),
                "rejected_prediction_tokens": sum(sequence.rejected for sequence in self._sequences),
            },
        }

    def _top(self, entry: TokenLogprob) -> list[tuple[int, float]]:
        return list(zip(entry.top_ids, entry.top_logprobs, strict=True))


class ChatShape(Shape):
    """`chat.completion` and its chunks."""

    prefix = "chatcmpl-"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def first(self) -> list[dict[str, Any]]:
        """The role of every choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([self._chunk_choice(index, delta)]) for index in range(len(self._outputs))]

    def events(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A chunk with text and log-probabilities, then one with the finish reason."""
        events = []
        if piece.text or piece.logprobs:
            delta = {"content": piece.text}
            events.append(self._chunk([self._chunk_choice(index, delta, self._logprobs(piece.logprobs))]))
        if piece.finish_reason:
            end = self._chunk_choice(index, {})
            end |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
            events.append(self._chunk([end]))
        return events

    def choice(self, index: int, output: _Output) -> dict[str, Any]:
        """A choice with the whole message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _chunk_choice(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, entries: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        content = [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(token_id, value) for token_id, value in self._top(entry)],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


class CompletionShape(Shape):
    """`text_completion`, whole and streamed alike."""

    prefix = "cmpl-"
    object_whole = "text_completion"
    object_chunk = "text_completion"

    def __init__(
        self,
        checked: GenerationRequest,
        served: Service,
        info: EngineInfo,
        prompts: list[list[int]],
        generation: Generation,
    ) -> None:
        super().__init__(checked, served, info, prompts, generation)
        self._echo = checked.echo
        if self._echo:
            skip = checked.skip_special_tokens
            texts = [
                one if isinstance(one, str) else self._tokenizer.decode(one, skip_special=skip)
                for one in checked.prompts
            ]
            self._outputs = [_Output(text) for text in texts for _ in range(checked.n)]

    def first(self) -> list[dict[str, Any]]:
        """The prompts' texts, where they are wanted."""
        return (
            [self._chunk([self.choice(index, output)]) for index, output in enumerate(self._outputs)]
            if self._echo
            else []
        )

    def events(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A chunk with text, log-probabilities and finish reason."""
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return []
        output = _Output(piece.text, piece.logprobs, piece.offsets, piece.finish_reason, piece.stop_reason)
        return [self._chunk([self.choice(index, output)])]

    def choice(self, index: int, output: _Output) -> dict[str, Any]:
        """A choice with the text."""
        return {
            "index": index,
            "text": output.text,
            "logprobs": self._logprobs(output.logprobs, output.offsets),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _logprobs(self, entries: list[TokenLogprob] | None, offsets: list[int]) -> dict[str, Any] | None:
        """Parallel lists; `text_offset` is where in the choice's text that of the token begins."""
        if entries is None:
            return None
        tokens = [self._token(entry.token_id) for entry in entries]
        chosen = [_finite(entry.logprob) for entry in entries]
        tops = [self._likeliest(entry, token) for entry, token in zip(entries, tokens, strict=True)]
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}

    def _likeliest(self, entry: TokenLogprob, token: str) -> dict[str, float]:
        """The likeliest tokens in falling order, the sampled one (`token`, as text) among them; of equal texts one."""
        tops: dict[str, float] = {}
        for token_id, value in self._top(entry):
            text = self._token(token_id)
            if text != token or token_id == entry.token_id:
                tops.setdefault(text, _finite(value))
        tops.setdefault(token, _finite(entry.logprob))
        return tops

    def _token(self, token_id: int) -> str:
        """A token as text; one that is not whole characters as its bytes, so that no two look the same."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's floor for an impossible token stands for it."""
    return max(logprob, -9999.0)


def _model_card(served: Service) -> dict[str, Any]:
    card = {
        "id": served.settings.served_model_name,
        "object": "model",
        "created": served.started,
        "owned_by": "pagegraph",
    }
    return {**card, "max_model_len": served.engine.info().max_model_len}


def _fingerprint(info: EngineInfo) -> str:
    """Equal for equal model, number format and device kind: what decides the tokens of a seed."""
    facts = f"{info.model} {info.dtype} {info.device} {info.compile_state == 'compiled'}"
    return "fp_" + hashlib.sha256(facts.encode()).hexdigest()[:12]


def _header_text(names: list[str]) -> str:
    """Field names as a header value: ASCII, no control characters, bounded."""
    return ", ".join("".join(char for char in name[:64] if "!" <= char <= "~") for name in names[:32])
