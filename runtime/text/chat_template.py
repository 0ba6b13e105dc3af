"""Messages to the text that a model was trained on, by the template that comes with it.

Knows jinja and what templates want of a message's content; whether what was said is in the text. Knows no tokens.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

_PROBE = "7249610358"  # text that no template holds, and that none changes by case or by trimming
_WRITTEN_OUT = rf"""(?i)text['"], ?['"]text['"]: ?['"]{_PROBE}"""  # a part as Python or JSON writes it
_MOST_DOUBTS = 4  # texts of one request that are looked into because they are not in the prompt as they are

Message = dict[
    str, Any
]  # role, content (a string, or parts as {"type": "text", "text": ...}), and what else a template reads


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the text is fit to show to the user."""


class ChatTemplate:
    """A jinja template and the model's special tokens by name, which it may read."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self._source = source
        self._special_tokens: dict[str, Any] = special_tokens
        self._known: dict[Any, bool] = {}  # role -> whether it takes parts, once it was seen to arrive

    def render(self, messages: list[Message], **arguments: Any) -> str:
        """`arguments` are those of `render_jinja_template`, and variables of the template.

        Raises ChatTemplateError when the template refuses the messages, or leaves out one whose text has to arrive: the
        last user's, and all but users' and assistants', whose earlier turns a template may drop. Templates may change a
        text, so that is said only where another text in its place gives the same prompt.
        """
        texts = [_joined(message.get("content")) for message in messages]
        parts = self._parts(messages)
        rendered = self._fill(_with(messages, texts, parts), arguments)
        missing = [index for index in _needed(messages) if texts[index].strip() not in rendered]
        for index in missing[:_MOST_DOUBTS]:
            other = "x" if texts[index].strip() != "x" else "y"
            try:
                lost = (
                    self._fill(_with(messages, [*texts[:index], other, *texts[index + 1 :]], parts), arguments)
                    == rendered
                )
            except ChatTemplateError:
                lost = False
            if lost:
                raise ChatTemplateError(
                    f"the model's chat template leaves out the content of messages[{index}]"
                    f" (role: {messages[index].get('role')})"
                )
        return rendered

    def _parts(self, messages: list[Message]) -> dict[Any, bool]:
        """Role -> whether its content has to be a list of parts: only as such does it reach the text.

        Tried, not read off the template: its loops may lie in macros, its indices anywhere, and it may take strings
        from one role and parts from another. Tried with these very messages, their texts replaced, as a template may
        want a system message or an order. A role that does not arrive in either form is tried again the next time.
        """
        roles = [message.get("role") for message in messages]
        unknown = [role for role in dict.fromkeys(roles) if role not in self._known]
        if not unknown:
            return self._known
        best = dict.fromkeys(unknown, False)
        arrived = self._arrived(messages, best)
        wanted = {index for index, role in enumerate(roles) if role in best}
        for flipped in (unknown, *([role] for role in unknown if len(unknown) > 1)):  # all of them, then one by one
            if arrived is not None and wanted <= arrived:
                break
            tried = best | {role: not best[role] for role in flipped}
            now = self._arrived(messages, tried)
            if now is not None and (arrived is None or len(now) > len(arrived)):
                best, arrived = tried, now
        self._known |= {roles[index]: best[roles[index]] for index in wanted & (arrived or set())}
        return self._known | best

    def _arrived(self, messages: list[Message], parts: dict[Any, bool]) -> set[int] | None:
        """Indices of the messages whose text is in the prompt; None if they are refused, or a part is written out."""
        probes = [f"{_PROBE}{index:06}" for index in range(len(messages))]
        try:
            rendered = self._fill(_with(messages, probes, self._known | parts), {"add_generation_prompt": True})
        except ChatTemplateError:
            return None
        return (
            None
            if re.search(_WRITTEN_OUT, rendered)
            else {int(found) for found in re.findall(_PROBE + r"(\d{6})", rendered)}
        )

    def _fill(self, messages: list[Message], arguments: dict[str, Any]) -> str:
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages], chat_template=self._source, **arguments, **self._special_tokens
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ChatTemplateError("the model's chat template cannot render these messages") from error
        return rendered[0]


def _with(messages: list[Message], texts: list[str], parts: dict[Any, bool]) -> list[Message]:
    """The messages with these texts as their content, each in the form for its role."""
    return [
        message | {"content": [{"type": "text", "text": text}] if parts[message.get("role")] else text}
        for message, text in zip(messages, texts, strict=True)
    ]


def _needed(messages: list[Message]) -> list[int]:
    """Indices of the messages whose text has to arrive, the last user's first."""
    users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    return users[-1:] + [
        index for index, message in enumerate(messages) if message.get("role") not in ("user", "assistant")
    ]


def _joined(content: str | list[Message] | None) -> str:
    """As one string; several parts are joined by newlines, as a template may read the first alone."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""
