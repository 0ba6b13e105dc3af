"""How a sequence is sampled and when it stops, and the one place that says what a request may ask of both.

`SamplingParams` checks itself whenever one is built, copied or decoded, so none holds a value that the engine could not
run. What depends on the model, its vocabulary and its context, is checked by functions that the HTTP surface, the
offline API and the engine all call. Knows no JSON shapes, no HTTP, no text and no scheduling.

Parameters check themselves, so the offline API, HTTP and the engine refuse the same values in the same words. A
model's own defaults (generation_config.json) reach the web processes with the engine's facts; a request's fields
replace them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import msgspec

from pagegraph.runtime.bad_parameter import BadParameter, shown
from pagegraph.runtime.structured_output import StructuredOutputs

GREEDY_BELOW = 1e-5  # temperatures under it are 0: logits divided by them leave float32
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MAX_IDS = 1024  # in logit_bias and stop_token_ids
MAX_STOP = 16
MAX_STOP_CHARS = 1024
_INT64 = 2**63

# Keys of a model's generation_config.json that are defaults of requests, and what they are called here.
FROM_GENERATION_CONFIG = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers of `type`, int or float, from `low` to `high`; `example` is one."""

    low: int | float
    high: int | float
    example: int | float
    type: type = float

    def checked(self, field: str, value: Any) -> int | float:
        """`value` as `type`, which may be written as the other one if it has no fraction; raises BadParameter."""
        number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        inside = self.low <= number <= self.high
        if not inside or (self.type is int and number != int(number)):
            raise BadParameter(field, f"must be {self}, for example {self.example:g}; got {shown(value)}")
        return self.type(number)

    def __str__(self) -> str:
        if self.type is float:
            return f"a number from {self.low:g} to {self.high:g}"
        if self.high < _INT64 - 1:
            return f"a whole number from {self.low} to {self.high}"
        return "a whole number of 64 bits" if self.low < 0 else f"a whole number of at least {self.low}"


RANGES = {
    "max_tokens": Range(1, _INT64 - 1, 16, int),
    "min_tokens": Range(0, _INT64 - 1, 0, int),
    "temperature": Range(0, 2, 1),
    "top_k": Range(-1, 2**31 - 1, 0, int),
    "top_p": Range(0, 1, 1),
    "min_p": Range(0, 1, 0),
    "repetition_penalty": Range(1e-5, 2, 1),  # a factor of every logit: smaller ones would leave float32
    "frequency_penalty": Range(-2, 2, 0),
    "presence_penalty": Range(-2, 2, 0),
    "seed": Range(-_INT64, _INT64 - 1, 0, int),
    "logprobs": Range(0, MAX_LOGPROBS, 0, int),
    "prompt_logprobs": Range(0, MAX_LOGPROBS, 0, int),
}
_MAY_BE_NONE = ("max_tokens", "seed", "logprobs", "prompt_logprobs")


