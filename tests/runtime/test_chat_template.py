"""What a template is given, and that what the user said is in its text."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.chat_template import ChatTemplate, ChatTemplateError

STRINGS = "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}"
LOOP = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
INDEX = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
MACRO = (
    "{% macro said(content) %}{% for part in content %}{{ part.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ said(m.content) }}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('parts!') }}{% endif %}"
    "<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
)
# Users' content in either form, the system's as a string.
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{{ m.content | trim }}{% elif m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello \u4f60\n"}]


def render(source: str, messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(source, {}).render(messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "parts"),
    [(STRINGS, False), (BOTH, False), (LOOP, True), (INDEX, True), (MACRO, True), (STRICT, True), ("{{ x.y.z }}", False)],
)
def test_the_form_that_a_template_takes(source: str, parts: bool) -> None:
    assert ChatTemplate(source, {}).takes_parts == parts


@pytest.mark.parametrize("source", [STRINGS, BOTH, LOOP, INDEX, MACRO, STRICT])
def test_every_text_arrives_in_either_form(source: str) -> None:
    expected = "<system>Be kind.<user>" + (" Hello \u4f60\n" if source != STRINGS else "Hello \u4f60")
    assert render(source, HELLO) == expected
    as_parts = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in HELLO]
    assert render(source, as_parts) == expected


def test_several_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "b")]}]
    assert (render(STRINGS, parts), render(LOOP, parts)) == ("<user>a\nb", "<user>ab")


@pytest.mark.parametrize("source", ["{% for m in messages %}<{{ m.role }}>{% endfor %}", "{{ messages[0].content }}"])
def test_a_template_that_leaves_the_user_out_is_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"leaves out the content of messages\[1\]"):
        render(source, HELLO)


def test_a_text_that_the_template_changes_has_arrived() -> None:
    assert render("{% for m in messages %}{{ m.content | upper | replace('\n', '') }}{% endfor %}", HELLO) == "BE KIND. HELLO \u4f60"
    assert render(STRINGS, [{"role": "user", "content": "  "}]) == "<user>"
    assert render(STRINGS, [{"role": "assistant", "content": "a"}]) == "<assistant>a"
