"""Chats with tools: what templates are given, how tools reach models whose template takes none, and where reasoning opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from pagegraph.runtime.text.chat import Chat
from pagegraph.runtime.text.chat_output import Content, Reasoning
from pagegraph.runtime.text.chat_template import ChatTemplateError
from pagegraph.runtime.text.formats import CALLS, REASONING, choose
from pagegraph.runtime.text.tokenizer import Tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": {}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
LOOP = [
    {"role": "user", "content": "How is it in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Rain.", "tool_call_id": "call_1"},
]
LISTED = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"


def body(more: str = "") -> str:
    return (
        f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{more}{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


# How a template shows a call; each wants it in one form alone.
OBJECT = LISTED + body("{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}{% endfor %}")
TEXT = LISTED + body(
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
)
ITEMS = LISTED + body(
    "{% for c in m.tool_calls or [] %}<tool_call><function=<parameter="
    "{% for k, v in c.function.arguments | items %}{{ k }}: {{ v }}{% endfor %}{% endfor %}"
)
NULL = LISTED + (
    "{% for m in messages %}{% if m.content is none %}<tool_call>{{ m.tool_calls[0].function | tojson }}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
PARTS = LISTED + (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}{% endfor %}{% endfor %}"
)
NINE = LISTED + (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('ids!') }}{% endif %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }} {{ c.id }}{% endfor %}"
    "{{ m.tool_call_id }} {{ m.content }}{% endfor %}"
)
PLAIN = body()
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN


def tokenizer(template: str, special: tuple[str, ...] = ()) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["a"], tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    return Tokenizer(backend, chat_template=template)


def render(template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] = TOOLS, **options: Any) -> str:
    return Chat(tokenizer(template)).render(messages, tools=tools, add_generation_prompt=True, **options)


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (OBJECT, '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}'),
        (TEXT, '<tool_call>weather {"city": "Paris"}'),
        (ITEMS, "<tool_call><function=<parameter=city: Paris"),
        (NULL, '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}'),
        (PARTS, '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}'),
    ],
)
def test_calls_reach_a_template_in_the_form_it_wants(template: str, call: str) -> None:
    rendered = render(template, LOOP)
    assert rendered.startswith(json.dumps(TOOLS[0])) and call in rendered and "Rain." in rendered
    again = Chat(tokenizer(template))
    assert [again.render(LOOP, tools=TOOLS, add_generation_prompt=True) for _ in range(2)] == [rendered] * 2


def test_arguments_that_are_no_object_stay_as_they_are() -> None:
    for arguments, shown in (("{broken", '"{broken"'), ("", "{}")):
        call = CALL | {"function": CALL["function"] | {"arguments": arguments}}
        assert f'"arguments": {shown}' in render(OBJECT, [LOOP[0], LOOP[1] | {"tool_calls": [call]}, LOOP[2]])


def test_ids_are_short_where_a_template_wants_that() -> None:
    rendered = render(NINE, LOOP)
    id = rendered.split("} ")[-1][:9]
    assert id.isalnum() and rendered.count(id) == 2
    assert "a1B2c3D4e" in render(NINE, [LOOP[0], LOOP[1] | {"tool_calls": [CALL | {"id": "a1B2c3D4e"}]}])


def test_a_tool_result_has_the_name_of_its_tool() -> None:
    assert "Rain. of weather" in render(
        LISTED + body(" of {{ m.name }}<tool_call>{{ (m.tool_calls or []) | tojson }}"), LOOP
    )


def test_what_a_template_leaves_out_is_said() -> None:
    with pytest.raises(ChatTemplateError, match="leaves out the tool calls of messages.1."):
        render(LISTED + body("<tool_call>"), LOOP)
    with pytest.raises(ChatTemplateError, match="leaves out the tool weather"):
        render("{{ tools[:0] }}<tool_call>" + PLAIN, LOOP[:1])
    with pytest.raises(ChatTemplateError, match="tool_call_parser none"):
        Chat(tokenizer(OBJECT), tool_call_parser="none").render(LOOP[:1], tools=TOOLS)


def test_tools_of_a_template_without_them_are_described_in_a_system_message() -> None:
    rendered = render(PLAIN, LOOP)
    assert rendered.startswith("<system>You may call functions.") and json.dumps(TOOLS[0]["function"]) in rendered
    assert rendered.endswith(
        '<user>How is it in Paris?<assistant><tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<user><tool_response>\nRain.\n</tool_response><assistant>"
    )
    both = render(PLAIN, [{"role": "system", "content": "Be kind."}, *LOOP, LOOP[2] | {"content": "Sun."}])
    assert both.startswith("<system>Be kind.\n\nYou may call functions.")
    assert both.endswith("Rain.\n</tool_response>\n<tool_response>\nSun.\n</tool_response><assistant>")
    assert render(PLAIN, LOOP, tools=[]).startswith("<user>How is it")


def test_a_template_without_system_messages_gets_them_in_the_first_of_a_user() -> None:
    rendered = render(NO_SYSTEM, LOOP)
    assert rendered.startswith("<user>You may call functions.") and "\n\nHow is it in Paris?<assistant>" in rendered
    with pytest.raises(ChatTemplateError, match="no system"):
        render(NO_SYSTEM, [{"role": "system", "content": "x"}, *LOOP])


def test_the_description_says_the_form_that_is_read() -> None:
    chat = Chat(tokenizer(PLAIN), tool_call_parser="qwen3_coder")
    assert "<tool_call>\n<function=function_name>\n<parameter=parameter>\nvalue\n</parameter>" in chat.render(
        LOOP, tools=TOOLS
    )


# Words of the templates that come with models; each means one row.
TEMPLATES = {
    "hermes": "<tools> {{ tools }} <tool_call>",
    "qwen3_coder": "<tool_call>\n<function=example>\n<parameter=p>",
    "glm45": "<tool_call>{{ name }}<arg_key>",
    "seed_oss": "<seed:tool_call><function=f><parameter=p>",
    "mistral": "[AVAILABLE_TOOLS] [TOOL_CALLS]",
    "deepseek_v3": "<｜tool▁call▁begin｜>{{ t }}<｜tool▁sep｜>{{ n }}\n```json\n",
    "deepseek_v31": "<｜tool▁call▁begin｜>{{ n }}<｜tool▁sep｜>",
    "openai": "<|start|>assistant<|channel|>final<|message|>",
    "granite": "respond with <|tool_call|> followed by a JSON list",
    "phi4_mini_json": "functools[{'name': ...}]",
    "functiongemma": "<start_function_call>call:",
    "gemma4": "<|tool_call>call:<|channel>",
    "pythonic": "[func_name1(params_name1=params_value1)]",
    "llama3_json": """Respond in the format {"name": name, "parameters": {}}. <|start_header_id|>ipython""",
}


def test_rows_are_chosen_by_the_words_of_a_template() -> None:
    assert TEMPLATES.keys() == CALLS.keys()
    for name, template in TEMPLATES.items():
        assert choose(template.replace("{{", "").replace("}}", "")).calls is CALLS[name]
    for name, row in REASONING.items():
        if name not in ("qwen3",):
            assert choose(" ".join(row.signs)).reasoning is row
    assert choose("</think>").reasoning is REASONING["qwen3"]
    assert choose("{{ messages }}") == choose("", "none", "none")
    assert choose("<tool_call></think>", "none", "none").calls is None
    assert choose("", "mistral", "granite").calls is CALLS["mistral"]


THINKS = "{{ messages[0].content }}<assistant>{% if thinking %}<think>\n{% elif thinking is defined %}<think>\n\n</think>\n\n{% endif %}"


@pytest.mark.parametrize(
    ("arguments", "text", "parts"),
    [
        ({"thinking": True}, "hm</think>Yes", [Reasoning("hm"), Content("Yes")]),
        ({"thinking": False}, "hm", [Content("hm")]),
        ({}, "<think>hm</think>Yes", [Reasoning("hm"), Content("Yes")]),
        ({}, "Yes", [Content("Yes")]),
    ],
)
def test_reasoning_that_the_prompt_opens_or_closes(arguments: dict[str, Any], text: str, parts: list[Any]) -> None:
    for special in (("<think>", "</think>"), ()):
        model = tokenizer(THINKS, special)
        prompt = model.apply_chat([{"role": "user", "content": "<think>"}], arguments=arguments)
        output = Chat(model).output(prompt)
        assert output.add(text) + output.finish() == parts
    # DeepSeek-R1's old template opens nothing, and the model answers as if it did.
    output = Chat(model, reasoning_parser="deepseek_r1").output(prompt)
    assert output.add("hm</think>Yes") == (
        [Content("hm</think>Yes")] if arguments == {"thinking": False} else [Reasoning("hm"), Content("Yes")]
    )


def test_a_continued_message_is_inside_reasoning_if_it_has_opened_it() -> None:
    chat = Chat(tokenizer(THINKS))
    for continued, part in (("<think>a", Reasoning("b")), ("<think>a</think>", Content("b")), ("a", Content("b"))):
        output = chat.output([], continued=continued)
        assert output.add("b") + output.finish() == [part]


def test_special_tokens_that_are_markers_are_kept_and_not_shown() -> None:
    special = ("[TOOL_CALLS]", "[ARGS]", "[INST]")
    model = tokenizer("{{ tools }}[TOOL_CALLS]", special)
    chat = Chat(model)
    texts = {model.token_bytes(id).decode() for id in chat.kept_ids(tools=True)}
    assert texts == {"[TOOL_CALLS]", "[ARGS]"} and not chat.kept_ids(tools=False)
    output = chat.output([], tools={})
    assert output.add("a[TOOL_CALLS]?[ARGS]b") + output.finish() == [Content("a?b")]
    output = chat.output([], tools={}, skip_special=False)
    assert output.add("a[TOOL_CALLS]?") + output.finish() == [Content("a[TOOL_CALLS]?")]


def test_variables_are_those_that_the_template_reads(tmp_path: Path) -> None:
    template = "{% if not tools is defined %}{% set tools = [] %}{% endif %}{% generation %}{{ reasoning_effort }}{% endgeneration %}"
    chat = Chat(tokenizer(template))
    assert chat.reads("tools") and chat.reads("reasoning_effort") and not chat.reads("documents")
    assert not Chat(tokenizer("{% broken")).reads("tools")
