"""The tools of a chat request: fields to checked values, or a 400 that names the place.

Knows OpenAI's shapes, with `functions` and `function_call`, their older names. Knows no template, no format of calls
and no schema of arguments beyond that it is an object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from pagegraph.runtime.sampling_params import shown
from pagegraph.runtime.structured_output import StructuredOutputs, check_grammar
from pagegraph.runtime.text.answer_grammar import closed
from pagegraph.web.fields import Fields, refuse

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_EXAMPLE = '{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}'
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The tools of a request, as the template gets them, and how they may be called."""

    listed: list[dict[str, Any]] = field(default_factory=list)
    choice: Literal["none", "auto", "required"] = "none"
    named: str | None = None  # the tool that has to be called; the choice is "required" then
    parallel: bool = True  # more than one call may come
    legacy: bool = False  # the request says `functions`, and so does the answer

    @property
    def schemas(self) -> dict[str, dict[str, Any]] | None:
        """The parameters' schema of each tool that may be called, by name; None if none may."""
        if self.choice == "none" or not self.listed:
            return None
        return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.listed}

    @property
    def strict(self) -> list[str]:
        """Names of tools that may be called with arguments of their schema alone."""
        return [tool["function"]["name"] for tool in self.listed if tool["function"].get("strict")]


def read_tools(fields: Fields) -> Tools:
    """The fields `tools`, `tool_choice`, `parallel_tool_calls`, `functions` and `function_call`."""
    listed, legacy = _listed(fields.take("tools"), "tools", _tool), False
    functions = _listed(fields.take("functions"), "functions", _function)
    choice, where = fields.take("tool_choice"), "tool_choice"
    older = fields.take("function_call")
    if functions:
        if listed:
            refuse("functions", "is the older name of tools; give one of them")
        listed, legacy = functions, True
    if older is not None and choice is None:
        choice, where = older, "function_call"
    names = [tool["function"]["name"] for tool in listed]
    for index, name in enumerate(names):
        if name in names[:index]:
            refuse(f"{'functions' if legacy else 'tools'}[{index}]", f"has the name of an earlier one, {shown(name)}")
    parallel = fields.boolean("parallel_tool_calls", True) and not legacy
    tools = Tools(listed=listed, choice="auto" if listed else "none", parallel=parallel, legacy=legacy)
    tools = tools if choice is None else _chosen(tools, choice, where)
    if schemas := tools.schemas:
        for index, name in enumerate(names):
            held = tools.choice == "required" or name in tools.strict
            if held and (schema := schemas.get(name)):
                _check_arguments(schema, f"functions[{index}]" if legacy else f"tools[{index}].function")
    return tools


def _check_arguments(schema: dict[str, Any], where: str) -> None:
    """Refuses a schema that a grammar cannot hold the arguments of a call to; they are an object."""
    types = schema.get("type", "object")
    if "object" not in (types if isinstance(types, list) else [types]):
        refuse(f"{where}.parameters", f'must be of the type "object"; got the type {shown(types)}')
    check_grammar(StructuredOutputs(json=closed(schema)), field=f"{where}.parameters")


def _chosen(tools: Tools, choice: Any, where: str) -> Tools:
    listed, named = tools.listed, None
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        listed, choice = _allowed(tools.listed, choice, where)
    elif isinstance(choice, dict):
        function = choice.get("function") if where == "tool_choice" else choice
        named = function.get("name") if isinstance(function, dict) else None
        if not isinstance(named, str):
            example = '{"name": "get_time"}'
            if where == "tool_choice":
                example = f'{{"type": "function", "function": {example}}}'
            refuse(where, f"must be {_words()}, or name a function, for example {example}")
        listed, choice = [tool for tool in listed if tool["function"]["name"] == named], "required"
        if not listed:
            offered = ", ".join(tool["function"]["name"] for tool in tools.listed[:8])
            works = f"give one of {offered}" if offered else "give tools beside it"
            refuse(where, f"names {shown(named)}, which is no tool of this request; {works}")
    if not isinstance(choice, str) or choice not in _CHOICES:
        refuse(where, f"must be {_words()} or an object that names a function; got {shown(choice)}")
    if choice == "required" and not listed:
        refuse(where, "needs tools beside it")
    return Tools(
        listed=listed,
        choice=choice if listed else "none",  # type: ignore[arg-type]
        named=named,
        parallel=tools.parallel,
        legacy=tools.legacy,
    )


def _words() -> str:
    return ", ".join(f'"{word}"' for word in _CHOICES)


def _allowed(listed: list[dict[str, Any]], choice: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], str]:
    """The tools that `allowed_tools` leaves, and its mode."""
    inner = choice.get("allowed_tools", choice)
    inner = inner if isinstance(inner, dict) else {}
    mode, tools = inner.get("mode", "auto"), inner.get("tools")
    if mode not in ("auto", "required") or not isinstance(tools, list):
        refuse(where, 'of type allowed_tools needs a mode, "auto" or "required", and a list of tools')
    names = set()
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in {one["function"]["name"] for one in listed}:
            refuse(where, f"allows {shown(name)}, which is no tool of this request")
        names.add(name)
    return [tool for tool in listed if tool["function"]["name"] in names], mode


def _listed(value: Any, name: str, check: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        refuse(name, f"must be a list of at most {MAX_TOOLS}; got {shown(value)}")
    return [check(one, f"{name}[{index}]") for index, one in enumerate(value)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        refuse(f"{where}.type", f'must be "function", the only kind served; got {shown(kind)}')
    return {**tool, "type": "function", "function": _function(tool.get("function"), f"{where}.function")["function"]}


def _function(function: Any, where: str) -> dict[str, Any]:
    """A function's description as a tool."""
    if not isinstance(function, dict):
        refuse(where, f"must be an object, for example that of {_EXAMPLE}; got {shown(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        refuse(f"{where}.name", f"must be 1 to 128 letters, digits or any of _.- ; got {shown(name)}")
    description, parameters = function.get("description"), function.get("parameters")
    if description is not None and not isinstance(description, str):
        refuse(f"{where}.description", f"must be a string; got {shown(description)}")
    if parameters is not None and not isinstance(parameters, dict):
        refuse(f"{where}.parameters", f"must be a JSON schema, an object; got {shown(parameters)}")
    if not isinstance(function.get("strict", False), bool | None):
        refuse(f"{where}.strict", f"must be true or false; got {shown(function['strict'])}")
    return {"type": "function", "function": function}
