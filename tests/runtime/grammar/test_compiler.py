"""Grammars that have hung, crashed or filled other servers are compiled or refused, and none is kept for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagegraph.runtime.bad_parameter import BadParameter
from pagegraph.runtime.grammar.compiler import MAX_GRAMMARS, Grammar, GrammarCompiler
from pagegraph.runtime.structured_output import StructuredOutputs, check_grammar
from perf.schemas import byte_vocabulary, takes
from tests.paths import ROOT
from tests.runtime.grammar.deep_grammars import DEEP


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_vocabulary)


def compiled(compiler: GrammarCompiler, **kind: Any) -> Grammar:
    """As a request comes to it: checked by its web process, compiled by the engine."""
    structured = StructuredOutputs(**kind)
    check_grammar(structured)
    return compiler.compile(structured).result()


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ({"regex": "(a+)+b"}, "a" * 500 + "b", "a" * 500),
        ({"regex": "(a|a)*(a|aa)+$"}, "a" * 500, "b"),
        ({"regex": "(.*a.{20}){1,3}"}, "a" + "x" * 20, "x" * 30),
        ({"choice": [f"choice {number}" for number in range(4096)]}, "choice 77", "choice"),
        ({"json": {"enum": [f"value {number}" for number in range(4096)]}}, '"value 77"', '"value"'),
        ({"json": {"type": "object", "properties": {"next": {"$ref": "#"}}}}, '{"next": {"next": {}}}', '{"next": 1}'),
        ({"json": {"type": "string", "maxLength": 1_000_000}}, '"a"', "a"),
        ({"json": {"type": "array", "maxItems": 4096, "items": {"type": "array", "maxItems": 4096}}}, "[[1]]", "[1]"),
        ({"grammar": 'start: e\ne: e e | "a" | "(" e ")"'}, "a(aa)a", "(a"),
    ],
)  # fmt: skip
def test_a_grammar_of_ill_repute(compiler: GrammarCompiler, kind: dict, good: str, bad: str) -> None:
    grammar = compiled(compiler, **kind)
    assert takes(grammar.matcher, good) and not takes(grammar.matcher, bad)


@pytest.mark.parametrize(
    "kind",
    [
        {"regex": "(" * 30_000 + ")" * 30_000},
        {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
        {"json": '{"items":' * 10_000 + "{}" + "}" * 10_000},
        {"json": {"$ref": "#"}},
        {"json": {"allOf": [{"$ref": "#"}]}},
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
        {"json": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "string"}}} for j in range(6)]} for i in range(6)]}},
        {"grammar": "start: start"},
    ],
    ids=["regex", "lark", "schema", "itself", "itself and more", "each other", "product", "no text"],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused(compiler: GrammarCompiler, kind: dict) -> None:
    with pytest.raises(BadParameter):
        compiled(compiler, **kind)


def test_a_refusal_is_not_compiled_twice_and_a_good_one_neither(compiler: GrammarCompiler) -> None:
    for regex in ("ab", "x"):
        assert compiler.compile(StructuredOutputs(regex=regex)) is compiler.compile(StructuredOutputs(regex=regex))


def resident_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_ten_thousand_schemas_take_no_memory(compiler: GrammarCompiler) -> None:
    def schema(number: int) -> dict[str, Any]:
        names = [f"key{number}_{place}" for place in range(8)]
        texts = {name: {"type": "string", "pattern": f"^[a-z]{{3}}{number}$"} for name in names}
        return {"type": "object", "properties": texts, "required": names[:4]}

    for number in range(2 * MAX_GRAMMARS):
        compiled(compiler, json=schema(-number - 1))
    before = resident_mib()
    for number in range(10_000):
        matcher = compiler.compile(StructuredOutputs(json=schema(number))).result().start()
        matcher.consume_tokens(list(b'{"'))
        matcher.compute_bitmask()
    assert resident_mib() - before < 100


def test_a_long_chain_of_references_does_not_end_the_process() -> None:
    """In a process of its own, for a stack that runs over is no exception."""
    command = [sys.executable, "-m", "tests.runtime.grammar.deep_grammars"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert done.stdout.split() == list(DEEP)