class PoolingParams(msgspec.Struct, frozen=True):
    """An embedding of the prompt is asked for, of so many dimensions; None: of all."""

    dimensions: int | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence is sampled and when it stops. Raises BadParameter, a ValueError, naming the field at fault.

    Every sequence also ends where the context does. A temperature below 1e-5 becomes 0, which takes the likeliest
    token, as `top_p` 0 does. `top_k` -1 and 0 mean all tokens.
    """

    max_tokens: int | None = 16  # None: until the context is full; 0: what is asked of the prompt alone
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; 0: of the sampled token; n: and of the n likeliest
    prompt_logprobs: int | None = None  # the same of every prompt token but the first
    structured_outputs: StructuredOutputs | None = None
    pooling: PoolingParams | None = None  # in place of output: max_tokens becomes 0

    def __post_init__(self) -> None:
        if self.pooling is not None:
            msgspec.structs.force_setattr(self, "max_tokens", 0)
        reads_prompt = self.prompt_logprobs is not None or self.pooling is not None
        for field, allowed in RANGES.items():
            value = getattr(self, field)
            # Most are as they should be, and this runs for every sequence.
            if type(value) is allowed.type and allowed.low <= value <= allowed.high:
                continue
            if field == "max_tokens" and value == 0 and reads_prompt:
                continue
            if value is not None or field not in _MAY_BE_NONE:
                msgspec.structs.force_setattr(self, field, allowed.checked(field, value))
        if 0 < self.temperature < GREEDY_BELOW:
            msgspec.structs.force_setattr(self, "temperature", 0.0)
        if self.top_k < 0:
            msgspec.structs.force_setattr(self, "top_k", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            above = f"is {self.min_tokens}, above max_tokens = {self.max_tokens}; give at most {self.max_tokens}"
            raise BadParameter("min_tokens", above)
        if not isinstance(self.ignore_eos, bool):
            raise BadParameter("ignore_eos", f"must be true or false; got {shown(self.ignore_eos)}")
        if self.logit_bias != {}:
            msgspec.structs.force_setattr(self, "logit_bias", _bias(self.logit_bias))
        if self.stop_token_ids != []:
            _check_id_list("stop_token_ids", self.stop_token_ids, MAX_IDS)
        if self.allowed_token_ids is not None:
            _check_id_list("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise BadParameter("allowed_token_ids", "must hold at least one token id, or be left out")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputs):
            raise BadParameter("structured_outputs", "must be StructuredOutputs, for example with json a schema")
        if self.pooling is not None and not isinstance(self.pooling, PoolingParams):
            raise BadParameter("pooling", "must be PoolingParams, or left out")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises BadParameter for token ids outside the vocabulary, or more logprobs than it has tokens."""
        if self.logit_bias:
            check_ids("logit_bias", list(self.logit_bias), vocab_size)
        if self.stop_token_ids:
            check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        if self.allowed_token_ids is not None:
            check_ids("allowed_token_ids", self.allowed_token_ids, vocab_size)
        for field in ("logprobs", "prompt_logprobs"):
            if (wanted := getattr(self, field)) is not None and wanted > vocab_size:
                raise BadParameter(field, f"is {wanted}; the vocabulary has {vocab_size} tokens, give at most those")


def model_defaults(generation_config: Mapping[str, Any]) -> dict[str, int | float]:
    """What a model's generation_config.json says of sampling, as fields of SamplingParams: defaults of requests.

    Raises ValueError for a value that no request may have.
    """
    said = {name: generation_config.get(key) for key, name in FROM_GENERATION_CONFIG.items()}
    given = {name: value for name, value in said.items() if value is not None}
    try:
        checked = SamplingParams(**given)
    except BadParameter as error:
        raise ValueError(
            f"generation_config.json of the model: {error}; mend the file, or set generation_config to none,"
            " which leaves it out"
        ) from None
    return {name: getattr(checked, name) for name in given}


def describe_defaults(defaults: Mapping[str, int | float]) -> str:
    """A line on how requests are sampled that do not say; `defaults` are the model's own."""
    if not defaults:
        return "sampling where a request does not say: temperature 1, no filters, no penalties"
    own = ", ".join(f"{name} {value:.10g}" for name, value in defaults.items())
    return (
        f"sampling where a request does not say, of generation_config.json: {own};"
        " generation_config: none leaves it out"
    )


def check_stop(stop: Any) -> list[str]:
    """Stop strings as a list, of one string or several; raises BadParameter."""
    words = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list | tuple) or len(words) > MAX_STOP:
        raise BadParameter("stop", f"must be a string or a list of at most {MAX_STOP} strings; got {shown(stop)}")
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= MAX_STOP_CHARS:
            problem = f'must hold strings of 1 to {MAX_STOP_CHARS} characters, for example "\\n"; got {shown(word)}'
            raise BadParameter("stop", problem)
    return list(words)


