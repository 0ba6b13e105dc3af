"""A checked request to sequences of the engine: prompts to token ids, parameters, lengths.

Knows the tokenizer, the context's length and the engine's client. Knows no JSON fields and no shapes of responses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from flask import g, request

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.sampling_params import BadParameter, SamplingParams, check_length, wrap_seed
from pagegraph.runtime.text.chat import Chat
from pagegraph.runtime.text.output import TextOutput
from pagegraph.runtime.text.tokenizer import ChatTemplateError, Tokenizer
from pagegraph.web import access
from pagegraph.web.errors import ApiError
from pagegraph.web.fields import refuse
from pagegraph.web.json_body import parse_body
from pagegraph.web.message import form_field, held
from pagegraph.web.prompt_logprobs import check_size
from pagegraph.web.schema import GenerationRequest
from pagegraph.web.service import Service
from pagegraph.web.stream import Generation, NoTokens, client_probe

Parse = Callable[..., GenerationRequest]  # `schema.parse_completion` or `schema.parse_chat`
Prompt = str | list[int]
T = TypeVar("T")

_LONG_CHARS = 1 << 16  # characters of a request from which on it waits its turn to be tokenised: some 10 ms
_LARGE_BODY_BYTES = 1 << 20  # from which on a body waits its turn to be parsed


def read_body(service: Service, check: Callable[[dict[str, Any]], T]) -> T:
    """What `check` makes of the JSON object that the current request's body is. Raises ApiError or ClientGone.

    A large body waits its turn: parsing takes four times its size.
    """
    if request.mimetype != "application/json":
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    is_large = (request.content_length or _LARGE_BODY_BYTES) >= _LARGE_BODY_BYTES  # one in chunks does not say
    with service.long_text(client_probe(request.environ)) if is_large else contextlib.nullcontext():
        return check(parse_body(request.get_data(cache=False)))


def read_request(parse: Parse, service: Service, info: EngineInfo) -> tuple[GenerationRequest, Sequence[Prompt]]:
    """The body of the current request, checked, and its prompts. Raises ApiError, BadParameter or ClientGone."""

    def check(body: dict[str, Any]) -> tuple[GenerationRequest, Sequence[Prompt]]:
        checked = parse(body, info.vocab_size, info.sampling_defaults)
        service.check_model(checked.model)
        return checked, prompts_of(service, checked, info)

    return read_body(service, check)


def encode(service: Service, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text of any length; a long one waits its turn. Raises UnicodeEncodeError or ClientGone."""
    with turn(service, len(text)):
        return service.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def tokenize(
    service: Service, prompts: Sequence[Prompt], checked: GenerationRequest, info: EngineInfo
) -> list[list[int]]:
    """Token ids of every prompt, each checked against the context. Raises ApiError, BadParameter or ClientGone."""
    with turn(service, sum(len(prompt) for prompt in prompts if isinstance(prompt, str))):
        tokenized = []
        for prompt in prompts:
            if isinstance(prompt, str):
                try:
                    prompt = service.tokenizer.encode(prompt, add_special_tokens=checked.add_special_tokens)
                except UnicodeEncodeError:  # of a prompt that is truncated, which `prompts_of` has not looked at
                    raise no_unicode(_prompt_field(checked)) from None
            prompt = truncated(prompt, checked, info)
            _check_length(len(prompt), checked, info)
            tokenized.append(prompt)
    return tokenized


def truncated(ids: list[int], checked: GenerationRequest, info: EngineInfo) -> list[int]:
    """The tokens of a prompt that `truncate_prompt_tokens` keeps. Raises BadParameter."""
    keep = checked.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep > info.max_model_len:
        most = f"is {keep}, above max_model_len = {info.max_model_len}; give at most that, or -1 for as many as fit"
        raise BadParameter("truncate_prompt_tokens", most)
    if keep < 0:
        asked = 1 if checked.max_tokens_is_default or checked.max_tokens is None else checked.max_tokens
        keep = max(info.max_model_len - max(asked, checked.params.min_tokens), 1)
    return ids[-keep:] if checked.truncation_side == "left" else ids[:keep]


def turn(service: Service, num_chars: int) -> contextlib.AbstractContextManager[None]:
    """What so many characters or tokens are turned into the other inside; see `Service.long_text`."""
    if num_chars < _LONG_CHARS:
        return contextlib.nullcontext()
    return service.long_text(client_probe(request.environ))


