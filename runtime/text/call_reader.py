"""Tool calls as a model writes them, read by the row of their format while they come.

A call counts from when its name is known and its arguments begin: from there on they are given on as they come. Until
then what was read is recorded; if it turns out to be no call, that is content. Knows no ids and no reasoning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pagegraph.runtime.text.formats import CallFormat
from pagegraph.runtime.text.incoming import Incoming, Reading, Words
from pagegraph.runtime.text.json_text import JsonSpan
from pagegraph.runtime.text.literals import LiteralReader
from pagegraph.runtime.text.parameters import StringWriter, as_json, value_types

_NAME = re.compile(r"[\w.\-:/]*")
_MAX_NAME = 256
_SCALAR_END = re.compile(r"[\s,}\]]")
_BARE_KEYS = ("type", "name", "parameters", "arguments", "id")


class Sink(Protocol):
    """Who is told what was read."""

    def content(self, text: str) -> None:
        """It was no call."""
        ...

    def begin(self, name: str) -> None:
        """A call."""
        ...

    def arguments(self, text: str) -> None:
        """More of the JSON text of its arguments."""
        ...


class CallReader:
    """Reads the calls of one answer. `tools`: parameters' schemas by the tool's name."""

    def __init__(self, incoming: Incoming, sink: Sink, format: CallFormat, tools: Mapping[str, Any]) -> None:
        self._incoming = incoming
        self._sink = sink
        self._format = format
        self._tools = tools
        self._section = tuple(word.strip() for word in format.section_begin)
        self._begin = tuple(word.strip() for word in format.begin)
        self.triggers = frozenset(words[0] for words in (self._section, self._begin) if words)
        self._stop = format.end[0].strip() if format.end else ""
        self._is_bare = False

    def read_bare(self) -> Reading[None]:
        """At the beginning of an answer: the calls that stand there without a marker."""
        bare = self._format.bare
        if not bare:
            return
        self._incoming.record()
        yield from self._incoming.spaces()
        if (yield from self._incoming.comes(bare)):
            self._is_bare = True
            yield from self._read(self._section[1:], in_section=True)
            self._is_bare = False
        else:
            self._sink.content(self._incoming.recorded())

    def read(self, trigger: str) -> Reading[None]:
        """The calls behind `trigger`, one of `triggers`, which has been read."""
        self._incoming.record(trigger)
        if self._section and trigger == self._section[0]:
            yield from self._read((*self._section[1:], *self._begin), in_section=True)
        else:
            yield from self._read(self._begin[1:], in_section=False)

    def _read(self, words: tuple[str, ...], in_section: bool) -> Reading[None]:
        """Calls, the first behind `words`. What was read before is being recorded; what is no call becomes content."""
        incoming, format = self._incoming, self._format
        while (yield from self._all(words)):
            yield from incoming.spaces()
            if format.listed is not None and (yield from self._list_comes()):
                listed = CallReader(incoming, self._sink, format.listed, self._tools)
                yield from listed._read(listed._section[1:], in_section=True)
                return
            if not (yield from self._call()):
                break
            incoming.record()
            if (yield from self._all(format.end)):
                incoming.record()
            between = format.between.strip()
            more = bool(between) and (yield from self._all((between,)))
            if format.section_end and (yield from self._all(format.section_end)):
                incoming.recorded()
                return
            again = format.style == "object" and (yield from incoming.comes("{"))
            if not (in_section or more or again):
                break
            words = () if again else self._begin
        self._sink.content(incoming.recorded())

    def _list_comes(self) -> Reading[bool]:
        again = yield from self._incoming.comes(self._begin[0])  # which may begin with a bracket, too
        return not again and (yield from self._incoming.comes("["))

    def _all(self, words: tuple[str, ...]) -> Reading[bool]:
        """Read these words and the white space before each, as far as they come; whether all did."""
        for word in words:
            yield from self._incoming.spaces()
            if not (yield from self._incoming.skip(word.strip())):
                return False
        return True

    def _call(self) -> Reading[bool]:
        """One call without its words; False, and what was read still recorded, if it is none."""
        return (yield from self._styles[self._format.style](self))

    def _commit(self, name: str) -> bool:
        """It is a call of `name`, unless nobody can be called so."""
        if not name or (self._is_bare and name not in self._tools):
            return False
        self._incoming.recorded()
        self._sink.begin(name)
        return True

    # object: a JSON object with the name and the arguments, in either order and among others.

    def _object_call(self) -> Reading[bool]:
        call = _ObjectCall()
        if not (yield from self._incoming.skip("{")):
            return False
        while not (yield from self._closes()):
            key = yield from self._key()
            if key is None or not (yield from self._field(call, key)):
                return call.begun
        if call.arguments is None:
            call.arguments = ["{}"]
        return call.begun or (call.name is not None and self._start(call))

    def _closes(self) -> Reading[bool]:
        yield from self._incoming.spaces()
        if (yield from self._incoming.skip(",")):
            yield from self._incoming.spaces()
        return (yield from self._incoming.skip("}"))

    def _key(self) -> Reading[str | None]:
        key = yield from self._string()
        yield from self._incoming.spaces()
        if not (yield from self._incoming.skip(":")):
            return None
        yield from self._incoming.spaces()
        return key

    def _field(self, call: _ObjectCall, key: str) -> Reading[bool]:
        """The value of a key; False if there can be no call."""
        if key == "name" and call.name is None:
            call.name = yield from self._string()
            return call.name is not None and self._start(call)
        if key in ("arguments", "parameters") and call.arguments is None and not call.begun:
            if call.name is None or not (yield from self._incoming.comes("{")):
                call.arguments = yield from self._collected_arguments()
                return call.arguments is not None and self._start(call)
            call.begun = self._commit(call.name)
            if call.begun:
                yield from self._incoming.passing(JsonSpan(self._stop), self._sink.arguments)
            return call.begun
        if self._is_bare and not call.begun and key not in _BARE_KEYS:
            return False
        yield from self._value()
        return True

    def _start(self, call: _ObjectCall) -> bool:
        """Begin a call whose name and arguments are both there; False if it can be none."""
        if call.name is not None and call.arguments is not None and not call.begun:
            call.begun = self._commit(call.name)
            if call.begun:
                self._sink.arguments("".join(call.arguments))
            return call.begun
        return True

    def _collected_arguments(self) -> Reading[list[str] | None]:
        """Arguments that cannot be given on as they come: before the name, in a string, or null; None for others."""
        first = yield from self._incoming.peek()
        if first == '"':
            text = yield from self._string()
            return [text] if text is not None and text.strip().startswith("{") else None
        parts: list[str] = []
        if first == "{":
            whole = yield from self._incoming.passing(JsonSpan(), parts.append)
            return parts if whole else None
        yield from self._incoming.some(_SCALAR_END, parts.append)
        return ["{}"] if parts == ["null"] else None

    def _string(self) -> Reading[str | None]:
        """A JSON string; None if there is none."""
        parts: list[str] = []
        if not (yield from self._incoming.comes('"')):
            return None
        yield from self._incoming.passing(JsonSpan(), parts.append)
        try:
            return json.loads("".join(parts), strict=False)
        except ValueError:
            return None

    def _value(self) -> Reading[None]:
        """Any JSON value, which nobody needs."""
        if (yield from self._incoming.peek()) in tuple('"[{'):
            yield from self._incoming.passing(JsonSpan(self._stop), lambda _: None)
        else:
            yield from self._incoming.some(_SCALAR_END, lambda _: None)

    # named: the name, then the arguments as a JSON object.

    def _named_call(self) -> Reading[bool]:
        name = yield from self._name()
        yield from self._all(self._format.name_end)
        yield from self._incoming.spaces()
        if not (yield from self._incoming.comes("{")) or not self._commit(name):
            return False
        yield from self._incoming.passing(JsonSpan(self._stop), self._sink.arguments)
        return True

    def _name(self) -> Reading[str]:
        """A name; "" if none comes."""
        name = yield from self._incoming.run(_NAME)
        if self._format.id_begin and (yield from self._incoming.skip(self._format.id_begin)):
            yield from self._incoming.run(_NAME)
        return name if len(name) <= _MAX_NAME else ""

    # parameters: the name, then each argument as text between words.

    def _parameters_call(self) -> Reading[bool]:
        name = yield from self._name()
        if not (yield from self._all(self._format.name_end)):
            return False
        yield from self._incoming.spaces()
        key_begin = self._format.key_begin
        if not (yield from self._incoming.comes(key_begin)) and not (yield from self._incoming.comes(self._stop)):
            return False
        if not self._commit(name):
            return False
        schema, opening = self._tools.get(name, {}), "{"
        while (yield from self._incoming.skip(key_begin)):
            yield from self._parameter(schema, opening)
            yield from self._incoming.spaces()
            opening = ", "
        self._sink.arguments("{}" if opening == "{" else "}")
        return True

    def _parameter(self, schema: Mapping[str, Any], opening: str) -> Reading[None]:
        """One argument behind `key_begin`, up to its end or to that of the call."""
        format, key = self._format, []
        yield from self._incoming.until(Words((format.key_end[0],)), key.append)
        yield from self._all(format.key_end[1:])
        properties = schema.get("properties")
        declared = properties.get("".join(key).strip()) if isinstance(properties, Mapping) else None
        types = value_types(declared, schema)
        self._sink.arguments(f"{opening}{json.dumps(''.join(key).strip(), ensure_ascii=False)}: ")
        breaks = format.value_end.startswith("\n")
        ends = Words((format.value_end.strip(), self._stop))
        if types <= {"string"}:
            self._sink.arguments('"')
            yield from self._incoming.until(ends, StringWriter(self._sink.arguments, breaks), read=False)
            self._sink.arguments('"')
        else:
            text: list[str] = []
            yield from self._incoming.until(ends, text.append, read=False)
            self._sink.arguments(as_json("".join(text).removeprefix("\n").removesuffix("\n"), types))
        yield from self._incoming.skip(format.value_end.strip())

    # literals: the name, then the arguments in brackets.

    def _literals_call(self) -> Reading[bool]:
        name = yield from self._name()
        python = not self._format.quote
        if not (yield from self._incoming.comes("(" if python else "{")) or not self._commit(name):
            return False
        yield from LiteralReader(self._incoming, self._sink.arguments, self._format.quote, named=python).read()
        return True

    _styles = {
        "object": _object_call,
        "named": _named_call,
        "parameters": _parameters_call,
        "literals": _literals_call,
    }


@dataclass(slots=True)
class _ObjectCall:
    """What is known of a call while its object is read."""

    name: str | None = None
    arguments: list[str] | None = None  # that wait for the name
    begun: bool = False
