"""What a template is given, and that what the user said is in its text."""

from __future__ import annotations

from typing import Any

import pytest

from pagegraph.runtime.text.chat_template import ChatTemplate, ChatTemplateError

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
# The system's content as parts, users' as a string; and the reverse.
SYSTEM_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
USER_PARTS = SYSTEM_PARTS.replace("==", "!=")
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' or not messages[1] %}{{ raise_exception('system!') }}{% endif %}" + LOOP
)
EITHER = [BOTH, LOOP, INDEX, MACRO, STRICT, SYSTEM_PARTS, USER_PARTS, SYSTEM_FIRST]
HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello \u4f60\n"}]


def render(source: str, messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(source, {}).render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("source", [STRINGS, *EITHER])
def test_every_text_arrives_in_either_form(source: str) -> None:
    expected = "<system>Be kind.<user>" + (" Hello \u4f60\n" if source != STRINGS else "Hello \u4f60")
    assert render(source, HELLO) == expected
    as_parts = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in HELLO]
    assert render(source, as_parts) == expected


@pytest.mark.parametrize("source", [STRINGS, LOOP, INDEX])
def test_several_parts_are_one(source: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "b")]}]
    assert render(source, parts) == "<user>a\nb"


@pytest.mark.parametrize("end", ["", " | tojson", " | upper"])
def test_a_part_is_not_written_out(end: str) -> None:
    source = f"{{{{ messages[0].content[:3]{end} }}}}"
    assert render(source, [{"role": "user", "content": "Hello"}]).strip('"').lower() == "hel"


def test_a_role_that_did_not_arrive_is_tried_again() -> None:
    first_only = ChatTemplate("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", {})
    one, two = {"role": "tool", "content": "one"}, {"role": "assistant", "content": "two"}
    assert [first_only.render(messages) for messages in ([one, two], [two], [one])] == ["one", "two", "one"]


def test_known_roles_cost_no_further_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(USER_PARTS, {})
    template.render(HELLO)
    calls: list[Any] = []
    monkeypatch.setattr(template, "_fill", lambda *given, fill=template._fill: calls.append(given) or fill(*given))
    template.render(HELLO)
    assert len(calls) == 1


@pytest.mark.parametrize("source", ["{% for m in messages %}<{{ m.role }}>{% endfor %}", "{{ messages[0].content }}"])
def test_a_template_that_leaves_the_user_out_is_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"leaves out the content of messages\[1\]"):
        render(source, HELLO)


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_template_that_leaves_out_another_s_text_is_refused(role: str) -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ChatTemplateError, match=rf"leaves out the content of messages\[1\] \(role: {role}\)"):
        render(source, messages)
    assert render(source, [messages[0], {"role": role, "content": ""}]) == "a"


def test_a_template_may_drop_earlier_turns() -> None:
    messages = [
        {"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    assert render("{{ messages[-1].content }}", messages) == "c"
    last = LOOP.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}")
    assert render(last, messages) == "<user>a<user>c"


def test_a_role_that_arrives_in_no_form_is_not_written_out() -> None:
    source = USER_PARTS.replace("{{ m.content }}", "{{ m.content[:3] }}")
    assert render(source, HELLO) == "<system>Be <user> Hello \u4f60\n"


@pytest.mark.parametrize("source", ["{{ x.y.z }}", "{{ raise_exception('no') }}"])
def test_a_template_that_refuses(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="refuses these messages"):
        render(source, HELLO)


def test_a_text_that_the_template_changes_has_arrived() -> None:
    assert (
        render("{% for m in messages %}{{ m.content | upper | replace('\n', '') }}{% endfor %}", HELLO)
        == "BE KIND. HELLO \u4f60"
    )
    assert render(STRINGS, [{"role": "user", "content": "  "}]) == "<user>"
    assert render(STRINGS, [{"role": "assistant", "content": "a"}]) == "<assistant>a"
