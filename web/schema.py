"""JSON of a request to a checked value, or a 400 that names the field and a value that works.

Knows the fields that completions and chat completions accept; all others are `fields`', and what a message holds is
`messages`'. Knows no Flask, no tokenizer and no engine state beyond the vocabulary's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

from pagegraph.runtime.sampling_params import RANGES, BadParameter, Range, SamplingParams, check_ids, check_stop, shown
from pagegraph.web.chat_fields import read_chat_fields
from pagegraph.web.errors import as_api_error
from pagegraph.web.fields import Fields, is_id, mapping, refuse
from pagegraph.web.messages import read_messages
from pagegraph.web.structured import Form, read_structured
from pagegraph.web.tools import Tools

MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024
DEFAULT_COMPLETION_TOKENS = 16
NUMBERS = {  # that are no sampling parameters
    "n": Range(1, 128, 1, int),
    "priority": Range(-(2**31), 2**31 - 1, 0, int),
    "truncate_prompt_tokens": Range(-1, 2**31 - 1, 512, int),
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats")
# Fields of SamplingParams that a request has under the same name and in the same form.
_SAMPLED = (
    "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "allowed_token_ids", "seed", "stop_token_ids", "ignore_eos",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One checked request. `params` still lacks the seed of each sequence and, if None, `max_tokens`."""

    model: str | None
    prompts: list[str] | list[list[int]]  # completions; empty for chat
    messages: list[dict[str, Any]]  # chat; empty for completions
    tools: Tools = field(default_factory=Tools)
    include_reasoning: bool = True  # in the answer
    advice: dict[str, Any] = field(default_factory=dict)  # for the template, where it reads it
    documents: list[dict[str, Any]] = field(default_factory=list)
    n: int
    best_of: int  # sequences for each prompt, of which the n likeliest are the answer
    stream: bool
    include_usage: bool
    continuous_usage: bool  # in every chunk
    echo: bool  # the prompt's text goes before the output's
    max_tokens: int | None  # None: chat, fill the context; 0: the prompt alone comes back
    max_tokens_is_default: bool
    params: SamplingParams
    form_field: str  # that asks for `params.structured_outputs`
    shows_logprobs: bool
    prompt_logprobs: int | None  # as vLLM shows them; `params` has what else they are needed for
    stop: list[str]
    include_stop: bool
    skip_special_tokens: bool
    add_special_tokens: bool
    add_generation_prompt: bool
    continue_final_message: bool
    template_arguments: dict[str, Any]
    truncate_prompt_tokens: int | None  # tokens of each prompt that are kept; -1: as many as fit
    truncation_side: str  # "left": its last tokens are kept; "right": its first
    return_token_ids: bool
    tokens_as_token_ids: bool  # tokens of log-probabilities are written "token_id:N"
    request_id: str | None
    priority: int
    cache_salt: str
    ignored: list[str]  # fields without effect here, and those that are not known


def _answered(parse: Callable[..., GenerationRequest]) -> Callable[..., GenerationRequest]:
    """`parse` with what is wrong with a field told as an ApiError 400."""

    @wraps(parse)
    def answered(*arguments: Any) -> GenerationRequest:
        try:
            return parse(*arguments)
        except BadParameter as error:
            raise as_api_error(error) from None

    return answered


@_answered
def parse_completion(
    body: dict[str, Any], vocab_size: int, sampling_defaults: Mapping[str, int | float] = {}
) -> GenerationRequest:
    """A body of POST /v1/completions. `sampling_defaults`: the model's own, by field of SamplingParams."""
    fields = Fields(body)
    echo = fields.boolean("echo", False)
    max_tokens = fields.number("max_tokens", replace(RANGES["max_tokens"], low=0), None)
    logprobs = fields.number("logprobs", RANGES["logprobs"], None)
    if max_tokens == 0 and not echo and body.get("prompt_logprobs") is None:
        beside = "0 needs echo: true or prompt_logprobs beside it"
        refuse("max_tokens", f"{beside}; give at least 1, for example {DEFAULT_COMPLETION_TOKENS}")
    return _request(
        fields,
        vocab_size,
        sampling_defaults,
        prompts=_prompts(fields.take("prompt"), vocab_size),
        messages=[],
        max_tokens=max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=logprobs,
        echo=echo,
    )


