"""Whether grammars of JSON schemas take what is invalid, and what they cost: over schemas at random, and over a suite.

`python -m perf.schemas --count 3000` makes schemas of all served keywords, walks each at random under its masks and
holds what comes against the package jsonschema. `--suite FOLDER` feeds the instances of JSON-Schema-Test-Suite to the
grammars: `json/tests` of the source of the package jsonschema (`pip download --no-deps --no-binary :all:
jsonschema==4.26.0`), or the folder of one draft. Knows no engine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from pagegraph.runtime.bad_parameter import BadParameter
from pagegraph.runtime.structured_output import StructuredOutputs, check_grammar, grammar_text, limits

NAMES = ("a", "b", "c", "ab", "é")
NUMBERS = (0, 1, -1, 2, 3, 5, 10, -7, 0.5, 1.5, -2.25, 100, 1e3)
VALUES = (1, "a", None, True, 1.5, [], {}, {"a": 1}, "é", 0, False, [1, "x"], -0.5)
PATTERNS = ("^[a-c]+$", "x", "^a", "b$", "^(ab|c){1,3}$", "[0-9]{2}", "^.{2,4}$", "a|b", "^$", r"\d", r"^\w+$")
DEFINITIONS = {
    "x": {"type": "integer"},
    "y": {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}, "b": {"$ref": "#/$defs/y"}}},
}
EOS = 256
DRAFTS = ("draft2020-12", "draft2019-09", "draft7", "draft6", "draft4")  # of the suite
# Its files whose keywords are annotations by default and, here, in every draft.
ANNOTATIONS = ("draft7/optional/content.json",)
PLACE = re.compile(r" at (the top|/.*?): ")  # in a refusal
WALKS = 8  # of each schema
LONGEST = 300  # bytes of a walk


class _Bytes:
    """Every byte is a token: walks come to every state of a grammar."""

    eos_token_id, bos_token_id, special_token_ids = EOS, None, [EOS]
    tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>"]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def byte_vocabulary() -> LLTokenizer:
    """A token for each byte, and EOS."""
    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=EOS + 1, eos_token=[EOS])


def compiled(vocabulary: LLTokenizer, schema: Any) -> LLMatcher:
    """A matcher of the schema, checked as the server checks it. Raises BadParameter."""
    structured = StructuredOutputs(json=schema)
    check_grammar(structured)
    matcher = LLMatcher(vocabulary, grammar_text(structured), log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise BadParameter("json", f"cannot be served: {matcher.get_error()[:80]}")
    return matcher


def walk(matcher: LLMatcher, generator: np.random.Generator, longest: int = LONGEST) -> bytes | None:
    """A text by random tokens of `byte_vocabulary` under the masks; None if it did not come to its end."""
    matcher, text = matcher.deep_copy(), bytearray()
    while len(text) < longest and not matcher.is_stopped():
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: EOS + 1])
        if not len(allowed):
            raise AssertionError(f"no token may follow {bytes(text)!r}: {matcher.get_error()}")
        if allowed[-1] == EOS and (len(allowed) == 1 or generator.random() < 0.5):
            break
        allowed = allowed[allowed != EOS]
        weights = np.where((allowed >= 32) & (allowed < 127), 1.0, 0.05)
        weights[np.isin(allowed, list(b'}]"'))] = 3.0
        weights[np.isin(allowed, list(b" \n\t"))] = 0.2
        token = int(generator.choice(allowed, p=weights / weights.sum()))
        matcher.consume_token(token)
        text.append(token)
    return bytes(text) if matcher.is_accepting() else None


def random_schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of the served keywords, with definitions that it may refer to."""
    schema: Any = True
    while not isinstance(schema, dict):
        schema = _Schemas(chance).any(depth)
    return {**schema, "$defs": DEFINITIONS}


