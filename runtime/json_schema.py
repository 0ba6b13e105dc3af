"""What a JSON schema may hold so that a grammar can be made of it, and where in it something is wrong.

`check_schema` walks a schema without recursion and raises `SchemaProblem`, which has the place as a JSON pointer. Knows
JSON Schema (draft 2020-12, and the older names still in use) and which keywords llguidance enforces; knows no grammar.
A keyword that would narrow the answer and is not enforced is refused by name: an answer never breaks the schema that was
asked for. Keywords that nobody defined say nothing, as JSON Schema has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

MAX_DEPTH = 64  # schemas within schemas
MAX_SCHEMAS = 4096  # in all, the properties' included
MAX_ENUM = 4096  # values of all enums
MAX_OPTIONAL = 450  # properties of one object that are not required: all of them may follow at one place
MAX_REPEAT = 4096  # of minItems, maxItems, minProperties and maxProperties, which are counted out in the grammar
MAX_LENGTH = 1 << 20  # of minLength and maxLength

NEXT = 1e-6  # numbers closer to an exclusive bound do not come
MAX_EXACT = 1e8  # of such a bound
MAX_WHOLE = 2**53  # up to which a float64 has every whole number

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# Keywords whose value is a schema, a list of schemas, an object of schemas.
_ONE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = {
    "minLength": MAX_LENGTH, "maxLength": MAX_LENGTH, "minItems": MAX_REPEAT, "maxItems": MAX_REPEAT,
    "minProperties": MAX_REPEAT, "maxProperties": MAX_REPEAT,
}  # fmt: skip
# Beside these an anyOf, oneOf or $ref holds by itself.
_ALONE = {
    "anyOf",
    "oneOf",
    "$ref",
    "$defs",
    "definitions",
    "title",
    "description",
    "$schema",
    "$id",
    "$comment",
    "default",
}
# Keywords that narrow what is valid and are not enforced.
UNSUPPORTED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
    "$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy", "contentSchema", "x-guidance",
)  # fmt: skip


_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = {"pattern": f"^(?:{_LEAP_YEAR}-02-29|[0-9]{{4}}-(?:0[13-9]|1[0-2]|02-(?:[01]|2[0-8])))"}
# What llguidance leaves out of a format: the days of February, and how long the whole may be.
_BESIDE_FORMAT = {
    "date": _DATE, "date-time": _DATE, "hostname": {"maxLength": 253},
    "email": {"maxLength": 254},
}  # fmt: skip


class SchemaProblem(ValueError):
    """A schema that cannot be served; the message begins with the place."""

    def __init__(self, path: str, problem: str) -> None:
        shown = path if len(path) <= 120 else f"{path[:60]}...{path[-60:]}"
        super().__init__(f"at {shown or 'the top'}: {problem}")
        self.path = path


def check_schema(schema: Any) -> None:
    """Raises SchemaProblem at the first place that cannot be served."""
    seen, num_values = 0, 0
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
        merged |= "allOf" in one or ("$ref" in one or "anyOf" in one or "oneOf" in one) and not one.keys() <= _ALONE
    # A pattern whose schema turns out to be unsatisfiable in both would be left out, and its keys taken for others.
    if len(by_pattern) > 1 and merged:
        problem = "several patternProperties are not supported beside allOf, or keywords beside anyOf, oneOf or $ref"
        raise SchemaProblem(by_pattern[1], problem)


def made_exact(schema: Any) -> Any:
    """The schema, changed so that llguidance takes all that it says: days of months, lengths of names, bounds.

    An exclusive whole bound is taken for an inclusive one where the other bound is a fraction beside it, maybe in a
    schema that it is merged with: it becomes the inclusive bound next to it. Raises SchemaProblem where that is too large.
    """
    held = [(path, one) for path, _, one in subschemas(schema) if isinstance(one, dict)]
    fractions = any(isinstance(one.get(key), float) and one[key] % 1 for _, one in held for key in _NUMBERS[:4])
    for path, one in held:
        if more := _BESIDE_FORMAT.get(str(one.get("format"))):
            one["allOf"] = [*one.get("allOf", ()), dict(more)]
        for key, inclusive, step in (("exclusiveMinimum", "minimum", NEXT), ("exclusiveMaximum", "maximum", -NEXT)):
            if fractions and key in one and one[key] % 1 == 0:
                if abs(one[key]) >= MAX_EXACT:
                    raise SchemaProblem(f"{path}/{key}", f"{MAX_EXACT:g} and more is not supported beside fractions")
                beside = {inclusive: round(one.pop(key) + step, 9)}
                one["allOf"] = [*one.get("allOf", ()), beside]
    return schema


def subschemas(schema: Any, path: str = "") -> Iterator[tuple[str, int, Any]]:
    """(JSON pointer, depth, schema) of a schema and of all within it, each before what it holds."""
    waiting = [(path, 0, schema)]
    while waiting:
        path, depth, one = waiting.pop()
        yield path, depth, one
        if isinstance(one, dict):
            waiting += reversed([(below, depth + 1, held) for below, held in children(one, path)])


def children(schema: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """(JSON pointer, schema) of what a schema holds directly."""
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            for name, held in value.items():
                yield f"{path}/{key}/{_escaped(name)}", held
        elif key in (*_LISTS, "items") and isinstance(value, list):
            for index, held in enumerate(value):
                yield f"{path}/{key}/{index}", held
        elif key in _ONE:
            yield f"{path}/{key}", value


def _check_keywords(path: str, schema: dict[str, Any]) -> None:
    for key, value in schema.items():
        at = f"{path}/{_escaped(key)}"
        if key in UNSUPPORTED and value is not None and value is not False:
            raise SchemaProblem(path, f"the keyword {key} is not supported; leave it out")
        if key in _COUNTS:
            _check_count(at, value, _COUNTS[key])
        elif key in _LISTS or key == "required" or key == "enum":
            if not isinstance(value, list):
                raise SchemaProblem(at, f"must be a list; got {_kind(value)}")
            if key == "enum":
                _check_values(at, value)
        elif key == "patternProperties" and isinstance(value, dict) and False in value.values():
            name = next(name for name, held in value.items() if held is False)
            raise SchemaProblem(f"{at}/{_escaped(name)}", "false is not supported; leave it out")
        elif key in _MAPS and not isinstance(value, dict):
            raise SchemaProblem(at, f"must be an object of schemas; got {_kind(value)}")
        elif key in _NUMBERS:
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
    if (ref := schema.get("$ref")) is not None and "://" in ref:
        raise SchemaProblem(f"{path}/$ref", "must stay within the schema, for example #/$defs/name")


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


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
