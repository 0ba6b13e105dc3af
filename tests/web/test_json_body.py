"""Bodies of every size to JSON: what large ones hold, what they are refused for, and that millions of values are not built."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from pagegraph.web import json_body
from pagegraph.web.errors import ApiError
from pagegraph.web.json_body import MAX_ITEMS, parse_body

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=6),
    max_leaves=30,
)  # fmt: skip


@settings(max_examples=200)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=6), st.booleans(), st.sampled_from([None, 1]))
def test_in_pieces_or_not_a_body_is_the_same(body: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    data = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "LARGE_BYTES", 2)
        assert parse_body(data) == body == json.loads(data)
        assert parse_body(data.decode().encode("utf-16")) == body


@pytest.mark.parametrize("body", [b'{"a": 1', b'{"a": [1, 2,]}', b'{"a": NaN}', b'{"a": "\xff"}', b'["a"]', b'{"a": tru}', b'{"a": [[1], 02]}',
                                  b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}", b'{"a": ' + b"[" * 10**5, b'{"a": [[1], 1' + b"0" * 5000 + b"]}"])  # fmt: skip
def test_bad_bodies_are_refused_in_pieces_too(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "LARGE_BYTES", 2)
    with pytest.raises(ApiError, match="^the body ") as caught:
        parse_body(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("item", ["[1]", '"x"', "{}", "[]", "null", "[[1]]"])
def test_of_a_list_longer_than_any_field_the_length_is_kept(item: str) -> None:
    data = f'{{"a": [{", ".join([item] * 200_000)}], "b": [[{", ".join([item] * 200_000)}]]}}'.encode()
    body = parse_body(data)
    for held in (body["a"], body["b"][0]):
        assert len(held) == 200_000 > MAX_ITEMS and all(one is held[0] for one in held) and held[0] == json.loads(item)


def test_no_object_has_so_many_fields() -> None:
    data = json.dumps({"a": {str(number): None for number in range(100_000)}}).encode()
    with pytest.raises(ApiError, match=f"an object of 100000 fields; at most {MAX_ITEMS}"):
        parse_body(data)


def test_numbers_and_long_texts_are_read_whole() -> None:
    body = {"ids": list(range(200_000)), "each": [list(range(60_000)), [1.5]], "text": "né\n" * 300_000,
            "bias": {str(number): -1.5 for number in range(100_000)}}  # fmt: skip
    assert parse_body(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("path", "field", "item"),
    [
        ("/v1/completions", "prompt", "[1]"),
        ("/v1/completions", "prompt", '"x"'),
        ("/v1/embeddings", "input", "[1]"),
        ("/v1/embeddings", "input", '"x"'),
        ("/v1/chat/completions", "messages", "{}"),
        ("/v1/responses", "input", "{}"),
        ("/v1/messages", "messages", "{}"),
    ],
)
def test_a_million_of_them_is_refused_by_its_number(http: FlaskClient, path: str, field: str, item: str) -> None:
    others = '"max_tokens": 1, ' if path == "/v1/messages" else ""
    data = f'{{{others}"{field}": [{",".join([item] * 10**6)}]}}'
    answer = http.post(path, data=data, content_type="application/json")
    message = answer.get_json()["error"]["message"]
    assert answer.status_code == 400 and message.startswith(f"{field} ") and "1000000" in message, message
