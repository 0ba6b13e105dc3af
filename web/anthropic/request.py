"""A body of /v1/messages to a checked chat request: a chat's body is written, and checked as one.

Knows the fields and the content blocks; what is written of them has one parser, that of /v1/chat/completions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.sampling_params import RANGES, shown
from pagegraph.web.anthropic.errors import THREAD_UNSUPPORTED
from pagegraph.web.as_chat import EXTENSIONS, Names, own_name, renaming
from pagegraph.web.errors import ApiError
from pagegraph.web.fields import Fields, mapping, refuse
from pagegraph.web.messages import MAX_MESSAGES
from pagegraph.web.schema import GenerationRequest, parse_chat

AS_IN_CHAT = ("model", "stream", "temperature", "top_p", "verbosity", *EXTENSIONS)
# Fields of a chat that have another name here, or ask for what an answer of this shape does not hold.
_INSTEAD = {
    "prompt": "messages", "stop": "stop_sequences", "max_completion_tokens": "max_tokens", "stream_options": "",
    "response_format": 'output_config: {"format": ...}',
    "reasoning_effort": 'output_config: {"effort": ...}', "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "functions": "tools", "function_call": "tool_choice", "n": "", "best_of": "", "echo": "", "logprobs": "",
    "top_logprobs": "", "prompt_logprobs": "", "return_token_ids": "", "return_tokens_as_token_ids": "",
    "request_id": "", "continue_final_message": "", "add_generation_prompt": "", "add_special_tokens": "",
    "include_reasoning": "", "container": "", "mcp_servers": "tools", "compaction": "", "thread": "",
}  # fmt: skip
_ASK_NOTHING = {"n": 1, "best_of": 1, "add_generation_prompt": True, "include_reasoning": True, "mcp_servers": []}
_ROLES = ("user", "assistant", "system")
_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": None}
_THINKING = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}
_KINDS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
# What a chat's fields are called here; see `renamed`.
NAMES: Names = (
    (r"max_completion_tokens", "max_tokens"),
    (r"stop(?!_)", "stop_sequences"),
    (r"messages\[\d+\]", "messages"),  # the chat's have other numbers
    (r"response_format\.json_schema", "output_config.format"),
    (r"response_format", "output_config.format"),
    (r"reasoning_effort", "output_config.effort"),
    (r"(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"(tools\[\d+\])\.function", r"\1"),
    (r"parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
)


def parse_messages(body: dict[str, Any], info: EngineInfo, counts: bool = False) -> GenerationRequest:
    """A body of POST /v1/messages, or, if `counts`, of count_tokens, which has no max_tokens. Raises ApiError or BadParameter."""
    if body.get("thread") is not None:  # clients know this answer, and then send all of it
        problem = "thread is not served here; leave it out and send the whole conversation"
        raise ApiError(400, problem, param="thread", code=THREAD_UNSUPPORTED)
    for name, instead in _INSTEAD.items():
        value = body.get(name)
        if value is not None and value != _ASK_NOTHING.get(name, False):
            refuse(name, f"is not served here; {f'give {instead}' if instead else 'leave it out'}")
    fields = Fields({name: value for name, value in body.items() if name not in _INSTEAD})
    chat = {name: value for name in AS_IN_CHAT if (value := fields.take(name)) is not None}
    chat["max_tokens"] = fields.number("max_tokens", RANGES["max_tokens"], None)
    if chat["max_tokens"] is None and not counts:
        refuse("max_tokens", "is missing; give the most tokens of the answer, for example 1024")
    chat["stop"] = _stop_sequences(fields)
    _read_messages(fields, chat)
    _read_tools(fields, chat)
    _read_thinking(fields, chat)
    mapping(fields.take("metadata"), "metadata")  # who asks
    own = fields.check_rest()
    with renaming(NAMES):
        checked = parse_chat(chat, info.vocab_size, info.sampling_defaults)
    # The most, not so many: an answer that fills the context ends there, and says so.
    form_field = own_name(checked.form_field, NAMES)
    return replace(checked, form_field=form_field, max_tokens_is_default=True, ignored=[*own, *checked.ignored])


def _stop_sequences(fields: Fields) -> Any:
    stop = fields.take("stop_sequences")
    if stop is not None and not isinstance(stop, list):
        refuse("stop_sequences", f"must be a list of strings; got {shown(stop)}")
    return stop


def _read_messages(fields: Fields, chat: dict[str, Any]) -> None:
    """System text and turns; an answer goes on with a last message that is the assistant's."""
    value, example = fields.take("messages"), '[{"role": "user", "content": "Hello"}]'
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        refuse("messages", f"must be a list of 1 to {MAX_MESSAGES}, for example {example}; got {shown(value)}")
    system = fields.take("system")
    messages = [] if system is None else [{"role": "system", "content": _text(_blocks(system, "system", "system"))}]
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            refuse(where, f"must be an object, for example {example[1:-1]}; got {shown(message)}")
        role = message.get("role")
        if role not in _ROLES:
            refuse(f"{where}.role", f"must be one of {', '.join(_ROLES)}; got {shown(role)}")
        blocks = _blocks(message.get("content"), f"{where}.content", role)
        if role == "user":
            messages += _users(blocks, f"{where}.content", fields.ignored)
        else:
            messages.append(_assistants(blocks, f"{where}.content") if role == "assistant" else
                            {"role": "system", "content": _text(blocks)})  # fmt: skip
    chat["messages"] = messages
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        chat |= {"continue_final_message": True, "add_generation_prompt": False}


