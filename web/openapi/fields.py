"""The fields of request bodies, described: a JSON schema and a line for people, by endpoint.

Bounds and defaults are those that the parsers check (`runtime.sampling_params`, `web.schema`). A test holds the names
against the fields that the parsers take.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pagegraph.runtime.sampling_params import MAX_STOP, RANGES, Range, SamplingParams
from pagegraph.web.chat_fields import EFFORTS, VERBOSITIES
from pagegraph.web.embeddings import DIMENSIONS, ENCODINGS
from pagegraph.web.messages import MAX_MESSAGES
from pagegraph.web.schema import DEFAULT_COMPLETION_TOKENS, MAX_PROMPTS, NUMBERS
from pagegraph.web.structured import FORMATS, PLAIN
from pagegraph.web.tools import MAX_TOOLS

Described = dict[str, tuple[dict[str, Any], str]]  # JSON schema and help by a field's name

_BOOLEAN = {"type": "boolean", "default": False}
_TRUE = {"type": "boolean", "default": True}
_STRING = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}


def number(allowed: Range, default: Any = None) -> dict[str, Any]:
    """The JSON schema of a number; bounds of 64 bits are left out."""
    schema: dict[str, Any] = {"type": "integer" if allowed.type is int else "number"}
    schema |= {"minimum": allowed.low} if abs(allowed.low) < 2**62 else {}
    schema |= {"maximum": allowed.high} if abs(allowed.high) < 2**62 else {}
    return schema if default is None else schema | {"default": default}


def _sampled(name: str, help: str) -> tuple[dict[str, Any], str]:
    return number(RANGES[name], _DEFAULTS[name]), help


def _pick(described: Described, *names: str) -> Described:
    return {name: described[name] for name in names}


def _form(kind: str) -> tuple[dict[str, Any], str]:
    schemas = {"json": {"type": "object"}, "choice": {"type": "array", "items": _STRING}}
    return schemas.get(kind, _STRING), f"The same as structured_outputs with {kind}."


SHARED: Described = {
    "model": (_STRING, "The served model's name; without it that model."),
    "stream": (_BOOLEAN, "Send server-sent events while tokens come."),
    "stream_options": (
        {"type": "object", "properties": {"include_usage": _BOOLEAN, "continuous_usage_stats": _BOOLEAN}},
        "include_usage: a last chunk with the usage; continuous_usage_stats: the usage in every chunk.",
    ),
    "n": (number(NUMBERS["n"], 1), "Answers for each prompt; answer j is sampled with seed + j."),
    "best_of": (number(NUMBERS["n"]), "Of so many answers for each prompt show the n likeliest; completions alone."),
    "prompt_logprobs": _sampled(
        "prompt_logprobs", "Show the log-probability of each prompt token and of so many others."
    ),
    "stop": (
        {"anyOf": [_STRING, {"type": "array", "items": _STRING, "maxItems": MAX_STOP}]},
        "Strings that end the answer, which does not hold them.",
    ),
    "stop_token_ids": (_IDS, "Token ids that end the answer."),
    "include_stop_str_in_output": (_BOOLEAN, "Leave the stop string, or the token that ended it, in the answer."),
    "min_tokens": _sampled("min_tokens", "Tokens before which nothing ends the answer."),
    "ignore_eos": (_BOOLEAN, "Go on after the end of sequence."),
    "temperature": _sampled("temperature", "0 takes the likeliest token."),
    "top_k": _sampled("top_k", "Sample among so many likeliest tokens; 0 and -1: among all."),
    "top_p": _sampled("top_p", "Sample among the likeliest tokens that have this share of the probability."),
    "min_p": _sampled("min_p", "Leave out tokens under this share of the likeliest one's probability."),
    "repetition_penalty": _sampled("repetition_penalty", "Above 1: tokens of prompt and answer come less often."),
    "frequency_penalty": _sampled("frequency_penalty", "Above 0: tokens come less often with each time they came."),
    "presence_penalty": _sampled("presence_penalty", "Above 0: tokens that came once come less often."),
    "logit_bias": (
        {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        "What is added to the logit of each token id.",
    ),
    "allowed_token_ids": (_IDS, "The only token ids that may come."),
    "response_format": (
        {"type": "object", "required": ["type"], "properties": {"type": {"enum": [*FORMATS]}}},
        "The form of the answer: json_object, or json_schema with json_schema: {name, schema}.",
    ),
    "structured_outputs": (
        {"type": "object"},
        "The form of the answer: one of json (a schema), regex, choice (a list of strings), grammar (Lark or GBNF) and "
        "json_object.",
    ),
    **{name: _form(kind) for name, kind in PLAIN.items()},
    "seed": (number(RANGES["seed"]), "The same seed and parameters give the same tokens."),
    "skip_special_tokens": (_TRUE, "Leave special tokens out of the text."),
    "truncate_prompt_tokens": (
        number(NUMBERS["truncate_prompt_tokens"]),
        "Keep so many tokens of each prompt; -1: as many as leave room for the answer.",
    ),
    "truncation_side": (
        {"enum": ["left", "right"], "default": "left"},
        "The side of the prompt that is dropped.",
    ),
    "return_token_ids": (_BOOLEAN, "Show the token ids of prompt and answer."),
    "return_tokens_as_token_ids": (_BOOLEAN, "Write tokens of log-probabilities as token_id:N."),
    "request_id": (_STRING, "What the answer's id is made of: 1 to 128 letters, digits or any of ._:-"),
    "priority": (number(NUMBERS["priority"], 0), "Requests of lower priority numbers run first."),
    "cache_salt": (_STRING, "Only requests of the same salt share cached prefixes: 1 to 128 ASCII characters."),
}

CHAT_TEMPLATE: Described = {
    "messages": (
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": _STRING,
                    "content": {"anyOf": [_STRING, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
                },
            },
        },
        "The conversation: role and content of each message, a string or text parts.",
    ),
    "add_generation_prompt": (_TRUE, "End the prompt with the opening of the assistant's message."),
    "continue_final_message": (_BOOLEAN, "Go on with the last message instead of answering it."),
    "chat_template_kwargs": ({"type": "object"}, "Variables for the model's chat template."),
    "add_special_tokens": (_BOOLEAN, "Add the tokenizer's special tokens to what the template wrote."),
}

CHAT: Described = {
    **CHAT_TEMPLATE,
    **SHARED,
    "max_tokens": (number(RANGES["max_tokens"]), "The most tokens of the answer; without it the rest of the context."),
    "max_completion_tokens": (number(RANGES["max_tokens"]), "The same as max_tokens, and goes before it."),
    "tools": (
        {"type": "array", "maxItems": MAX_TOOLS, "items": {"type": "object", "required": ["type", "function"]}},
        "Functions that the model may call: name, description and the JSON schema of the parameters of each.",
    ),
    "tool_choice": (
        {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]},
        "Whether tools may be or have to be called, or the one that has to be.",
    ),
    "parallel_tool_calls": (_TRUE, "Let one answer call several tools."),
    "functions": ({"type": "array", "items": {"type": "object"}}, "The older name of tools."),
    "function_call": (
        {"anyOf": [{"enum": ["none", "auto"]}, {"type": "object"}]},
        "The older name of tool_choice.",
    ),
    "reasoning_effort": ({"enum": [*EFFORTS]}, "How much the model is to think, where its template reads it."),
    "verbosity": ({"enum": [*VERBOSITIES]}, "How long the answer is to be, where the template reads it."),
    "documents": ({"type": "array", "items": {"type": "object"}}, "Documents for templates that read them."),
    "include_reasoning": (_TRUE, "Show what the model thought before it answered."),
    "logprobs": (_BOOLEAN, "Show the log-probability of each token."),
    "top_logprobs": (number(RANGES["logprobs"]), "And of so many likeliest tokens."),
}

COMPLETION: Described = {
    "prompt": (
        {"anyOf": [_STRING, {"type": "array", "items": {"anyOf": [_STRING, {"type": "integer"}, _IDS]}}]},
        f"A string, a list of token ids, or a list of up to {MAX_PROMPTS} of either.",
    ),
    **SHARED,
    "max_tokens": (
        number(Range(0, RANGES["max_tokens"].high, 16, int), DEFAULT_COMPLETION_TOKENS),
        "The most tokens of each answer; 0 needs echo or prompt_logprobs.",
    ),
    "logprobs": (number(RANGES["logprobs"]), "Show the log-probability of each token and of so many likeliest ones."),
    "echo": (_BOOLEAN, "Put the prompt before the answer; its log-probabilities too, if they are wanted."),
    "add_special_tokens": (_TRUE, "Add the tokenizer's special tokens to a prompt that is text."),
}

EMBEDDINGS: Described = {
    "input": COMPLETION["prompt"],
    **_pick(SHARED, "model", "truncate_prompt_tokens", "truncation_side", "request_id", "priority", "cache_salt"),
    "encoding_format": (
        {"enum": [*ENCODINGS], "default": "float"},
        "float: a list of numbers; base64: float32 in little-endian bytes.",
    ),
    "dimensions": (number(DIMENSIONS), "So many numbers of each vector, if the model is trained for that."),
    "add_special_tokens": COMPLETION["add_special_tokens"],
}

TOKENIZE: Described = {
    "model": SHARED["model"],
    "prompt": (_STRING, "The text."),
    "messages": (CHAT_TEMPLATE["messages"][0], "A chat in its place; all fields of a chat completion are taken then."),
    "content": (_STRING, "llama.cpp's name for the text."),
    "add_special_tokens": (
        {"type": "boolean"},
        "Add the tokenizer's special tokens; without it true beside prompt, false beside messages and content.",
    ),
    "add_special": ({"type": "boolean"}, "llama.cpp's name for add_special_tokens."),
    "parse_special": (_TRUE, "llama.cpp's: special tokens in the text are read as such; false is not served."),
    "with_pieces": (_BOOLEAN, "llama.cpp's; true is not served: give return_token_strs."),
    "return_token_strs": (_BOOLEAN, "Show the tokens as the vocabulary writes them, too."),
}

DETOKENIZE: Described = {**_pick(SHARED, "model"), "tokens": (_IDS, "Token ids of the text.")}
