"""A body of /v1/responses to a checked request: a chat's body is written, and checked as one.

So a field that a chat has too, by whatever name, has one parser. Knows the fields; the items of `input` are `items`'s to
read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.sampling_params import RANGES, Range, shown
from pagegraph.web.as_chat import EXTENSIONS, Names, own_name, renaming
from pagegraph.web.errors import ApiError
from pagegraph.web.fields import Fields, mapping, refuse
from pagegraph.web.openai_responses.items import Item, messages_of, read_items
from pagegraph.web.openai_responses.store import ResponseStore
from pagegraph.web.schema import GenerationRequest, parse_chat

# Fields that a chat has under the same name and in the same form.
AS_IN_CHAT = ("model", "stream", "temperature", "top_p", "parallel_tool_calls", "stop", *EXTENSIONS)
# Fields with another name here, or that ask for what an answer of this shape does not hold.
_INSTEAD = {
    "messages": "input", "prompt": "instructions and input", "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens", "functions": "tools", "function_call": "tool_choice",
    "response_format": 'text: {"format": ...}',
    "reasoning_effort": 'reasoning: {"effort": ...}', "verbosity": 'text: {"verbosity": ...}',
    "logprobs": 'include: ["message.output_text.logprobs"]', "conversation": "previous_response_id",
    "n": "", "best_of": "", "echo": "", "prompt_logprobs": "", "return_token_ids": "", "request_id": "",
    "return_tokens_as_token_ids": "", "continue_final_message": "", "add_generation_prompt": "",
    "add_special_tokens": "", "context_management": "", "include_reasoning": "",
}  # fmt: skip
_ASK_NOTHING = {
    "n": 1, "best_of": 1, "add_generation_prompt": True, "include_reasoning": True, "context_management": [],
}  # others: false  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (
    _LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)  # fmt: skip
_MAX_INCLUDED = 64
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512
# What a chat's fields are called here; see `renamed`.
NAMES: Names = (
    (r"messages(?:\[\d+\])?", "input"),
    (r"max_(?:completion_)?tokens\b", "max_output_tokens"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"verbosity", "text.verbosity"),
    (r"(tools\[\d+\])\.function", r"\1"),
)


@dataclass(frozen=True, kw_only=True)
class ResponsesRequest:
    """One checked request. `echo`: what the answer holds of it, under the names that it has there."""

    chat: GenerationRequest
    input: list[Item]
    before: list[Item]  # the conversation that it goes on from
    echo: dict[str, Any]
    store: bool
    background: bool

    @property
    def is_shortened(self) -> bool:
        """Whether a conversation that is too long loses its oldest turns."""
        return self.echo["truncation"] == "auto"


def parse_responses(body: dict[str, Any], info: EngineInfo, store: ResponseStore) -> ResponsesRequest:
    """A body of POST /v1/responses. Raises ApiError or BadParameter."""
    for name, instead in _INSTEAD.items():
        value = body.get(name)
        if value is not None and value != _ASK_NOTHING.get(name, False):
            refuse(name, f"is not served here; {f'give {instead}' if instead else 'leave it out'}")
    fields = Fields({name: value for name, value in body.items() if name not in _INSTEAD})
    chat = {name: value for name in AS_IN_CHAT if (value := fields.take(name)) is not None}
    echo: dict[str, Any] = {}
    for read in (_read_facts, _read_lengths, _read_text, _read_reasoning, _read_tools):
        read(fields, chat, echo)
    before = _conversation(echo["previous_response_id"], store)
    items = read_items(fields.take("input"), store.item)
    opening = [{"role": "system", "content": echo["instructions"]}] if echo["instructions"] else []
    chat["messages"] = opening + messages_of([*before, *items])
    keeps, background = fields.boolean("store", True) and store.keeps, fields.boolean("background", False)
    if background and (not keeps or chat.get("stream")):
        refuse("background", "needs a response that is stored and not streamed")
    own = fields.check_rest()
    with renaming(NAMES):
        checked = parse_chat(chat, info.vocab_size, info.sampling_defaults)
    echo |= {"temperature": checked.params.temperature, "top_p": checked.params.top_p, "background": background}
    listed = isinstance(body.get("input"), list)
    _check_writable({**echo, **{f"input[{index}]" if listed else "input": item for index, item in enumerate(items)}})
    form_field = own_name(checked.form_field, NAMES)
    checked = replace(checked, form_field=form_field, ignored=[*own, *checked.ignored])
    return ResponsesRequest(chat=checked, input=items, before=before, echo=echo, store=keeps, background=background)


def _read_facts(fields: Fields, chat: dict[str, Any], echo: dict[str, Any]) -> None:
    """Who asks and what for; of these only the instructions change the answer."""
    for name in ("instructions", "previous_response_id", "user", "safety_identifier", "prompt_cache_key"):
        echo[name] = fields.text(name)
    metadata = mapping(fields.take("metadata"), "metadata")
    good = len(metadata) <= _MAX_METADATA and all(
        isinstance(value, str) and len(value) <= _MAX_VALUE and len(key) <= _MAX_KEY for key, value in metadata.items()
    )
    if not good:
        limits = f"strings of at most {_MAX_VALUE} characters under keys of at most {_MAX_KEY}"
        refuse("metadata", f"must hold at most {_MAX_METADATA} {limits}; got {shown(metadata)}")
    echo["metadata"] = metadata
    echo["max_tool_calls"] = fields.number("max_tool_calls", Range(1, 2**31 - 1, 8, int), None)  # of tools not served
    options = mapping(fields.take("stream_options"), "stream_options")
    if options and not fields.body.get("stream"):
        refuse("stream_options", "needs stream: true beside it")
    fields.ignored += [f"stream_options.{name}" for name in options]


def _read_lengths(fields: Fields, chat: dict[str, Any], echo: dict[str, Any]) -> None:
    """How much may come, and what is told of it."""
    chat["max_completion_tokens"] = fields.number("max_output_tokens", RANGES["max_tokens"], None)
    echo["max_output_tokens"] = chat["max_completion_tokens"]
    echo["truncation"] = fields.one_of("truncation", ("disabled", "auto"), "disabled")
    top = fields.number("top_logprobs", RANGES["logprobs"], None)
    echo["top_logprobs"] = top or 0
    include = fields.take("include")
    include = [] if include is None else include
    if not isinstance(include, list) or len(include) > _MAX_INCLUDED:
        refuse("include", f"must be a list of at most {_MAX_INCLUDED}, for example {[_LOGPROBS]}; got {shown(include)}")
    for index, name in enumerate(include):
        if name not in _INCLUDABLE:
            refuse(f"include[{index}]", f"must be one of {', '.join(_INCLUDABLE)}; got {shown(name)}")
        if name != _LOGPROBS:
            fields.ignored.append(f"include.{name}")
    if top or _LOGPROBS in include:
        chat |= {"logprobs": True, "top_logprobs": top}


def _read_text(fields: Fields, chat: dict[str, Any], echo: dict[str, Any]) -> None:
    """The form of the answer's text."""
    text = mapping(fields.take("text"), "text")
    form = mapping(text.get("format"), "text.format") or {"type": "text"}
    echo["text"] = {"format": form, "verbosity": text.get("verbosity")}
    chat["verbosity"] = text.get("verbosity")
    if form.get("type") == "json_schema":
        rest = {name: value for name, value in form.items() if name != "type"}
        if not isinstance(rest.get("schema"), dict):
            refuse("text.format.schema", f"must be a JSON schema, an object; got {shown(rest.get('schema'))}")
        if not isinstance(rest.get("name"), str):
            refuse("text.format.name", f"must be a string; got {shown(rest.get('name'))}")
        chat["response_format"] = {"type": "json_schema", "json_schema": rest}
    elif form.get("type") == "json_object":
        chat["response_format"] = {"type": "json_object"}
    elif form.get("type") != "text":
        refuse("text.format.type", f"must be text, json_object or json_schema; got {shown(form.get('type'))}")


