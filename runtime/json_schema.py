"""What a JSON schema may hold so that a grammar can be made of it, and where in it something is wrong.

`check_schema` walks a schema without recursion and raises `SchemaProblem`, which has the place as a JSON pointer. Knows
JSON Schema (draft 2020-12, and the older names still in use) and which keywords llguidance enforces; knows no grammar.
A keyword that would narrow the answer and is not enforced is refused by name: an answer never breaks the schema that was
asked for. Keywords that nobody defined say nothing, as JSON Schema has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

MAX_DEPTH = 64  # schemas within schemas
MAX_SCHEMAS = 4096  # in all, the properties' included
MAX_ENUM = 4096  # values of all enums
# Properties of one object that are not required: all of them may follow at one place. In vocabularies of 49,152 and
# 151,646 tokens `limits` of a step are met above 300.
MAX_OPTIONAL = 256
MAX_REPEAT = 4096  # of minItems, maxItems, minProperties and maxProperties, which are counted out in the grammar
MAX_LENGTH = 1 << 20  # of minLength and maxLength
# Of all multipleOf, tens and decimal places aside: each remainder is a state, and takes 8 us and 1 KB.
MAX_REMAINDERS = 4096

MAX_WHOLE = 2**53  # up to which a float64 has every whole number

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# Keywords whose value is a schema, a list of schemas, an object of schemas.
_ONE = ("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
COUNTS = {
    "minLength": MAX_LENGTH, "maxLength": MAX_LENGTH, "minItems": MAX_REPEAT, "maxItems": MAX_REPEAT,
    "minProperties": MAX_REPEAT, "maxProperties": MAX_REPEAT,
}  # fmt: skip
# Beside these an anyOf, oneOf or $ref holds by itself.
_ALONE = {
    "anyOf", "oneOf", "$ref", "$defs", "definitions", "title", "description", "$schema", "$id", "$comment", "default",
}  # fmt: skip
# Keywords that narrow what is valid and are not enforced.
UNSUPPORTED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
    "$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor", "extends", "disallow", "divisibleBy",
    "contentSchema", "x-guidance",
)  # fmt: skip
# Values of them that narrow nothing, besides null.
_SAY_NOTHING: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,), "not": (False,), "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedItems": (True, {}), "unevaluatedProperties": (True, {}), "$recursiveAnchor": (False,),
}  # fmt: skip
# What the first says of whatever no other keyword has spoken of, the second says too where no other schema speaks.
PLAIN = {"unevaluatedProperties": "additionalProperties", "unevaluatedItems": "items"}
_NOWHERE = object()


class SchemaProblem(ValueError):
    """A schema that cannot be served; the message begins with the place."""

    def __init__(self, path: str, problem: str) -> None:
        shown = re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", path)
        shown = shown if len(shown) <= 120 else f"{shown[:60]}...{shown[-60:]}"
        super().__init__(f"at {shown or 'the top'}: {problem}")
        self.path = path


def check_schema(schema: Any) -> None:
    """Raises SchemaProblem at the first place that cannot be served."""
    seen, num_values = 0, 0
    names = _Names()
    by_pattern: list[str] = []  # places of patternProperties
    merged = False  # whether schemas hold together that may both have some
    for path, depth, one in subschemas(schema):
        seen += 1
        if seen > MAX_SCHEMAS:
            raise SchemaProblem("", f"holds more than {MAX_SCHEMAS} schemas, those of properties included")
        if depth > MAX_DEPTH:
            raise SchemaProblem(path, f"is nested more than {MAX_DEPTH} deep")
        if isinstance(one, bool):
            continue
        if not isinstance(one, dict):
            raise SchemaProblem(path, f"must be a schema, an object or true or false; got {_kind(one)}")
        _check_keywords(path, one)
        num_values += len(one.get("enum", ()))
        if num_values > MAX_ENUM:
            raise SchemaProblem(f"{path}/enum", f"the enums hold more than {MAX_ENUM} values in all")
        if "patternProperties" in one:
            by_pattern.append(f"{path}/patternProperties")
        merged |= is_merged(one)
        names.see(path, one)
    names.check(schema)
    check_multiples(schema)
    # A pattern whose schema turns out to be unsatisfiable in both would be left out, and its keys taken for others.
    if len(by_pattern) > 1 and merged:
        problem = "several patternProperties are not supported beside allOf, or keywords beside anyOf, oneOf or $ref"
        raise SchemaProblem(by_pattern[1], problem)


def check_multiples(schema: Any) -> None:
    """Raises SchemaProblem where the remainders of multipleOf are too many, tens and decimal places aside.

    Of schemas that hold together the least common multiple counts. What is no schema or no number is passed over.
    """
    every = [(path, one) for path, _, one in subschemas(schema) if isinstance(one, dict)]
    merged, seen = any(is_merged(one) for _, one in every), set()
    remainders = 1 if merged else 0
    for path, one in every:
        value = one.get("multipleOf")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value in seen:
            continue
        seen.add(value)
        own = int("".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits)))
        remainders = remainders * own if merged else remainders + own
        if remainders > MAX_REMAINDERS:
            together = "" if remainders == own else "with others of the schema "
            problem = (
                f"takes {together}{remainders} remainders, tens and decimal places aside; at most {MAX_REMAINDERS}"
            )
            raise SchemaProblem(f"{path}/multipleOf", problem)


def is_merged(schema: dict[str, Any]) -> bool:
    """Whether it holds together with others in it."""
    return "allOf" in schema or bool(schema.keys() & {"$ref", "anyOf", "oneOf"}) and not schema.keys() <= _ALONE


def says_nothing(key: str, value: Any) -> bool:
    """Whether one of `UNSUPPORTED` narrows nothing with this value."""
    return value is None or any(
        value is one or type(value) is dict and value == one for one in _SAY_NOTHING.get(key, ())
    )


def subschemas(schema: Any) -> Iterator[tuple[str, int, Any]]:
    """(JSON pointer, depth, schema) of a schema and of all within it, each before what it holds.

    At the end what else is referred to: it may stand below a key that nobody defined.
    """
    waiting, walked, pointers = [("", 0, schema)], set(), set()
    while waiting:
        path, depth, one = waiting.pop()
        yield path, depth, one
        walked.add(path)
        if isinstance(one, dict):
            waiting += reversed([(below, depth + 1, held) for below, held in children(one, path)])
            if isinstance(ref := one.get("$ref"), str) and ref.startswith("#/"):
                pointers.add(unquote(ref[1:]))
        if not waiting:
            found = [(pointer, 0, _at(schema, pointer)) for pointer in sorted(pointers - walked)]
            waiting = [one for one in found if one[2] is not _NOWHERE]


def children(schema: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """(JSON pointer, schema) of what a schema holds directly."""
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            for name, held in value.items():
                yield f"{path}/{key}/{escaped(name)}", held
        elif key in (*_LISTS, "items") and isinstance(value, list):
            for index, held in enumerate(value):
                yield f"{path}/{key}/{index}", held
        elif key in _ONE and not (key in PLAIN and value is None):
            yield f"{path}/{key}", value


def _check_keywords(path: str, schema: dict[str, Any]) -> None:
    for key, value in schema.items():
        at = f"{path}/{escaped(key)}"
        if key in UNSUPPORTED and not says_nothing(key, value) and not _is_plain(key, schema):
            where = " beside allOf, anyOf, oneOf, $ref or a list of items" if key in PLAIN else ""
            raise SchemaProblem(path, f"the keyword {key} is not supported{where}; leave it out")
        if key in COUNTS:
            _check_count(at, value, COUNTS[key])
        elif key in _LISTS or key == "required" or key == "enum":
            if not isinstance(value, list):
                raise SchemaProblem(at, f"must be a list; got {_kind(value)}")
            if key == "enum":
                _check_values(at, value)
        elif key == "patternProperties" and isinstance(value, dict) and False in value.values():
            name = next(name for name, held in value.items() if held is False)
            raise SchemaProblem(f"{at}/{escaped(name)}", "false is not supported; leave it out")
        elif key in _MAPS and not isinstance(value, dict):
            raise SchemaProblem(at, f"must be an object of schemas; got {_kind(value)}")
        elif key in NUMBERS:
            _check_bound(at, key, value)
        elif key == "const":
            _check_values(at, value)
        elif key in ("$ref", "pattern", "format") and not isinstance(value, str):
            raise SchemaProblem(at, f"must be a string; got {_kind(value)}")
    least = schema.get("minProperties", 0)
    if least > max(1, len(schema.get("required", ()))):
        problem = "above 1 and the number of required properties is not supported: a key might come twice"
        raise SchemaProblem(f"{path}/minProperties", problem)
    optional = len(schema.get("properties", {}).keys() - set(filter(_is_name, schema.get("required", ()))))
    if optional > MAX_OPTIONAL:
        raise SchemaProblem(path, f"has {optional} properties that are not required; at most {MAX_OPTIONAL} an object")
    if "type" in schema:
        _check_type(f"{path}/type", schema["type"])
    for name in schema.get("required", ()):
        if not _is_name(name):
            raise SchemaProblem(f"{path}/required", f"must hold names of properties; got {_kind(name)}")
    if (name := schema.get("format")) is not None and name not in FORMATS:
        raise SchemaProblem(f"{path}/format", f"is not supported; give one of {', '.join(FORMATS)}, or a pattern")


def _is_plain(key: str, schema: dict[str, Any]) -> bool:
    """Whether it speaks of what its own schema's keywords leave, as the key of `PLAIN` does."""
    beside = schema.keys() & {"allOf", "anyOf", "oneOf", "$ref"}
    return key in PLAIN and not beside and not isinstance(schema.get("items"), list)


