"""Instruction data as people have it: every text of a conversation is in a turn, or named in a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trim_lightning.errors import UserError
from trim_lightning.records.indexing import index
from trim_lightning.records.record import conversation_of
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile

USER, ASSISTANT = ("user", "Which tree is it?"), ("assistant", "An oak.")
PAIR = [USER, ASSISTANT]
CHAT = [{"role": "user", "content": USER[1]}, {"role": "assistant", "content": ASSISTANT[1]}]
SHARED = [{"from": "human", "value": USER[1]}, {"from": "gpt", "value": ASSISTANT[1]}]
TOOL = {"name": "look", "description": "Looks at trees"}

SHAPES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "dolly": (
        {"instruction": USER[1], "context": "It has acorns.", "response": ASSISTANT[1], "category": "qa"},
        [("user", f"{USER[1]}\nIt has acorns."), ASSISTANT],
    ),
    "context in the prompt": ({"prompt": USER[1], "context": "tree", "response": ASSISTANT[1]}, PAIR),
    "orca": (
        {"system_prompt": "Be brief.", "question": USER[1], "response": ASSISTANT[1]},
        [("system", "Be brief."), *PAIR],
    ),
    "system beside messages": ({"system": "Be brief.", "messages": CHAT}, [("system", "Be brief."), *PAIR]),
    "system in both": (
        {"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, *CHAT]},
        [("system", "Be brief."), *PAIR],
    ),
    "swift": (
        {"query": USER[1], "response": ASSISTANT[1], "history": [["Hello", "Hi"]], "system": None},
        [("user", "Hello"), ("assistant", "Hi"), *PAIR],
    ),
    "history of messages": (
        {"prompt": USER[1], "completion": ASSISTANT[1], "history": [{"role": "user", "content": "Hello"}]},
        [("user", "Hello"), *PAIR],
    ),
    "question and answer": ({"question": USER[1], "answer": ASSISTANT[1]}, PAIR),
    "capital letters": ({"Question": USER[1], "Response": ASSISTANT[1]}, PAIR),
    "flan": ({"inputs": USER[1], "targets": ASSISTANT[1], "task": "trees"}, PAIR),
    "problem and solution": ({"problem": USER[1], "solution": ASSISTANT[1]}, PAIR),
    "preference": ({"prompt": USER[1], "chosen": ASSISTANT[1], "rejected": "A stone."}, PAIR),
    "preference with the prompt inside": ({"prompt": USER[1], "chosen": CHAT, "rejected": CHAT}, PAIR),
    "preference without a prompt": ({"chosen": CHAT, "rejected": CHAT, "score_chosen": 9}, PAIR),
    "preference of messages": ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, PAIR),
    "preference of one message": (
        {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": {"from": "gpt", "value": "A stone."}},
        PAIR,
    ),
    "preference with messages beside": ({"prompt": USER[1], "messages": CHAT, "chosen": CHAT, "rejected": CHAT}, PAIR),
    "ultrachat": ({"id": "0", "data": [USER[1], ASSISTANT[1]]}, PAIR),
    "capybara": ({"source": "s", "conversation": [{"input": USER[1], "output": ASSISTANT[1]}]}, PAIR),
    "another name": ({"exchange": CHAT, "source": "s"}, PAIR),
    "json text": ({"messages": json.dumps(CHAT)}, PAIR),
    "python text": ({"messages": str(CHAT)}, PAIR),
    "columns of messages": ({"messages": {"role": ["user", "assistant"], "content": [USER[1], ASSISTANT[1]]}}, PAIR),
    "messages of two kinds": (
        {"messages": [{"from": "human", "value": USER[1], "role": None, "content": None}, CHAT[1]]},
        PAIR,
    ),
    "text": ({"text": ASSISTANT[1], "meta": {}}, [ASSISTANT]),
    "null is absent": ({"prompt": USER[1], "response": None, "messages": CHAT}, PAIR),
    "roles": (
        {
            "messages": [
                {"role": "prompter", "content": USER[1]},
                {"role": "tool_call", "content": "look()"},
                {"role": "environment", "content": "acorns"},
                {"role": "ipython", "content": "leaves"},
                CHAT[1],
            ]
        },
        [USER, ("assistant", "look()"), ("tool", "acorns"), ("tool", "leaves"), ASSISTANT],
    ),
    "tool result parts": (
        {"messages": [CHAT[0], {"role": "user", "content": [{"type": "tool_result", "content": "acorns"}]}, CHAT[1]]},
        [USER, ("tool", "acorns"), ASSISTANT],
    ),
}


def read(path: Path, *records: Any, **options: Any) -> RecordFile:
    path = path / "pool.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return index(LineSource(path, label="pool.path=pool.jsonl", name="pool.jsonl", what="pool"), ReadOptions(**options))


def said(file: RecordFile, row: int = 0) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in file.record(row).turns]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_read_whole_and_without_a_remark(tmp_path: Path, name: str) -> None:
    record, expected = SHAPES[name]
    file = read(tmp_path, record)
    assert said(file) == expected
    assert file.remarks == ()
    turns = file.record(0).turns
    assert read(tmp_path, conversation_of(turns)).record(0).turns == turns


@pytest.mark.parametrize("name", SHAPES)
def test_beside_any_layout(tmp_path: Path, name: str) -> None:
    record, expected = SHAPES[name]
    beside = {"system": "You know trees.", "history": [["Hello", "Hi"]], "tools": json.dumps([TOOL])}
    turns = said(read(tmp_path, {**record, **beside}))
    assert turns[0] == ("tools", json.dumps([TOOL]))
    for turn in (("system", "You know trees."), ("user", "Hello"), ("assistant", "Hi"), *expected):
        assert turns.count(turn) == 1 or turn in (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"))


def test_layouts_are_chosen_record_by_record_and_counted(tmp_path: Path) -> None:
    file = read(tmp_path, *(SHAPES[name][0] for name in ("flan", "dolly", "dolly", "another name")))
    assert [said(file, row) for row in range(4)] == [
        PAIR,
        SHAPES["dolly"][1],
        SHAPES["dolly"][1],
        PAIR,
    ]
    assert file.remarks == ("mixed layouts: instruction/response (2), inputs/targets (1), exchange (1)",)


@pytest.mark.parametrize(
    ("record", "remedy", "expected"),
    [
        (
            {"question": USER[1], "passage": "Oaks have acorns.", "answer": ASSISTANT[1]},
            {"prompt_field": ["question", "passage"], "response_field": "answer"},
            [("user", f"{USER[1]}\n\nOaks have acorns."), ASSISTANT],
        ),
        (
            {"messages": CHAT, "document": "Oaks have acorns."},
            {"system_field": "document"},
            [("system", "Oaks have acorns."), *PAIR],
        ),
        (
            {"prompt": USER[1], "response": ASSISTANT[1], "earlier": [{"role": "user", "content": "Hello"}]},
            {"history_field": "earlier"},
            [("user", "Hello"), *PAIR],
        ),
    ],
)
def test_the_remedy_for_an_unread_field_reads_it(
    tmp_path: Path, record: dict[str, Any], remedy: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    remark = read(tmp_path, record, record).remarks
    assert len(remark) == 1
    assert "looks like a part of the conversation and is not read" in remark[0]
    for key, value in remedy.items():
        assert f"pool.{key}={'[' + ','.join(value) + ']' if isinstance(value, list) else value}" in remark[0]
    file = read(tmp_path, record, **remedy)
    assert said(file) == expected
    assert file.remarks == ()


def test_a_list_of_messages_among_several_is_named(tmp_path: Path) -> None:
    record = {"first": CHAT, "second": CHAT[:1]}
    with pytest.raises(UserError, match=r"pool\.messages_field=first"):
        read(tmp_path, record)
    assert said(read(tmp_path, record, messages_field="first")) == PAIR


def test_answers_marked_as_bad_are_left_out(tmp_path: Path) -> None:
    records = [{"prompt": CHAT[:1], "completion": CHAT[1:], "label": label} for label in (True, False, False)]
    file = read(tmp_path, *records)
    assert (len(file), file.source_rows) == (1, 3)
    assert "2 records with label=false" in file.remarks[0]
    assert len(read(tmp_path, *records, where={"label": [True, False]})) == 3
    with pytest.raises(UserError, match="label=false"):
        read(tmp_path, records[1])


def test_thoughts_calls_and_masks(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "tree"}'}}
    parts = [{"type": "thinking", "thinking": "Acorns."}, {"type": "text", "text": "An oak."}]
    messages = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Look first."},
        {"role": "tool", "content": "acorns", "tool_call_id": "c1", "name": "look"},
        {"role": "assistant", "content": "A stone.", "weight": 0},
        {"role": "assistant", "content": parts, "train": True},
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": {"at": "leaf"}}},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    file = read(tmp_path, {"messages": messages})
    turns = file.record(0).turns
    assert json.loads(turns[1].calls)[0]["function"] == {"name": "look", "arguments": {"at": "tree"}}
    assert (turns[1].thought, turns[1].content) == ("Look first.", "")
    assert (turns[2].name, turns[2].call_id) == ("look", "c1")
    assert [turn.trained for turn in turns] == [True, True, True, False, True, True, True]
    assert (turns[4].thought, turns[4].content) == ("Acorns.", "An oak.")
    assert json.loads(turns[5].calls)[0]["function"]["arguments"] == {"at": "leaf"}
    assert read(tmp_path, conversation_of(turns)).record(0).turns == turns


def test_bad_records_are_listed_at_once_or_left_out(tmp_path: Path) -> None:
    good = {"instruction": "a", "output": "b"}
    bad = [{**good, "output": None}, {**good, "input": 3}, *[{**good, "output": 1}] * 6]
    with pytest.raises(UserError) as caught:
        read(tmp_path, good, *bad, good)
    message = str(caught.value)
    for part in ("8 lines cannot be read", "line 2: field output is null", "line 6:", "and 3 more", "bad_records=skip"):
        assert part in message
    assert "field output is a number, not text (6)" in message
    assert "line 7" not in message
    file = read(tmp_path, good, *bad, good, bad_records="skip")
    assert (len(file), len(file.bad)) == (2, 8)
    assert file.bad[0] == ("line 2", "field output is null, not text (layout instruction/input/output)")
    assert "8 lines cannot be read and are left out" in file.remarks[0]


def test_a_mark_at_the_start_of_a_later_line(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(
        b"".join(b"\xef\xbb\xbf" + json.dumps({"prompt": "a", "response": n}).encode() + b"\n" for n in "12")
    )
    file = index(LineSource(path, label="pool", name="pool", what="pool"), ReadOptions())
    assert [turn.content for row in range(2) for turn in file.record(row).turns] == ["a", "1", "a", "2"]
