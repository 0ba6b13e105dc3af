"""JSON of a request to a checked value, or a 400 that names the field and a value that works.

Knows the fields of OpenAI's completions and chat completions and the extras of other engines. Knows no
Flask, no tokenizer and no engine state beyond the vocabulary's size.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import msgspec

from runtime.protocol import SamplingParams
from web.errors import ApiError

MAX_N = 128
MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024
MAX_STOP = 16
MAX_STOP_CHARS = 1024
MAX_TOP_LOGPROBS = 20
MAX_ID_LIST = 1024
MAX_MESSAGES = 4096
DEFAULT_COMPLETION_TOKENS = 16
_INT64 = 2**63
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One checked request. `params` still lacks the seed of each sequence and, if None, `max_tokens`."""

    model: str | None
    prompts: list[str] | list[list[int]]  # completions; empty for chat
    messages: list[dict[str, Any]]  # chat; empty for completions
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None  # None: chat, fill the context
    max_tokens_is_default: bool
    params: SamplingParams
    stop: list[str]
    include_stop: bool
    skip_special_tokens: bool
    add_special_tokens: bool
    add_generation_prompt: bool
    continue_final_message: bool
    template_arguments: dict[str, Any]
    priority: int
    cache_salt: str
    ignored: list[str]  # fields that are not known


def parse_body(data: bytes) -> dict[str, Any]:
    """Bytes of a body to a JSON object; raises ApiError 400 on anything else."""
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        detail = f": {error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not JSON{detail}") from None
    if not isinstance(body, dict):
        raise ApiError(400, 'the body must be a JSON object, for example {"model": "...", "prompt": "Hello"}')
    return body


def parse_completion(body: dict[str, Any], vocab_size: int) -> GenerationRequest:
    """A body of POST /v1/completions."""
    fields = _Fields(body)
    prompts = _prompts(fields.take("prompt"), vocab_size)
    logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    return _request(
        fields,
        vocab_size,
        prompts=prompts,
        messages=[],
        max_tokens=fields.integer("max_tokens", None, 1, _INT64 - 1),
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=logprobs,
    )


def parse_chat(body: dict[str, Any], vocab_size: int) -> GenerationRequest:
    """A body of POST /v1/chat/completions."""
    fields = _Fields(body)
    messages = _messages(fields.take("messages"))
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        _refuse("top_logprobs", "needs logprobs: true beside it")
    longest = fields.integer("max_tokens", None, 1, _INT64 - 1)
    newer = fields.integer("max_completion_tokens", None, 1, _INT64 - 1)
    return _request(
        fields,
        vocab_size,
        prompts=[],
        messages=messages,
        max_tokens=longest if newer is None else newer,
        default_max_tokens=None,
        logprobs=(top or 0) if wanted else None,
    )


def _request(
    fields: _Fields,
    vocab_size: int,
    *,
    prompts: list[str] | list[list[int]],
    messages: list[dict[str, Any]],
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> GenerationRequest:
    """The fields that both endpoints share, and the check that nothing unserved was asked."""
    chat = bool(messages)
    n = fields.integer("n", 1, 1, MAX_N)
    best_of = fields.integer("best_of", n, 1, MAX_N)
    if best_of != n:
        _refuse("best_of", f"other than n is not served; leave it out or give {n}")
    if n * len(prompts) > MAX_SEQUENCES:
        _refuse("n", f"times the number of prompts is {n * len(prompts)}; at most {MAX_SEQUENCES} sequences a request")
    stream = fields.boolean("stream", False)
    limit = default_max_tokens if max_tokens is None else max_tokens
    request = GenerationRequest(
        model=fields.text("model"),
        prompts=prompts,
        messages=messages,
        n=n,
        stream=stream,
        include_usage=_include_usage(fields.take("stream_options"), stream),
        max_tokens=limit,
        max_tokens_is_default=max_tokens is None,
        params=_sampling(fields, vocab_size, limit, logprobs),
        stop=_stop(fields.take("stop")),
        include_stop=fields.boolean("include_stop_str_in_output", False),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        add_special_tokens=fields.boolean("add_special_tokens", not chat),
        add_generation_prompt=fields.boolean("add_generation_prompt", True),
        continue_final_message=fields.boolean("continue_final_message", False),
        template_arguments=_mapping(fields.take("chat_template_kwargs"), "chat_template_kwargs"),
        priority=fields.integer("priority", 0, -(2**31), 2**31 - 1),
        cache_salt=_cache_salt(fields.take("cache_salt")),
        ignored=fields.check_rest(),
    )
    if request.continue_final_message and request.add_generation_prompt and chat:
        if "add_generation_prompt" in fields.body:
            _refuse("continue_final_message", "needs add_generation_prompt: false beside it")
        return replace(request, add_generation_prompt=False)
    return request


def _sampling(fields: _Fields, vocab_size: int, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    min_tokens = fields.integer("min_tokens", 0, 0, _INT64 - 1)
    if max_tokens is not None and min_tokens > max_tokens:
        _refuse("min_tokens", f"is {min_tokens}, above max_tokens = {max_tokens}; give at most {max_tokens}")
    return SamplingParams(
        max_tokens=DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens,
        min_tokens=min_tokens,
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_k=_top_k(fields),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0, low_open=True),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.0, 2.0, low_open=True),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(fields.take("logit_bias"), vocab_size),
        allowed_token_ids=_allowed(fields.take("allowed_token_ids"), vocab_size),
        seed=fields.integer("seed", None, -_INT64, _INT64 - 1),
        stop_token_ids=_ids(fields.take("stop_token_ids") or [], "stop_token_ids", vocab_size, MAX_ID_LIST),
        ignore_eos=fields.boolean("ignore_eos", False),
        logprobs=logprobs,
    )