def _users(blocks: list[dict[str, Any]], where: str, ignored: list[str]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, and so is the text between them."""
    messages: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        if block["type"] == "text":
            texts.append(block)
            continue
        if texts:
            messages.append({"role": "user", "content": _text(texts)})
            texts = []
        place = f"{where}[{index}]"
        content = block.get("content")
        result = "" if content is None else _text(_blocks(content, f"{place}.content", "system"))
        if block.get("is_error") and "messages.is_error" not in ignored:
            ignored.append("messages.is_error")
        messages.append({"role": "tool", "tool_call_id": _string(block, "tool_use_id", place), "content": result})
    return [*messages, {"role": "user", "content": _text(texts)}] if texts or not messages else messages


def _assistants(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    thoughts, calls = [], []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if block["type"] == "thinking":
            thoughts.append(_string(block, "thinking", place))
        elif block["type"] == "tool_use":
            if not isinstance(block.get("input"), dict):
                refuse(f"{place}.input", f"must be an object; got {shown(block.get('input'))}")
            function = {"name": _string(block, "name", place), "arguments": json.dumps(block["input"])}
            calls.append({"id": _string(block, "id", place), "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": _text(blocks)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _blocks(content: Any, where: str, role: str) -> list[dict[str, Any]]:
    """Content as blocks of the kinds that this role may have."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        refuse(where, f"must be a string or a list of content blocks; got {shown(content)}")
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in _KINDS[role]:
            refuse(f"{where}[{index}].type", f"must be {' or '.join(_KINDS[role])}; got {shown(kind)}")
        if kind == "text":
            _string(block, "text", f"{where}[{index}]")
    return content


def _text(blocks: list[dict[str, Any]]) -> str:
    return "\n".join(block["text"] for block in blocks if block["type"] == "text")


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        refuse(f"{where}.{name}", f"must be a string; got {shown(value)}")
    return value


def _read_tools(fields: Fields, chat: dict[str, Any]) -> None:
    tools = fields.take("tools")
    tools = [] if tools is None else tools
    if not isinstance(tools, list):
        refuse("tools", f"must be a list; got {shown(tools)}")
    listed = []
    for index, tool in enumerate(tools):
        kind = tool.get("type") or "custom" if isinstance(tool, dict) else tool
        if kind != "custom":
            refuse(f"tools[{index}].type", f'must be "custom", the only kind served; got {shown(kind)}')
        known = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
        function = {ours: tool[name] for name, ours in known.items() if tool.get(name) is not None}
        listed.append({"type": "function", "function": function})
    choice = mapping(fields.take("tool_choice"), "tool_choice")
    if listed:
        chat["tools"] = listed
    if not choice:
        return
    kind = choice.get("type")
    if not isinstance(kind, str) or kind not in _CHOICES:
        refuse("tool_choice.type", f"must be one of {', '.join(_CHOICES)}; got {shown(kind)}")
    chat["tool_choice"] = _CHOICES[kind] or {"type": "function", "function": {"name": choice.get("name")}}
    single = choice.get("disable_parallel_tool_use")
    if single is not None:
        if not isinstance(single, bool):
            refuse("tool_choice.disable_parallel_tool_use", f"must be true or false; got {shown(single)}")
        chat["parallel_tool_calls"] = not single


def _read_thinking(fields: Fields, chat: dict[str, Any]) -> None:
    """Thinking is a variable of the templates that know it; how much has no bound but that of the answer."""
    thinking = mapping(fields.take("thinking"), "thinking")
    if thinking:
        kind = thinking.get("type")
        if not isinstance(kind, str) or kind not in _THINKING:
            refuse("thinking.type", f"must be one of {', '.join(_THINKING)}; got {shown(kind)}")
        given = mapping(chat.get("chat_template_kwargs"), "chat_template_kwargs")
        chat["chat_template_kwargs"] = {"enable_thinking": _THINKING[kind], **given}
        fields.ignored += [f"thinking.{name}" for name in thinking if name != "type"]
    config = mapping(fields.take("output_config"), "output_config")
    chat["reasoning_effort"] = config.get("effort")
    older = mapping(fields.take("output_format"), "output_format")
    form = mapping(config.get("format"), "output_config.format") or older
    if form:
        if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
            refuse("output_config.format", "must be of type json_schema, with a schema, an object")
        schema = {"name": "answer", "schema": form["schema"], "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    fields.ignored += [f"output_config.{name}" for name in config if name not in ("effort", "format")]
