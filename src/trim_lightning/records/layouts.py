"""The shapes that instruction data comes in, and how each becomes turns.

A layout is chosen once per file, from its first record, and then every record must fit it. Which fields a
layout reads follows the public formats (Alpaca, ShareGPT, chat messages, TRL); the order of preference is our
choice: a plain prompt and response win over Alpaca, because some sets carry an extra ``instruction``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trim_lightning.errors import UserError, suggest
from trim_lightning.records.record import Role, Turn

MISSING: Any = object()
_SURROGATE = re.compile("[\ud800-\udfff]")

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class LayoutError(Exception):
    """One record does not fit the layout; the message has no place in it, the caller knows the line."""


class Layout(Protocol):
    """Turns the JSON object of a record into its conversation."""

    @property
    def name(self) -> str:
        """What messages and manifests call the layout."""

    def turns(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        """The conversation in order.

        Raises:
            LayoutError: if a field is missing or has the wrong type.
        """

    def identity(self) -> dict[str, Any]:
        """JSON-able: what determines the turns, for cache keys."""


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


def _text(record: Mapping[str, Any], field: str) -> str:
    value = lookup(record, field)
    if value is MISSING:
        raise LayoutError(f"field {field} is missing")
    if not isinstance(value, str):
        raise LayoutError(f"field {field} is {kind_of(value)}, not text")
    return value


def _optional_text(record: Mapping[str, Any], field: str) -> str:
    return "" if record.get(field) is None else _text(record, field)


def _parts(content: list[Any], field: str) -> str:
    """Join the text parts of a multi-part message."""
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else kind_of(part)
            raise LayoutError(f"field {field} has a content part of type {scalar_text(kind)}; only text can be read")
    return "".join(texts)


def _message(message: Any, field: str) -> Turn:
    """Read one ``role``/``content`` or ``from``/``value`` message."""
    if not isinstance(message, Mapping):
        raise LayoutError(f"field {field} holds {kind_of(message)} where a message is due")
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    name = message.get(role_key)
    if not isinstance(name, str):
        raise LayoutError(f"field {field} has a message without {role_key}")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise LayoutError(f"field {field} has the unknown role {name!r} (known: {', '.join(ROLES)})")
    content = message.get(content_key, MISSING)
    calls = message.get("tool_calls") or message.get("function_call")
    if calls and (content is None or content is MISSING):
        return Turn(role, "")
    if isinstance(content, list):
        return Turn(role, _parts(content, field))
    if content is MISSING:
        raise LayoutError(f"field {field} has a message without {content_key}")
    if not isinstance(content, str):
        raise LayoutError(f"field {field} has a message whose {content_key} is {kind_of(content)}, not text")
    return Turn(role, content)


def _messages(record: Mapping[str, Any], field: str) -> tuple[Turn, ...]:
    value = lookup(record, field)
    if value is MISSING:
        raise LayoutError(f"field {field} is missing")
    if not isinstance(value, list):
        raise LayoutError(f"field {field} is {kind_of(value)}, not a list of messages")
    if not value:
        raise LayoutError(f"field {field} is an empty list")
    return tuple(_message(message, field) for message in value)


@dataclass(frozen=True)
class PairLayout:
    """A prompt and a response, each of them text or (as in TRL) a list of messages."""

    prompt_field: str
    response_field: str

    @property
    def name(self) -> str:
        return f"{self.prompt_field}/{self.response_field}"

    def turns(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        return self._side(record, self.prompt_field, "user") + self._side(record, self.response_field, "assistant")

    def _side(self, record: Mapping[str, Any], field: str, role: Role) -> tuple[Turn, ...]:
        value = lookup(record, field)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return _messages(record, field)
        return (Turn(role, _text(record, field)),)

    def identity(self) -> dict[str, Any]:
        return {"layout": "pair", "prompt_field": self.prompt_field, "response_field": self.response_field}


@dataclass(frozen=True)
class AlpacaLayout:
    """``instruction`` and ``output``; optional ``input``, ``system`` and ``history`` of earlier pairs."""

    name: str = "instruction/input/output"

    def turns(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        if system := _optional_text(record, "system"):
            turns.append(Turn("system", system))
        for user, assistant in self._history(record):
            turns += [Turn("user", user), Turn("assistant", assistant)]
        instruction, extra = _text(record, "instruction"), _optional_text(record, "input")
        turns.append(Turn("user", f"{instruction}\n{extra}" if extra else instruction))
        turns.append(Turn("assistant", _text(record, "output")))
        return tuple(turns)

    def _history(self, record: Mapping[str, Any]) -> list[list[str]]:
        history = record.get("history")
        if history is None or history == "":
            return []
        if not isinstance(history, list):
            raise LayoutError(f"field history is {kind_of(history)}, not a list of [user, assistant] pairs")
        for pair in history:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
                raise LayoutError("field history holds something other than [user, assistant] pairs of text")
        return history

    def identity(self) -> dict[str, Any]:
        return {"layout": "alpaca"}


@dataclass(frozen=True)
class ConversationLayout:
    """A list of messages: ShareGPT's ``conversations`` (with an optional ``system``) or ``messages``."""

    field: str

    @property
    def name(self) -> str:
        return self.field

    def turns(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        turns = _messages(record, self.field)
        system = _optional_text(record, "system") if self.field == "conversations" else ""
        if system and turns[0] != Turn("system", system):
            return (Turn("system", system), *turns)
        return turns

    def identity(self) -> dict[str, Any]:
        return {"layout": "conversation", "field": self.field}


# In order of preference: the fields that must be there, and the layout that they stand for.
KNOWN: tuple[tuple[tuple[str, ...], Layout], ...] = (
    (("prompt", "response"), PairLayout("prompt", "response")),
    (("prompt", "completion"), PairLayout("prompt", "completion")),
    (("instruction", "output"), AlpacaLayout()),
    (("conversations",), ConversationLayout("conversations")),
    (("messages",), ConversationLayout("messages")),
)


def check_fields(prompt_field: str | None, response_field: str | None, what: str) -> None:
    """Refuse half a layout.

    Raises:
        UserError: if only one of the two fields is named.
    """
    if (prompt_field is None) != (response_field is None):
        given, missing = "prompt_field", "response_field"
        if prompt_field is None:
            given, missing = missing, given
        raise UserError(f"{what}.{given} is set but {what}.{missing} is not: set both, or neither")


def choose_layout(
    record: Mapping[str, Any],
    prompt_field: str | None = None,
    response_field: str | None = None,
    *,
    what: str,
    where: str,
) -> Layout:
    """Find the layout of a file from its first record, whose place ``where`` says in messages; fields may be dotted.

    Raises:
        UserError: if only one field is named, a named field is not in the record, or no layout fits.
    """
    check_fields(prompt_field, response_field, what)
    known = list(field_names(record))
    if prompt_field is not None and response_field is not None:
        for key, field in (("prompt_field", prompt_field), ("response_field", response_field)):
            if lookup(record, field) is MISSING:
                raise UserError(
                    f"{what}.{key}={field}: {where} has no such field (it has {', '.join(known) or 'none'})"
                    f"{suggest(field, known)}"
                )
        return PairLayout(prompt_field, response_field)
    for fields, layout in KNOWN:
        if all(field in record for field in fields):
            return layout
    tried = ", ".join("+".join(fields) for fields, _ in KNOWN)
    raise UserError(
        f"{where} fits no known layout: tried {tried}; it has the fields {', '.join(known) or 'none'}; "
        f"name yours with {what}.prompt_field and {what}.response_field"
    )
