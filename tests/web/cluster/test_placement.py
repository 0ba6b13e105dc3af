"""Which replica a request goes to, without Ray: prefixes, load, room, and what replicas tell."""

from __future__ import annotations

import json
import pickle

import pytest

from pagegraph.web.cluster.messages import Request
from pagegraph.web.cluster.placement import (
    BLOCK_BYTES,
    CACHED_TOKENS,
    READY,
    REQUESTS,
    Placement,
    Prompts,
    prompt_text,
)

PROMPTS = Prompts()
NAMES = ("a", "b", "c")


def chat(*texts: str) -> Request:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text} for text in texts]}).encode()
    return Request("POST", "/v1/chat/completions", [], body, "own", PROMPTS.route(body, ""))


def told(num_requests: int = 0, ready: bool = True, cached_tokens: int = 1 << 20) -> dict:
    return {READY: ready, REQUESTS: {"other": num_requests, "own": 1000}, CACHED_TOKENS: cached_tokens}


def placement(**stats: dict) -> Placement:
    made = Placement()
    made.update({name: stats.get(name, told()) for name in NAMES})
    return made


def ended(placed: Placement, request: Request) -> str:
    name = placed.choose(request, NAMES)
    request.begun = request.ended = True
    return name


def test_the_turns_of_a_conversation_stay_together_and_strangers_take_turns() -> None:
    placed = placement()
    first = {name: ended(placed, chat(name * 400)) for name in NAMES}
    assert sorted(first.values()) == sorted(NAMES)
    for turns in (2, 3):
        for name in NAMES:
            assert ended(placed, chat(name * 400, *("more " * 40,) * turns)) == first[name]


def test_what_a_prompt_is_made_of_counts_and_not_how_the_body_is_written() -> None:
    fields = {"messages": [{"role": "system", "content": "You are terse. " * 20}], "tools": [{"type": "function"}]}
    one = json.dumps({"model": "m", **fields, "stream": True}).encode()
    other = json.dumps(
        {"temperature": 0.5, "tools": fields["tools"], "messages": fields["messages"]}, indent=1
    ).encode()
    assert prompt_text(one) == prompt_text(other) != b""
    assert PROMPTS.route(one, "k") == PROMPTS.route(other, "k")
    assert PROMPTS.route(one, "k").chains != PROMPTS.route(one, "l").chains  # keys share no prefix cache
    assert prompt_text(b"\xff") == prompt_text(b"[1]") == prompt_text(b"") == b""


def test_a_prefix_does_not_outweigh_a_long_queue() -> None:
    placed = placement()
    home = ended(placed, chat("x" * 400))
    placed.update({name: told(40 if name == home else 0) for name in NAMES})
    assert placed.choose(chat("x" * 400), NAMES) != home


def test_what_was_placed_since_counts_before_a_replica_tells_of_it() -> None:
    placed = placement()
    running = [chat(f"{number}" * 300) for number in range(6)]
    taken = [placed.choose(one, NAMES) for one in running]
    assert sorted(taken) == sorted(NAMES * 2)
    for one, name in zip(running, taken):
        if name == "b":
            one.begun = one.ended = True
    assert placed.choose(chat("z" * 300), NAMES) == "b"


def test_one_that_is_not_ready_or_was_tried_is_the_last_choice() -> None:
    placed = placement(a=told(ready=False), b=told(9))
    request = chat("hello")
    assert placed.choose(request, NAMES) == "c"
    request.tried |= {"c"}
    assert placed.choose(request, NAMES) == "b"
    request.tried |= {"b"}
    assert placed.choose(request, NAMES) == "a"
    request.tried |= {"a"}
    assert placed.choose(request, NAMES) == "c"  # which answers a second time, where there is no other
    assert placed.choose(chat("hello"), ["a"]) == "a"


def test_a_replica_is_not_held_to_cache_more_than_it_has_room_for() -> None:
    blocks = 8
    placed = placement(**dict.fromkeys(NAMES, told(cached_tokens=blocks * 16)))
    long = chat("y" * (blocks * BLOCK_BYTES * 4))
    home = ended(placed, long)
    assert len(placed._replicas[home].sent) == blocks
    assert (
        placed._replicas[home].left(long.route) == long.route.num_tokens - blocks * 16
    )  # its beginning is what is kept
    placed.update({name: told() for name in NAMES if name != home})
    assert home not in placed._replicas


@pytest.mark.parametrize("headers", [[], [(b"x-Request-ID", b"1")]])
def test_what_a_replica_is_sent_holds_nothing_of_the_choice(headers: list[tuple[bytes, bytes]]) -> None:
    request = Request("POST", "/v1/x?y=1", headers, b"{}" * 1000, "own", chat("w" * 100_000).route, {"a"})
    sent = pickle.dumps(request)
    assert len(sent) < 3000
    got = pickle.loads(sent)
    assert (got.method, got.target, got.headers, got.body, got.front) == (
        "POST",
        "/v1/x?y=1",
        headers,
        b"{}" * 1000,
        "own",
    )
    assert got.tried == set() and got.route.chains == ()
