"""The offline API: `LLM(config).generate(prompts, params)`, in this process, without a server.

Runs the same engine as the server; messages go through lists instead of sockets. Text in, text out, by the rules of
`runtime.text.output`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pagegraph.compiler.build import BuiltModel, build_compiled
from pagegraph.runtime.config import Config, load_config, require_one_engine
from pagegraph.runtime.engine.assemble import engine_of
from pagegraph.runtime.engine.ranks import build_with_ranks
from pagegraph.runtime.ipc.protocol import (
    Abort,
    Failed,
    Submit,
    ToClient,
    ToEngine,
    TokenDelta,
    TokenLogprob,
    Tokens,
)
from pagegraph.runtime.sampling_params import PoolingParams, SamplingParams, check_ids, check_length, check_stop
from pagegraph.runtime.structured_output import check_grammar
from pagegraph.runtime.text.output import TextOutput
from pagegraph.runtime.text.tokenizer import Tokenizer

CLIENT = b"local"


class RequestFailed(ValueError):
    """The engine refused or could not finish a request; the message says why."""


@dataclass(slots=True)
class Completion:
    """What one prompt became."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # stop or length once finished
    stop_reason: str | int | None = None  # the stop string, or the one of stop_token_ids, that ended it
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = (
        None  # one a prompt token; the first, which nothing precedes, None
    )


class LocalMailbox:
    """The engine's mailbox as two lists."""

    def __init__(self) -> None:
        self.inbox: list[tuple[bytes, ToEngine]] = []
        self.outbox: list[ToClient] = []

    def poll(self, block: bool) -> list[tuple[bytes, ToEngine]]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, client: bytes, message: ToClient) -> None:
        self.outbox.append(message)

    def put(self, message: ToEngine) -> None:
        self.inbox.append((CLIENT, message))

    def take(self) -> list[ToClient]:
        messages, self.outbox = self.outbox, []
        return messages


