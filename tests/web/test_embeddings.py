"""/v1/embeddings over the fake engine, as the official client's types check it."""

from __future__ import annotations

import base64
from array import array
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient
from openai.types import CreateEmbeddingResponse

from pagegraph.runtime.ipc.protocol import Failed
from pagegraph.runtime.pooling import Pooler
from pagegraph.runtime.sampling_params import PoolingParams
from pagegraph.runtime.text.tokenizer import Tokenizer
from tests.web.test_openai import strict


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def embed(http: FlaskClient, value: Any, **more: Any) -> Any:
    answer = http.post("/v1/embeddings", json={"model": "tiny", "input": value, **more})
    assert answer.status_code == 200, answer.json
    return answer.json


def vector(ids: list[int], dimensions: int = 3) -> list[float]:
    """As the fake engine makes it, in float32."""
    return array("f", [len(ids), ids[0] / 3, ids[-1] / 3][:dimensions]).tolist()


def test_every_form_of_input(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    texts = ["hello world", "the end"]
    ids = [tokenizer.encode(text) for text in texts]
    for value, wanted in ((texts[0], ids[:1]), (texts, ids), (ids[0], ids[:1]), (ids, ids)):
        typed = strict(CreateEmbeddingResponse, embed(http, value))
        assert [one.embedding for one in typed.data] == list(map(vector, wanted))
        assert [one.index for one in typed.data] == list(range(len(wanted)))
        assert typed.usage.prompt_tokens == typed.usage.total_tokens == sum(map(len, wanted))
        assert typed.model == "tiny"
    params = fake_engine.submits[0].params
    assert params.pooling == PoolingParams() and params.max_tokens == 0


def test_base64_is_the_same_numbers(http: FlaskClient, tokenizer: Tokenizer) -> None:
    (one,) = embed(http, "hello", encoding_format="base64", user="somebody")["data"]
    assert array("f", base64.b64decode(one["embedding"])).tolist() == vector(tokenizer.encode("hello"))


def test_dimensions(http: FlaskClient, fake_engine, tokenizer: Tokenizer) -> None:
    (one,) = embed(http, "hello", dimensions=2)["data"]
    assert one["embedding"] == vector(tokenizer.encode("hello"), 2)
    assert fake_engine.submits[0].params.pooling == PoolingParams(2)


def test_a_long_input_is_cut_if_that_is_asked(http: FlaskClient, fake_engine) -> None:
    ids = list(range(10, 150))
    for keep, side, wanted in ((-1, "left", ids[-128:]), (5, "right", ids[:5]), (128, "left", ids[-128:])):
        usage = embed(http, ids, truncate_prompt_tokens=keep, truncation_side=side)["usage"]
        assert fake_engine.submits[-1].token_ids == wanted and usage["total_tokens"] == len(wanted)
    embed(http, ids[:128])  # the whole context, for there is no output


BAD = [
    ({"input": None}, "input"), ({"input": []}, "input"), ({"input": ""}, "input"), ({"input": [[]]}, "input"),
    ({"input": 3}, "input"), ({"input": ["a", 1]}, "input"), ({"input": [-1]}, "input"), ({"input": [10**6]}, "input"),
    ({"input": [2**63]}, "input"), ({"input": ["x"] * 1025}, "input"), ({"input": [7] * 129}, "input"),
    ({"input": "x" * 100_000}, "input"),
    ({"dimensions": 0}, "dimensions"), ({"dimensions": 4}, "dimensions"), ({"dimensions": 1}, "dimensions"),
    ({"dimensions": "2"}, "dimensions"), ({"encoding_format": "bytes"}, "encoding_format"),
    ({"encoding_format": 3}, "encoding_format"), ({"truncate_prompt_tokens": 129}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"), ({"prompt": "a"}, "prompt"),
    ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("wish", "param"), BAD, ids=lambda one: str(one)[:40])
def test_bad_requests_name_their_field(http: FlaskClient, fake_engine, wish: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/embeddings", json={"input": "hello", **wish})
    error = answer.json["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert error["message"].startswith(param) or error["code"] == "context_length_exceeded"
    assert "of prompt" not in error["message"]
    assert not fake_engine.submits


def test_a_model_without_embeddings_says_so(http: FlaskClient, fake_engine) -> None:
    fake_engine.info = msgspec.structs.replace(fake_engine.info, pooler=Pooler(3, refused="it has a Dense module"))
    answer = http.post("/v1/embeddings", json={"input": "hello"})
    assert answer.status_code == 400 and "it has a Dense module" in answer.json["error"]["message"]


def test_other_models_and_failures(http: FlaskClient, fake_engine) -> None:
    assert http.post("/v1/embeddings", json={"input": "a", "model": "other"}).status_code == 404
    fake_engine.script = lambda submit: [Failed(submit.request_id, 500, "broken")]
    assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 500


def test_fields_without_effect_are_named(http: FlaskClient) -> None:
    answer = http.post("/v1/embeddings", json={"input": "a", "user": "x", "temperature": 1, "strange": 2})
    assert answer.status_code == 200
    assert set(answer.headers["x-ignored-fields"].split(", ")) == {"user", "temperature", "strange"}
