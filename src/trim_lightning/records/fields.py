"""Values of JSON objects: found by dotted names, told in words, made into text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from trim_lightning.errors import UserError, suggest

MISSING: Any = object()
_SURROGATE = re.compile("[\ud800-\udfff]")


class LayoutError(Exception):
    """One record does not fit the layout; the message has no place in it, the caller knows the line."""


def kind_of(value: Any) -> str:
    """The JSON type of a value in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "a number"
    return "an object" if isinstance(value, Mapping) else "a list"


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """The value of a field, or `MISSING`; ``a.b`` descends into nested objects.

    A field whose own name holds the dot wins over descent.
    """
    if path in record:
        return record[path]
    head, dot, tail = path.partition(".")
    while dot:
        inner = record.get(head, MISSING)
        if isinstance(inner, Mapping):
            value = lookup(inner, tail)
            if value is not MISSING:
                return value
        part, dot, tail = tail.partition(".")
        head = f"{head}.{part}"
    return MISSING


def as_list(value: Any) -> Any:
    """A list in place of the text that spells it, and a list of objects in place of an object of lists."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = json_value(value)
    if isinstance(value, Mapping):
        columns = [column for column in value.values() if isinstance(column, list)]
        if columns and len(columns) == len(value) and len({len(column) for column in columns}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value


def json_value(text: str) -> Any:
    """What a text says as JSON, or as Python prints lists and objects; the text itself if it says neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, list | dict) else text


def texts_of(value: Any) -> list[str]:
    """The texts of a list, of the lists and of the text parts in it; none if it holds anything else."""
    if isinstance(value, Mapping) and value.get("type", "text") == "text" and isinstance(value.get("text"), str):
        return [value["text"]]
    parts = [[item] if isinstance(item, str) else texts_of(item) for item in value] if isinstance(value, list) else []
    return [text for part in parts for text in part] if all(parts) else []


def field_names(record: Mapping[str, Any], prefix: str = "", depth: int = 4) -> Iterable[str]:
    """The dotted paths of a record that `lookup` can follow, ``depth`` levels down, for messages."""
    for name, value in record.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping) and depth > 1:
            yield from field_names(value, f"{prefix}{name}.", depth - 1)


def scalar_field(record: Mapping[str, Any], field: str, place: str, needed: str) -> Any:
    """The text, number or truth value in a field; ``place`` (which key asks, where) and ``needed`` stand in the error.

    Raises:
        UserError: if there is no such field, or a list, an object or null in it.
    """
    value = lookup(record, field)
    if value is MISSING:
        fields = list(field_names(record))
        raise UserError(f"{place} has no such field{suggest(field, fields) or '; fields: ' + ', '.join(fields[:20])}")
    if value is None or isinstance(value, list | Mapping):
        raise UserError(f"{place} has {kind_of(value)} there; {needed}")
    return value


def scalar_text(value: Any) -> str:
    """A JSON value as text: text as it is, everything else as compact JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def clean_text(text: str) -> str:
    """Replace lone surrogates, which no encoder or tokenizer takes, by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def text_field(record: Mapping[str, Any], field: str) -> str:
    """The text in a field.

    Raises:
        LayoutError: if it is missing or something else.
    """
    value = lookup(record, field)
    if value is MISSING:
        raise LayoutError(f"field {field} is missing")
    if not isinstance(value, str):
        raise LayoutError(f"field {field} is {kind_of(value)}, not text")
    return value


def optional_text(record: Mapping[str, Any], field: str) -> str:
    """The text in a field, empty where there is none.

    Raises:
        LayoutError: if it is something else.
    """
    return "" if lookup(record, field) in (MISSING, None) else text_field(record, field)
