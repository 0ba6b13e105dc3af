"""The messages of a chat: JSON to what a chat template reads.

Knows roles, parts of content and the fields of a message. Knows no other field of a request and no template.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pagegraph.runtime.sampling_params import shown
from pagegraph.web.fields import Fields, refuse

MAX_MESSAGES = 4096
_ROLE = re.compile(r"[\w.-]{1,64}")  # no characters of which special tokens are made
OLDER_ID = "call_function"  # of a call that was made before calls had ids
# Fields of a message besides role and content that a template may read; and all that are known.
_MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")
MESSAGE_FIELDS = {
    "role",
    "content",
    "refusal",
    "tool_calls",
    "function_call",
    "audio",
    "prefix",
    "partial",
    *_MESSAGE_TEXTS,
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages as the chat template gets them; raises BadParameter naming the place."""
    value = fields.take("messages")
    example = '[{"role": "user", "content": "Hello"}]'
    if not isinstance(value, list) or not value:
        refuse("messages", f"must be a list that is not empty, for example {example}; got {shown(value)}")
    if len(value) > MAX_MESSAGES:
        refuse("messages", f"holds {len(value)} messages; at most {MAX_MESSAGES}")
    messages = [_message(message, f"messages[{index}]", fields.ignored) for index, message in enumerate(value)]
    for message in messages:
        if message["role"] == "function":  # the older name, and without an id
            message |= {"role": "tool", "tool_call_id": OLDER_ID}
    return messages


def _message(message: Any, where: str, ignored: list[str]) -> dict[str, Any]:
    """One message as the template gets it; names of fields that it does not get are added to `ignored`."""
    if not isinstance(message, dict):
        refuse(where, f'must be an object, for example {{"role": "user", "content": "Hello"}}; got {shown(message)}')
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        known = ", ".join(_ROLES)
        refuse(
            f"{where}.role", f"must be one of {known}, or another that the model's template takes; got {shown(role)}"
        )
    if message.get("audio"):
        refuse(f"{where}.audio", "is not served; leave it out")
    for name in ("prefix", "partial"):
        if message.get(name):
            refuse(f"{where}.{name}", "is not served; give continue_final_message: true beside messages")
    content = message.get("content")
    if content is None and role == "assistant":
        content = message.get("refusal")  # what it said instead
    if content is None and role != "assistant":
        refuse(f"{where}.content", "is missing; give a string")
    kinds = ("text", "refusal") if role == "assistant" else ("text",)
    checked: dict[str, Any] = {"role": role, "content": _content(content, f"{where}.content", kinds)}
    checked |= _calls(message, where)
    for name in _MESSAGE_TEXTS:
        text = message.get(name)
        if text is not None:
            if not isinstance(text, str):
                refuse(f"{where}.{name}", f"must be a string; got {shown(text)}")
            checked[name] = text
    if thought := checked.get("reasoning") or checked.get("reasoning_content"):
        checked |= {"reasoning": thought, "reasoning_content": thought}  # templates read one name or the other
    for name, value in message.items():
        listed = f"messages.{name}"
        if value is not None and name not in MESSAGE_FIELDS and listed not in ignored:
            ignored.append(listed)
    return checked


def _calls(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The tool calls of an assistant's message, the arguments of each as JSON text; those of its older name, too."""
    calls, older = message.get("tool_calls"), message.get("function_call")
    if older:
        if calls:
            refuse(f"{where}.function_call", "is the older name of tool_calls; give one of them")
        return {"tool_calls": [{"id": OLDER_ID, "type": "function", **_called(older, f"{where}.function_call")}]}
    if not calls:
        return {}
    if message["role"] != "assistant" or not isinstance(calls, list):
        refuse(f"{where}.tool_calls", f"must be a list, in a message of an assistant; got {shown(calls)}")
    checked = []
    for index, call in enumerate(calls):
        place = f"{where}.tool_calls[{index}]"
        if not isinstance(call, dict) or call.get("type", "function") != "function":
            refuse(f"{place}.type", f'must be "function", the only kind served; got {shown(call)}')
        id = call.get("id")
        if not isinstance(id, str) or not id:
            refuse(f"{place}.id", f"must be a string, the call's own; got {shown(id)}")
        checked.append({"id": id, "type": "function", **_called(call.get("function"), f"{place}.function")})
    return {"tool_calls": checked}


def _called(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        refuse(where, f'must be an object, for example {{"name": "f", "arguments": "{{}}"}}; got {shown(function)}')
    name, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(name, str) or not name:
        refuse(f"{where}.name", f"must be a string; got {shown(name)}")
    if isinstance(arguments, dict):  # as some clients write them
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        refuse(f"{where}.arguments", f"must be a string of JSON; got {shown(arguments)}")
    return {"function": {"name": name, "arguments": arguments}}


def _content(content: Any, where: str, kinds: tuple[str, ...]) -> str:
    """Content as one string. Parts are of these kinds and hold a string under that name; newlines join them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(where, f"must be a string or a list of text parts; got {shown(content)}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            served = " or ".join(map(json.dumps, kinds))
            refuse(f"{where}[{index}].type", f"must be {served}, the only kind served; got {shown(kind)}")
        if not isinstance(part.get(kind), str):
            refuse(f"{where}[{index}].{kind}", "must be a string")
        texts.append(part[kind])
    return "\n".join(texts)
