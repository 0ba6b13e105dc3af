"""Tool calls as a model would write them, by the row of their format: for prompts and for examples.

Knows the formats; `call_reader` reads what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pagegraph.runtime.text import harmony
from pagegraph.runtime.text.formats import CallFormat

Call = tuple[str, Mapping[str, Any]]  # name and arguments


def write_calls(format: CallFormat, calls: Sequence[Call]) -> str:
    """All calls of one message."""
    if format.style == "harmony":
        return f"{harmony.START}assistant".join(harmony.written(name, _json(arguments)) for name, arguments in calls)
    begin, end = "".join(format.begin), "".join(format.end)
    inside = format.between.join(begin + _written(format, *call) + end for call in calls)
    section = format.section_begin[bool(format.bare) :]
    return "".join(section) + inside + "".join(format.section_end)


def _written(format: CallFormat, name: str, arguments: Mapping[str, Any]) -> str:
    if format.style == "object":
        return f'{{"name": {_json(name)}, "{format.arguments_key}": {_json(arguments)}}}'
    if format.style == "named":
        return name + "".join(format.name_end) + _json(arguments)
    if format.style == "parameters":
        texts = {key: value if isinstance(value, str) else _json(value) for key, value in arguments.items()}
        return (
            name
            + "".join(format.name_end)
            + "".join(
                format.key_begin + key + "".join(format.key_end) + text + format.value_end
                for key, text in texts.items()
            )
        )
    if format.quote:
        return name + _gemma(dict(arguments), format.quote)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _gemma(value: Any, quote: str) -> str:
    """A value in Gemma's words, in which keys stand without quotes."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_gemma(one, quote)}' for key, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(_gemma(one, quote) for one in value)}]"
    return f"{quote}{value}{quote}" if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