class LLM:
    """A loaded model that generates. Not thread-safe.

    `config` is a Config, or a YAML file, model folder or hub name with overrides as keyword arguments.
    `built` is a model that is already loaded, to run under another scheduling configuration.
    """

    def __init__(
        self, config: Config | str, *, built: BuiltModel | None = None, progress: bool = True, **overrides: object
    ) -> None:
        if isinstance(config, str):
            config = load_config(config, overrides).config
        elif overrides:
            raise TypeError("overrides go with a configuration file or model name, not with a Config")
        require_one_engine(config, "LLM")
        if config.inter_token_target_ms == "auto":  # nobody watches tokens come while other prompts wait
            config = replace(config, inter_token_target_ms="none")
        self.config = config
        self.built = built or build_with_ranks(config, lambda options: build_compiled(options, progress=progress))
        self.tokenizer = Tokenizer.load(Path(config.tokenizer) if config.tokenizer else self.built.folder)
        self._mailbox = LocalMailbox()
        self.engine, self.metrics = engine_of(config, self.built, self._mailbox, max_queue=sys.maxsize)
        self.sampling_defaults = self.engine.info().sampling_defaults
        self._num_requests = 0

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        stop: str | list[str] | None = None,
        tick: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """Complete every prompt (text or token ids); completions in the order of the prompts.

        `params` are taken as they are; without any, `sampling_params()` are. `tick` is called as each prompt ends.
        Raises ValueError, before any prompt runs, for what cannot be served.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        params = self.sampling_params() if params is None else params
        each = params if isinstance(params, list) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params: {len(each)} for {len(prompts)} prompts; give one, or one a prompt")
        requests = self._start(prompts, each, stop)
        unfinished = {request.request_id: request for request in requests}
        while unfinished:
            before = len(unfinished)
            self._turn(unfinished)
            for _ in range(before - len(unfinished)):
                tick()
        return [request.completion for request in requests]

    def embed(self, prompts: str | list[str] | list[list[int]], *, dimensions: int | None = None) -> list[np.ndarray]:
        """The embedding of every prompt (text or token ids), float32; `dimensions` of the first, if the model has such.

        Raises ValueError, before any prompt runs, for what cannot be served.
        """
        self.engine.limits.pooler.check(dimensions)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        params = SamplingParams(pooling=PoolingParams(dimensions))
        requests = self._start(prompts, [params] * len(prompts), None)
        unfinished = {request.request_id: request for request in requests}
        while unfinished:
            self._turn(unfinished)
        return [np.frombuffer(request.output.embedding, np.float32) for request in requests]

    def stream(
        self, prompt: str | list[int], params: SamplingParams | None = None, *, stop: str | list[str] | None = None
    ) -> Iterator[str]:
        """Pieces of the completion's text as they come; closing the iterator aborts the request."""
        (request,) = self._start([prompt], [self.sampling_params() if params is None else params], stop, eager=True)
        unfinished = {request.request_id: request}
        try:
            while unfinished:
                seen = len(request.completion.text)
                self._turn(unfinished)
                if piece := request.completion.text[seen:]:
                    yield piece
        finally:
            if not request.completion.finish_reason:
                self._mailbox.put(Abort(request.request_id))
                self._drain()

    def chat(
        self,
        messages: list[dict[str, str]],
        params: SamplingParams | None = None,
        *,
        stop: str | list[str] | None = None,
    ) -> Completion:
        """Answer a conversation through the model's chat template."""
        return self.generate([self.tokenizer.apply_chat(messages)], params, stop=stop)[0]

    def close(self) -> None:
        """Finish what is launched and free the worker."""
        self.built.close()

    def sampling_params(self, **fields: object) -> SamplingParams:
        """Sampling parameters of these fields; others as the model's generation_config.json has them."""
        return SamplingParams(**{**self.sampling_defaults, **fields})

    def _start(
        self,
        prompts: Sequence[str | list[int]],
        params: list[SamplingParams],
        stop: str | list[str] | None,
        eager: bool = False,
    ) -> list[_Request]:
        """Hand all prompts to the engine, or none: each is checked before the first goes. Raises ValueError."""
        words = check_stop(stop)
        for one in params:
            one.check_vocabulary(self.built.vocab_size)
        for structured in {id(one.structured_outputs): one.structured_outputs for one in params}.values():
            if structured is not None:
                check_grammar(structured)
        encoded = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for ids, one in zip(encoded, params):
            no_output = 0 if one.max_tokens == 0 else None
            check_length(len(ids), self.built.max_model_len, max_tokens=no_output, min_tokens=one.min_tokens)
            check_ids("prompt", ids, self.built.vocab_size)
        return [self._submit(ids, one, words, eager) for ids, one in zip(encoded, params)]

    def _submit(self, ids: list[int], params: SamplingParams, stop: list[str], eager: bool) -> _Request:
        self._num_requests += 1
        request_id = str(self._num_requests)
        self._mailbox.put(Submit(request_id=request_id, token_ids=ids, params=params))
        output = TextOutput(self.tokenizer, ids, params, stop)
        completion = Completion(ids, prompt_logprobs=None if params.prompt_logprobs is None else [None])
        return _Request(request_id, completion, output, eager=eager or bool(stop))

    def _turn(self, unfinished: dict[str, _Request]) -> None:
        """One turn of the engine; requests that it ends leave `unfinished`."""
        self.engine.turn()
        for message in self._mailbox.take():
            match message:
                case Failed(message=text):
                    self._drain()
                    raise RequestFailed(text)
                case Tokens():
                    self._take(message, unfinished)

    def _take(self, message: Tokens, unfinished: dict[str, _Request]) -> None:
        for request_id, token_id in zip(message.request_ids, message.token_ids):
            if request := unfinished.get(request_id):
                request.fresh.append(token_id)
                if request.eager:
                    self._read(request, unfinished)
        for delta in message.deltas:
            if request := unfinished.get(delta.request_id):
                request.gather(delta)
                if request.eager or delta.finish_reason:
                    self._read(request, unfinished, delta.finish_reason, delta.stop_reason)

    def _read(
        self, request: _Request, unfinished: dict[str, _Request], finish_reason: str = "", stop_reason: int = -1
    ) -> None:
        """Make text of what was gathered; if that ends the request, tell the engine where it does not know."""
        if request.read(finish_reason, stop_reason):
            del unfinished[request.request_id]
            if not finish_reason:
                self._mailbox.put(Abort(request.request_id, "stop"))

    def _drain(self) -> None:
        while not self.engine.idle or self._mailbox.inbox:
            self.engine.turn()
        self._mailbox.take()


@dataclass(slots=True)
class _Request:
    """A completion in the making. Text is made as tokens come only for who looks at it: a stream, a stop string."""

    request_id: str
    completion: Completion
    output: TextOutput
    eager: bool
    fresh: list[int] = field(default_factory=list)  # tokens that are not text yet
    logprobs: list[TokenLogprob] | None = None  # of those

    def gather(self, delta: TokenDelta) -> None:
        """Take in a delta's tokens and totals."""
        self.fresh += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
        self.output.count(delta)

    def read(self, finish_reason: str, stop_reason: int) -> bool:
        """Turn fresh tokens into text; True if the completion is whole."""
        delta = TokenDelta(self.request_id, self.fresh, finish_reason, stop_reason, logprobs=self.logprobs)
        self.fresh, self.logprobs = [], None
        piece, done = self.output.add(delta), self.completion
        done.text += piece.text
        done.token_ids += piece.token_ids
        done.logprobs += piece.logprobs or ()
        done.cached_tokens = self.output.cached_tokens
        if piece.finish_reason and done.prompt_logprobs is not None:
            for part in self.output.prompt_logprobs:
                done.prompt_logprobs += part.entries(done.prompt_token_ids)
        done.finish_reason, done.stop_reason = piece.finish_reason or "", piece.stop_reason
        return piece.finish_reason is not None
