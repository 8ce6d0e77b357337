"""Each layout from its own published form, and what is said where none fits."""

from typing import Any

import pytest

from trim_lightning.errors import UserError
from trim_lightning.records.fields import LayoutError, lookup
from trim_lightning.records.layouts import choose_layout
from trim_lightning.records.record import Turn


def turns(record: dict[str, Any], **fields: str) -> list[tuple[str, str]]:
    layout = choose_layout(record, **fields, what="pool", where="line 1")
    return [(turn.role, turn.content) for turn in layout.turns(record)]


def problem(record: dict[str, Any]) -> str:
    layout = choose_layout(record, what="pool", where="line 1")
    with pytest.raises(LayoutError) as caught:
        layout.turns(record)
    return str(caught.value)


def refusal(record: dict[str, Any], **fields: str | None) -> str:
    with pytest.raises(UserError) as caught:
        choose_layout(record, **fields, what="pool", where="line 1")
    return str(caught.value)


def test_prompt_and_response() -> None:
    assert turns({"prompt": " a\n", "response": "b"}) == [("user", " a\n"), ("assistant", "b")]
    assert turns({"prompt": "", "response": ""}) == [("user", ""), ("assistant", "")]


def test_prompt_and_completion_as_text_or_messages() -> None:
    assert turns({"prompt": "a", "completion": "b"}) == [("user", "a"), ("assistant", "b")]
    record = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert turns(record) == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_prompt_and_response_win_over_alpaca() -> None:
    record = {"instruction": "task text", "output": "x", "prompt": "a", "response": "b"}
    assert turns(record) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input(extra: dict[str, Any]) -> None:
    assert turns({"instruction": "do", "output": "done", **extra}) == [("user", "do"), ("assistant", "done")]


def test_alpaca_with_everything() -> None:
    record = {
        "instruction": "sum",
        "input": "1 2",
        "output": "3",
        "system": "brief",
        "history": [["hi", "hello"], ["and", "so"]],
    }
    assert turns(record) == [
        ("system", "brief"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "and"),
        ("assistant", "so"),
        ("user", "sum\n1 2"),
        ("assistant", "3"),
    ]
    assert turns({**record, "history": [], "system": None, "input": ""}) == [
        ("user", "sum"),
        ("assistant", "3"),
    ]


def test_alpaca_refuses_what_is_not_text() -> None:
    record: dict[str, Any] = {"instruction": "a", "output": "b"}
    assert problem({**record, "input": 3}) == "field input is a number, not text"
    assert problem({**record, "output": None}) == "field output is null, not text"
    assert problem({**record, "system": {}}) == "field system is an object, not text"
    assert "[user, assistant] pairs" in problem({**record, "history": "past"})
    assert "pairs of text" in problem({**record, "history": [["a"]]})
    assert "pairs of text" in problem({**record, "history": [["a", None]]})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("model", "assistant"),
        ("chatgpt", "assistant"),
        ("bard", "assistant"),
        ("bing", "assistant"),
        ("function_call", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("function", "tool"),
        ("observation", "tool"),
        ("GPT", "assistant"),
    ],
)
def test_sharegpt_names(name: str, role: str) -> None:
    assert turns({"conversations": [{"from": name, "value": "v"}]}) == [(role, "v")]


def test_sharegpt_system_field() -> None:
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    both = [("user", "a"), ("assistant", "b")]
    assert turns({"conversations": said, "system": "s"}) == [("system", "s"), *both]
    assert turns({"conversations": said, "system": ""}) == both
    opened = [{"from": "system", "value": "s"}, *said]
    assert turns({"conversations": opened, "system": "s"}) == [("system", "s"), *both]
    assert turns({"conversations": opened, "system": "t"}) == [("system", "t"), ("system", "s"), *both]


def test_messages_keep_every_turn() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": ""},
    ]
    assert turns({"messages": messages}) == [
        ("system", "s"),
        ("user", "ab"),
        ("assistant", ""),
        ("tool", "42"),
        ("assistant", "done"),
        ("user", ""),
    ]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hi", "field messages is text, not a list of messages"),
        ([], "field messages is an empty list"),
        (["hi"], "holds text where a message is due"),
        ([{"content": "a"}], "a message without role"),
        ([{"role": "narrator", "content": "a"}], "unknown role 'narrator'"),
        ([{"role": "user"}], "a message without content"),
        ([{"role": "user", "content": None}], "content is null, not text"),
        ([{"role": "user", "content": 5}], "content is a number, not text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type image_url"),
        ([{"role": "user", "content": [4]}], "only text can be read"),
    ],
)
def test_messages_that_cannot_be_read(messages: Any, expected: str) -> None:
    assert expected in problem({"messages": messages})


def test_named_fields() -> None:
    record = {"prompt": "no", "response": "no", "q": "a", "deep": {"a": "b"}}
    assert turns(record, prompt_field="q", response_field="deep.a") == [("user", "a"), ("assistant", "b")]


def test_named_fields_come_in_pairs_and_must_exist() -> None:
    record = {"question": "a", "answer": "b"}
    assert "pool.prompt_field is set but pool.response_field is not" in refusal(record, prompt_field="question")
    assert "pool.response_field is set but pool.prompt_field is not" in refusal(record, response_field="answer")
    message = refusal(record, prompt_field="question", response_field="anwser")
    assert "pool.response_field=anwser: line 1 has no such field" in message
    assert "did you mean answer?" in message


def test_no_layout_says_what_was_tried_and_found() -> None:
    message = refusal({"question": "a", "label": {"text": 3}})
    for part in (
        "prompt+response",
        "prompt+completion",
        "instruction+output",
        "conversations",
        "messages",
        "question",
        "label.text",
        "pool.prompt_field",
    ):
        assert part in message
    assert "none" in refusal({})


def test_lookup_prefers_a_literal_dot_and_descends() -> None:
    record = {"a.b": 1, "a": {"b": 2, "c": {"d": 3}, "c.e": 4}, "x.y": {"z": None}}
    assert lookup(record, "a.b") == 1
    assert lookup(record, "a.c.d") == 3
    assert lookup(record, "a.c.e") == 4
    assert lookup(record, "x.y.z") is None
    missing = lookup(record, "nowhere")
    assert all(lookup(record, path) is missing for path in ("a.b.c", "a.", "", ".a", "x.y"[:1]))


def test_turns_are_the_package_value_objects() -> None:
    layout = choose_layout({"prompt": "a", "response": "b"}, what="pool", where="line 1")
    assert layout.turns({"prompt": "a", "response": "b"}) == (Turn("user", "a"), Turn("assistant", "b"))
