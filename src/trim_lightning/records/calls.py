"""The tools that a conversation may call, and the calls of its messages, in the form of OpenAI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trim_lightning.records.fields import LayoutError, as_list, json_value, kind_of
from trim_lightning.records.record import TOOLS, Turn


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message, whichever field they are in.

    Raises:
        LayoutError: if something else is in that field.
    """
    given = as_list(message.get("tool_calls") or message.get("function_call"))
    if not given and (more := message.get("function_calls")) and are_tools(more):  # others are written as text
        given = as_list(more)
    found = given if isinstance(given, list) else [given] if given else []
    return [call_of(item) for item in found]


def call_of(item: Any) -> dict[str, Any]:
    """One call in the form of OpenAI; arguments that are JSON text become an object."""
    item = json_value(item) if isinstance(item, str) else item
    inner = (item.get("function") or item) if isinstance(item, Mapping) else None
    inner = json_value(inner) if isinstance(inner, str) else inner
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise LayoutError("tool_calls holds something other than calls with a name and arguments")
    arguments = next((inner[key] for key in ("arguments", "parameters") if inner.get(key) is not None), None)
    if isinstance(arguments, str):
        parsed = json_value(arguments) if arguments.strip() else {}
        arguments = parsed if isinstance(parsed, Mapping) else arguments
    else:
        arguments = without_nulls(arguments)
    function = {"name": inner["name"], "arguments": {} if arguments is None else arguments}
    call_id = item.get("id")
    return {
        **({"id": call_id} if isinstance(call_id, str) and call_id else {}),
        "type": "function",
        "function": function,
    }


def without_nulls(value: Any) -> Any:
    """A value without the nulls in its objects: a column of structs has one for each key that a record lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_tools(value: Any, field: str) -> tuple[Turn, ...]:
    """The tools that a conversation may call: a list of them, one alone, or JSON text of either.

    Raises:
        LayoutError: if it is none of that.
    """
    found = as_list(value) if not isinstance(value, list) else value
    found = [found] if isinstance(found, Mapping) and found else found
    if isinstance(found, list):
        clean = found if isinstance(value, str) else without_nulls(found)
        found = [json_value(item) if isinstance(item, str) else item for item in clean]
    if not found or (isinstance(value, str) and not value.strip()):
        return ()
    if not (isinstance(found, list) and all(isinstance(item, Mapping) for item in found)):
        raise LayoutError(f"field {field} is {kind_of(value)}, not a list of tools")
    return (_tools_turn(found),)


def are_tools(value: Any) -> bool:
    """True for a list of tools, one alone, or JSON text of either."""
    found = as_list(value)
    items = found if isinstance(found, list) else [found]
    return all(isinstance(json_value(item) if isinstance(item, str) else item, Mapping) for item in items)


def _tools_turn(tools: Sequence[Any]) -> Turn:
    return Turn(TOOLS, json.dumps(tools, ensure_ascii=False))


def tools_first(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns, with the tools of all of them in one at the head."""
    found = [tool for turn in turns if turn.role == TOOLS for tool in json.loads(turn.content)]
    if not found:
        return tuple(turns)
    tools = [tool for place, tool in enumerate(found) if tool not in found[:place]]
    return (_tools_turn(tools), *(turn for turn in turns if turn.role != TOOLS))
