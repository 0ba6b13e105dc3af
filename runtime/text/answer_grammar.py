"""What an answer may be, as one Lark grammar: reasoning as the model likes it, then calls of tools or a structured text.

Calls are written exactly as the row of their format says, with arguments that the tool's JSON schema finds valid. How a
word becomes tokens is asked of `literal`. Knows formats and llguidance's dialect of Lark; no tokenizer and no requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pagegraph.runtime.structured_output import StructuredOutputs, lark_string, rule_body
from pagegraph.runtime.text import harmony
from pagegraph.runtime.text.formats import CallFormat, ChatFormat
from pagegraph.runtime.text.parameters import value_types

_DEPTH = 8  # of objects in each other whose strings are written as the model does
# What the symbols of single values do not heed, besides the length of strings.
_INTRICATE = {
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "minItems",
    "maxItems",
    "uniqueItems",
    "prefixItems",
    "contains",
}
ANY_ARGUMENTS = {"type": "object", "additionalProperties": True}
MAX_CALLS = 16  # of one answer that has to have some
Thought = Literal["open", "closed", "free"]  # the prompt ends inside reasoning, behind it, or neither


class AnswerGrammar:
    """One grammar. `literal`: a text as symbols of Lark, special tokens among them; `thought`: how the prompt ends."""

    def __init__(self, format: ChatFormat, literal: Callable[[str], str], thought: Thought) -> None:
        self._format = format
        self._literal = literal
        self._thought = thought
        self._rules: list[str] = []

    def calls(self, tools: Mapping[str, Any], parallel: bool) -> str:
        """The symbol of one call or, if `parallel`, of one or several; `tools` are schemas by name."""
        format = self._format.calls
        assert format is not None
        names = [self._rule(f"call_{index}", self._call(format, *tool)) for index, tool in enumerate(tools.items())]
        call = self._rule("call", " | ".join(names))
        more = self._join(self._literal(format.between), call)
        several = parallel and format.style != "harmony"
        calls = f"{call} ({more}){{0,{MAX_CALLS - 1}}}" if several else call
        section = "".join(format.section_begin[bool(format.bare) :])
        return self._rule("calls", self._join(self._literal(section), calls, self._words(format.section_end)))

    def text(self, structured: StructuredOutputs) -> str:
        """The symbol of an answer that is this and nothing else."""
        body = self._rule("structured", rule_body(structured))
        return self._rule("said", self._join(self._literal(harmony.FINAL), body)) if self._format.is_harmony else body

    def whole(self, answers: Sequence[str]) -> str:
        """The grammar of reasoning and then one of these symbols."""
        self._rules.append(f"start: {self._join(self._reasoning(), self._rule('answer', ' | '.join(answers)))}")
        return "\n".join([*self._rules, r"SPACES: /[ \t\r\n]{1,8}/", "TEXT: /(?s:.+)/", ""])

    def _rule(self, name: str, body: str, attributes: str = "") -> str:
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    @staticmethod
    def _join(*symbols: str) -> str:
        return " ".join(filter(None, symbols))

    def _words(self, words: Sequence[str]) -> str:
        return self._literal("".join(words))

    def _reasoning(self) -> str:
        row = self._format.reasoning
        if self._format.is_harmony:
            return f"({self._literal(harmony.ANALYSIS)} {self._up_to('thought', harmony.NEXT)})?"
        if row is None or self._thought == "closed":
            return ""
        rest = f"{self._up_to('thought', row.end)} SPACES?"
        return rest if self._thought == "open" else f"(SPACES? {self._literal(row.begin)} {rest})?"

    def _up_to(self, name: str, end: str, length: str = "*") -> str:
        """The symbol of any text, of this length, and then `end`."""
        if token := re.search(r"<\[.*", self._literal(end)):  # a special token is no part of any text
            text = "TEXT?" if length in ("*", "{0,}") else f"/(?s:.{length})/"
            return self._rule(name, f"{text} {token[0]}")
        return self._rule(name, f"/(?s:.{length})/", f"[suffix={lark_string(end)}]")

    def _call(self, format: CallFormat, name: str, schema: Any) -> str:
        if format.style == "harmony":
            return self._join(self._literal(harmony.written(name, "").removesuffix(harmony.CALL)), self._object(schema))
        return self._join(self._words(format.begin), *self._inside(format, name, schema), self._words(format.end))

    def _inside(self, format: CallFormat, name: str, schema: Any) -> list[str]:
        if format.style == "object":
            head = f'{{"name": {lark_string(name)}, "{format.arguments_key}": '
            return [self._literal(head), self._object(schema), self._literal("}")]
        if format.style == "named":
            return [self._literal(name + "".join(format.name_end)), self._object(schema)]
        if format.style == "parameters":
            return [self._literal(name + "".join(format.name_end)), self._arguments(format, schema, "")]
        opening, closing, between = ("{", "}", ",") if format.quote else ("(", ")", ", ")
        return [self._literal(name + opening), self._arguments(format, schema, between), self._literal(closing)]

    def _object(self, schema: Any) -> str:
        """The symbol of all arguments as JSON."""
        return self._json(closed(schema))

    def _json(self, schema: Any) -> str:
        return self._named("json", rule_body(StructuredOutputs(json=schema)))

    def _named(self, kind: str, body: str) -> str:
        return self._rule(f"{kind}_{len(self._rules)}", body)

    def _arguments(self, format: CallFormat, schema: Any, between: str, root: Any = None) -> str:
        """The symbol of the arguments one by one, in the order of the schema, `between` standing between two."""
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        required = schema.get("required", ()) if properties else ()
        first = rest = ""  # symbols of the arguments from here on, as the first ones or behind others
        for name, own in reversed((properties or {}).items()):
            one = self._named("argument", self._argument(format, name, own, root or schema))
            behind = self._join(self._literal(between), one, rest)
            ahead = self._join(one, rest)
            if name in required:
                first, rest = self._named("first", ahead), self._named("rest", behind)
            else:
                first = self._named("first", f"{ahead} | {first}" if first else f"({ahead})?")
                rest = self._named("rest", f"{behind} | {rest}" if rest else f"({behind})?")
        return first

    def _argument(self, format: CallFormat, name: str, schema: Any, root: Any) -> str:
        texts, types = _texts(schema), value_types(schema, root)
        if format.style == "literals" and not format.quote:
            return self._join(self._literal(f"{name}="), self._json(_with_definitions(schema, root)))
        if format.quote:
            return self._join(self._literal(f"{name}:"), self._quoted(format, schema, root, 0))
        key = self._literal(format.key_begin + name + "".join(format.key_end))
        if texts:
            return f"{key} ({' | '.join(map(self._literal, texts))}) {self._literal(format.value_end)}"
        if types and "string" not in types:
            return self._join(key, self._json(_with_definitions(schema, root)), self._literal(format.value_end))
        return self._join(key, self._string(schema, format.value_end))

    def _quoted(self, format: CallFormat, schema: Any, root: Any, depth: int) -> str:
        """The symbol of a value whose strings stand between `quote`; between quotation marks where a schema is intricate."""
        if texts := _texts(schema):
            return f"({' | '.join(self._literal(format.quote + text + format.quote) for text in texts)})"
        plain = isinstance(schema, Mapping) and not schema.keys() & _INTRICATE and depth < _DEPTH
        types = value_types(schema, root)
        if plain and types == {"string"}:
            return self._join(self._literal(format.quote), self._string(schema, format.quote))
        if plain and types == {"array"} and isinstance(schema.get("items"), Mapping):
            one = self._named("item", self._quoted(format, schema["items"], root, depth + 1))
            return self._named("list", f'"[" ({one} ("," {one})*)? "]"')
        if plain and types == {"object"} and schema.get("properties"):
            return self._join('"{"', self._arguments(format, schema, ",", root), '"}"')
        return self._json(_with_definitions(schema, root))

    def _string(self, schema: Any, end: str) -> str:
        """The symbol of a string as it is, and then `end`. Of what a schema says, its length is heeded."""
        facts = schema if isinstance(schema, Mapping) else {}
        least, most = facts.get("minLength", 0), facts.get("maxLength", "")
        return self._up_to(f"string_{len(self._rules)}", end, f"{{{least},{most}}}")


def closed(schema: Any) -> dict[str, Any]:
    """A schema of arguments: an object, without others than those it names unless it says that there may be some."""
    said = dict(schema) if isinstance(schema, Mapping) else {}
    combined = said.keys() & {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "dependentSchemas"}
    return {**({} if combined else {"additionalProperties": False}), **said, "type": "object"}


def _texts(schema: Any) -> list[str]:
    """The strings that a value may be, if they are listed and nothing else is."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else []) if isinstance(schema, Mapping) else []
    listed = isinstance(values, list) and values and all(isinstance(value, str) and value for value in values)
    return values if listed else []


def _with_definitions(schema: Any, root: Any) -> dict[str, Any]:
    """A part of a schema that may refer to the definitions of the whole."""
    part = schema if isinstance(schema, Mapping) else {}
    return {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **part}
