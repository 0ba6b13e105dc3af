"""GBNF as llama.cpp reads it: what its grammars match, and where one is wrong."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from pagegraph.runtime.gbnf import MAX_DEPTH, MAX_RULES, GbnfError, to_lark
from perf.schemas import byte_vocabulary, takes

JSON = r"""
# JSON without anything else
root   ::= object
value  ::= object | list | text | number | ("true" | "false" | "null") ws
object ::= "{" ws (
             text ":" ws value
    ("," ws text ":" ws value)*
  )? "}" ws
list   ::= "[" ws ( value ("," ws value)* )? "]" ws
text   ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return byte_vocabulary()


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (JSON, ['{"a": [1, 2.5e3, {"b": null}], "c": "\\u00e9 é"}', "{}", json.dumps({"a": {"b": [True]}}, indent=2)],
         ["[1]", '{"a":}', "{a: 1}", '{"a": 1}}']),
        ('root ::= [a-z]+ "bc"', ["abc", "bcbc"], ["ab", "bc"]),
        (r'root ::= "\x41\u00e9\U0001F999" [\]a-] [-+] [^\n"/] "/\\"', ["Aé🦙]-x/\\", "Aé🦙-+é/\\"], ["Aé]-x/", "Aé🦙]-//\\"]),
        ('root ::= fooBar foo-bar | foobar\nfooBar ::= "a"\nfoo-bar ::= "b"\nfoobar ::= "c"', ["ab", "c"], ["a", "b"]),
        ('root ::= "a" |\n  "b"\n  | "c" # or\n\nx ::= "y"', ["a", "b", "c"], ["y", "ab"]),
        ('root ::= expr\nexpr ::= term ("+" term)*\nterm ::= "(" expr ")" | [0-9]+', ["1+(2+33)", "7"], ["1+", "()"]),
        ('root ::= "(" root? ")"', ["()", "((()))"], ["", "(()"]),
        ('root ::= ("a" "b"){2,3} "c"{1,} "d"{2} .', ["ababcddx", "abababccddé", "ababcdd\n"], ["abcddx", "ababcdx"]),
        ('root ::= "" | "a"\r\n', ["", "a"], ["b"]),
        ("root ::= [a-c]*", ["", "abc"], ["d"]),
    ],
)  # fmt: skip
def test_what_a_grammar_matches(vocabulary: LLTokenizer, grammar: str, good: list[str], bad: list[str]) -> None:
    matcher = LLMatcher(vocabulary, to_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    for text in good:
        assert takes(matcher, text), text
    for text in bad:
        assert not takes(matcher, text), text


def test_special_tokens_are_handed_on() -> None:
    lines = to_lark('root ::= <|im_end|> x <[5]>\nx ::= "a" <think>').splitlines()
    assert [line.split() for line in lines] == [
        ["start:", "<|im_end|>", "r_x_1", "<[5]>"],
        ["r_x_1:", '"a"', "<think>"],
    ]


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('x ::= "a"', "no rule root"),
        ("root ::= x", "line 1, column 10: there is no rule x"),
        ('root ::= "a', "line 1, column 10: the literal is not closed"),
        ("root ::= [a", "the class is not closed"),
        ('root ::= ("a"', "line 1, column 10: the group is not closed"),
        ('root ::= "a")', "line 1, column 13: there is no group to close"),
        ('root ::= "\\q"', "no escape sequence"),
        ('root ::= "\\u12"', "no escape sequence"),
        ('root ::= "\\ud800"', "no character"),
        ('root ::= "\\U00110000"', "no character"),
        ('root := "a"', "line 1, column 6: expected ::="),
        ('root ::= "a"{', "expected a repetition"),
        ('root ::= "a"\n\nroot ::= "b"', "line 3, column 1: the rule root is there already"),
        ("root ::= [z-a]", "wrong way round"),
        ("root ::= []", "the class is empty"),
        ("root ::= *", "unexpected '\\*'"),
        ("root ::= $", "unexpected '\\$'"),
        ('root ::= "a" !x', "unexpected '!'"),
        ("root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000, f"nested more than {MAX_DEPTH}"),
        ("\n".join(f'r{n} ::= "a"' for n in range(MAX_RULES + 1)), f"more than {MAX_RULES} rules"),
    ],
)  # fmt: skip
def test_where_a_grammar_is_wrong(grammar: str, words: str) -> None:
    with pytest.raises(GbnfError, match=words):
        to_lark(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= r0\n" + "\n".join(f'r{n} ::= "x" r{n + 1}' for n in range(2000)) + '\nr2000 ::= "y"',
        "root ::= r0\n" + "\n".join(f'r{n} ::= r{(n * 7 + 1) % 2000} | r{(n * 5 + 3) % 2000} | "y"' for n in range(2000)),
        "root ::= " + '"a" ' * 30_000,
        "root ::= " + '"a"*' * 30_000,
        "root ::= " + "(" * MAX_DEPTH + '"a"' + ")*" * MAX_DEPTH,
    ],
    ids=["chain", "tangle", "long", "repetitions", "nested"],
)  # fmt: skip
def test_large_grammars_take_no_recursion_and_no_time_to_speak_of(grammar: str) -> None:
    assert '"y"' in to_lark(grammar) or '"a"' in to_lark(grammar)
