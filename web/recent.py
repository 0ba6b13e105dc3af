"""/recent_requests: what became of the last requests of whoever asks, for the dashboard. Sizes and times alone: no text."""

from __future__ import annotations

import math
import time

from flask import Blueprint, Response

from pagegraph.runtime.ipc.protocol import Timeline
from pagegraph.web import access
from pagegraph.web.errors import json_response
from pagegraph.web.service import current_service

_WAIT_S = 2.0  # for the engine to tell

blueprint = Blueprint("recent", __name__)


@blueprint.get("/recent_requests")
def recent_requests() -> Response:
    """Each sequence is an entry, the newest first."""
    timelines = current_service().engine.recent(access.asker().name, _WAIT_S)
    return json_response({"object": "list", "data": [_entry(one) for one in reversed(timelines)]})


def _entry(one: Timeline) -> dict[str, str | int | float | None]:
    """Times in seconds; null of what it did not come to."""
    times = (one.arrival, one.launched, one.first_token, one.ended)
    names = ("queue_s", "prefill_s", "decode_s")
    spent = {name: _or_null(end - begin) for name, begin, end in zip(names, times, times[1:])}
    return {
        "request_id": one.label,
        "created": round(time.time() - time.monotonic() + one.arrival, 3),
        "finish_reason": one.finish_reason,
        "prompt_tokens": one.prompt_tokens,
        "cached_tokens": one.cached_tokens,
        "cache_miss_reason": one.cache_miss or None,
        "completion_tokens": one.generated_tokens,
        "total_s": _or_null(one.ended - one.arrival),
        **spent,
    }


def _or_null(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds, 6)
