"""Several API keys: each opens the server, and keeps its users' prefixes and stored responses from those of the others.

And pages of other origins: their scripts may ask where the server allows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.datastructures import Headers

from pagegraph.runtime.askers import Asker
from pagegraph.runtime.ipc.protocol import Failed, Quota, Quotas

KEYS = ("first-key", "second key")
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def header(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def client(make_app: Callable[..., Flask]) -> FlaskClient:
    return make_app(api_key="\n".join(KEYS)).test_client()


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(client: FlaskClient, key: str) -> None:
    assert client.get("/v1/models", headers=header(key)).status_code == 200
    assert client.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    # A program may send both headers, and one of them for somebody else.
    assert client.get("/v1/models", headers=header("other") | {"x-api-key": key}).status_code == 200


@pytest.mark.parametrize("key", ["", "first", "first-key\nsecond key", "second", "first-key second key"])
def test_nothing_else_does(client: FlaskClient, key: str) -> None:
    given = {"x-api-key": key} if "\n" not in key else {"x-api-key": key.replace("\n", " ")}
    for headers in (given, {"Authorization": f"Bearer {given['x-api-key']}"}):
        assert client.get("/v1/models", headers=headers).status_code == 401


def salts(client: FlaskClient, fake_engine, *headers: dict[str, str], **more: str) -> list[str]:
    """The cache salts that the engine gets of a chat with each of these headers."""
    before = len(fake_engine.submits)
    for one in headers:
        assert client.post("/v1/chat/completions", json=CHAT | more, headers=one).status_code == 200
    return [submit.cache_salt for submit in fake_engine.submits[before:]]


def test_each_key_has_a_prefix_cache_of_its_own(client: FlaskClient, fake_engine) -> None:
    first, again, second = salts(client, fake_engine, header(KEYS[0]), {"x-api-key": KEYS[0]}, header(KEYS[1]))
    assert first == again != second and first and second
    assert not any(key in salt for key in KEYS for salt in (first, second))
    mine, theirs = salts(client, fake_engine, header(KEYS[0]), header(KEYS[1]), cache_salt="salt")
    assert len({first, second, mine, theirs}) == 4
    # A salt that somebody makes up does not lead into another's cache.
    (made_up,) = salts(client, fake_engine, header(KEYS[1]), cache_salt=first)
    assert made_up not in (first, second, mine)


@pytest.mark.parametrize("key", [None, "the-only-key"])
def test_where_all_have_one_key_they_share_the_cache(
    make_app: Callable[..., Flask], fake_engine, key: str | None
) -> None:
    client = make_app(api_key=key).test_client()
    assert salts(client, fake_engine, header(key or "any")) == [""]
    assert salts(client, fake_engine, header(key or "any"), cache_salt="salt") == ["salt"]


def test_a_stored_response_is_seen_by_its_key_alone(client: FlaskClient) -> None:
    mine, theirs = map(header, KEYS)
    made = client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 4}, headers=mine).json
    path = f"/v1/responses/{made['id']}"
    for ask in (client.get, client.delete):
        assert ask(path, headers=theirs).status_code == 404
    assert client.get(f"{path}/input_items", headers=theirs).status_code == 404
    assert client.post(f"{path}/cancel", headers=theirs).status_code == 404
    follows = {"input": "And?", "previous_response_id": made["id"], "max_output_tokens": 4}
    refers = {"input": [{"type": "item_reference", "id": made["output"][0]["id"]}], "max_output_tokens": 4}
    for body in (follows, refers):
        assert client.post("/v1/responses", json=body, headers=theirs).status_code in (400, 404)
        assert client.post("/v1/responses", json=body, headers=mine).status_code == 200
    assert client.get(path, headers=mine).json["id"] == made["id"]
    assert client.delete(path, headers=mine).status_code == 200
    assert client.get(path, headers=mine).status_code == 404


def test_a_background_response_is_stored_for_its_key(client: FlaskClient) -> None:
    mine, theirs = map(header, KEYS)
    body = {"input": "Hello", "background": True, "max_output_tokens": 4}
    path = f"/v1/responses/{client.post('/v1/responses', json=body, headers=mine).json['id']}"
    end = time.monotonic() + 20
    while client.get(path, headers=mine).json["status"] in ("queued", "in_progress") and time.monotonic() < end:
        time.sleep(0.02)
    assert client.get(path, headers=mine).json["status"] in ("completed", "incomplete")
    assert client.get(path, headers=theirs).status_code == 404


def test_a_key_takes_its_limits_to_the_engine(make_app: Callable[..., Flask], fake_engine) -> None:
    lines = "first-key requests_per_minute=5\nsecond key"
    client = make_app(api_key=lines, tokens_per_minute=100).test_client()
    salts(client, fake_engine, *map(header, KEYS))
    first, second = (submit.asker for submit in fake_engine.submits)
    assert first == Asker(first.name, 5, 100, None) and second == Asker(second.name, None, 100, None)
    assert first.name != second.name
    assert client.get("/v1/models", headers=header(lines.partition("\n")[0])).status_code == 401


@pytest.mark.parametrize("key", [None, "the-only-key"])
def test_limits_hold_for_all_where_there_is_one_key_or_none(
    make_app: Callable[..., Flask], fake_engine, key: str | None
) -> None:
    client = make_app(api_key=key, max_parallel_requests=3).test_client()
    salts(client, fake_engine, header(key or "any"))
    assert fake_engine.submits[-1].asker == Asker("", None, None, 3)


def test_keys_may_share_a_prefix_cache(make_app: Callable[..., Flask], fake_engine) -> None:
    client = make_app(api_key="\n".join(KEYS), prefix_cache_per_key=False).test_client()
    assert salts(client, fake_engine, *map(header, KEYS)) == ["", ""]
    assert salts(client, fake_engine, *map(header, KEYS), cache_salt="salt") == ["salt", "salt"]
    assert len({submit.asker.name for submit in fake_engine.submits}) == 2


def test_one_key_does_not_hold_all_threads(make_app: Callable[..., Flask], fake_engine) -> None:
    app = make_app(api_key="\n".join(KEYS), threads=20)  # ten are for what takes its time
    fake_engine.script = lambda submit: []
    client = app.test_client()
    body = CHAT | {"stream": True}
    held = [client.post("/v1/chat/completions", json=body, headers=header(KEYS[0])) for _ in range(10)]
    assert [answer.status_code for answer in held] == [200] * 9 + [503]
    assert "that one key may hold are taken: threads = 20" in held[-1].json["error"]["message"]
    others = client.post("/v1/chat/completions", json=body, headers=header(KEYS[1]))
    assert others.status_code == 200
    for answer in (*held, others):
        answer.close()
    again = client.post("/v1/chat/completions", json=body, headers=header(KEYS[0]))
    assert again.status_code == 200
    again.close()


QUOTAS = Quotas(Quota(60, 59, 1.0), Quota(10_000, 9_100, 90.5))
TOLD = {
    "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59", "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-limit-tokens": "10000", "x-ratelimit-remaining-tokens": "9100", "x-ratelimit-reset-tokens": "1m30.5s",
}  # fmt: skip


def quotas_told(headers: Headers) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith("x-ratelimit")}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_tells_what_its_key_has_left(client: FlaskClient, fake_engine, stream: bool) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=header(KEYS[0]))
    assert not quotas_told(answer.headers)
    fake_engine.quotas = QUOTAS
    answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=header(KEYS[0]))
    assert quotas_told(answer.headers) == TOLD
    fake_engine.quotas = Quotas(requests=Quota(3, 0, 0.0125))
    told = quotas_told(client.post("/v1/responses", json={"input": "Hello"}, headers=header(KEYS[0])).headers)
    assert told == {
        "x-ratelimit-limit-requests": "3", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "13ms",
    }  # fmt: skip


@pytest.mark.parametrize(("path", "kind"), [("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")])
def test_a_key_at_its_limit_gets_429(client: FlaskClient, fake_engine, path: str, kind: str) -> None:
    message = "rate limit reached: requests_per_minute = 60 of this key; try again in 11.2 s"
    fake_engine.script = lambda s: [Failed(s.request_id, 429, message, retry_after_s=11.2, quotas=QUOTAS)]
    answer = client.post(path, json=CHAT | {"stream": True}, headers=header(KEYS[0]))
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "12"
    assert quotas_told(answer.headers) == TOLD
    error = answer.json["error"]
    assert error["type"] == "rate_limit_error" and error["message"] == message
    assert kind == "anthropic" or (error["code"], error["param"]) == ("rate_limit_exceeded", None)


ORIGIN, OTHER = "https://chat.example.org", "https://evil.example.org"


def preflight(client: FlaskClient, origin: str) -> dict[str, str]:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = client.options("/v1/chat/completions", headers=asked)
    return dict(answer.headers) | {"status": str(answer.status_code)}


@pytest.mark.parametrize("allowed", [f"{ORIGIN} http://localhost:3000", "*"])
def test_pages_of_allowed_origins_may_ask(make_app: Callable[..., Flask], allowed: str) -> None:
    client = make_app(api_key="key", allowed_origins=allowed).test_client()
    told = preflight(client, ORIGIN)  # a browser sends no key with it
    assert told["status"] == "204" and "POST" in told["Access-Control-Allow-Methods"]
    assert told["Access-Control-Allow-Headers"] == "authorization,content-type"
    wanted = ORIGIN if allowed != "*" else "*"
    for headers in (header("key"), {}):  # a refusal, too, has to be readable
        answer = client.post("/v1/chat/completions", json=CHAT, headers=headers | {"Origin": ORIGIN})
        assert answer.status_code == (200 if headers else 401)
        assert answer.headers["Access-Control-Allow-Origin"] == wanted
        assert ("Origin" in answer.headers.get("Vary", "")) == (allowed != "*")
    streamed = client.post(
        "/v1/chat/completions", json=CHAT | {"stream": True}, headers=header("key") | {"Origin": ORIGIN}
    )
    assert streamed.headers["Access-Control-Allow-Origin"] == wanted and streamed.text.endswith("[DONE]\n\n")
    assert "Access-Control-Allow-Origin" not in client.get("/v1/models", headers=header("key")).headers


@pytest.mark.parametrize("allowed", [ORIGIN, None])
def test_others_may_not(make_app: Callable[..., Flask], allowed: str | None) -> None:
    client = make_app(allowed_origins=allowed).test_client()
    for told in (preflight(client, OTHER), preflight(client, "null"), preflight(client, ORIGIN + ".evil.org")):
        assert "Access-Control-Allow-Origin" not in told and "Access-Control-Allow-Methods" not in told
    answer = client.get("/v1/models", headers={"Origin": OTHER})
    assert answer.status_code == 200 and "Access-Control-Allow-Origin" not in answer.headers