class _Names:
    """What a schema's references name, and what has such names."""

    def __init__(self) -> None:
        self._refs: dict[str, str] = {}  # by path
        self._ids: set[str] = set()  # paths below the top
        self._anchors: set[str] = set()

    def see(self, path: str, schema: dict[str, Any]) -> None:
        if "$ref" in schema:
            self._refs[path] = schema["$ref"]
        if path and isinstance(name := schema.get("$id"), str) and not name.startswith("#"):
            self._ids.add(path)
        if isinstance(name := schema.get("$anchor"), str):
            self._anchors.add(name)

    def check(self, whole: dict[str, Any]) -> None:
        """Raises SchemaProblem where a reference leaves the schema or names nothing in it."""
        for path, ref in self._refs.items():
            at, name = f"{path}/$ref", unquote(ref[1:])
            if not ref.startswith("#"):
                raise SchemaProblem(at, "must stay within the schema, for example #/$defs/name")
            parts = path.split("/")
            if any("/".join(parts[:count]) in self._ids for count in range(2, len(parts) + 1)):
                raise SchemaProblem(at, "is not supported below an $id of its own; leave the $id out")
            known = _at(whole, name) is not _NOWHERE if name.startswith("/") else not name or name in self._anchors
            if not known:
                raise SchemaProblem(at, f"names {ref[:80]}, which is nowhere in the schema")


