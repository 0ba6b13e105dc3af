"""`truncation: auto`: the oldest turns of a conversation that is too long are left out.

A turn begins with a user's message; system messages and the last turn stay. Knows messages, not items.
"""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import Any

from pagegraph.runtime.ipc.protocol import EngineInfo
from pagegraph.web.schema import GenerationRequest
from pagegraph.web.service import Service
from pagegraph.web.submit import encode, no_unicode, prompt_text


def shortened(service: Service, info: EngineInfo, checked: GenerationRequest) -> GenerationRequest:
    """The request with as many of its turns as leave room for the answer; the last one alone if none does.

    Raises ApiError, also where the chat template refuses what is left, or ClientGone.
    """
    asked = None if checked.max_tokens_is_default else checked.max_tokens
    room = info.max_model_len - max(asked or 1, checked.params.min_tokens)
    turns = [index for index, message in enumerate(checked.messages) if message["role"] == "user"]
    # The first turn begins with the conversation, whoever speaks first in it.
    starts = [0, *turns[1:]]

    def fits(start: int) -> bool:
        text = prompt_text(service.chat, _from(checked, start))
        at_least = service.tokenizer.min_tokens(text, enough=room + 1)
        return at_least <= room and len(encode(service, text, checked.add_special_tokens)) <= room

    try:
        left_out = bisect.bisect_left(starts, True, hi=len(starts) - 1, key=fits)
    except UnicodeEncodeError:
        raise no_unicode("input") from None
    return _from(checked, starts[left_out])


def _from(checked: GenerationRequest, start: int) -> GenerationRequest:
    def stays(index: int, message: dict[str, Any]) -> bool:
        return index >= start or message["role"] in ("system", "developer")

    kept = [message for index, message in enumerate(checked.messages) if stays(index, message)]
    return replace(checked, messages=kept)
