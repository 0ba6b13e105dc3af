"""What the output of a request must be: JSON of a schema, a match of a regex, one of several texts, text of a grammar.

`StructuredOutputs` is a field of SamplingParams and checks its form and size whenever one is built or decoded. It
becomes one grammar text, in llguidance's dialect of Lark, by `grammar_text`; `check_grammar` says whether that is a
grammar at all, and where the fault is, without a tokenizer and within limits of time and size. Knows no HTTP, no tokens
and no masks; imports no torch.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from pagegraph.runtime import gbnf
from pagegraph.runtime.bad_parameter import BadParameter, shown
from pagegraph.runtime.deep_stack import on_deep_stack
from pagegraph.runtime.exact_schema import ANY_KEY, made_exact
from pagegraph.runtime.json_schema import SchemaProblem, check_multiples, check_schema, children, escaped, subschemas

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_CHARS = 1 << 17  # of a schema as JSON, a regex, a grammar, all choices
MAX_CHOICES = 4096
MAX_ALTERNATIVES = 1000  # of a rule: each is an item of the parser's rows, which are bounded; those of a regex are not
KINDS = ("json", "json_object", "regex", "choice", "grammar")
# Between two tokens of JSON: nothing, a space, or line breaks with indentation. Without bounds a model may go on with
# white space for ever.
WHITESPACE = r"\x20|\n{1,2}[\x20\t]{0,20}"
LOCATE_TRIES = 256  # sub-schemas that are compiled to find the one at fault

# Attributes of a rule that ask for what sampling here does not do.
_RULE_ATTRIBUTE = re.compile(r"^[ \t]*[?!]?[\w.-]+\[[^\]\n]*\b(max_tokens|stop|temperature)\s*=", re.MULTILINE)
_LARK = re.compile(r"^[ \t]*([?!]?start\b[ \t]*(\[[^\]\n]*\])?[ \t]*:(?!:=)|%llguidance\b)", re.MULTILINE)


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one of its kinds. Raises BadParameter, a ValueError, naming the field at fault.

    json: a schema, as an object or as JSON; the output is JSON that it finds valid. json_object: any JSON object.
    regex: matched whole; \\d is an ASCII digit. grammar: Lark with a rule `start`, or GBNF with a rule `root`.
    disable_any_whitespace: none between the tokens of JSON.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise BadParameter(field_of(name), f"must be true or false; got {shown(getattr(self, name))}")
        given = self._given()
        if len(given) != 1:
            got = f"got {' and '.join(given)}" if given else "got none of them"
            raise BadParameter("structured_outputs", f"must have exactly one of {', '.join(KINDS)}; {got}")
        if self.json is not None:
            msgspec.structs.force_setattr(self, "json", _schema_text(self.json))
        elif self.choice is not None:
            _check_choices(self.choice)
        elif not self.json_object:
            _check_text(given[0], getattr(self, given[0]))

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [name for name in KINDS if getattr(self, name) is not (False if name == "json_object" else None)]


def field_of(name: str) -> str:
    """A field of StructuredOutputs as messages call it."""
    return f"structured_outputs.{name}"


def grammar_text(structured: StructuredOutputs) -> str:
    """The whole grammar, as Lark. Raises BadParameter for a grammar that is neither Lark nor good GBNF."""
    return _lark(structured.grammar) if structured.grammar is not None else f"start: {rule_body(structured)}\n"


def rule_body(structured: StructuredOutputs) -> str:
    """What stands right of the colon where it is a rule of a larger Lark grammar; may have several lines."""
    if structured.grammar is not None:
        return f"%lark {{\n{_lark(structured.grammar)}\n}}"
    if structured.regex is not None:
        return _regex_literal(structured.regex)
    if structured.choice is not None:
        if len(structured.choice) > MAX_ALTERNATIVES:
            return _regex_literal("|".join(map(re.escape, structured.choice)))
        return " | ".join(map(lark_string, structured.choice))
    schema = {"type": "object"} if structured.json is None else made_exact(_checked_schema(structured.json))
    return f"%json {_with_options(schema, structured.disable_any_whitespace)}"


def lark_string(text: str) -> str:
    """A literal of Lark that matches this text."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_grammar(structured: StructuredOutputs, field: str | None = None) -> None:
    """Raises BadParameter where no grammar can be made of it, with the place of the fault in it.

    field: what the user calls it; by default the field of StructuredOutputs.
    """
    field = field or field_of(structured.kind)
    try:
        if structured.json is not None:
            _check_json(structured)
        else:
            grammar = grammar_text(structured)
            _check_schemas_within(grammar)
            if problem := _problem(grammar):
                raise BadParameter(field, f"cannot be served: {problem}")
    except SchemaProblem as error:
        raise BadParameter(field, f"cannot be served: {error}") from None
    except BadParameter as error:
        raise BadParameter(field, error.problem) from None


