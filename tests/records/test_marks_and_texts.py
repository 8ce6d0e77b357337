"""What looks like a conversation, a mark or an array, and what it is taken for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trim_lightning.errors import UserError
from trim_lightning.records.indexing import index, is_bad
from trim_lightning.records.record_file import LineSource, ReadOptions
from trim_lightning.records.sources import open_records
from trim_lightning.settings.schema import PoolSettings
from trim_lightning.store import Store


def read(tmp_path: Path, *records: dict, what: str = "pool") -> list[list[tuple[str, str]]]:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = index(LineSource(path, label=path.name, name=path.name, what=what), ReadOptions())
    return [[(turn.role, turn.content) for turn in found.record(row).turns] for row in range(len(found))]


@pytest.mark.parametrize(
    "answer",
    ['[["Paris", "France"], ["Rome", "Italy"]]', '[{"question": "?", "answer": "Bob"}]', '{"role": "user"}'],
)
@pytest.mark.parametrize("names", [("prompt", "response"), ("instruction", "output"), ("prompt", "completion")])
def test_an_answer_that_is_json_stays_one_answer(tmp_path: Path, names: tuple[str, str], answer: str) -> None:
    assert read(tmp_path, {names[0]: "Extract", names[1]: answer}) == [[("user", "Extract"), ("assistant", answer)]]


def test_messages_written_as_json_are_messages(tmp_path: Path) -> None:
    told = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}])
    assert read(tmp_path, {"chosen": told, "rejected": "n"}) == [[("user", "q"), ("assistant", "y")]]


def test_a_chosen_conversation_does_not_repeat_the_prompt(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "q"), ("assistant", "y"))]
    whole = [[("system", "s"), ("user", "q"), ("assistant", "y")]]
    assert read(tmp_path, {"prompt": "q", "chosen": turns, "rejected": "n"}) == whole
    assert read(tmp_path, {"prompt": "q", "system": "s", "chosen": turns, "rejected": "n"}) == whole
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    assert read(tmp_path, {"messages": messages, "chosen": turns[1:], "rejected": "n"}) == [whole[0][1:]]


def test_answers_marked_as_bad_are_left_out_but_not_of_a_coreset(tmp_path: Path) -> None:
    records = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False, 0, 0.0, "False", 1)]
    assert len(read(tmp_path, *records)) == 2
    assert len(read(tmp_path, *records, what="coreset")) == 6
    assert not is_bad(0, answered=False), "a class"
    assert not is_bad("no", answered=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a", "response": "b"}]\n[{"prompt": "c", "response": "d"}]', "more after its array"),
        ('{"train": [{"prompt": "a", "response": "b"}], "test": [{"prompt": "c", "response": "d"}]}', "several lists"),
    ],
)
def test_no_record_of_a_json_file_is_lost(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_records(PoolSettings(source="file", path=str(tmp_path / "pool.json")), what="pool", seed=0,
                     spool=Store(tmp_path / "store").spool)  # fmt: skip


def test_a_record_with_a_list_beside_its_text_is_one_record(tmp_path: Path) -> None:
    record = {"instruction": "i", "output": "o", "examples": [{"prompt": "p", "response": "r"}]}
    (tmp_path / "pool.json").write_text(json.dumps(record, indent=1))
    found = open_records(PoolSettings(source="file", path=str(tmp_path / "pool.json")), what="pool", seed=0,
                         spool=Store(tmp_path / "store").spool)  # fmt: skip
    assert [[turn.content for turn in found.record(row).turns] for row in range(len(found))] == [["i", "o"]]
