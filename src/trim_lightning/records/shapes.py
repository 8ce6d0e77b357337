"""Where the parts of a conversation are in a record, and how they become turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.records.calls import read_tools, tools_first
from trim_lightning.records.fields import MISSING, LayoutError, lookup, optional_text, text_field, texts_of
from trim_lightning.records.messages import (
    beside,
    is_conversation,
    is_message,
    is_messages,
    read_history,
    read_messages,
)
from trim_lightning.records.names import CHOSEN, CONVERSATIONS, THOUGHTS
from trim_lightning.records.record import TOOLS, Role, Turn
from trim_lightning.records.transcripts import spoken_turns

_LISTED = frozenset("[{")  # a text that begins so may hold messages
_TWO = {2}
_SWITCH = 20  # characters of a word such as "on" or "medium"


@dataclass(frozen=True)
class FieldKeys:
    """The fields that the user named; null recognises them. Several prompt fields are joined by a blank line."""

    prompt_field: Any = None
    response_field: str | None = None
    messages_field: str | None = None
    system_field: str | None = None
    history_field: str | None = None
    tools_field: str | None = None
    thought_field: str | None = None

    @property
    def named(self) -> list[tuple[str, str]]:
        """Each key that is set with each field that it names."""
        others = [(key, name) for key, name in vars(self).items() if key != "prompt_field" and name is not None]
        return [*(("prompt_field", name) for name in self.prompts), *others]

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
        thought: Field of the thought before the last response.
        joined: The user named a list of prompts, each of which may be absent or a list of texts.
        unread: Fields whose names sound like conversation and that are in no other place.
        listed: Fields of these that hold messages or pairs, which may have further fields.
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
    thought: str | None = None
    joined: bool = False
    unread: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()

    @cached_property
    def transcribed(self) -> bool:
        """True where a text may hold several turns: one that stands alone, and the sides of preference pairs."""
        return (self.response or "").rpartition(".")[2].lower() == CHOSEN or self.bare

    @cached_property
    def bare(self) -> bool:
        """True for a response that has its prompt, if any, in itself."""
        return not self.prompts and self.messages is None

    @cached_property
    def _watched(self) -> bool:
        return bool(self.unread or self.bare)

    def may_leave(self, record: Mapping[str, Any]) -> bool:
        """True if there may be something in a record, which was read, that is in no turn."""
        if self._watched:
            return True
        for name in self.listed:
            value = record.get(name)
            if type(value) is not list or set(map(len, value)) != _TWO:  # role and content, or a pair
                return True
        return False

    @cached_property
    def simple(self) -> str:
        """``pair`` or ``messages`` if there is nothing beside them, which goes a shorter way; else empty."""
        if self.contexts or self.systems or self.history or self.tools or self.thought or self.transcribed:
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
        if any(turn.role == TOOLS for turn in body):
            tools += tuple(turn for turn in body if turn.role == TOOLS)
            body = tuple(turn for turn in body if turn.role != TOOLS)
        systems: list[Turn] = []
        for name in self.systems:
            text = _joined(record, name) or optional_text(record, name)
            if text and not (body and body[0] == Turn("system", text)):
                systems.append(Turn("system", text))
        earlier = read_history(lookup(record, self.history), self.history) if self.history else ()
        if earlier:
            first = next((place for place, turn in enumerate(body) if turn.role != "system"), len(body))
            body = (*body[:first], *earlier, *body[first:])
        if self.thought:
            thought = _joined(record, self.thought) or optional_text(record, self.thought)
            body = _with_thought(body, thought) if _is_thought(self.thought, thought) else body
        return tools_first((*tools, *systems, *body))

    def _body(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        body: tuple[Turn, ...] = ()
        if self.messages is not None:
            body = read_messages(_there(record, self.messages), self.messages)
        elif self.prompts:
            body = self._prompt(record)
        if self.response is not None:
            answer = self._side(record, self.response, "assistant")
            if self.messages is not None and body[-1].role == answer[0].role == "assistant":
                body = body if body[-1] == answer[-1] else (*body[:-1], *answer)
            else:
                body = _in_turn(body, answer)
        contexts = [text for name in self.contexts if (text := _joined(record, name))]
        spoken = "\n".join(turn.content for turn in body if turn.role != "assistant") if contexts else ""
        for text in contexts:
            if text not in spoken:
                body = _with_context(body, text)
        return body

    def _side(self, record: Mapping[str, Any], name: str, role: Role) -> tuple[Turn, ...]:
        """A prompt or a response: text, a transcript, one message, or a list of messages."""
        value = lookup(record, name)
        if isinstance(value, str) and not is_written(name, value):
            return (spoken_turns(value) if self.transcribed else None) or (Turn(role, value),)
        if is_message(value) or is_conversation(value):
            return read_messages(value, name)
        if isinstance(value, Mapping) and (inner := next((key for key in CONVERSATIONS if value.get(key)), None)):
            return (*beside(value), *read_messages(value[inner], f"{name}.{inner}"))
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return read_messages(value, name)
        return (Turn(role, text_field(record, name)),)

    def _prompt(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        names = self.prompts
        if self.joined:
            names = tuple(name for name in names if lookup(record, name) not in (MISSING, None)) or names[:1]
        listed = [_listed(record, name) if self.joined else "" for name in names]
        asked = zip(names, listed, strict=True)
        sides = [(Turn("user", text),) if text else self._side(record, name, "user") for name, text in asked]
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


def _in_turn(before: tuple[Turn, ...], after: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Prompt and answer with what both hold, as in preference pairs, once."""
    asked = {turn.content.strip() for turn in before if turn.role == "user"}
    if asked and asked <= {turn.content.strip() for turn in after if turn.role == "user"}:
        return (*(turn for turn in before if turn.role in ("system", TOOLS) and turn not in after), *after)
    most = min(len(before), len(after))
    shared = next((size for size in range(most, 0, -1) if _same(before[-size:], after[:size])), 0)
    return (*before, *after[shared:])


