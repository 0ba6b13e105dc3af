"""/v1/embeddings: the vector that a model makes of a text.

A body is read as a completion's without output, whose prompts the inputs are. Knows the fields and the shape of an answer;
what a vector is made of, the engine knows.
"""

from __future__ import annotations

import base64
import contextlib
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.runtime.sampling_params import PoolingParams, Range, SamplingParams
from pagegraph.web.as_chat import Names, renaming
from pagegraph.web.errors import json_response
from pagegraph.web.fields import Fields, refuse
from pagegraph.web.generate import name_ignored, start
from pagegraph.web.schema import GenerationRequest, parse_completion
from pagegraph.web.service import current_service
from pagegraph.web.submit import prompts_of, read_body

ENCODINGS = ("float", "base64")  # of a vector: a list of numbers, or float32 in little-endian bytes
DIMENSIONS = Range(1, 2**31 - 1, 256, int)
# Fields that a completion has under the same name and in the same form.
_AS_IN_COMPLETION = (
    "model", "truncate_prompt_tokens", "truncation_side", "add_special_tokens", "request_id", "priority", "cache_salt",
)  # fmt: skip
_NAMES: Names = ((r"prompts?\b", "input"),)

blueprint = Blueprint("embeddings", __name__)


@blueprint.post("/v1/embeddings")
def embeddings() -> Response:
    """An embedding of each input."""
    service = current_service()
    info = service.engine.info()

    def check(body: dict[str, Any]) -> tuple[GenerationRequest, str, Any]:
        checked, encoding_format = parse_embeddings(body, info)
        service.check_model(checked.model)
        with renaming(_NAMES):
            return checked, encoding_format, prompts_of(service, checked, info)

    checked, encoding_format, prompts = read_body(service, check)
    with renaming(_NAMES):
        generation, token_ids = start(service, info, checked, prompts)
    with contextlib.closing(generation):
        for _ in generation.batches(keep_alive_s=float("inf")):
            pass
    data = [
        {"object": "embedding", "index": index, "embedding": _written(output.embedding, encoding_format)}
        for index, output in enumerate(generation.outputs)
    ]
    tokens = sum(map(len, token_ids))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": data, "model": service.settings.served_model_name, "usage": usage}
    return name_ignored(json_response(answer), checked)


def parse_embeddings(body: dict[str, Any], info: EngineInfo) -> tuple[GenerationRequest, str]:
    """A body of POST /v1/embeddings -> a completion without output, and how vectors are to be written.

    Raises ApiError or BadParameter.
    """
    fields = Fields(body)
    given = {name: value for name in _AS_IN_COMPLETION if (value := fields.take(name)) is not None}
    given["prompt"] = fields.take("input")
    encoding_format = fields.one_of("encoding_format", ENCODINGS, "float")
    dimensions = fields.number("dimensions", DIMENSIONS, None)
    for name in ("prompt", "messages"):
        if body.get(name) is not None:
            refuse(name, "is not served here; give input")
    info.pooler.check(dimensions)
    ignored = fields.check_rest()
    with renaming(_NAMES):
        checked = parse_completion(given, info.vocab_size)
    params = SamplingParams(pooling=PoolingParams(dimensions))
    return replace(checked, params=params, max_tokens=0, max_tokens_is_default=False, ignored=ignored), encoding_format


def _written(embedding: bytes, encoding_format: str) -> str | list[float]:
    """Bytes of float32, as machines that we run on have them, little-endian."""
    if encoding_format == "base64":
        return base64.b64encode(embedding).decode()
    numbers: memoryview[float] = memoryview(embedding).cast("f")
    return [*numbers]
