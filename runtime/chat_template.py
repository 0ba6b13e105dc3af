"""Messages to the text that a model was trained on, by the template that comes with it.

Knows jinja and what templates want of a message's content; whether what the user said is in the text. Knows no tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

_PROBE = "7249610358"  # text that no template holds, and that none changes by case or by trimming

Message = dict[str, Any]  # role, content (a string, or parts as {"type": "text", "text": ...}), and what else a template reads


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the text is fit to show to the user."""


class ChatTemplate:
    """A jinja template and the model's special tokens by name, which it may read."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self._source = source
        self._special_tokens = special_tokens

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether content has to be a list of parts: as a string it does not reach the text, as parts it does.

        Tried, not read off the template: its loops may lie in macros, its indices anywhere, and one that serves both forms
        for users may take strings alone from others. Where neither form arrives, it is given strings.
        """
        return not self._shows(_PROBE) and self._shows([_part(_PROBE)])

    def render(self, messages: list[Message], **arguments: Any) -> str:
        """`arguments` are those of `render_jinja_template`, and variables of the template.

        Raises ChatTemplateError when the template refuses the messages, or leaves out what the last user said. Templates may
        change a text, so that is said only where another text in its place gives the same prompt.
        """
        rendered = self._render(messages, arguments)
        index = max((index for index, message in enumerate(messages) if message.get("role") == "user"), default=None)
        if index is None or all(text.strip() in rendered for text in _texts(messages[index].get("content"))):
            return rendered
        other = "x" if _joined(messages[index].get("content")).strip() != "x" else "y"
        changed = [*messages[:index], messages[index] | {"content": other}, *messages[index + 1 :]]
        try:
            lost = self._render(changed, arguments) == rendered
        except ChatTemplateError:
            lost = False
        if lost:
            raise ChatTemplateError(f"the model's chat template leaves out the content of messages[{index}], the user's last")
        return rendered

    def _shows(self, content: str | list[Message]) -> bool:
        try:
            return _PROBE in self._fill([{"role": "user", "content": content}], {"add_generation_prompt": True})
        except ChatTemplateError:
            return False

    def _render(self, messages: list[Message], arguments: dict[str, Any]) -> str:
        form = _as_parts if self.takes_parts else _joined
        return self._fill([message | {"content": form(message.get("content"))} for message in messages], arguments)

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


def _part(text: str) -> Message:
    return {"type": "text", "text": text}


def _as_parts(content: str | list[Message] | None) -> list[Message]:
    return content if isinstance(content, list) else [_part(content or "")]


def _texts(content: str | list[Message] | None) -> list[str]:
    return [part["text"] for part in _as_parts(content)]


def _joined(content: str | list[Message] | None) -> str:
    """As one string; several parts are joined by newlines."""
    return "\n".join(_texts(content))