def submit(
    service: Service,
    checked: GenerationRequest,
    prompts: list[list[int]],
    info: EngineInfo,
    release: Callable[[], None],
) -> Generation:
    """Submit best_of sequences for each prompt, sequence j of them with seed + j.

    Closing the generation calls `release`. Raises BadParameter where the answer would be too large.
    """
    check_size(checked, prompts)
    names = {"structured_outputs": form_field(checked), "prompt": _prompt_field(checked)}
    each, times = [ids for ids in prompts for _ in range(checked.best_of)], checked.best_of
    if checked.messages:
        checked = replace(checked, params=held(service.chat, checked, prompts[0]))
    if checked.max_tokens == 0 and checked.params.prompt_logprobs is None and checked.params.pooling is None:
        params, group = [checked.params] * len(each), NoTokens(len(each))
    else:
        params = [_params(checked, len(ids), index % times, info.max_model_len) for index, ids in enumerate(each)]
        asker = access.asker()
        salt = (asker.name if service.settings.prefix_cache_per_key else "") + checked.cache_salt
        trace = "" if service.tracing is None else service.tracing.current()
        group = service.engine.submit_group(
            list(zip(each, params, strict=True)), checked.priority, salt, asker, g.request_id, trace
        )
    kept = service.chat.kept_ids(tools=checked.tools.schemas is not None) if checked.messages else frozenset()
    outputs = [
        TextOutput(service.tokenizer, ids, one, checked.stop, checked.include_stop, checked.skip_special_tokens, kept)
        for ids, one in zip(each, params, strict=True)
    ]
    return Generation(group, outputs, client_probe(request.environ), release, names)


def no_unicode(field: str) -> ApiError:
    """What a text with a lone surrogate is answered with."""
    return ApiError(400, f"{field} holds half of a surrogate pair: not valid Unicode", param=field)


def prompt_text(chat: Chat, checked: GenerationRequest) -> str:
    """The prompt of a chat, as its template renders it. Raises ApiError 400.

    What only a template could heed, and this one does not read, is added to `checked.ignored`.
    """
    advice = {name: value for name, value in checked.advice.items() if chat.reads(name)}
    checked.ignored.extend(name for name in checked.advice if name not in advice and name not in checked.ignored)
    if checked.documents and not chat.reads("documents"):
        refuse("documents", "is not read by the chat template of this model; put them into a message")
    try:
        return chat.render(
            checked.messages,
            tools=checked.tools.listed if checked.tools.choice != "none" else [],
            documents=checked.documents or None,
            add_generation_prompt=checked.add_generation_prompt,
            continue_final_message=checked.continue_final_message,
            arguments=advice | checked.template_arguments,
        )
    except ChatTemplateError as error:
        raise ApiError(400, str(error), param="messages") from None


def prompts_of(service: Service, checked: GenerationRequest, info: EngineInfo) -> Sequence[Prompt]:
    """The prompts, a chat rendered by its template. Refuses what by its characters alone is too long."""
    prompts = [prompt_text(service.chat, checked)] if checked.messages else checked.prompts
    try:
        for prompt in prompts:
            if isinstance(prompt, str) and checked.truncate_prompt_tokens is None:
                _check_chars(prompt, service.tokenizer, checked, info)
    except UnicodeEncodeError:
        raise no_unicode(_prompt_field(checked)) from None
    return prompts


def _check_chars(text: str, tokenizer: Tokenizer, checked: GenerationRequest, info: EngineInfo) -> None:
    """Refuse megabytes before they are tokenised, which takes seconds and hundreds of megabytes."""
    if at_least := tokenizer.min_tokens(text, enough=info.max_model_len):
        no_output = 0 if checked.max_tokens == 0 else None
        check_length(
            at_least, info.max_model_len, field=_prompt_field(checked), max_tokens=no_output, num_chars=len(text)
        )


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


def _params(checked: GenerationRequest, num_prompt: int, rank: int, max_model_len: int) -> SamplingParams:
    room = max_model_len - num_prompt
    max_tokens = room if checked.max_tokens is None else min(checked.max_tokens, room)
    seed = checked.params.seed
    if seed is not None:
        seed = wrap_seed(seed + rank)
    # One sequence of a prompt tells of it, if the others' answers can wait.
    tells = rank == 0 or checked.stream or checked.max_tokens == 0
    prompt_logprobs = checked.params.prompt_logprobs if tells else None
    return msgspec.structs.replace(checked.params, max_tokens=max_tokens, seed=seed, prompt_logprobs=prompt_logprobs)