def _at(whole: Any, pointer: str) -> Any:
    """What a JSON pointer names; `_NOWHERE` if nothing."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(whole, dict) and name in whole:
            whole = whole[name]
        elif isinstance(whole, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(whole):
            whole = whole[int(name[:9])]
        else:
            return _NOWHERE
    return whole


def _check_type(path: str, value: Any) -> None:
    types = value if isinstance(value, list) else [value]
    for one in types:
        if not isinstance(one, str) or one not in TYPES:
            raise SchemaProblem(path, f"must be one of {', '.join(TYPES)}, or a list of them")
    if not types:
        raise SchemaProblem(path, "must hold a type")


def _check_count(path: str, value: Any, most: int) -> None:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not 0 <= value <= most:
        raise SchemaProblem(path, f"must be a whole number from 0 to {most}")


def _check_bound(path: str, key: str, value: Any) -> None:
    if key.startswith("exclusive") and isinstance(value, bool):  # draft 4
        raise SchemaProblem(path, f"must be a number, the bound itself; got {_kind(value)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        raise SchemaProblem(path, "must be a number from -1e15 to 1e15")
    if key == "multipleOf" and value <= 0:
        raise SchemaProblem(path, "must be a number above 0")


def _check_values(path: str, value: Any) -> None:
    """Numbers that an answer has to be: llguidance takes them for float64 and writes as many digits as tell one."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one
        elif (
            isinstance(one, int)
            and abs(one) > MAX_WHOLE
            and (abs(one) > 1e300 or int(Decimal(repr(float(one)))) != one)
        ):
            problem = f"a whole number beyond {MAX_WHOLE} that a float64 does not have is not supported; give a string"
            raise SchemaProblem(path, problem)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
