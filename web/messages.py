"""The messages of a chat: JSON to what a chat template reads.

Knows roles, parts of content and the fields of a message. Knows no other field of a request and no template.
"""

from __future__ import annotations

import json
from typing import Any

from pagegraph.runtime.sampling_params import shown
from pagegraph.web.fields import Fields, refuse

MAX_MESSAGES = 4096
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
    return [_message(message, f"messages[{index}]", fields.ignored) for index, message in enumerate(value)]


def _message(message: Any, where: str, ignored: list[str]) -> dict[str, Any]:
    """One message as the template gets it; names of fields that it does not get are added to `ignored`."""
    if not isinstance(message, dict):
        refuse(where, f'must be an object, for example {{"role": "user", "content": "Hello"}}; got {shown(message)}')
    role = message.get("role")
    if role not in _ROLES:
        refuse(f"{where}.role", f"must be one of {', '.join(_ROLES)}; got {shown(role)}")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            refuse(f"{where}.{name}", "is not served; leave it out")
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
    for name in _MESSAGE_TEXTS:
        text = message.get(name)
        if text is not None:
            if not isinstance(text, str):
                refuse(f"{where}.{name}", f"must be a string; got {shown(text)}")
            checked[name] = text
    for name, value in message.items():
        listed = f"messages.{name}"
        if value is not None and name not in MESSAGE_FIELDS and listed not in ignored:
            ignored.append(listed)
    return checked


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
