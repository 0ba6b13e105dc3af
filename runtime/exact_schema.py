"""A schema as llguidance takes it whole: what it would leave out or read otherwise, written in words that it enforces.

`made_exact` changes a schema that `check_schema` has passed. Formats get their missing part, patterns Rust's syntax,
lists under `items` the name of draft 2020-12, numbers of things their whole form, keys one way to be written; keywords
that say nothing go. Knows no grammar.
"""

from __future__ import annotations

import re
from typing import Any

from pagegraph.runtime.ecma_regex import EcmaProblem, to_rust
from pagegraph.runtime.json_schema import (
    COUNTS,
    NUMBERS,
    PLAIN,
    UNSUPPORTED,
    SchemaProblem,
    escaped,
    is_merged,
    says_nothing,
    subschemas,
)

NEXT = 1e-6  # numbers closer to an exclusive bound do not come
MAX_EXACT = 1e8  # of such a bound

_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DAY = f"(?:{_LEAP_YEAR}-02-29|[0-9]{{4}}-(?:0[13-9]|1[0-2]|02-(?:[01]|2[0-8])))"
_CLOCK = "[0-9]{2}:[0-9]{2}:[0-5]"
# What llguidance leaves out of a format: the days of February, when a second may be the 60th (here: never), how long
# the whole may be.
_BESIDE_FORMAT = {
    "date": {"pattern": f"^{_DAY}"},
    "date-time": {"pattern": f"^{_DAY}[-0-9]*[Tt]{_CLOCK}"},
    "time": {"pattern": f"^{_CLOCK}"},
    "hostname": {"maxLength": 253},
    "email": {"maxLength": 254},
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# llguidance writes a key that a pattern describes without needless escapes, and any other key with them: "\\u0061" would
# pass for a key that is not "a". Holding together with this, all are described by a pattern.
ANY_KEY = "^(?s:.*)$"  # without ^ and $ it takes ten times as long at each key
_PLAIN_KEYS = {"patternProperties": {ANY_KEY: True}, "additionalProperties": False}


def made_exact(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, changed. Raises SchemaProblem where something cannot be said."""
    held = list({id(one): (path, one) for path, _, one in subschemas(schema) if isinstance(one, dict)}.values())
    fractions = any(isinstance(one.get(key), float) and one[key] % 1 for _, one in held for key in NUMBERS[:4])
    merged = any(is_merged(one) for _, one in held)
    for key in ("$schema", "$id"):  # of all drafts the words are read alike, and references stay within
        schema.pop(key, None)
    for path, one in held:
        _drop_empty(one)
        _write_patterns(path, one)
        _write_keys_plainly(path, one)
        if more := _BESIDE_FORMAT.get(str(one.get("format"))):
            _and(one, dict(more))
        if merged:
            _name_prefix_items(path, one)
        if fractions:
            _include_bounds(path, one)
    return schema


def _and(schema: dict[str, Any], more: dict[str, Any]) -> None:
    schema["allOf"] = [*schema.get("allOf", ()), more]


def _drop_empty(schema: dict[str, Any]) -> None:
    """Keywords that say nothing go, and those of what nobody evaluated become plain where no other schema evaluates."""
    for key in [key for key in UNSUPPORTED if key in schema]:
        value = schema.pop(key)
        if not says_nothing(key, value):
            schema.setdefault(PLAIN[key], value)
    for key in COUNTS.keys() & schema.keys():
        schema[key] = int(schema[key])


def _write_patterns(path: str, schema: dict[str, Any]) -> None:
    if "pattern" in schema:
        schema["pattern"] = _rust(f"{path}/pattern", schema["pattern"])
    if by_pattern := schema.get("patternProperties"):
        where = f"{path}/patternProperties"
        written = {_rust(f"{where}/{escaped(name)}", name): held for name, held in by_pattern.items()}
        if len(written) < len(by_pattern):
            raise SchemaProblem(where, "has two names of one meaning; leave one out")
        schema["patternProperties"] = written


def _rust(path: str, pattern: str) -> str:
    try:
        return to_rust(pattern)
    except EcmaProblem as error:
        raise SchemaProblem(path, str(error)) from None


def _write_keys_plainly(path: str, schema: dict[str, Any]) -> None:
    """Beside patterns of its own no other keys come: they cannot be told from those by a pattern."""
    others, by_pattern = schema.get("additionalProperties", True), schema.get("patternProperties")
    if others is False and not by_pattern:
        return
    properties = schema.get("properties", {})
    for name in (*properties, *schema.get("required", ())):
        if _CONTROL.search(name):  # which has two ways to be written in any case
            problem = "has control characters in its name, which is served only where no other keys may come"
            raise SchemaProblem(f"{path}/properties/{escaped(name)}", problem)
    if by_pattern:
        missing = [name for name in schema.get("required", ()) if name not in properties]
        if others is not False:
            schema["properties"] = {**properties, **dict.fromkeys(missing, others)}
        schema["additionalProperties"] = False
    elif properties or schema.get("required"):
        _and(schema, dict(_PLAIN_KEYS))


def _name_prefix_items(path: str, schema: dict[str, Any]) -> None:
    """Older drafts' list of items: what it is merged with would take its places for any others."""
    if not isinstance(schema.get("items"), list):
        return
    if "prefixItems" in schema:
        raise SchemaProblem(f"{path}/items", "must be a schema beside prefixItems; got a list")
    schema["prefixItems"] = schema.pop("items")
    if "additionalItems" in schema:
        schema["items"] = schema.pop("additionalItems")


def _include_bounds(path: str, schema: dict[str, Any]) -> None:
    """An exclusive whole bound becomes the inclusive one next to it.

    It would be taken for inclusive as it is where the other bound is a fraction beside it, maybe in a schema that it is
    merged with. Raises SchemaProblem where that is too large.
    """
    for key, inclusive, step in (("exclusiveMinimum", "minimum", NEXT), ("exclusiveMaximum", "maximum", -NEXT)):
        if key in schema and schema[key] % 1 == 0:
            if abs(schema[key]) >= MAX_EXACT:
                raise SchemaProblem(f"{path}/{key}", f"{MAX_EXACT:g} and more is not supported beside fractions")
            _and(schema, {inclusive: round(schema.pop(key) + step, 9)})
