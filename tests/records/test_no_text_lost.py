"""Random records: every text is in a turn, or in a field that is named, with a remedy that has it read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trim_lightning.records.fields import LayoutError
from trim_lightning.records.layouts import LayoutReader
from trim_lightning.records.record import Turn
from trim_lightning.records.shapes import FieldKeys

Text = Callable[[], str]


def message(role: str, text: Text) -> dict[str, Any]:
    return {"role": role, "content": text()}


BASES: list[Callable[[Text], dict[str, Any]]] = [
    lambda text: {"prompt": text(), "response": text()},
    lambda text: {"instruction": text(), "input": text(), "output": text()},
    lambda text: {"question": text(), "answer": text()},
    lambda text: {"messages": [message("user", text), message("assistant", text)]},
    lambda text: {"conversations": [{"from": "human", "value": text()}, {"from": "gpt", "value": text()}]},
    lambda text: {"prompt": text(), "chosen": text(), "rejected": "no"},
    lambda text: {"prompt": [message("system", text), message("user", text)], "chosen": [message("assistant", text)]},
    lambda text: {"chosen": [message("user", text), message("assistant", text)], "rejected": "no"},
    lambda text: {"text": text()},
    lambda text: {"data": [text(), text()]},
    lambda text: {"conversation": [{"input": text(), "output": text()}]},
    lambda text: {"prompt": [message("user", text)], "completion": [message("assistant", text)]},
]
VALUES: list[Callable[[Text], Any]] = [lambda text: text(), lambda text: text(), lambda text: [text(), text()]]
BESIDE: dict[str, list[Callable[[Text], Any]]] = {
    **dict.fromkeys(
        ["system", "system_prompt", "context", "reasoning", "thinking", "rationale", "explanation", "passage", "story",
         "documents", "answers", "solution", "instruction", "question", "input", "options", "content", "text", "target",
         "query", "original_answer"], VALUES,
    ),
    "tools": [lambda text: [{"name": "look", "description": text()}]],
    "history": [lambda text: [[text(), text()]], lambda text: [message("user", text), message("assistant", text)]],
    "earlier": [lambda text: [message("user", text), message("assistant", text)]],
    "facts": [lambda text: "not of the conversation"],
    "document": [lambda text: {"text": text(), "id": "1"}],
}  # fmt: skip


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    numbers = count()

    def text() -> str:
        return f"This is the text with the number {next(numbers):03}."

    record = draw(st.sampled_from(BASES))(text)
    for name in draw(st.lists(st.sampled_from(sorted(BESIDE)), max_size=3, unique=True)):
        inner = [item for value in record.values() if isinstance(value, list) for item in value if type(item) is dict]
        if inner and name not in ("earlier", "facts") and draw(st.booleans()):
            draw(st.sampled_from(inner)).setdefault(name, text())
        else:
            record.setdefault(name, draw(st.sampled_from(BESIDE[name]))(text))
    return record


def texts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each of the texts in a record, with the names on the way to it."""
    if isinstance(value, str) and value.startswith("This is the text"):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from texts(item, (*path, name))
    elif isinstance(value, list):
        for item in value:
            yield from texts(item, path)


def read(record: dict[str, Any], **keys: Any) -> tuple[str, list[str]]:
    """All that was said, and what is not read."""
    reader = LayoutReader(FieldKeys(**keys), "pool")
    layout = reader.layout_of(record)
    turns: tuple[Turn, ...] = layout.turns(record)
    reader.note(record, layout, turns, "line {}".format, 0)
    return "\n".join(turn.text for turn in turns), reader.remarks()


@given(records())
@settings(max_examples=400)
def test_no_text_is_lost(record: dict[str, Any]) -> None:
    try:
        said, remarks = read(record)
    except LayoutError:
        return  # refused, with the reason
    named = {found[1] for remark in remarks if (found := re.match(r"the field (\S+) looks", remark))}
    for path, text in texts(record):
        ways = {".".join(path[:end]) for end in range(1, len(path) + 1)}
        assert text in said or "original_answer" in path or ways & named, (path, remarks)


@given(records())
@settings(max_examples=400)
def test_each_remedy_has_the_field_read(record: dict[str, Any]) -> None:
    try:
        _, remarks = read(record)
    except LayoutError:
        return
    for remark in remarks:
        first = remark.partition(", pool.messages_field")[0]  # which is another remedy
        given = dict(re.findall(r"pool\.(\w+_field)=(\[[^]]*\]|[\w.]+)", first))
        if not given:
            continue  # it is for the author of the data
        options = {key: value[1:-1].split(",") if value[0] == "[" else value for key, value in given.items()}
        said, _ = read(record, **options)
        name = remark.split()[2]
        for path, text in texts(record):
            assert text in said or ".".join(path) != name, remark
