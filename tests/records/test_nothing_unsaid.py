"""What stands inside messages and pairs, beside them, or is left out by a filter: read, or said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_shapes import ASSISTANT, CHAT, PAIR, TOOL, USER, read, said
from test_sources import CountingSpool, open_pool

from trim_lightning.errors import UserError
from trim_lightning.records.transcripts import spoken_turns

SYSTEM = ("system", "Be brief.")
HH = "\n\nHuman: Which tree is it?\n\nAssistant: An oak."

INSIDE: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "system in a message": ({"messages": [{**CHAT[0], "system": "Be brief."}, CHAT[1]]}, [SYSTEM, *PAIR]),
    "system in every message": ({"messages": [{**turn, "system": "Be brief."} for turn in CHAT]}, [SYSTEM, *PAIR]),
    "system in a pair": (
        {"conversation": [{"system": "Be brief.", "input": USER[1], "output": ASSISTANT[1]}]},
        [SYSTEM, *PAIR],
    ),
    "input of a pair": (
        {"conversation": [{"instruction": "Name it.", "input": "acorns", "output": ASSISTANT[1]}]},
        [("user", "Name it.\nacorns"), ASSISTANT],
    ),
    "pairs with nulls": (
        {"conversation": [{"input": None, "output": None, "user": USER[1], "assistant": ASSISTANT[1]}]},
        PAIR,
    ),
    "system of the prompt, prompt in chosen": (
        {"prompt": [{"role": "system", "content": "Be brief."}, CHAT[0]], "chosen": CHAT, "rejected": CHAT},
        [SYSTEM, *PAIR],
    ),
    "system in chosen": (
        {"chosen": [{**CHAT[0], "system": "Be brief."}, CHAT[1]], "rejected": CHAT},
        [SYSTEM, *PAIR],
    ),
    "context beside, prompt in chosen": (
        {"prompt": USER[1], "context": "It has acorns.", "chosen": CHAT, "rejected": CHAT},
        [("user", f"{USER[1]}\nIt has acorns."), ASSISTANT],
    ),
    "context of lists": (
        {"question": USER[1], "context": [["Oaks", ["They have", "acorns."]]], "answer": ASSISTANT[1]},
        [("user", f"{USER[1]}\nOaks\n\nThey have\n\nacorns."), ASSISTANT],
    ),
    "last question in chosen": (
        {"prompt": [*CHAT, {"role": "user", "content": "And now?"}], "rejected": "x",
         "chosen": [{"role": "user", "content": "And now? "}, {"role": "assistant", "content": "Now too."}]},
        [*PAIR, ("user", "And now?"), ("assistant", "Now too.")],
    ),
    "tools in a message": (
        {"messages": [{"role": "system", "content": "Be brief.", "functions": json.dumps([TOOL])}, *CHAT]},
        [("tools", json.dumps([TOOL])), SYSTEM, *PAIR],
    ),
    "refusal": (
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "refusal": "I cannot say."}]},
        [USER, ("assistant", "I cannot say.")],
    ),
    "calls as text": (
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "function_calls": "look(at='tree')"}]},
        [USER, ("assistant", "look(at='tree')")],
    ),
    "null parts": (
        {"messages": [CHAT[0], {"role": "assistant", "content": [
            {"type": "refusal", "refusal": "No.", "text": None}, {"type": None, "text": "An oak."}]}]},
        [USER, ("assistant", "No.An oak.")],
    ),
    "hh-rlhf": ({"chosen": HH, "rejected": "\n\nHuman: Which?\n\nAssistant: A stone."}, PAIR),
    "hh-rlhf of several turns": (
        {"chosen": f"{HH}\n\nHuman: Sure?\n\nLook well.\n\nAssistant: Yes", "rejected": HH},
        [*PAIR, ("user", "Sure?\n\nLook well."), ("assistant", "Yes")],
    ),
    "hh-rlhf with the prompt apart": (
        {"prompt": "\n\nHuman: Which tree is it?\n\nAssistant:", "chosen": "An oak.", "rejected": "A stone."},
        PAIR,
    ),
    "hh-rlhf with the prompt in both": (
        {"prompt": "\n\nHuman: Which tree is it?\n\nAssistant:", "chosen": HH, "rejected": HH},
        PAIR,
    ),
    "glaive": (
        {"system": "Be brief.", "chat": "USER: Which tree is it?\n\n\nASSISTANT: An oak.\n\n\nFUNCTION RESPONSE: {}"},
        [SYSTEM, *PAIR, ("tool", "{}")],
    ),
    "parts of Gemini": (
        {"contents": [{"role": role, "parts": [{"text": text}]} for role, text in (USER, ("model", "An oak."))]},
        PAIR,
    ),
    "system of Anthropic": ({"system": [{"type": "text", "text": "Be brief."}], "messages": CHAT}, [SYSTEM, *PAIR]),
    "preference pair of OpenAI": (
        {"input": {"messages": CHAT[:1], "tools": [TOOL]}, "preferred_output": CHAT[1:], "non_preferred_output": CHAT},
        [("tools", json.dumps([TOOL])), *PAIR],
    ),
    "contents that are objects": (
        {"messages": [{"role": "user", "content": {"type": "text", "text": USER[1]}},
                      {"role": "tool", "content": {"at": 1}}, CHAT[1]]},
        [USER, ("tool", '{"at": 1}'), ASSISTANT],
    ),
    "an original question": ({"query": USER[1], "response": ASSISTANT[1], "original_question": "What?"}, PAIR),
    "guanaco": ({"text": "### Human: Which tree is it?### Assistant: An oak."}, PAIR),
    "rejected under another name": ({"chosen_messages": CHAT, "rejected_messages": CHAT[:1]}, PAIR),
    "problem, solution and bare result": ({"problem": USER[1], "solution": ASSISTANT[1], "answer": "oak"}, PAIR),
    "the text of all": ({"instruction": USER[1], "output": ASSISTANT[1], "text": f"Q: {USER[1]} {ASSISTANT[1]}"}, PAIR),
    "a switch for thoughts": ({"messages": CHAT, "reasoning": "off"}, PAIR),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_what_stands_inside_is_read(tmp_path: Path, name: str) -> None:
    record, expected = INSIDE[name]
    file = read(tmp_path, record)
    assert said(file) == expected
    assert file.remarks == ()


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"messages": [{**CHAT[0], "context": "It has acorns."}, CHAT[1]]}, "messages.context"),
        ({"messages": [{**CHAT[0], "thinking": "Hm, a tree."}, CHAT[1]]}, "messages.thinking"),
        ({"messages": [CHAT[0], {**CHAT[1], "text": "Or a beech."}]}, "messages.text"),
        ({"messages": [CHAT[0], {**CHAT[1], "refusal": "I cannot say."}]}, "messages.refusal"),
        ({"messages": json.dumps([CHAT[0], {**CHAT[1], "story": "Long ago."}])}, "messages.story"),
        ({"chosen": [CHAT[0], {**CHAT[1], "story": "Long ago."}], "rejected": CHAT}, "chosen.story"),
        ({"prompt": CHAT[:1], "chosen": {**CHAT[1], "story": "Long ago."}, "rejected": CHAT[1]}, "chosen.story"),
        ({"conversation": [{"input": USER[1], "output": ASSISTANT[1], "document": "Oaks."}]}, "conversation.document"),
        (
            {"query": USER[1], "solution": "b", "conversation": [{"input": "a", "output": "It is another."}]},
            "conversation",
        ),
        ({"conversation": [{"input": USER[1], "output": ASSISTANT[1], "content": "More."}]}, "conversation.content"),
        (
            {"query": USER[1], "response": "b", "history": [{"user": "a", "assistant": "b", "story": "Long."}]},
            "history.story",
        ),
    ],
)
def test_what_stands_inside_and_is_not_read_is_named_once(tmp_path: Path, record: dict[str, Any], name: str) -> None:
    (remark,) = read(tmp_path, record, record).remarks
    assert remark.startswith(f"the field {name} looks like a part of the conversation and is not read (first in pool")


def test_a_text_that_is_a_conversation_or_lacks_its_prompt_is_said(tmp_path: Path) -> None:
    rendered = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\nAn oak.<|im_end|>"
    for record, told in (
        ({"text": rendered}, "the field text looks like a whole conversation"),
        ({"chosen": "An oak.", "rejected": "A stone."}, "the field chosen holds no prompt"),
        ({"text": "Which?", "role": "prompter"}, "the field text is one message of a conversation"),
        ({"text": "A chat. USER: Which? ASSISTANT: An oak."}, "the field text looks like a whole conversation"),
    ):
        (remark,) = read(tmp_path, record, record).remarks
        assert told in remark
    assert read(tmp_path, {"text": "Some story."}).remarks == ()


@pytest.mark.parametrize("text", ["Human: alone", "She said:\n\nHuman: a\n\nAssistant: b", "", "### Assistant: b"])
def test_what_is_no_transcript(text: str) -> None:
    assert spoken_turns(text) is None


def test_weights_between_none_and_all_are_said_and_texts_are_marks_too(tmp_path: Path) -> None:
    def weighted(weight: Any) -> dict[str, Any]:
        return {"messages": [CHAT[0], {**CHAT[1], "weight": weight}]}

    file = read(tmp_path, *(weighted(weight) for weight in (0.5, 1, 0, "0", "false", 0.25, None)))
    assert [file.record(row).turns[1].trained for row in range(7)] == [True, True, False, False, False, True, True]
    (remark,) = file.remarks
    assert remark.startswith("2 records have weights of messages other than 0 and 1")
    assert "(first in pool.path=pool.jsonl line 1)" in remark
    partly = {
        "messages": [CHAT[0], {**CHAT[1], "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]
    }
    assert read(tmp_path, partly).remarks[0].startswith("1 records have weights of messages")


def test_nulls_in_calls_and_tools_are_absent(tmp_path: Path) -> None:
    def calling(name: str, arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        tool = {"name": name, "parameters": {"properties": {key: {"type": "string"} for key in arguments}}}
        return {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}

    rows = [calling("look", {"at": "tree", "deep": {"x": 1}}), calling("go", {"deep": {"y": 2}, "to": "wood"})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    file = open_pool(CountingSpool(tmp_path / "spool"), "file", tmp_path / "pool.parquet")
    assert [file.record(row).turns for row in range(2)] == [read(tmp_path, row).record(0).turns for row in rows]
    text = '{"at": null}'  # written by the one who called
    answer = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": text}]}
    call = json.loads(read(tmp_path, {"messages": [CHAT[0], answer]}).record(0).turns[-1].calls)
    assert call[0]["function"]["arguments"] == {"at": None}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thoughts", "Complex_CoT", "rationale"])
@pytest.mark.parametrize("pair", [("question", "answer"), ("prompt", "response"), ("instruction", "output")])
def test_thoughts_beside_a_pair(tmp_path: Path, name: str, pair: tuple[str, str]) -> None:
    file = read(tmp_path, {pair[0]: USER[1], name: "It has acorns.", pair[1]: ASSISTANT[1]})
    assert said(file) == PAIR
    assert file.record(0).turns[1].thought == "It has acorns."
    assert file.remarks == ()
    again = read(tmp_path, {pair[0]: USER[1], name: "Hm.", pair[1]: f"<think>Hm.</think>{ASSISTANT[1]}"})
    assert again.record(0).turns[1].thought == ""


# Remedies, followed as they stand

REMEDIES: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str, str]]]] = {
    "a passage that some lack": (
        [{"question": USER[1], "answer": "It is an old oak tree."},
         {"question": USER[1], "answer": "It is an old oak tree.", "passage": "Acorns."}],
        [("user", f"{USER[1]}\n\nAcorns.", ""), ("assistant", "It is an old oak tree.", "")],
    ),
    "a solution": (
        [{"question": USER[1], "answer": "oak", "solution": ASSISTANT[1]}],
        [(*USER, ""), (*ASSISTANT, "")],
    ),
    "an explanation": (
        [{"question": USER[1], "answer": ASSISTANT[1], "explanation": "It has acorns."}],
        [(*USER, ""), (*ASSISTANT, "It has acorns.")],
    ),
    "an answer beside open messages": (
        [{"messages": CHAT[:1], "reply": ASSISTANT[1]}],
        [(*USER, ""), (*ASSISTANT, "")],
    ),
    "a document of a text": (
        [{"text": ASSISTANT[1], "document": "It has acorns."}],
        [("user", "It has acorns.", ""), (*ASSISTANT, "")],
    ),
    "pairs in the context": (
        [{"question": USER[1], "context": [["Hello", "Hi"]], "answer": ASSISTANT[1]}],
        [("user", "Hello", ""), ("assistant", "Hi", ""), (*USER, ""), (*ASSISTANT, "")],
    ),
    "a document beside messages": (
        [{"messages": CHAT, "document": "It has acorns."}],
        [("system", "It has acorns.", ""), (*USER, ""), (*ASSISTANT, "")],
    ),
    "passages in an object": (
        [{"question": USER[1], "context": {"ids": ["1", "2"], "passages": ["It has", "acorns."]}, "answer": "old oak"}],
        [("user", f"{USER[1]}\n\nIt has\n\nacorns.", ""), ("assistant", "old oak", "")],
    ),
    "documents beside messages": (
        [{"messages": CHAT, "documents": ["It has", "acorns."]}],
        [("system", "It has\n\nacorns.", ""), (*USER, ""), (*ASSISTANT, "")],
    ),
    "answers beside a text": (
        [{"text": USER[1], "answers": "It is an old oak tree."}],
        [(*USER, ""), ("assistant", "It is an old oak tree.", "")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_followed_as_it_stands_gives_the_right_reading(tmp_path: Path, name: str) -> None:
    records, expected = REMEDIES[name]
    (remark,) = read(tmp_path, *records).remarks
    first = remark.partition(", pool.messages_field")[0]  # which is another remedy
    given = dict(re.findall(r"pool\.(\w+_field)=(\[[^]]*\]|[\w.]+)", first))
    options = {key: value[1:-1].split(",") if value[0] == "[" else value for key, value in given.items()}
    file = read(tmp_path, *records, **options)
    turns = file.record(len(records) - 1).turns
    assert [(turn.role, turn.content, turn.thought) for turn in turns] == expected
    assert file.remarks == ()
    assert len(file) == len(records)


def test_lists_of_one_field_are_told_apart_record_by_record(tmp_path: Path) -> None:
    records = [{"question": USER[1], "context": context, "answer": "b"} for context in (["Oaks."], [["Hello", "Hi"]])]
    file = read(tmp_path, *records)
    assert said(file, 0) == [("user", f"{USER[1]}\nOaks."), ("assistant", "b")]
    assert "pool.history_field=context puts it before the conversation" in file.remarks[0]


def test_a_named_field_that_no_record_has_is_refused(tmp_path: Path) -> None:
    records = [{"question": USER[1], "passage": "Acorns.", "answer": "oak"}, {"question": USER[1], "answer": "oak"}]
    two = {"prompt_field": ["question", "pasage"], "response_field": "answer"}
    with pytest.raises(UserError, match=r"pool\.prompt_field=pasage: no record .*did you mean passage\?"):
        read(tmp_path, *records, **two)
    for key in ("system_field", "history_field", "tools_field", "thought_field"):
        with pytest.raises(UserError, match=rf"pool\.{key}=pasage: no record"):
            read(tmp_path, *records, **{key: "pasage"})
    named = {"prompt_field": "question", "response_field": "solution", "bad_records": "skip"}
    assert len(read(tmp_path, *records, {"question": USER[1], "solution": "oak"}, **named)) == 1
    with pytest.raises(UserError, match=r"pool\.response_field=soluton: no record .*did you mean solution\?"):
        read(tmp_path, *records, {"question": "a", "solution": "b"}, **{**named, "response_field": "soluton"})


# Filters, marks and bad records


def test_records_that_a_filter_drops_for_want_of_the_field_are_counted(tmp_path: Path) -> None:
    records = [{"prompt": "p", "response": "r", **more} for more in ({"label": True}, {"label": False}, {}, {})]
    file = read(tmp_path, *records, where={"label": [True, False]})
    assert len(file) == 2
    assert "2 records without the field label are left out by pool.where.label" in file.remarks
    (remark,) = read(tmp_path, *records).remarks
    assert "'pool.exclude.label=[]' keeps them" in remark
    assert len(read(tmp_path, *records, exclude={"label": []})) == 4


def test_an_input_of_bad_records_alone_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pool is empty: 1 lines cannot be read and are left out: field response is"):
        read(tmp_path, {"prompt": "p", "response": 3}, bad_records="skip")
    with pytest.raises(UserError, match=r"pool is empty: 2 lines cannot be read and are left out: "):
        read(tmp_path, "text", 3, bad_records="skip")


@pytest.mark.parametrize("cut", ['{"prompt":', '{"prompt": "a",', '{"prompt": [', '{"prompt": "a"'])
def test_a_first_line_that_is_cut_is_one_bad_record(tmp_path: Path, cut: str) -> None:
    good = json.dumps({"prompt": "p", "response": "r"})
    for number, lines in enumerate(([cut, good], [cut, good, good], [cut, "", good])):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join(lines))
        file = open_pool(CountingSpool(tmp_path / "spool"), "file", path, bad_records="skip")
        assert len(file) == sum(line == good for line in lines)


def test_leaving_out_bad_records_changes_no_key_where_there_are_none(tmp_path: Path) -> None:
    good = {"prompt": "p", "response": "r"}
    plain = read(tmp_path, good).identity()
    assert read(tmp_path, good, bad_records="skip").identity() == plain
    assert read(tmp_path, good, {"prompt": 3}, bad_records="skip").identity()["bad_records"] == "skip"
