"""Messages to the text that a model was trained on, by the template that comes with it.

Knows jinja and what templates want of a message's content; whether what was said is in the text. Knows no tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from transformers.utils.chat_template_utils import render_jinja_template

_PROBE = "7249610358"  # text that no template holds, and that none changes by case or by trimming
_FOUND = _PROBE + "1"
_WRITTEN_OUT = rf"""(?i)text['"], ?['"]text['"]: ?['"]{_PROBE}"""  # a part as Python or JSON writes it
_MOST_DOUBTS = 4  # texts of one request that are looked into because they are not in the prompt as they are

Message = dict[
    str, Any
]  # role, content (a string, or parts as {"type": "text", "text": ...}), and what else a template reads


@dataclass(frozen=True)
class CallForm:
    """How a template wants an assistant's tool calls: arguments as JSON text or as an object, no content as null or ""."""

    as_text: bool
    null_content: bool

    def of(self, message: Message) -> Message:
        """The message in this form."""
        if not (calls := message.get("tool_calls")):
            return message
        content = message.get("content") or None
        if not self.as_text:
            calls = [call | {"function": call["function"] | {"arguments": _as_object(call)}} for call in calls]
        return message | {"tool_calls": calls, "content": content if self.null_content else content or ""}

    def shows(self, fill: Callable[..., str], messages: list[Message], arguments: dict[str, Any]) -> bool:
        """Whether the arguments of the last calls, which are probes, are in the prompt and no Python."""
        try:
            rendered = fill([self.of(message) for message in messages], {**arguments, "continue_final_message": False})
        except ChatTemplateError:
            return False
        return _FOUND in rendered and f"{{'{_PROBE}'" not in rendered and f'\\"{_PROBE}' not in rendered


CALL_FORMS = tuple(CallForm(as_text, null) for null in (False, True) for as_text in (False, True))


def _as_object(call: dict[str, Any]) -> Any:
    """The arguments as an object; as they are where they are none."""
    text = call["function"]["arguments"]
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the text is fit to show to the user."""


class ChatTemplate:
    """A jinja template and the model's special tokens by name, which it may read.

    `variables`: the names it reads besides those that it sets itself.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.variables = _variables(source)
        self._source = source
        self._call_form: CallForm | None = None  # once calls were seen to arrive
        self._special_tokens: dict[str, Any] = special_tokens
        self._known: dict[Any, bool] = {}  # role -> whether it takes parts, once it was seen to arrive

    def render(self, messages: list[Message], **arguments: Any) -> str:
        """`arguments` are those of `render_jinja_template`, and variables of the template.

        Tool calls are OpenAI's, the arguments of each as JSON text. Raises ChatTemplateError when the template refuses the messages, or leaves out one whose text has to arrive: the
        last user's, and all but users' and assistants', whose earlier turns a template may drop. Templates may change a
        text, so that is said only where another text in its place gives the same prompt.
        """
        messages = self._with_calls(messages, arguments)
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

    def _with_calls(self, messages: list[Message], arguments: dict[str, Any]) -> list[Message]:
        """The messages with their tool calls in the form in which this template shows them; tried, as parts are."""
        calling = [index for index, message in enumerate(messages) if message.get("tool_calls")]
        if not calling:
            return messages
        if self._call_form is None:
            for form, parts in itertools.product(CALL_FORMS, (False, True)):
                if form.shows(self._fill, _probed(messages[: calling[-1] + 1], parts), arguments):
                    self._call_form = form
                    break
            else:
                # Whatever it is that the template minds, it may say so itself.
                self._fill([CALL_FORMS[0].of(message) for message in messages], arguments)
                raise ChatTemplateError(
                    f"the model's chat template leaves out the tool calls of messages[{calling[-1]}]"
                )
        return [self._call_form.of(message) for message in messages]

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


def _probed(messages: list[Message], parts: bool) -> list[Message]:
    """The messages, the calls of the last with arguments to be found again; contents as strings, or as parts."""
    function = messages[-1]["tool_calls"][-1]["function"] | {"arguments": json.dumps({_PROBE: _FOUND})}
    probe = messages[-1] | {"tool_calls": [messages[-1]["tool_calls"][-1] | {"function": function}]}
    texts = [_joined(message.get("content")) for message in messages]
    forms = {message.get("role"): parts for message in messages}
    return [*_with(messages[:-1], texts[:-1], forms), probe]


def _variables(source: str) -> frozenset[str]:
    """The variables that a template reads; none of one that does not compile."""
    environment = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
    except jinja2.TemplateError:
        return frozenset()


class _Generation(jinja2.ext.Extension):
    """The tag that transformers adds: what is inside is what the model has said."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Only its content counts."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _with(messages: list[Message], texts: list[str], parts: dict[Any, bool]) -> list[Message]:
    """The messages with these texts as their content, each in the form for its role."""
    return [
        message | {"content": [{"type": "text", "text": text}] if parts[message.get("role")] else text}
        if text or message.get("content") is not None or not message.get("tool_calls")
        else message
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
