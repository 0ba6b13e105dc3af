"""Log-probabilities of prompts and `best_of` over the fake engine, in the shapes of OpenAI and vLLM."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient
from openai.types import Completion

from pagegraph.runtime.ipc.protocol import Submit, TokenDelta, TokenLogprob
from pagegraph.runtime.text.tokenizer import Tokenizer
from pagegraph.web import prompt_logprobs
from tests.conftest import FakeEngine
from tests.web.test_openai import MESSAGES, events, strict

TEXT = "the end of the world"


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def complete(http: FlaskClient, **body: Any) -> Any:
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": TEXT, **body})
    assert answer.status_code == 200, answer.json
    return answer.json


def checked_echo(choice: dict[str, Any], tokenizer: Tokenizer, prompt: str) -> None:
    """Parallel lists over prompt and output; every token stands where its offset says."""
    found, ids = choice["logprobs"], tokenizer.encode(prompt)
    lengths = {len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert len(lengths) == 1
    assert found["tokens"][: len(ids)] == [tokenizer.decode([one]) for one in ids]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1 : len(ids)] == [-at / 8 for at in range(1, len(ids))]
    for token, value, tops in list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"]))[1:]:
        assert tops[token] == value
    for token, at in zip(found["tokens"], found["text_offset"]):
        assert choice["text"][at:].startswith(token) or token == "<|end|>"


@pytest.mark.parametrize("max_tokens", [0, 1, 50])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_with_logprobs(
    http: FlaskClient, fake_engine, tokenizer: Tokenizer, max_tokens: int, as_ids: bool
) -> None:
    prompts: list[Any] = [TEXT, "hello"]
    asked = {
        "prompt": [tokenizer.encode(one) for one in prompts] if as_ids else prompts,
        "echo": True, "logprobs": 1, "max_tokens": max_tokens, "n": 2,
    }  # fmt: skip
    whole = complete(http, **asked)
    choices = whole["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice, prompt in zip(choices, [TEXT, TEXT, "hello", "hello"], strict=True):
        assert choice["text"].startswith(prompt)
        checked_echo(choice, tokenizer, prompt)
        size = len(tokenizer.encode(prompt))
        assert choice["logprobs"]["text_offset"][size:][:1] == ([len(prompt)] if max_tokens else [])
        # The official client's types lack the null that OpenAI's API gives.
        choice["logprobs"]["token_logprobs"][0], choice["logprobs"]["top_logprobs"][0] = 0.0, {}
    strict(Completion, whole)
    # All that is known of a prompt comes from its first sequence, unless there is nothing else to run.
    wanted = [submit.params.prompt_logprobs for submit in fake_engine.submits]
    assert wanted == ([1] * 4 if max_tokens == 0 else [1, None, 1, None])
    assert whole["usage"]["completion_tokens"] == 4 * min(max_tokens, 3 if max_tokens == 50 else max_tokens)


def test_a_stream_with_echo_and_logprobs_is_the_whole_answer(http: FlaskClient, tokenizer: Tokenizer) -> None:
    for extra in ({}, {"return_token_ids": True}):
        asked = {"prompt": [TEXT, "hello"], "echo": True, "logprobs": 2, "n": 2, "max_tokens": 9, **extra}
        chunks = events(http.post("/v1/completions", json={**asked, "stream": True}).data)
        for choice in complete(http, **asked)["choices"]:
            parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            for name, values in choice["logprobs"].items():
                assert [one for part in parts if part["logprobs"] for one in part["logprobs"][name]] == values
            assert parts[0].get("prompt_token_ids") == choice.get("prompt_token_ids")


def expected_rows(tokenizer: Tokenizer, ids: list[int], top: int) -> list[Any]:
    """As the fake engine has it: the token itself of rank 2, and `top` others."""
    text = lambda one: tokenizer.token_bytes(one).decode("utf-8", "replace")  # noqa: E731
    rows: list[Any] = [None]
    for at, token in enumerate(ids[1:], 1):
        tops = [one for one in range(7, 7 + top) if one != token]
        if top >= 2:
            tops = [tops[0], *tops[1 : top - 1]]  # the token's own is the second of them
        row = {str(token): {"logprob": -at / 8, "rank": 2, "decoded_token": text(token)}}
        for place, one in enumerate(tops):
            rank = place + 1 if place == 0 else place + 2
            row.setdefault(str(one), {"logprob": -1 / 16, "rank": rank, "decoded_token": text(one)})
        rows.append(row)
    return rows


@pytest.mark.parametrize("top", [0, 1, 3])
def test_prompt_logprobs_in_the_shape_of_vllm(http: FlaskClient, tokenizer: Tokenizer, top: int) -> None:
    ids = tokenizer.encode(TEXT)
    whole = complete(http, prompt_logprobs=top, n=2, prompt=[TEXT, "hello"])
    rows = [choice["prompt_logprobs"] for choice in whole["choices"]]
    assert rows[0] == rows[1] == expected_rows(tokenizer, ids, top)
    assert rows[2] == rows[3] == expected_rows(tokenizer, tokenizer.encode("hello"), top)
    assert all(choice["logprobs"] is None for choice in whole["choices"])
    chat = http.post("/v1/chat/completions", json={"messages": MESSAGES, "prompt_logprobs": top}).json
    assert chat["prompt_logprobs"] == expected_rows(tokenizer, tokenizer.apply_chat(MESSAGES), top)
    assert "prompt_logprobs" not in http.post("/v1/chat/completions", json={"messages": MESSAGES}).json


def test_max_tokens_0_with_prompt_logprobs_alone(http: FlaskClient, fake_engine) -> None:
    (choice,) = complete(http, prompt_logprobs=0, max_tokens=0)["choices"]
    assert choice["text"] == "" and choice["finish_reason"] == "length" and len(choice["prompt_logprobs"]) > 1
    assert fake_engine.submits[0].params.max_tokens == 0


def test_a_prompt_of_the_whole_context_is_read(http: FlaskClient, tokenizer: Tokenizer) -> None:
    whole, more = [7] * 128, [7] * 129
    (choice,) = complete(http, prompt=whole, echo=True, logprobs=0, max_tokens=0)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 128
    assert (
        len(complete(http, prompt=more, echo=True, logprobs=0, max_tokens=0, truncate_prompt_tokens=-1)["choices"]) == 1
    )
    for body in ({"prompt": more, "max_tokens": 0}, {"prompt": whole, "max_tokens": 1}):
        answer = http.post("/v1/completions", json={"echo": True, "logprobs": 0, **body})
        assert answer.status_code == 400 and answer.json["error"]["code"] == "context_length_exceeded"


def test_too_many_for_one_answer(http: FlaskClient, fake_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logprobs, "MAX_ENTRIES", 300)
    for asked, param in (({"echo": True, "logprobs": 4}, "logprobs"), ({"prompt_logprobs": 4}, "prompt_logprobs")):
        answer = http.post("/v1/completions", json={"prompt": [[7] * 31, [7] * 30], **asked})
        error = answer.json["error"]
        assert (answer.status_code, error["param"]) == (400, param) and "at most 300" in error["message"]
    assert not fake_engine.submits
    complete(http, prompt=[[7] * 30, [7] * 30], prompt_logprobs=4)


def rated(scores: list[list[float]]):
    """A script: sequence j of a prompt gets a token for each of scores[j], with that log-probability."""

    def script(submit: Submit) -> list[TokenDelta]:
        own = scores[submit.params.seed - 5]
        deltas = FakeEngine.prompt_deltas(submit)
        for at, score in enumerate(own):
            reason = "length" if at == len(own) - 1 else ""
            entry = [TokenLogprob(20 + submit.params.seed, score, 1)]
            deltas.append(TokenDelta(submit.request_id, [20 + submit.params.seed], reason, logprobs=entry))
        return deltas

    return script


def test_best_of_gives_the_likeliest_by_token(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    """By the mean, not the sum; all of them are counted."""
    fake_engine.script = rated([[-3.0], [-1.0, -1.0, -1.0, -1.0], [-2.0, -0.5], [float("-inf")]])
    asked = {"prompt": ["a", "b"], "n": 2, "best_of": 4, "seed": 5, "max_tokens": 9, "temperature": 1}
    whole = complete(http, **asked)
    texts = [tokenizer.decode([26]) * 4, tokenizer.decode([27]) * 2]
    assert [choice["text"] for choice in whole["choices"]] == texts * 2
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in whole["choices"])
    assert whole["usage"]["completion_tokens"] == 16 and len(fake_engine.submits) == 8
    shown = complete(http, **asked, logprobs=0, echo=True)
    assert [choice["text"] for choice in shown["choices"]] == [p + text for p in "ab" for text in texts]
    assert [choice["logprobs"]["token_logprobs"] for choice in shown["choices"]][:2] == [
        [None, -1.0, -1.0, -1.0, -1.0],
        [None, -2.0, -0.5],
    ]
