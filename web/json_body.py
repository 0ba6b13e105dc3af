"""Bytes of a body to a JSON object, or a 400 that says what is wrong with them.

A large body is read piece by piece: building millions of small values takes a second, during which no other request of
the process would be answered, and no field may have so many. Knows no fields.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, NoReturn

import msgspec

from pagegraph.web.errors import ApiError

LARGE_BYTES = 1 << 18  # of a piece that is read in pieces itself
MAX_ITEMS = 8192  # of a list or object that is large and holds more than numbers: above what any field may have
_MAX_DEPTH = 16  # of large pieces within each other


def parse_body(data: bytes) -> dict[str, Any]:
    """Bytes of a body to a JSON object; raises ApiError 400 on anything else.

    Of a list that is longer than any field may have only the length is true: it holds its first value so often.
    """
    try:
        body = _read(_utf8(data), _MAX_DEPTH) if len(data) >= LARGE_BYTES else _loads(data)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ApiError(400, "the body holds a number of thousands of digits") from None
        detail = f": {error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not JSON{detail}") from None
    if not isinstance(body, dict):
        raise ApiError(400, 'the body must be a JSON object, for example {"model": "...", "prompt": "Hello"}')
    return body


def _read(piece: bytes | msgspec.Raw, depth: int) -> Any:
    """The value of UTF-8 JSON."""
    view = memoryview(piece)
    if len(view) < LARGE_BYTES:
        return _loads(bytes(view))
    begin = bytes(view[:64]).lstrip()[:1]
    if begin not in b"[{" or not begin:
        return _loads(bytes(view))
    if not depth:
        raise RecursionError
    held, whole = (
        (dict[str, msgspec.Raw], dict[str, int | float]) if begin == b"{" else (list[msgspec.Raw], list[int | float])
    )
    with contextlib.suppress(msgspec.ValidationError):  # something else is in it
        return msgspec.json.decode(piece, type=whole)
    items = msgspec.json.decode(piece, type=held)
    if isinstance(items, dict):
        if len(items) > MAX_ITEMS:
            raise ApiError(400, f"the body holds an object of {len(items)} fields; at most {MAX_ITEMS}")
        return {name: _read(value, depth - 1) for name, value in items.items()}
    if len(items) <= MAX_ITEMS:
        return [_read(item, depth - 1) for item in items]
    return [_read(items[0], depth - 1)] * len(items)


def _loads(data: bytes) -> Any:
    return json.loads(data, parse_constant=_no_constant)


def _utf8(data: bytes) -> bytes:
    """Bytes in any encoding that JSON may have as UTF-8. Raises ValueError."""
    encoding = json.detect_encoding(data)
    return data if encoding == "utf-8" else data.decode(encoding).encode()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
