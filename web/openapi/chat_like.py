"""The fields of the surfaces that are read as a chat, described: /v1/responses and /v1/messages.

What a chat has under the same name is described in `fields`.
"""

from __future__ import annotations

from typing import Any

from pagegraph.runtime.sampling_params import MAX_STOP, RANGES
from pagegraph.web.anthropic import request as anthropic
from pagegraph.web.messages import MAX_MESSAGES
from pagegraph.web.openai_responses import request as responses
from pagegraph.web.openapi.fields import CHAT, Described, number

_OBJECT: dict[str, Any] = {"type": "object"}
_STRING = {"type": "string"}
_LIST = {"type": "array", "items": _OBJECT}

RESPONSES: Described = {
    "input": (
        {"anyOf": [_STRING, {"type": "array", "maxItems": MAX_MESSAGES, "items": _OBJECT}]},
        "A user's message, or items: messages, function calls and their outputs, reasoning, references to items.",
    ),
    "instructions": (_STRING, "The system message; that of an earlier response does not go on."),
    "previous_response_id": (_STRING, "A stored response whose conversation goes on."),
    "store": ({"type": "boolean", "default": True}, "Keep the response for a while, to be retrieved or gone on from."),
    "background": (
        {"type": "boolean", "default": False},
        "Answer at once with a response that is still being made; retrieve it later.",
    ),
    "max_output_tokens": (number(RANGES["max_tokens"]), "The most tokens of the answer."),
    "tools": (_LIST, "Functions that the model may call: name, description, parameters."),
    "tool_choice": (
        CHAT["tool_choice"][0],
        "Whether tools may or have to be called, which, or those that are allowed.",
    ),
    "text": (_OBJECT, "format: text, json_object, or json_schema with name and schema; verbosity."),
    "reasoning": (_OBJECT, "effort: how much the model is to think, where its template knows it."),
    "include": ({"type": "array", "items": _STRING}, "message.output_text.logprobs: log-probabilities of the text."),
    "top_logprobs": (number(RANGES["logprobs"]), "Log-probabilities of the text, and of so many likeliest tokens."),
    "metadata": ({"type": "object", "additionalProperties": _STRING}, "Up to 16 strings that the response holds."),
    "truncation": (
        {"enum": ["auto", "disabled"], "default": "disabled"},
        "auto: leave out the oldest turns of a conversation that is too long, which is refused otherwise.",
    ),
    "stream_options": (_OBJECT, "No option has an effect."),
    "max_tool_calls": (number(RANGES["max_tokens"]) | {"minimum": 1}, "Of tools that are not served."),
    "user": (_STRING, "Held by the response."),
    "safety_identifier": (_STRING, "Held by the response."),
    "prompt_cache_key": (_STRING, "Held by the response."),
    **{name: CHAT[name] for name in responses.AS_IN_CHAT},
}

MESSAGES: Described = {
    "messages": (
        {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": _OBJECT},
        "The conversation: role and content of each message, a string or blocks of text, thinking, tool_use and"
        " tool_result. An answer goes on with a last message of the assistant.",
    ),
    "system": ({"anyOf": [_STRING, _LIST]}, "The system message, a string or blocks of text."),
    "max_tokens": (number(RANGES["max_tokens"]), "The most tokens of the answer, which also ends with the context."),
    "stop_sequences": (
        {"type": "array", "items": _STRING, "maxItems": MAX_STOP},
        "Strings that end the answer, which does not hold them.",
    ),
    "tools": (_LIST, "Functions that the model may call: name, description, input_schema."),
    "tool_choice": (_OBJECT, "type: auto, any, none, or tool with its name; disable_parallel_tool_use."),
    "thinking": (_OBJECT, "type: enabled, adaptive or disabled, where the model's template knows it."),
    "output_config": (_OBJECT, "effort; format: json_schema with a schema."),
    "output_format": (_OBJECT, "The older name of output_config.format."),
    "metadata": (_OBJECT, "No key has an effect."),
    **{name: CHAT[name] for name in anthropic.AS_IN_CHAT},
}
