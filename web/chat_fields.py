"""The fields that only a chat has, besides its messages: tools, reasoning, and what a chat template may read.

Knows which of them a template may heed or not; whether this one does is seen when the prompt is rendered.
"""

from __future__ import annotations

from typing import Any

from pagegraph.runtime.sampling_params import shown
from pagegraph.web.fields import Fields, refuse
from pagegraph.web.tools import read_tools

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
VERBOSITIES = ("low", "medium", "high")


def read_chat_fields(fields: Fields) -> dict[str, Any]:
    """Fields of GenerationRequest that only a chat has."""
    advice = {
        name: value
        for name, words in (("reasoning_effort", EFFORTS), ("verbosity", VERBOSITIES))
        if (value := fields.one_of(name, words, ""))
    }
    return {
        "tools": read_tools(fields),
        "include_reasoning": fields.boolean("include_reasoning", True),
        "advice": advice,
        "documents": _documents(fields.take("documents")),
    }


def _documents(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        refuse("documents", f'must be a list, for example [{{"title": "A", "text": "..."}}]; got {shown(value)}')
    for index, document in enumerate(value):
        if not isinstance(document, dict):
            refuse(f"documents[{index}]", f'must be an object, for example {{"text": "..."}}; got {shown(document)}')
    return value