def check_ids(field: str, ids: Any, vocab_size: int) -> None:
    """Raises BadParameter unless `ids` is a list of token ids of a vocabulary of so many."""
    # Types and bounds of all at once first: prompts are long, and good.
    if isinstance(ids, list) and (
        not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size)
    ):
        return
    _check_id_list(field, ids)
    for one in ids:
        if not 0 <= one < vocab_size:
            raise BadParameter(field, f"must hold token ids from 0 to {vocab_size - 1}; got {shown(one)}")


def check_length(
    num_prompt: int,
    max_model_len: int,
    *,
    field: str = "prompt",
    max_tokens: int | None = None,
    min_tokens: int = 0,
    num_chars: int | None = None,
) -> None:
    """Raises BadParameter unless a prompt of so many tokens fits the context with its output.

    max_tokens: where it is given, all of them must fit, and none has to be 0; else one.
    num_chars: the prompt is not tokenised; `num_prompt` is the fewest tokens that so many characters can be.
    """
    if num_prompt == 0:
        raise BadParameter(field, "has no tokens; give at least one")
    room = max_model_len - num_prompt
    if room < (max_tokens != 0):
        has = f"{num_prompt} tokens" if num_chars is None else f"{num_chars} characters, at least {num_prompt} tokens"
        most = max_model_len - (max_tokens != 0)
        why = "leave no room for one of output" if max_tokens != 0 else "do not fit"
        _too_long(field, max_model_len, f"{has} of {field} {why}: give at most {most}")
    if max_tokens is not None and max_tokens > room:
        total = f"{num_prompt} tokens of {field} + max_tokens {max_tokens} = {num_prompt + max_tokens}"
        _too_long("max_tokens", max_model_len, f"{total}: give max_tokens of at most {room}, or a shorter {field}")
    if min_tokens > room:
        total = f"{num_prompt} tokens of {field} + min_tokens {min_tokens} = {num_prompt + min_tokens}"
        _too_long("min_tokens", max_model_len, f"{total}: give min_tokens of at most {room}, or a shorter {field}")


def wrap_seed(seed: int) -> int:
    """Any whole number to a seed, which has 64 bits and a sign."""
    return (seed + _INT64) % (2 * _INT64) - _INT64


def own_seed(engine_seed: int, number: int) -> int:
    """The seed of the engine's sequence `number`, whose request brought none: reproducible from the engine's own."""
    return wrap_seed((engine_seed << 32 | engine_seed >> 32) + number)


def _too_long(field: str, max_model_len: int, problem: str) -> None:
    # Clients know a context overflow by OpenAI's words for it, or by the code.
    raise BadParameter(
        field,
        f"This model's maximum context length is {max_model_len} tokens (max_model_len). However, {problem}.",
        "context_length_exceeded",
    )


def _bias(bias: Any) -> dict[int, float]:
    """The bias of each token id, checked."""
    if not isinstance(bias, Mapping) or len(bias) > MAX_IDS:
        raise BadParameter("logit_bias", f"must hold at most {MAX_IDS} token ids with a bias each; got {shown(bias)}")
    _check_id_list("logit_bias", list(bias))
    for amount in bias.values():
        if not isinstance(amount, Real) or isinstance(amount, bool) or not -MAX_BIAS <= float(amount) <= MAX_BIAS:
            raise BadParameter("logit_bias", f"values must be numbers from -100 to 100; got {shown(amount)}")
    return {token: float(amount) for token, amount in bias.items()}


def _check_id_list(field: str, ids: Any, most: int | None = None) -> None:
    if not isinstance(ids, list | tuple) or (most is not None and len(ids) > most):
        raise BadParameter(
            field, f"must be a list of {'' if most is None else f'at most {most} '}token ids; got {shown(ids)}"
        )
    if set(map(type, ids)) == {int} and min(ids) >= 0:
        return
    for one in ids:
        if not isinstance(one, Integral) or isinstance(one, bool) or one < 0:
            raise BadParameter(field, f"must hold token ids, whole numbers from 0 on; got {shown(one)}")