def _read_reasoning(fields: Fields, chat: dict[str, Any], echo: dict[str, Any]) -> None:
    """How much the model is to think. Reasoning comes as the model writes it, never as a summary."""
    reasoning = mapping(fields.take("reasoning"), "reasoning")
    chat["reasoning_effort"] = reasoning.get("effort")
    echo["reasoning"] = {"effort": reasoning.get("effort"), "summary": None}
    fields.ignored += [f"reasoning.{name}" for name, value in reasoning.items() if name != "effort" and value]


def _read_tools(fields: Fields, chat: dict[str, Any], echo: dict[str, Any]) -> None:
    """Functions, whose facts lie flat here; every other kind of tool is refused by its name."""
    tools = fields.take("tools")
    tools = [] if tools is None else tools
    if not isinstance(tools, list):
        refuse("tools", f"must be a list of functions; got {shown(tools)}")
    echo["tools"], nested = [], []
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else tool
        if kind != "function":
            refuse(f"tools[{index}].type", f'must be "function", the only kind served; got {shown(kind)}')
        known = {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}
        echo["tools"].append({"type": "function", **known})
        function = {name: value for name, value in known.items() if value is not None}
        nested.append({"type": "function", "function": function})
    if nested:
        chat["tools"] = nested
    choice = fields.take("tool_choice")
    echo["tool_choice"] = "auto" if choice is None else choice
    echo["parallel_tool_calls"] = chat.get("parallel_tool_calls", True)
    if isinstance(choice, dict):
        if choice.get("type") not in ("function", "allowed_tools"):
            refuse("tool_choice.type", f"must be function or allowed_tools; got {shown(choice.get('type'))}")
        if choice["type"] == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
    chat["tool_choice"] = choice


def _conversation(previous: str | None, store: ResponseStore) -> list[Item]:
    """The items of the response that this one follows."""
    if previous is None:
        return []
    stored = store.get(previous)
    if stored is None:
        problem = f"previous_response_id {shown(previous)} names no response that is stored"
        raise ApiError(400, problem, param="previous_response_id", code="previous_response_not_found")
    if stored.response["status"] in ("queued", "in_progress"):
        refuse("previous_response_id", "names a response that is still being made; wait until it is completed")
    return stored.conversation


def _check_writable(told: dict[str, Any]) -> None:
    """Refuse what cannot be written into an answer or the store; by field."""
    for name, value in told.items():
        try:
            msgspec.json.encode(value)
        except UnicodeEncodeError:
            refuse(name, "holds half of a surrogate pair, which is no character")
        except (RecursionError, OverflowError):
            refuse(name, "is nested too deeply, or holds a number of more than 64 bits")
