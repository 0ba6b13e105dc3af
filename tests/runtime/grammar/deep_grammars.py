"""Grammars whose parts are each compiled within the one before: as a program, checks and compiles all and names them.

Knows no test; a stack that runs over ends the process that runs this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagegraph.runtime.grammar.compiler import GrammarCompiler
from pagegraph.runtime.structured_output import StructuredOutputs, check_grammar
from perf.schemas import byte_vocabulary, takes


def rules(one: str, count: int, letter: str = "r") -> dict[str, Any]:
    """A grammar of the text x in Lark; HERE and NEXT are names of two rules. An R as `letter` makes them terminals."""
    lines = [one.replace("HERE", f"{letter}{i}").replace("NEXT", f"{letter}{i + 1}") for i in range(count)]
    return {"grammar": "\n".join([f"start: {letter}0", *lines, f'{letter}{count}: "x"'])}


def schemas(below: Callable[[dict[str, Any]], dict[str, Any]], count: int) -> dict[str, Any]:
    definitions = {f"d{i}": below({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"json": {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{count}": {"type": "null"}}}}


# A text that matches, and the grammar.
DEEP: dict[str, tuple[str, dict[str, Any]]] = {
    "rules": ("x", rules("HERE: NEXT", 8000)),
    "groups": ("x", rules(f"HERE: {'(' * 25}NEXT{')' * 25}", 1900)),
    "terminals": ("x", rules("HERE: NEXT", 8000, "R")),
    "properties": ('{"a": {}}', schemas(lambda below: {"type": "object", "properties": {"a": below}}, 1300)),
    "items": ("[[]]", schemas(lambda below: {"type": "array", "items": below}, 2000)),
}


def main() -> None:
    compiler = GrammarCompiler(byte_vocabulary)
    for name, (text, kind) in DEEP.items():
        structured = StructuredOutputs(**kind)
        check_grammar(structured)
        matcher = compiler.compile(structured).result().matcher
        assert takes(matcher, text) and not takes(matcher, "y"), name
        print(name, flush=True)


if __name__ == "__main__":
    main()