def limits() -> LLParserLimits:
    """What a grammar may take, at its compilation and at each token."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        verbose_errors=False, max_grammar_size=200_000, step_max_items=20_000, max_lexer_states=100_000
    )


def _check_json(structured: StructuredOutputs) -> None:
    """Raises SchemaProblem, and BadParameter where it is not even JSON."""
    schema = _checked_schema(structured.json)
    definitions = _definitions(schema)
    for path, _, one in list(subschemas(schema)):
        for name in one.get("patternProperties", ()) if isinstance(one, dict) else ():
            # Alone as well: one that nothing satisfies would be left out, and its keys taken for others.
            if problem := _problem_alone(one["patternProperties"][name], definitions):
                raise SchemaProblem(f"{path}/patternProperties/{escaped(name)}", problem)
    if problem := _problem(grammar_text(structured)):
        raise SchemaProblem(*_located(schema, problem))


def _check_schemas_within(grammar: str) -> None:
    """Raises SchemaProblem where a schema in a grammar would take what the compiler has no limit for."""
    for found in re.finditer(r"%json\s*(?=\{)", grammar):
        try:
            schema, _ = json.JSONDecoder().raw_decode(grammar, found.end())
        except (ValueError, RecursionError):
            continue  # the compiler does not read it either
        check_multiples(schema)


def _checked_schema(text: Any) -> dict[str, Any]:
    """A schema of JSON that a grammar can be made of. Raises SchemaProblem, BadParameter."""
    try:
        schema = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise BadParameter(field_of("json"), "is nested too deeply") from None
    except ValueError as error:
        raise BadParameter(field_of("json"), f"is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise BadParameter(field_of("json"), 'must be an object, for example {"type": "object"}')
    check_schema(schema)
    return schema


def _located(schema: dict[str, Any], problem: str) -> tuple[str, str]:
    """(JSON pointer, problem) of the innermost sub-schema that cannot be compiled even by itself."""
    definitions = _definitions(schema)
    path, tries, waiting = "", 0, list(children(schema, ""))
    while waiting and tries < LOCATE_TRIES:
        below, held = waiting.pop(0)
        if not isinstance(held, dict):
            continue
        tries += 1
        if found := _problem_alone(held, definitions):
            path, problem, waiting, schema = below, found, list(children(held, below)), held
    if problem.startswith("invalid regex") and "pattern" in schema:
        path = f"{path}/pattern"
    return path, problem


def _problem_alone(schema: Any, definitions: dict[str, Any]) -> str:
    """What is wrong with a part of a schema; empty if nothing is."""
    if not isinstance(schema, dict):
        return ""
    try:
        alone = made_exact(json.loads(json.dumps({**definitions, **schema})))
    except SchemaProblem as error:
        return str(error)
    return _problem(f"start: %json {_with_options(alone, False)}\n")


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _problem(grammar: str) -> str:
    """What is wrong with a grammar, in one line; empty if nothing is."""
    from llguidance import LLMatcher

    bad, messages = on_deep_stack(LLMatcher.validate_grammar_with_warnings, grammar, limits=limits())
    return in_words(messages[0]) if bad else ""


def in_words(message: str) -> str:
    """A message of the compiler without the excerpts of its own making."""
    regex_error = re.search(r"^error: (.*)", message, re.MULTILINE)
    first = message.split("\n", 1)[0].strip()
    if first.startswith(("NoExtension", "InternalError")):
        return "no text can match it"
    if re.search(r"items; max is|Too many items", first):
        return (
            "too much may follow at one place; have fewer alternatives there, fewer optional properties, less recursion"
        )
    if first.startswith("lexer error"):
        return "its regexes are too large; have fewer or smaller repetitions in them"
    if f"/{ANY_KEY}/" in first:  # is not disjoint with another pattern
        return "patternProperties are not supported in a schema that holds together with others, as those of allOf do"
    if "oneOf" in first:
        return "oneOf is served only where its options exclude each other, by type or const; give anyOf"
    if "lookarounds not supported" in first:
        return r"invalid regex: ^ and $ are served at its ends alone, \b and \B nowhere"
    if regex_error:
        return f"invalid regex: {regex_error.group(1)}"
    first = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: ", "", first)
    first = re.sub(r"^(at )?(\d+)\((\d+)\): ", r"line \2, column \3: ", first)
    first = re.sub(r'invalid regex ".*" \(in regex\): (.*?)( in regex .*)?$', r"invalid regex: \1", first)
    return first if len(first) <= 300 else first[:300] + "..."


def _schema_text(schema: Any) -> str:
    """A schema as JSON."""
    if isinstance(schema, dict):
        try:
            schema = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except RecursionError:
            raise BadParameter(field_of("json"), "is nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise BadParameter(field_of("json"), f"is not JSON: {error}") from None
    elif not isinstance(schema, str):
        example = 'for example {"type": "object"}'
        raise BadParameter(
            field_of("json"), f"must be a schema, an object or JSON text, {example}; got {shown(schema)}"
        )
    _check_text("json", schema)
    return schema.strip()


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise BadParameter(field_of(name), f"must be a string; got {shown(text)}")
    if not text.strip():
        raise BadParameter(field_of(name), "must not be empty")
    if len(text) > MAX_CHARS:
        raise BadParameter(field_of(name), f"has {len(text)} characters; give at most {MAX_CHARS}")
    _check_encodable(name, text)


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list | tuple) or not choices or len(choices) > MAX_CHOICES:
        raise BadParameter(field_of("choice"), f"must be a list of 1 to {MAX_CHOICES} strings; got {shown(choices)}")
    for one in choices:
        if not isinstance(one, str) or not one:
            raise BadParameter(field_of("choice"), f"must hold strings that are not empty; got {shown(one)}")
        _check_encodable("choice", one)
    if (total := sum(map(len, choices))) > MAX_CHARS:
        raise BadParameter(field_of("choice"), f"has {total} characters in all; give at most {MAX_CHARS}")


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadParameter(field_of(name), "holds half a surrogate pair, which is no character") from None


def _with_options(schema: dict[str, Any], compact: bool) -> str:
    """A schema as JSON, with how its text may be spaced."""
    options = {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}
    return json.dumps({"x-guidance": options, **schema}, ensure_ascii=False, separators=(",", ":"))


def _regex_literal(regex: str) -> str:
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex, 'd')}/"


def _lark(grammar: str) -> str:
    """A grammar as Lark, of Lark or GBNF."""
    if not _LARK.search(grammar):
        return _lark_of_gbnf(grammar)
    if attribute := _RULE_ATTRIBUTE.search(grammar):
        problem = f"has a rule with {attribute.group(1)}=, which is not supported; leave it out"
        raise BadParameter(field_of("grammar"), problem)
    return grammar


def _lark_of_gbnf(grammar: str) -> str:
    if not re.search(r"^[ \t]*root[ \t]*::=", grammar, re.MULTILINE):
        raise BadParameter(field_of("grammar"), "must be Lark with a rule start:, or GBNF with a rule root ::=")
    try:
        return gbnf.to_lark(grammar)
    except gbnf.GbnfError as error:
        raise BadParameter(field_of("grammar"), f"is not GBNF: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
