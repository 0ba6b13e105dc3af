"""The fields that say what form an answer has, of OpenAI, vLLM, SGLang and llama.cpp, as one StructuredOutputs.

Knows their names and shapes. What a schema, regex or grammar may be is `runtime.structured_output`'s; here it is
called what the user called it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pagegraph.runtime.sampling_params import BadParameter, shown
from pagegraph.runtime.structured_output import StructuredOutputs, check_grammar
from pagegraph.web.fields import Fields, mapping, refuse

# Fields that hold one kind and nothing else, and the kind.
PLAIN = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
    "json_schema": "json",
}
FORMATS = ("text", "json_object", "json_schema")
_KINDS = ("json", "regex", "choice", "grammar", "json_object", "disable_any_whitespace")
# vLLM's other keys, and the values besides null that ask nothing.
_ASK_NOTHING: dict[str, tuple[Any, ...]] = {
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
    "disable_fallback": (True, False),  # there is nothing to fall back to
    "backend": ("auto", "guidance"),
}


class Form(NamedTuple):
    """What form an answer has, None for free text, and the field that asks for it."""

    structured: StructuredOutputs | None = None
    field: str = "structured_outputs"


class _Asked(NamedTuple):
    """What one field asks, and where in it a kind is written."""

    field: str
    kinds: dict[str, Any]
    name: Callable[[str], str]  # of a kind


def read_structured(fields: Fields) -> Form:
    """The form that the request asks for, checked. Raises BadParameter naming the place."""
    asked = [_response_format(fields), _structured_outputs(fields), *(_plain(fields, name) for name in PLAIN)]
    found = [one for one in asked if one is not None]
    if not found:
        return Form()
    if len(found) > 1:
        refuse(found[1].field, f"beside {found[0].field} would ask for two forms at once; give one of them")
    (one,) = found
    try:
        structured = StructuredOutputs(**one.kinds)
        check_grammar(structured)
    except BadParameter as error:
        _, _, kind = error.field.partition(".")
        raise BadParameter(one.name(kind) if kind else one.field, error.problem) from None
    return Form(structured, one.name(structured.kind))


def _plain(fields: Fields, name: str) -> _Asked | None:
    value = fields.take(name)
    if value is None or (name == "grammar" and value == ""):  # llama.cpp's for none
        return None
    return _Asked(name, {PLAIN[name]: value}, lambda kind: name)


def _structured_outputs(fields: Fields) -> _Asked | None:
    name = "structured_outputs"
    given = {key: value for key, value in mapping(fields.take(name), name).items() if value is not None}
    for key, value in given.items():
        if key in _KINDS:
            continue
        neutral = _ASK_NOTHING.get(key, ())
        if not any(value is one or (isinstance(value, str) and value == one) for one in neutral):
            refuse(f"{name}.{key}", "is not served; leave it out")
    kinds = {key: value for key, value in given.items() if key in _KINDS}
    return _Asked(name, kinds, lambda kind: f"{name}.{kind}") if kinds else None


def _response_format(fields: Fields) -> _Asked | None:
    """OpenAI's; of type json_object it may hold a schema, as llama.cpp has it."""
    name = "response_format"
    form = mapping(fields.take(name), name)
    kind = form.get("type", "text" if not form else None)
    if kind not in FORMATS:
        refuse(f"{name}.type", f"must be one of {', '.join(FORMATS)}; got {shown(kind)}")
    known: tuple[str, ...] = ("type",)
    asked, schema = None, form.get("schema")
    if kind == "json_object":
        known = ("type", "schema")
        kinds = {"json_object": True} if schema is None else {"json": _schema(schema, f"{name}.schema")}
        asked = _Asked(name, kinds, lambda kind: f"{name}.schema" if kind == "json" else name)
    elif kind == "json_schema":
        known = ("type", "json_schema")
        where = f"{name}.json_schema"
        schema = _named_schema(form.get("json_schema"), where, fields.ignored)
        asked = _Asked(name, {"json": schema}, lambda kind: f"{where}.schema")
    fields.ignored += [f"{name}.{key}" for key, value in form.items() if key not in known and value is not None]
    return asked


def _named_schema(value: Any, where: str, ignored: list[str]) -> dict[str, Any]:
    """The schema of OpenAI's json_schema. It always holds; `strict` false is a promise that is kept anyway."""
    example = '{"name": "answer", "schema": {"type": "object"}}'
    if not isinstance(value, dict):
        refuse(where, f"must be an object, for example {example}; got {shown(value)}")
    for key, kind, words in (
        ("name", str, "a string"),
        ("description", str, "a string"),
        ("strict", bool, "true or false"),
    ):
        if value.get(key) is not None and not isinstance(value[key], kind):
            refuse(f"{where}.{key}", f"must be {words}; got {shown(value[key])}")
    ignored += [f"{where}.{key}" for key in value if key not in ("name", "description", "strict", "schema")]
    return _schema(value.get("schema"), f"{where}.schema")


def _schema(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(where, f'must be a JSON schema, for example {{"type": "object"}}; got {shown(value)}')
    return value
