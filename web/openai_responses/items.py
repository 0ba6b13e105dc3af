"""Items of a conversation, as /v1/responses has them, to messages of a chat; and checked items with ids.

Reasoning, a message and the calls that follow it are one assistant message, as the model wrote them in one turn. Knows
the kinds of items; knows no tools and no model.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from pagegraph.runtime.sampling_params import shown
from pagegraph.web.fields import refuse
from pagegraph.web.messages import MAX_MESSAGES

Item = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_EXAMPLE = '"Hello" or [{"role": "user", "content": "Hello"}]'
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def new_id(kind: str) -> str:
    """An id for an item of this type, or of a response, that nobody guesses."""
    return f"{_PREFIXES.get(kind, kind)}_{uuid.uuid4().hex}"


def read_items(value: Any, stored_item: Callable[[str], Item | None]) -> list[Item]:
    """The items that the field `input` holds, each with an id; `stored_item` finds those that it only names.

    Raises BadParameter naming the place.
    """
    if value is None:
        refuse("input", f"is missing; give {_EXAMPLE}")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        refuse("input", f"must be a string or a list of items, for example {_EXAMPLE}; got {shown(value)}")
    if len(value) > MAX_MESSAGES:
        refuse("input", f"holds {len(value)} items; at most {MAX_MESSAGES}")
    return [_item(item, f"input[{index}]", stored_item) for index, item in enumerate(value)]


def messages_of(items: list[Item]) -> list[dict[str, Any]]:
    """Checked items as messages of /v1/chat/completions."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, to which more may belong
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item["output"])})
        elif kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": text_of(item["content"])})
        else:
            if turn is None or not _belongs(kind, turn):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _extend(turn, item)
            continue
        turn = None
    return messages


def text_of(content: Any) -> str:
    """Checked content, a string or text parts, as one string."""
    if isinstance(content, str):
        return content
    return "\n".join(part[_TEXT_PARTS[part["type"]]] for part in content)


def _belongs(kind: str, turn: dict[str, Any]) -> bool:
    """Whether an item goes on with the assistant's turn, which is reasoning, then a message, then calls."""
    if kind == "function_call":
        return True
    return "tool_calls" not in turn and not turn["content"] and (kind == "message" or "reasoning_content" not in turn)


def _extend(turn: dict[str, Any], item: Item) -> None:
    if item["type"] == "message":
        turn["content"] = text_of(item["content"])
    elif item["type"] == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
    elif text := "\n".join(part["text"] for part in item.get("content") or item["summary"]):
        turn["reasoning_content"] = text


def _item(item: Any, where: str, stored_item: Callable[[str], Item | None]) -> Item:
    if not isinstance(item, dict):
        refuse(where, f'must be an object, for example {{"role": "user", "content": "Hello"}}; got {shown(item)}')
    kind = item.get("type", "message" if "role" in item else "item_reference" if "id" in item else None)
    if kind == "item_reference":
        return _referenced(item.get("id"), f"{where}.id", stored_item)
    read = {
        "message": _message,
        "function_call": _call,
        "function_call_output": _call_output,
        "reasoning": _reasoning,
    }.get(kind) if isinstance(kind, str) else None  # fmt: skip
    if read is None:
        served = ", ".join((*_PREFIXES, "item_reference"))
        refuse(f"{where}.type", f"must be one of {served}, the only kinds served; got {shown(kind)}")
    id = item.get("id")
    return {"id": id if isinstance(id, str) and id else new_id(kind), "type": kind, **read(item, where)}


def _referenced(id: Any, where: str, stored_item: Callable[[str], Item | None]) -> Item:
    found = stored_item(id) if isinstance(id, str) else None
    if found is None:
        refuse(where, f"names no item of a response that is stored: {shown(id)}; give the item itself")
    return found


def _message(item: Item, where: str) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        refuse(f"{where}.role", f"must be one of {', '.join(_ROLES)}; got {shown(role)}")
    content = _content(item.get("content"), f"{where}.content", "output_text" if role == "assistant" else "input_text")
    return {"role": role, "status": "completed", "content": content}


def _call(item: Item, where: str) -> Item:
    texts = {name: _string(item, name, where) for name in ("call_id", "name", "arguments")}
    return {**texts, "status": "completed"}


def _call_output(item: Item, where: str) -> Item:
    output = item.get("output")
    if not isinstance(output, str):
        output = _content(output, f"{where}.output", "input_text")
    return {"call_id": _string(item, "call_id", where), "output": output, "status": "completed"}


def _reasoning(item: Item, where: str) -> Item:
    summary = _parts(item.get("summary") or [], f"{where}.summary", "summary_text")
    content = item.get("content")
    checked: Item = {"summary": summary}
    if content:
        checked["content"] = _parts(content, f"{where}.content", "reasoning_text")
    return checked


def _content(content: Any, where: str, kind: str) -> list[dict[str, Any]]:
    """Content as parts, of which a string is one of this kind."""
    if isinstance(content, str):
        return [_part(kind, content)]
    if not isinstance(content, list):
        refuse(where, f"must be a string or a list of text parts; got {shown(content)}")
    checked = []
    for index, part in enumerate(content):
        given = part.get("type") if isinstance(part, dict) else None
        name = _TEXT_PARTS.get(given) if isinstance(given, str) else None
        if name is None:
            refuse(f"{where}[{index}].type", f"must be {kind}, the only kind served; got {shown(given)}")
        text = _string(part, name, f"{where}[{index}]")
        checked.append({"type": "refusal", "refusal": text} if name == "refusal" else _part(kind, text))
    return checked


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {})


def _parts(value: Any, where: str, kind: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        refuse(where, f"must be a list of {kind} parts; got {shown(value)}")
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != kind:
            refuse(f"{where}[{index}].type", f"must be {kind}; got {shown(part)}")
        _string(part, "text", f"{where}[{index}]")
    return [{"type": kind, "text": part["text"]} for part in value]


def _string(holder: dict[str, Any], name: str, where: str) -> str:
    value = holder.get(name)
    if not isinstance(value, str):
        refuse(f"{where}.{name}", f"must be a string; got {shown(value)}")
    return value
