"""Where the parts of a conversation are in a record, and how they become turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.records.fields import MISSING, LayoutError, lookup, optional_text, text_field
from trim_lightning.records.messages import (
    is_conversation,
    is_message,
    is_messages,
    read_history,
    read_messages,
    read_tools,
)
from trim_lightning.records.record import Role, Turn

_LISTED = frozenset("[{")  # a text that begins so may hold messages


@dataclass(frozen=True)
class FieldKeys:
    """The fields that the user named; null recognises them. Several prompt fields are joined by a blank line."""

    prompt_field: Any = None
    response_field: str | None = None
    messages_field: str | None = None
    system_field: str | None = None
    history_field: str | None = None
    tools_field: str | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt fields, none if they are not named."""
        given = self.prompt_field
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    def identity(self) -> dict[str, Any]:
        """JSON-able: the keys that are set."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        return {**found, "prompt_field": list(self.prompts)} if self.prompts else found

    def check(self, what: str) -> None:
        """Refuse half a layout, and two at once.

        Raises:
            UserError: naming the keys.
        """
        given, missing = "prompt_field", "response_field"
        if not self.prompts:
            given, missing = missing, given
        if self.messages_field is not None and (self.prompts or self.response_field is not None):
            raise UserError(
                f"{what}.messages_field and {what}.{given}: a conversation is read from one list or from single "
                "fields; set one of them"
            )
        if bool(self.prompts) != (self.response_field is not None):
            raise UserError(f"{what}.{given} is set but {what}.{missing} is not: set both, or neither")


@dataclass(frozen=True)
class Layout:
    """Where the parts of a conversation are in a record.

    Attributes:
        name: What messages and manifests call the layout.
        prompts: Fields of the last prompt, joined by a blank line.
        response: Field of the last response.
        messages: Field with a list of messages.
        extra: Text that follows the prompt on a new line: Alpaca's ``input``.
        contexts: Likewise, unless the conversation has it already: Dolly's ``context``.
        systems: Fields of the system text.
        history: Field of earlier turns.
        tools: Field of the tools that may be called.
        unread: Fields whose names sound like conversation and that are in no other place.
    """

    name: str
    prompts: tuple[str, ...] = ()
    response: str | None = None
    messages: str | None = None
    extra: str | None = None
    contexts: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    history: str | None = None
    tools: str | None = None
    unread: tuple[str, ...] = ()

    @cached_property
    def simple(self) -> str:
        """``pair`` or ``messages`` if there is nothing beside them, which goes a shorter way; else empty."""
        if self.contexts or self.systems or self.history or self.tools:
            return ""
        if self.messages is not None:
            return "" if self.response else "messages"
        return "pair" if len(self.prompts) == 1 and self.response is not None else ""

    def turns(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        """The conversation in order.

        Raises:
            LayoutError: if a field is missing or has the wrong type.
        """
        if self.simple == "messages":
            return self._body(record)
        if self.simple:
            prompt, response = record.get(self.prompts[0]), record.get(self.response or "")
            extra = record.get(self.extra) if self.extra else ""
            if isinstance(prompt, str) and isinstance(response, str) and (extra is None or isinstance(extra, str)):  # noqa: SIM102
                if prompt[:1] not in _LISTED and response[:1] not in _LISTED:
                    asked = f"{prompt}\n{extra}" if extra else prompt
                    return (Turn("user", asked), Turn("assistant", response))
        body = self._body(record)
        tools = read_tools(lookup(record, self.tools), self.tools) if self.tools else ()
        systems: list[Turn] = []
        for name in self.systems:
            text = optional_text(record, name)
            if text and not (body and body[0] == Turn("system", text)):
                systems.append(Turn("system", text))
        earlier = read_history(lookup(record, self.history), self.history) if self.history else ()
        if earlier:
            first = next((place for place, turn in enumerate(body) if turn.role != "system"), len(body))
            body = (*body[:first], *earlier, *body[first:])
        return (*tools, *systems, *body)

    def _body(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        before: tuple[Turn, ...] = ()
        if self.messages is not None:
            before = read_messages(_there(record, self.messages), self.messages)
        elif self.prompts:
            before = self._prompt(record)
        contexts = [text for name in self.contexts if (text := _joined(record, name))]
        spoken = "\n".join(turn.content for turn in before) if contexts else ""
        for text in contexts:
            if text not in spoken:
                before = _with_context(before, text)
        if self.response is None:
            return before
        after = _side(record, self.response, "assistant")
        asked = {turn.content for turn in before if turn.role == "user"}
        if asked and asked <= {turn.content for turn in after if turn.role == "user"}:
            return after  # the answer of a preference pair may hold its prompt
        if self.messages is not None and before[-1].role == "assistant":
            return before if before[-1] == after[-1] else (*before[:-1], *after)
        return before + after

    def _prompt(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        sides = [_side(record, name, "user") for name in self.prompts]
        if any(len(side) != 1 or side[0].role != "user" for side in sides):
            before = tuple(turn for side in sides for turn in side)
        else:
            texts = [side[0].content for side in sides]
            before = (Turn("user", texts[0] if len(texts) == 1 else "\n\n".join(filter(None, texts))),)
        if self.extra is not None and (extra := optional_text(record, self.extra)):
            before = _with_context(before, extra)
        return before


def _there(record: Mapping[str, Any], name: str) -> Any:
    value = lookup(record, name)
    if value is MISSING:
        raise LayoutError(f"field {name} is missing")
    return value


def is_written(name: str, text: str) -> bool:
    """True for messages written as JSON in a field of preference data; JSON elsewhere is an answer like others."""
    opens = {"chosen": ("[", "{"), "prompt": ("[",), "completion": ("[",)}.get(name, ())
    return text[:1] in opens and is_messages(text)


def _side(record: Mapping[str, Any], name: str, role: Role) -> tuple[Turn, ...]:
    """A prompt or a response: text, one message, or a list of messages."""
    value = lookup(record, name)
    if isinstance(value, str) and not is_written(name, value):
        return (Turn(role, value),)
    if is_message(value) or is_conversation(value):
        return read_messages(value, name)
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return read_messages(value, name)
    return (Turn(role, text_field(record, name)),)


def _joined(record: Mapping[str, Any], name: str) -> str:
    """A text, or a list of texts joined by blank lines; nothing of other values."""
    value = lookup(record, name)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n\n".join(value)
    return value if isinstance(value, str) and value.strip() else ""


def _with_context(turns: tuple[Turn, ...], text: str) -> tuple[Turn, ...]:
    """The turns with a text on a new line after the first user turn; as a system turn where there is none."""
    for place, turn in enumerate(turns):
        if turn.role == "user":
            return (*turns[:place], turn._replace(content=f"{turn.content}\n{text}"), *turns[place + 1 :])
    return (Turn("system", text), *turns)
