"""What of the records was not read, or is not what it seems, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trim_lightning.records.fields import lookup, texts_of
from trim_lightning.records.messages import (
    CONTENT_KEYS,
    MASKS,
    ROLES,
    is_conversation,
    is_message,
    unfolded,
    weight_of,
)
from trim_lightning.records.names import ANSWER_WORDS, CHOSEN, THOUGHT_WORDS, is_spoken, words_of
from trim_lightning.records.record import Turn
from trim_lightning.records.shapes import Layout
from trim_lightning.records.transcripts import looks_rendered

_SHORT = 20  # characters; the short answer that judges a generated text is seldom a part of the conversation
_CALLED = {"role", "from"}
_SAID = {"content", "value"}


class Unread:
    """Collects, over the records of an input, what the user should know of how they were read.

    Attributes:
        fields: Fields that sound like conversation and were in no turn, each with what the user can do about it.
    """

    def __init__(self, what: str) -> None:
        self.fields: dict[str, str] = {}
        self._what = what
        self._told: dict[str, str] = {}
        self._weighted, self._first_weighted = 0, ""

    def note(self, record: Mapping[str, Any], layout: Layout, turns: Sequence[Turn], where: Callable[[], str]) -> None:
        """Look at a record and what was read of it; ``where`` says which it is."""
        for field in layout.unread:
            name, value = most_text(field, record.get(field))
            if name not in self.fields and is_left_out(name, value, turns):
                self.fields[name] = f"first in {where()}; {remedy(name, value, layout, turns, self._what)}"
        for name in layout.listed:
            value = lookup(record, name)
            value = value if type(value) is list else unfolded(value)
            odd = [item for item in value if type(item) is dict and len(item) > 2] if isinstance(value, list) else []
            if odd:
                self._note_messages(name, odd, turns, where)
        if layout.bare and len(turns) == 1:
            self._note_bare(record, layout, turns[0].content, where)

    def _note_messages(
        self, field: str, messages: Sequence[Mapping[str, Any]], turns: Sequence[Turn], where: Callable[[], str]
    ) -> None:
        for message in messages:
            two = all(isinstance(message.get(key), str) for key in _SAID) or not is_message(message)
            for key, text in message.items():
                name = f"{field}.{key}"
                if key in _CALLED or (key in _SAID and not two) or name in self.fields or not is_spoken(key):
                    continue
                if is_left_out(key, text, turns):
                    self.fields[name] = f"first in {where()}; write it into the content of its message"
        weights = (weight_of(message.get(key)) for message in messages for key in MASKS)
        partly = any(message.get("train_detail") for message in messages)
        if partly or any(weight is not None and weight not in (0, 1) for weight in weights):
            self._weighted += 1
            self._first_weighted = self._first_weighted or where()

    def _note_bare(self, record: Mapping[str, Any], layout: Layout, text: str, where: Callable[[], str]) -> None:
        field = layout.response or ""
        if field in self._told:
            return
        if looks_rendered(text):
            seems = "looks like a whole conversation written as one text"
        elif str(record.get("role")).lower() in ROLES:
            seems = "is one message of a conversation, as the role beside it says"
        elif words_of(field) == {CHOSEN}:
            seems = "holds no prompt"
        else:
            return
        self._told[field] = (
            f"the field {field} {seems} (first in {where()}): all of it counts as response; give its turns as "
            f"messages, or name the prompt's field with {self._what}.prompt_field and {self._what}.response_field"
        )

    def remarks(self) -> list[str]:
        """What was found, a line each."""
        lines = [
            f"the field {name} looks like a part of the conversation and is not read ({told})"
            for name, told in self.fields.items()
        ]
        if self._weighted:
            lines.append(
                f"{self._weighted:,} records have weights of messages other than 0 and 1, or of parts of a message "
                f"(first in {self._first_weighted}): a message is trained on whole or, at 0, not at all"
            )
        return [*lines, *self._told.values()]


def is_left_out(name: str, value: Any, turns: Sequence[Turn]) -> bool:
    """True for text in a field that stands in no turn, and in which the conversation does not stand whole."""
    texts = [text for text in _texts_in(value) if text.strip()]
    if not texts or ("answer" in name.lower() and len(texts[0]) <= _SHORT):
        return False
    said = [content for turn in turns if (content := turn.text.strip())]
    whole = "\n".join(said)
    missing = [text for text in texts if text.strip() not in whole]
    return any(len(said) < 2 or not all(content in text for content in said) for text in missing)


def most_text(name: str, value: Any) -> tuple[str, Any]:
    """A field and its value; of an object, which is no message, those of what holds most text in it."""
    if not isinstance(value, Mapping) or not value or is_conversation(value):
        return name, value
    inner = max(value, key=lambda key: sum(map(len, _texts_in(value[key]))))
    return f"{name}.{inner}", value[inner]


def _texts_in(value: Any) -> list[str]:
    found = unfolded(value) if isinstance(value, str) else value
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list):
        return []
    messages = [item for item in found if isinstance(item, Mapping)]
    keys = [(item, key) for item in messages for key in item if key in CONTENT_KEYS or is_spoken(key)]
    texts = [text for item, key in keys if isinstance(text := item[key], str)]
    inner = (texts_of([item]) for item in found if not isinstance(item, Mapping))
    return [*(text for some in inner for text in some), *texts]


def remedy(name: str, value: Any, layout: Layout, turns: Sequence[Turn], what: str) -> str:
    """The keys that have a field read beside a layout, or in place of a part of it."""
    words = words_of(name)
    prompts = [*layout.prompts, *((layout.extra,) if layout.extra else ())]
    if is_conversation(value):
        return f"{what}.history_field={name} puts it before the conversation, {what}.messages_field={name} in its place"
    if words & THOUGHT_WORDS:
        return f"{what}.thought_field={name} puts it before the answer, as the thought that leads to it"
    if words & ANSWER_WORDS and not isinstance(value, str):
        return "it holds several texts: write the right one into a field of its own"
    if layout.response and not layout.messages:
        prompt, response = ",".join([*prompts, name]), layout.response
        told = "adds it to the prompt"
        if words & ANSWER_WORDS:
            prompt, response = ",".join(prompts) or layout.response, name
            told = f"takes it in place of {layout.response}" if prompts else "takes it as the response"
        return f"'{what}.prompt_field=[{prompt}]' {what}.response_field={response} {told}"
    if words & ANSWER_WORDS and turns[-1].role != "assistant":
        return f"{what}.prompt_field={layout.messages} {what}.response_field={name} takes it as the answer"
    if words & ANSWER_WORDS or layout.systems:
        return f"if it belongs there, write it into a message of {layout.messages}"
    return f"{what}.system_field={name} puts it at the head"