def _same(some: tuple[Turn, ...], others: tuple[Turn, ...]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(one.role == other.role and one.content.strip() == other.content.strip() for one, other in pairs)


def _is_thought(field: str, text: str) -> bool:
    """False for a blank, and for one word in a field of a usual name, which says how much was to be thought."""
    words = len(text.split())
    return words > 1 or (words == 1 and (len(text) > _SWITCH or field.lower() not in THOUGHTS))


def _with_thought(turns: tuple[Turn, ...], thought: str) -> tuple[Turn, ...]:
    """The turns with a thought in the last answer, unless that has it already."""
    place = next((place for place in reversed(range(len(turns))) if turns[place].role == "assistant"), None)
    if place is None:
        return (*turns, Turn("assistant", "", thought))
    answer = turns[place]
    if thought.strip() in answer.text:
        return turns
    thought = f"{answer.thought}\n\n{thought}" if answer.thought else thought
    return (*turns[:place], answer._replace(thought=thought), *turns[place + 1 :])


def _joined(record: Mapping[str, Any], name: str) -> str:
    """A text, or the texts of a list joined by blank lines; nothing of other values."""
    value = lookup(record, name)
    return value if isinstance(value, str) and value.strip() else _listed(record, name)


def _listed(record: Mapping[str, Any], name: str) -> str:
    """The texts of a list joined by blank lines; nothing of other values."""
    return "\n\n".join(texts_of(lookup(record, name)))


def _with_context(turns: tuple[Turn, ...], text: str) -> tuple[Turn, ...]:
    """The turns with a text on a new line after the first user turn; as a system turn where there is none."""
    for place, turn in enumerate(turns):
        if turn.role == "user":
            return (*turns[:place], turn._replace(content=f"{turn.content}\n{text}"), *turns[place + 1 :])
    return (Turn("system", text), *turns)
