"""The shapes that instruction data comes in, and how each becomes turns.

The layout is chosen record by record, from the fields that hold a value. Which fields a layout reads follows the
public formats (Alpaca, Dolly, Orca, ShareGPT, chat messages, TRL, FLAN, UltraChat, preference pairs); the order of
preference is our choice: a plain prompt and response win over Alpaca, because some sets carry an extra
``instruction``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from trim_lightning.errors import UserError, suggest
from trim_lightning.records.calls import are_tools
from trim_lightning.records.fields import MISSING, LayoutError, field_names, lookup, texts_of
from trim_lightning.records.messages import as_pairs, is_conversation, unfolded
from trim_lightning.records.names import (
    CHOSEN,
    CONTEXTS,
    CONVERSATIONS,
    HISTORIES,
    LISTS,
    PREFERRED,
    PROMPTS,
    REJECTED,
    RESPONSES,
    SYSTEMS,
    TEXTS,
    THOUGHTS,
    TOOL_FIELDS,
    is_spoken,
    is_worse,
)
from trim_lightning.records.record import Turn
from trim_lightning.records.shapes import FieldKeys, Layout
from trim_lightning.records.transcripts import spoken_turns
from trim_lightning.records.unread import Unread

READING_VERSION = 3
"""Raise it when the same record would become other turns than before."""

# In order of preference, before all others: the fields that must be there.
FIRST = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
PREFERENCES = (("input", PREFERRED),)  # of OpenAI
SOLVED = (("problem", CHOSEN), ("problem", "solution"))  # an answer beside them is the bare result
ALPACA = "instruction/input/output"
_MOST_SHAPES = 4096


class LayoutReader:
    """Turns the JSON objects of records into conversations, each by its own layout.

    Attributes:
        counts: How many records were read by each layout, as the one who reads them counts.
        unread: What was not read.
    """

    def __init__(self, keys: FieldKeys, what: str) -> None:
        self.keys, self.what = keys, what
        self.counts: Counter[str] = Counter()
        self.unread = Unread(what)
        self._known: dict[tuple[Any, ...], Layout] = {}
        self._last: Layout | None = None

    @property
    def name(self) -> str:
        """The layouts that were met, the most frequent first."""
        return " and ".join(name for name, _ in self.counts.most_common())

    def identity(self) -> dict[str, Any]:
        """JSON-able: what determines the turns, for cache keys."""
        return {"reading": READING_VERSION, **self.keys.identity()}

    def layout_of(self, record: Mapping[str, Any]) -> Layout:
        """The layout of a record; where none fits, that of the record before it, which says what is missing.

        Raises:
            LayoutError: if none fits, and there was none before.
        """
        shape = (*record, *map(type, record.values()))
        known = self._known.get(shape)
        if known is None:
            known, lasting = recognise(record, self.keys, self.what)
            if known is None:
                known = self._last
            if known is None:
                raise LayoutError(no_layout(record, self.what))
            if lasting:
                if len(self._known) >= _MOST_SHAPES:
                    self._known.clear()
                self._known[shape] = known
        self._last = known
        return known

    def turns(self, record: Mapping[str, Any]) -> tuple[Turn, ...]:
        """The conversation of a record.

        Raises:
            LayoutError: if no layout fits, or a field is missing or has the wrong type.
        """
        return self.layout_of(record).turns(record)

    def note(
        self, record: Mapping[str, Any], layout: Layout, turns: tuple[Turn, ...], place: Callable[[int], str], row: int
    ) -> None:
        """Remember what of a record was not read."""
        if layout.may_leave(record):
            self.unread.note(record, layout, turns, partial(place, row))

    def remarks(self) -> list[str]:
        """What the user should know of how the records were read, a line each."""
        lines = []
        if len(self.counts) > 1:
            counted = ", ".join(f"{name} ({number:,})" for name, number in self.counts.most_common())
            lines.append(f"mixed layouts: {counted}")
        return lines + self.unread.remarks()


def choose_layout(
    record: Mapping[str, Any],
    prompt_field: Any = None,
    response_field: str | None = None,
    *,
    what: str,
    where: str,
    **more: Any,
) -> Layout:
    """Find the layout of a record, whose place ``where`` says in messages; fields may be dotted.

    Raises:
        UserError: if only one field is named, a named field is not in the record, or no layout fits.
    """
    keys = FieldKeys(prompt_field, response_field, **more)
    keys.check(what)
    check_named(record, keys, what, where)
    layout, _ = recognise(record, keys, what)
    if layout is None:
        raise UserError(f"{where} {no_layout(record, what)}")
    return layout


def check_named(record: Mapping[str, Any], keys: FieldKeys, what: str, where: str) -> None:
    """Refuse a named field that a record, the first of its file, does not have.

    Raises:
        UserError: naming it and the closest one that exists.
    """
    absent = [(key, name) for key, name in keys.named if lookup(record, name) is MISSING]
    needed = ["response_field", "messages_field"]
    if all(("prompt_field", name) in absent for name in keys.prompts):
        needed.append("prompt_field")  # of several a record may lack some
    for key, name in absent:
        if key in needed:
            raise no_field(key, name, list(field_names(record)), f"{where} has", "it has", what)


def no_field(key: str, name: str, known: Sequence[str], who: str, has: str, what: str) -> UserError:
    """The error for a named field that is not there; ``who`` and ``has`` say where, ``known`` what is."""
    return UserError(
        f"{what}.{key}={name}: {who} no such field ({has} {', '.join(known[:20]) or 'none'}){suggest(name, known)}"
    )


def has_keys(what: str) -> bool:
    """True for an input of which config keys say how it is read; others are read by their content alone."""
    return what in ("pool", "target", "evaluation")


def no_layout(record: Mapping[str, Any], what: str) -> str:
    """What is said of a record that fits no layout."""
    tried = [*("+".join(fields) for fields in FIRST), *CONVERSATIONS, "question+answer and the like", *LISTS[:2]]
    lists = [name for name, value in record.items() if not is_worse(name) and is_conversation(value)]
    hint = f"name yours with {what}.prompt_field and {what}.response_field, or {what}.messages_field"
    if not has_keys(what):
        hint = "rename yours to prompt and response, or to messages"
    elif lists:
        hint = f"there are several lists of messages; name the right one with {what}.messages_field={lists[0]}"
    fields = ", ".join(field_names(record)) or "none"
    return f"fits no known layout: tried {', '.join(tried)}; it has the fields {fields}; {hint}"


def recognise(record: Mapping[str, Any], keys: FieldKeys, what: str) -> tuple[Layout | None, bool]:
    """The layout of a record, from the fields that hold a value, else from those that are there; None if none fits.

    Returns:
        The layout, and whether every record with the same fields and types has it.
    """
    valued = {name: value for name, value in record.items() if value is not None}
    layout, lasting = _recognise(valued, keys)
    if layout is None:
        layout, more = _recognise(record, keys)
        lasting = lasting and more
    if layout is None:
        return None, False
    # a value that is a list may be one of messages in one record and not in the next
    read = {*layout.prompts, layout.response, layout.messages, layout.extra, *layout.contexts, *layout.systems}
    read |= {layout.history, layout.tools, layout.thought, REJECTED}
    unread = [name for name, value in valued.items() if name not in read and (is_spoken(name) or _is_list(value))]
    lists = {name: lookup(valued, name) for name in (layout.messages, layout.history, *layout.prompts) if name}
    if layout.response:
        lists[layout.response] = lookup(valued, layout.response)
    texts = (layout.messages, layout.history)  # which may hold JSON
    listed = [name for name, value in lists.items() if isinstance(value, list | Mapping) or name in texts]
    return replace(layout, unread=tuple(unread), listed=tuple(listed)), lasting


def _recognise(record: Mapping[str, Any], keys: FieldKeys) -> tuple[Layout | None, bool]:
    present = {name.lower(): name for name in reversed(list(record))}
    present |= {name: name for name in record}
    lasting = True
    core: Layout | None = None
    if keys.messages_field is not None:
        core = Layout(keys.messages_field, messages=keys.messages_field)
    elif keys.prompts and keys.response_field is not None:
        name = f"{'+'.join(keys.prompts)}/{keys.response_field}"
        joined = not isinstance(keys.prompt_field, str)
        core = Layout(name, prompts=keys.prompts, response=keys.response_field, joined=joined)
    else:
        core = _pair(present, FIRST) or _listed(present)
        if core is None:
            pairs = [(prompt, response) for prompt in PROMPTS for response in (CHOSEN, *RESPONSES)]
            core = _pair(present, (*PREFERENCES, *SOLVED, *pairs))
            if core is None and CHOSEN in present:
                core = Layout(CHOSEN, response=present[CHOSEN])
            if core is None:
                core, lasting = _by_value(record, present), False
    if core is None:
        return None, False
    core, still = _with_beside(core, record, present, keys)
    return core, lasting and still


def _pair(present: Mapping[str, str], pairs: Sequence[tuple[str, str]]) -> Layout | None:
    for prompt, response in pairs:
        if prompt in present and response in present and prompt != response:
            extra = present.get("input") if prompt == "instruction" and response != "input" else None
            name = "/".join(filter(None, (present[prompt], extra, present[response])))
            return Layout(
                ALPACA if name == "instruction/output" else name,
                prompts=(present[prompt],),
                response=present[response],
                extra=extra,
            )
    return None


def _listed(present: Mapping[str, str]) -> Layout | None:
    for name in CONVERSATIONS:
        if name in present:
            chosen = present[CHOSEN] if CHOSEN in present and REJECTED in present else None
            return Layout(present[name], messages=present[name], response=chosen)
    return None


def _by_value(record: Mapping[str, Any], present: Mapping[str, str]) -> Layout | None:
    """A list of messages under another name, or nothing but a text."""
    for name in LISTS:
        value = unfolded(record[present[name]]) if name in present else None
        if isinstance(value, str) and spoken_turns(value):
            return Layout(present[name], response=present[name])
        if isinstance(value, list) and (is_conversation(value) or _are_texts(value)):
            return Layout(present[name], messages=present[name])
    others = (CHOSEN, *HISTORIES, *TOOL_FIELDS)
    names = [name for name in record if name.lower() not in others and not is_worse(name)]
    lists = [name for name in names if is_conversation(record[name])]
    if lists:
        return Layout(lists[0], messages=lists[0]) if len(lists) == 1 else None
    if not any(name in present for name in (*PROMPTS, *RESPONSES, CHOSEN)):
        for name in TEXTS:
            if name in present and isinstance(record[present[name]], str):
                return Layout(present[name], response=present[name])
    return None


def _are_passages(value: Any) -> bool:
    return bool(texts_of(value)) and not is_conversation(value)


def _are_texts(value: list[Any]) -> bool:
    return len(value) > 1 and all(isinstance(item, str) for item in value)


def _with_beside(
    core: Layout, record: Mapping[str, Any], present: Mapping[str, str], keys: FieldKeys
) -> tuple[Layout, bool]:
    """The layout with the fields beside it that are a part of any conversation."""
    taken = {*core.prompts, core.response, core.messages, core.extra}
    strict = core.name in (ALPACA, "conversations")  # there they were always read, or refused
    lasting = True

    def beside(names: Sequence[str]) -> list[str]:
        found = [present[name] for name in names if name in present]
        return [name for name in dict.fromkeys(found) if name not in taken and record[name] is not None]

    if keys.system_field is not None:
        systems = [keys.system_field]
    else:
        known = beside(SYSTEMS)
        systems = [name for name in known if strict or isinstance(record[name], str) or texts_of(record[name])]
        lasting = not any(isinstance(record[name], list) for name in known)
    history, tools = keys.history_field, keys.tools_field
    if history is None:
        for name in beside(HISTORIES):
            value = record[name]
            lasting = lasting and not value
            found = unfolded(value)
            listed = isinstance(found, list) and (as_pairs(found) is not None or is_conversation(found))
            if listed or (strict and name == "history"):
                history = name
                break
    if tools is None:
        tools = next((name for name in beside(TOOL_FIELDS) if are_tools(record[name])), None)
        lasting = lasting and not any(record[name] for name in beside(TOOL_FIELDS))
    contexts = tuple(name for name in beside(CONTEXTS) if name not in (*systems, history, tools))
    lasting = lasting and not any(isinstance(record[name], list) for name in contexts)
    contexts = tuple(name for name in contexts if isinstance(record[name], str) or _are_passages(record[name]))
    thought = keys.thought_field
    if thought is None:
        thought = next((name for name in beside(THOUGHTS) if isinstance(record[name], str)), None)
    made = replace(core, systems=tuple(systems), history=history, tools=tools, thought=thought, contexts=contexts)
    return made, lasting


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and is_conversation(value)