class _Fields:
    """A body whose fields are taken one by one; null counts as absent, as OpenAI has it."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self._taken: set[str] = set()

    def take(self, name: str) -> Any:
        self._taken.add(name)
        return self.body.get(name)

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            if high >= 2**31:
                bound = f"at least {low}" if low >= 0 else "of 64 bits" if low == -_INT64 else "of 32 bits"
            else:
                bound = f"from {low} to {high}"
            _refuse(name, f"must be a whole number {bound}, for example {_within(default, low, high)}; got {_show(value)}")
        return value

    def number(self, name: str, default: float, low: float, high: float, *, low_open: bool = False) -> float:
        value = self.take(name)
        if value is None:
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not good or not math.isfinite(value) or (low_open and value == low):
            bound = f"above {low:g} and at most {high:g}" if low_open else f"from {low:g} to {high:g}"
            _refuse(name, f"must be a number {bound}, for example {default:g}; got {_show(value)}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            _refuse(name, f"must be true or false; got {_show(value)}")
        return value

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            _refuse(name, f"must be a string; got {_show(value)}")
        return value

    def check_rest(self) -> list[str]:
        """Names that are not known; raises on a known field that is not served, unless it asks nothing."""
        rest = [name for name in self.body if name not in self._taken and name not in _ADVISORY]
        for name in rest:
            neutral = _UNSERVED.get(name)
            value = self.body[name]
            if neutral is not None and value is not None and not any(_same(value, item) for item in neutral):
                works = f"; leave it out or give {json.dumps(neutral[0])}" if neutral else "; leave it out"
                _refuse(name, f"is not served{works}")
        return [name for name in rest if name not in _UNSERVED]


def _prompts(value: Any, vocab_size: int) -> list[str] | list[list[int]]:
    example = 'a string, a list of strings, a list of token ids or a list of those, for example "Hello"'
    if value is None:
        _refuse("prompt", f"is missing; give {example}")
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value and _is_id(value[0]):
        prompts = [value]
    else:
        prompts = value
    if not isinstance(prompts, list) or not prompts:
        _refuse("prompt", f"must be {example}; got {_show(value)}")
    if len(prompts) > MAX_PROMPTS:
        _refuse("prompt", f"holds {len(prompts)} prompts; at most {MAX_PROMPTS} a request")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    if not all(isinstance(prompt, list) and prompt for prompt in prompts):
        _refuse("prompt", f"must be {example}")
    return [_ids(prompt, "prompt", vocab_size, _INT64) for prompt in prompts]


def _messages(value: Any) -> list[dict[str, Any]]:
    example = '[{"role": "user", "content": "Hello"}]'
    if not isinstance(value, list) or not value:
        _refuse("messages", f"must be a list that is not empty, for example {example}; got {_show(value)}")
    if len(value) > MAX_MESSAGES:
        _refuse("messages", f"holds {len(value)} messages; at most {MAX_MESSAGES}")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        _refuse(where, f'must be an object, for example {{"role": "user", "content": "Hello"}}; got {_show(message)}')
    role = message.get("role")
    if role not in _ROLES:
        _refuse(f"{where}.role", f"must be one of {', '.join(_ROLES)}; got {_show(role)}")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            _refuse(f"{where}.{name}", "is not served; leave it out")
    content = message.get("content")
    if content is None and role != "assistant":
        _refuse(f"{where}.content", "is missing; give a string")
    checked: dict[str, Any] = {"role": role, "content": _content(content, f"{where}.content")}
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            _refuse(f"{where}.name", f"must be a string; got {_show(name)}")
        checked["name"] = name
    return checked


def _content(content: Any, where: str) -> str:
    """Content as one string; several text parts are joined by newlines."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(where, f"must be a string or a list of text parts; got {_show(content)}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            _refuse(f"{where}[{index}].type", f"must be \"text\", the only kind served; got {_show(kind)}")
        if not isinstance(part.get("text"), str):
            _refuse(f"{where}[{index}].text", "must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _stop(value: Any) -> list[str]:
    if value is None:
        return []
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or len(words) > MAX_STOP:
        _refuse("stop", f"must be a string or a list of at most {MAX_STOP} strings; got {_show(value)}")
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= MAX_STOP_CHARS:
            _refuse("stop", f"must hold strings of 1 to {MAX_STOP_CHARS} characters, for example \"\\n\"; got {_show(word)}")
    return words


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    entries = _mapping(value, "logit_bias")
    if len(entries) > MAX_ID_LIST:
        _refuse("logit_bias", f"holds {len(entries)} entries; at most {MAX_ID_LIST}")
    for key, amount in entries.items():
        if not re.fullmatch(r"[0-9]{1,10}", key) or int(key) >= vocab_size:
            _refuse("logit_bias", f"keys must be token ids from 0 to {vocab_size - 1}; got {_show(key)}")
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not -100 <= amount <= 100:
            _refuse("logit_bias", f"values must be numbers from -100 to 100; got {_show(amount)}")
        bias[int(key)] = float(amount)
    return bias


def _allowed(value: Any, vocab_size: int) -> list[int] | None:
    if value is None:
        return None
    ids = _ids(value, "allowed_token_ids", vocab_size, vocab_size)
    if not ids:
        _refuse("allowed_token_ids", "must hold at least one token id, or be left out")
    return ids


def _ids(value: Any, name: str, vocab_size: int, most: int) -> list[int]:
    if not isinstance(value, list) or len(value) > most:
        _refuse(name, f"must be a list of at most {most} token ids; got {_show(value)}")
    for item in value:
        if not _is_id(item) or not 0 <= item < vocab_size:
            _refuse(name, f"must hold token ids from 0 to {vocab_size - 1}; got {_show(item)}")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _top_k(fields: _Fields) -> int:
    """-1 and 0 both mean off; some clients send one, some the other."""
    return max(0, fields.integer("top_k", 0, -1, 2**31 - 1))


def _cache_salt(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]{1,128}", value):
        _refuse("cache_salt", f"must be 1 to 128 printable ASCII characters without spaces; got {_show(value)}")
    return value


def _include_usage(value: Any, stream: bool) -> bool:
    options = _mapping(value, "stream_options")
    if options and not stream:
        _refuse("stream_options", "needs stream: true beside it")
    wanted = options.get("include_usage")
    if wanted is not None and not isinstance(wanted, bool):
        _refuse("stream_options.include_usage", f"must be true or false; got {_show(wanted)}")
    return bool(wanted)


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(name, f"must be an object; got {_show(value)}")
    return value


def _refuse(name: str, message: str) -> NoReturn:
    raise ApiError(400, f"{name} {message}", param=name, code="invalid_value")


def _within(default: Any, low: int, high: int) -> int:
    return default if isinstance(default, int) and low <= default <= high else max(low, min(high, 1))


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral


def _show(value: Any) -> str:
    """A value as the user sent it, cut short."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of more than 64 bits"
    text = msgspec.json.encode(value).decode() if not isinstance(value, str) else json.dumps(value[:80])
    return text if len(text) <= 80 else text[:80] + "..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Fields that ask nothing of the output: taken without a word.
_ADVISORY = frozenset(
    {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "store", "service_tier",
     "parallel_tool_calls", "request_id"}
)  # fmt: skip

# Known fields that are not served, and the values of each that ask nothing (null always does).
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "echo": (False,),
    "prompt_logprobs": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "bad_words": ([],),
    "chat_template": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "truncate_prompt_tokens": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "documents": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1.0, 1),
    "prompt_embeds": (),
    "mm_processor_kwargs": (),
    "logits_processors": ([],),
}
