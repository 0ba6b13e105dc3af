"""Work from files: what is read, what is left out, what is refused and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagegraph.runtime.bench.files import custom, sharegpt


def words(text: str) -> int:
    return len(text.split())


def entry(question: int, answer: int, begin: str = "w") -> dict:
    return {"conversations": [{"from": "human", "value": " ".join([begin] * question)}, {"from": "gpt", "value": "a " * answer}]}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    entries = [
        entry(10, 20, "a"),
        entry(12, 30, "b"),
        entry(2, 30),
        entry(10, 1),
        entry(1025, 30),
        entry(900, 1200),
        {},
    ]
    entries += [{"conversations": []}, {"conversations": [{"from": "human", "value": "alone"}]}]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries))
    return path


def test_sharegpt_takes_first_turns_of_usual_length(file: Path) -> None:
    requests = sharegpt(file, 2, seed=0, count_tokens=words, output_len=None)
    assert {(str(one.prompt)[0], one.input_len, one.output_len) for one in requests} == {("a", 10, 20), ("b", 12, 30)}


def test_a_short_file_comes_again(file: Path) -> None:
    requests = sharegpt(file, 5, seed=0, count_tokens=words, output_len=None)
    assert len(requests) == 5 and requests[:2] == requests[2:4]


def test_output_len_needs_no_tokenizer(file: Path) -> None:
    requests = sharegpt(file, 3, seed=1, count_tokens=None, output_len=9)
    assert {(one.output_len, one.input_len) for one in requests} == {(9, 0)}
    with pytest.raises(ValueError, match="--tokenizer"):
        sharegpt(file, 3, seed=1, count_tokens=None, output_len=None)


def test_messages_are_conversations_too(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"messages": [{"role": "user", "content": "q " * 5}, {"role": "assistant", "content": "a " * 6}]}]))  # fmt: skip
    assert sharegpt(path, 1, seed=0, count_tokens=words, output_len=None)[0].output_len == 6


@pytest.mark.parametrize("text, told", [("{", "is not JSON"), ("{}", "is not a list"), ("[]", "no entry")])
def test_sharegpt_that_is_none(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        sharegpt(path, 1, seed=0, count_tokens=words, output_len=None)


def test_custom_lines_in_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one two", "output_tokens": 5}\n\n{"prompt": "three", "max_tokens": 6}\n')
    requests = custom(path, 3, count_tokens=words, output_len=None)
    assert [(one.prompt, one.output_len, one.input_len) for one in requests] == [
        ("one two", 5, 2),
        ("three", 6, 1),
        ("one two", 5, 2),
    ]
    assert [one.output_len for one in custom(path, 2, count_tokens=None, output_len=8)] == [8, 8]


@pytest.mark.parametrize(
    "line, told",
    [("{", ":1: is not JSON"), ("[]", 'no text "prompt"'), ('{"prompt": 3}', 'no text "prompt"'), ("", "holds no line"),
     ('{"prompt": "a"}', "--output-len"), ('{"prompt": "a", "output_tokens": 0}', "at least 1")],
)  # fmt: skip
def test_custom_lines_that_are_none(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=told):
        custom(path, 1, count_tokens=None, output_len=None)