@_answered
def parse_chat(
    body: dict[str, Any], vocab_size: int, sampling_defaults: Mapping[str, int | float] = {}
) -> GenerationRequest:
    """A body of POST /v1/chat/completions; `sampling_defaults` as in `parse_completion`."""
    fields = Fields(body)
    messages = read_messages(fields)
    wanted = fields.boolean("logprobs", False)
    top = fields.number("top_logprobs", RANGES["logprobs"], None)
    if top and not wanted:
        refuse("top_logprobs", "needs logprobs: true beside it")
    longest = fields.number("max_tokens", RANGES["max_tokens"], None)
    newer = fields.number("max_completion_tokens", RANGES["max_tokens"], None)
    return _request(
        fields,
        vocab_size,
        sampling_defaults,
        prompts=[],
        messages=messages,
        max_tokens=longest if newer is None else newer,
        default_max_tokens=None,
        logprobs=(top or 0) if wanted else None,
    )


def _request(
    fields: Fields,
    vocab_size: int,
    sampling_defaults: Mapping[str, int | float],
    *,
    prompts: list[str] | list[list[int]],
    messages: list[dict[str, Any]],
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
    echo: bool = False,
) -> GenerationRequest:
    """The fields that both endpoints share, and the check that nothing unserved was asked."""
    chat = bool(messages)
    stream = fields.boolean("stream", False)
    n, best_of = _counts(fields, len(prompts), ranks=not chat and not stream)
    prompt_logprobs = fields.number("prompt_logprobs", RANGES["prompt_logprobs"], None)
    if stream and prompt_logprobs is not None:
        refuse("prompt_logprobs", "is not served beside stream: true; leave one of them out")
    options = _stream_options(fields, stream)
    echoed = logprobs if echo else None
    limit = max_tokens
    if limit is None:
        own: Any = sampling_defaults.get("max_tokens")
        limit = min((one for one in (default_max_tokens, own) if one is not None), default=None)
    form = read_structured(fields)
    request = GenerationRequest(
        model=fields.text("model"),
        prompts=prompts,
        messages=messages,
        **(read_chat_fields(fields) if chat else {}),
        n=n,
        best_of=best_of,
        stream=stream,
        include_usage=options["include_usage"],
        continuous_usage=options["continuous_usage_stats"],
        echo=echo,
        max_tokens=limit,
        max_tokens_is_default=max_tokens is None,
        params=_sampling(
            fields,
            vocab_size,
            sampling_defaults,
            form,
            max_tokens=limit or None,
            logprobs=0 if logprobs is None and best_of > n else logprobs,
            prompt_logprobs=max((one for one in (prompt_logprobs, echoed) if one is not None), default=None),
        ),
        form_field=form.field,
        shows_logprobs=logprobs is not None,
        prompt_logprobs=prompt_logprobs,
        stop=check_stop(fields.take("stop")),
        include_stop=fields.boolean("include_stop_str_in_output", False),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        add_special_tokens=fields.boolean("add_special_tokens", not chat),
        add_generation_prompt=fields.boolean("add_generation_prompt", True) if chat else False,
        continue_final_message=fields.boolean("continue_final_message", False) if chat else False,
        template_arguments=mapping(fields.take("chat_template_kwargs"), "chat_template_kwargs") if chat else {},
        truncate_prompt_tokens=_truncate(fields),
        truncation_side=fields.one_of("truncation_side", ("left", "right"), "left"),
        return_token_ids=fields.boolean("return_token_ids", False),
        tokens_as_token_ids=fields.boolean("return_tokens_as_token_ids", False),
        request_id=_own_id(fields.take("request_id")),
        priority=fields.number("priority", NUMBERS["priority"], 0),
        cache_salt=_cache_salt(fields.take("cache_salt")),
        ignored=[*fields.check_rest(), *(f"stream_options.{name}" for name in options if name not in _STREAM_OPTIONS)],
    )
    if limit == 0 and request.params.min_tokens:
        refuse("min_tokens", f"is {request.params.min_tokens}, above max_tokens = 0; leave it out")
    if request.continue_final_message and request.add_generation_prompt:
        if fields.body.get("add_generation_prompt") is not None:
            refuse("continue_final_message", "needs add_generation_prompt: false beside it")
        return replace(request, add_generation_prompt=False)
    return request