class _Schemas:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def any(self, depth: int) -> Any:
        simple = self._chance.choice([self._string, self._number, self._number, self._value, self._little])
        holding = self._chance.choice([self._object, self._object, self._array, self._combined])
        return holding(depth - 1) if depth and self._maybe(0.6) else simple()

    def _maybe(self, share: float) -> bool:
        return self._chance.random() < share

    def _string(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        if self._maybe(0.4):
            schema["minLength"] = self._chance.randint(0, 3)
        if self._maybe(0.4):
            schema["maxLength"] = self._chance.randint(schema.get("minLength", 0), 6)
        if self._maybe(0.3):
            schema["pattern"] = self._chance.choice(PATTERNS)
        return schema

    def _number(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": self._chance.choice(["integer", "number"])}
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if self._maybe(0.25):
                schema[key] = self._chance.choice(NUMBERS)
        if self._maybe(0.2):
            schema["multipleOf"] = self._chance.choice([1, 2, 3, 5, 0.5, 0.25, 10, 1.5])
        return schema

    def _value(self) -> dict[str, Any]:
        if self._maybe(0.5):
            return {"const": self._chance.choice(VALUES)}
        return {"enum": [self._chance.choice(VALUES) for _ in range(self._chance.randint(1, 4))]}

    def _little(self) -> Any:
        few = [{}, True, {"type": ["string", "integer", "null"]}, {"minimum": 3}, {"minLength": 2}, {"required": ["a"]},
               {"maxItems": 1}, {"type": "null"}, {"type": "boolean"}, {"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}]  # fmt: skip
        return self._chance.choice(few)

    def _object(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "object"} if self._maybe(0.9) else {}
        schema["properties"] = {
            name: self.any(depth) for name in self._chance.sample(NAMES, self._chance.randint(0, 3))
        }
        if self._maybe(0.5):
            schema["required"] = self._chance.sample(NAMES, self._chance.randint(0, 2))
        if self._maybe(0.6):
            schema["additionalProperties"] = self._chance.choice([False, False, True, self.any(depth)])
        if self._maybe(0.15):
            schema["patternProperties"] = {self._chance.choice(["^a", "^x", "b$", "^[a-z]$"]): self.any(depth)}
        for key in ("minProperties", "maxProperties"):
            if self._maybe(0.1):
                schema[key] = self._chance.randint(0, 3)
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array"} if self._maybe(0.9) else {}
        if self._maybe(0.7):
            schema["items"] = self.any(depth) if self._maybe(0.9) else False
        if self._maybe(0.4):
            schema["prefixItems"] = [self.any(depth) for _ in range(self._chance.randint(1, 2))]
        for key in ("minItems", "maxItems"):
            if self._maybe(0.4):
                schema[key] = self._chance.randint(0, 3)
        return schema

    def _combined(self, depth: int) -> dict[str, Any]:
        key = self._chance.choice(["anyOf", "anyOf", "allOf", "oneOf"])
        schema = {key: [self.any(depth) for _ in range(self._chance.randint(1, 3))]}
        beside = self.any(depth) if self._maybe(0.3) else {}
        return {**beside, **schema} if isinstance(beside, dict) else schema


@dataclass(slots=True)
class Findings:
    """What became of schemas."""

    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    over_accepted: list[str] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)  # refusals of objects that name no place in them
    compile_ms: list[float] = field(default_factory=list)

    def compile(self, vocabulary: LLTokenizer, schema: Any) -> LLMatcher | None:
        """The schema's matcher, counted; None where it is refused."""
        begin = time.perf_counter()
        try:
            matcher = compiled(vocabulary, schema)
        except BadParameter as error:
            self.counts["refused"] += 1
            self.refusals[re.sub(r"at (/.*?|the top): ", "", error.problem)[:90]] += 1
            if isinstance(schema, dict) and not PLACE.search(str(error)):
                self.nameless.append(str(error))
            return None
        self.compile_ms.append((time.perf_counter() - begin) * 1e3)
        self.counts["served"] += 1
        return matcher

    def show(self) -> None:
        print(dict(self.counts))
        for words, count in self.refusals.most_common(20):
            print(f"{count:6d}  {words}")
        if self.compile_ms:
            p50, p99, most = np.percentile(self.compile_ms, [50, 99, 100])
            print(f"check and compile: p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {most:.2f} ms")
        for title, those in (("OVER-ACCEPTED", self.over_accepted), ("NAMES NO PLACE", self.nameless)):
            for one in those[:20]:
                print(title, one)


def is_valid(validator: jsonschema.Draft202012Validator, text: bytes) -> bool:
    """What the package says of a text of JSON; numbers beyond float64 it does not judge."""
    try:
        return validator.is_valid(json.loads(text))
    except OverflowError:
        return True


def walk_schemas(count: int, seed: int) -> Findings:
    """Random schemas, each walked a few times; what comes must be valid."""
    vocabulary, found = byte_vocabulary(), Findings()
    chance, generator = random.Random(seed), np.random.default_rng(seed)
    for _ in range(count):
        schema = random_schema(chance)
        if (matcher := found.compile(vocabulary, schema)) is None:
            continue
        validator = jsonschema.Draft202012Validator(schema)
        for _ in range(WALKS):
            text = walk(matcher, generator)
            found.counts["walks" if text is not None else "unfinished walks"] += 1
            if text is not None and not is_valid(validator, text):
                found.over_accepted.append(f"{json.dumps(schema)}\n    {text!r}")
    return found


def feed_suite(folder: Path) -> Findings:
    """The instances of a suite's files: an invalid one must not pass, however it is written."""
    vocabulary, found = byte_vocabulary(), Findings()
    for path in _files(folder):
        for case in json.loads(path.read_text()):
            schema = case["schema"]
            if (matcher := found.compile(vocabulary, schema)) is None:
                continue
            for test in case["tests"]:
                passes = any(takes(matcher, text) for text in _texts(test["data"], schema))
                outcome = f"{'valid' if test['valid'] else 'invalid'}, {'taken' if passes else 'not taken'}"
                if passes and not test["valid"]:
                    if path.as_posix().endswith(ANNOTATIONS):
                        outcome += ", by an annotation"
                    else:
                        found.over_accepted.append(f"{path.name}: {case['description']}: {test['description']}")
                found.counts[outcome] += 1
    return found


def _files(folder: Path) -> list[Path]:
    drafts = [folder / name for name in DRAFTS if (folder / name).is_dir()] or [folder]
    return [path for draft in drafts for path in sorted(draft.rglob("*.json"))]


def takes(matcher: LLMatcher, text: str) -> bool:
    """Whether the whole text matches."""
    matcher, data = matcher.deep_copy(), list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def _texts(instance: Any, schema: Any) -> Iterator[str]:
    order = {name: place for place, name in enumerate(dict.fromkeys(_names(schema)))}
    for one in (instance, _sorted(instance, order)):
        for ascii_only in (False, True):
            yield json.dumps(one, ensure_ascii=ascii_only)
            yield json.dumps(one, ensure_ascii=ascii_only, separators=(",", ":"))


def _names(schema: Any) -> Iterator[str]:
    """Names of properties in the order in which a schema has them."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("properties", "required"):
                yield from (name for name in value if isinstance(name, str))
            yield from _names(value)
    elif isinstance(schema, list):
        for one in schema:
            yield from _names(one)


def _sorted(value: Any, order: dict[str, int]) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(value[name], order) for name in sorted(value, key=lambda name: order.get(name, 1 << 30))}
    return [_sorted(one, order) for one in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", type=Path)
    options = parser.parse_args()
    (feed_suite(options.suite) if options.suite else walk_schemas(options.count, options.seed)).show()


if __name__ == "__main__":
    main()