def _counts(fields: Fields, num_prompts: int, ranks: bool) -> tuple[int, int]:
    """n and best_of. `ranks`: whether the likeliest of several sequences can be chosen."""
    n = fields.number("n", NUMBERS["n"], 1)
    best_of = fields.number("best_of", NUMBERS["n"], n)
    if best_of < n:
        refuse("best_of", f"is {best_of}, below n = {n}; give at least n, or leave it out")
    if best_of > n and not ranks:
        where = "above n is served by /v1/completions without stream alone"
        refuse("best_of", f"{where}; leave it out or give {n}")
    if best_of * num_prompts > MAX_SEQUENCES:
        name = "best_of" if best_of > n else "n"
        times = f"times the number of prompts is {best_of * num_prompts}"
        refuse(name, f"{times}; at most {MAX_SEQUENCES} sequences a request")
    return n, best_of


def _sampling(
    fields: Fields, vocab_size: int, defaults: Mapping[str, int | float], form: Form, **own: int | None
) -> SamplingParams:
    """What the request gives, over the model's defaults, over our own; `own` fields are read already."""
    given = {name: value for name in _SAMPLED if (value := fields.take(name)) is not None}
    if (bias := fields.take("logit_bias")) is not None:
        given["logit_bias"] = _logit_bias(bias, vocab_size)
    params = SamplingParams(**{**defaults, **given, **own, "structured_outputs": form.structured})
    params.check_vocabulary(vocab_size)
    return params


def _prompts(value: Any, vocab_size: int) -> list[str] | list[list[int]]:
    example = 'a string, a list of strings, a list of token ids or a list of those, for example "Hello"'
    if value is None:
        refuse("prompt", f"is missing; give {example}")
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value and is_id(value[0]):
        prompts = [value]
    else:
        prompts = value
    if not isinstance(prompts, list) or not prompts:
        refuse("prompt", f"must be {example}; got {shown(value)}")
    if len(prompts) > MAX_PROMPTS:
        refuse("prompt", f"holds {len(prompts)} prompts; at most {MAX_PROMPTS} a request")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    if not all(isinstance(prompt, list) and prompt for prompt in prompts):
        refuse("prompt", f"must be {example}")
    for prompt in prompts:
        check_ids("prompt", prompt, vocab_size)
    return prompts


def _logit_bias(value: Any, vocab_size: int) -> dict[int, Any]:
    """The biases by token id, which JSON can only write as a string; their values are not looked at."""
    entries = mapping(value, "logit_bias")
    for key in entries:
        if not re.fullmatch("0|[1-9][0-9]{0,9}", key):
            refuse("logit_bias", f"keys must be token ids from 0 to {vocab_size - 1}; got {shown(key)}")
    return {int(key): amount for key, amount in entries.items()}


def _cache_salt(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]{1,128}", value):
        refuse("cache_salt", f"must be 1 to 128 printable ASCII characters without spaces; got {shown(value)}")
    return value


def _truncate(fields: Fields) -> int | None:
    keep = fields.number("truncate_prompt_tokens", NUMBERS["truncate_prompt_tokens"], None)
    if keep == 0:
        refuse("truncate_prompt_tokens", "must be at least 1, or -1 for as many as fit; got 0")
    return keep


def _own_id(value: Any) -> str | None:
    if value is not None and not is_request_id(value):
        refuse("request_id", f"must be 1 to 128 letters, digits or any of ._:-; got {shown(value)}")
    return value


def is_request_id(value: Any) -> bool:
    """Whether a client may call its request so: in answers and in the header x-request-id."""
    return isinstance(value, str) and _REQUEST_ID.fullmatch(value) is not None


def _stream_options(fields: Fields, stream: bool) -> dict[str, Any]:
    """The options of a stream; those that are served are booleans, false where they are not given."""
    options = mapping(fields.take("stream_options"), "stream_options")
    if options and not stream:
        refuse("stream_options", "needs stream: true beside it")
    served = {}
    for name in _STREAM_OPTIONS:
        value = options.get(name)
        if value is not None and not isinstance(value, bool):
            refuse(f"stream_options.{name}", f"must be true or false; got {shown(value)}")
        served[name] = bool(value)
    if served["continuous_usage_stats"] and not served["include_usage"]:
        refuse("stream_options.continuous_usage_stats", "needs include_usage: true beside it")
    return {**options, **served}
