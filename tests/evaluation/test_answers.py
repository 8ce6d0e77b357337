"""Which generated answers count as right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_lightning.evaluation.answers import as_number, canonical, extract, is_correct, reasoning_gym_score
from trim_lightning.records.generated_pool import FAMILIES, generate


@pytest.mark.parametrize(
    ("generated", "gold", "right"),
    [
        ("$1,234.50.", "1234.5", True),
        ("It costs $1,234.50.", "$1,234.50", True),
        ("The answer is 18.", "18", True),
        ("The answer is 18", "18.0", True),
        ("3 + 4 = 7, and 7 - 2 = 5", "5", True),
        ("3 + 4 = 7, and 7 - 2 = 5", "7", False),  # the last number counts
        ("It fell to -3 degrees", "-3", True),
        ("It fell to \N{MINUS SIGN}3 degrees", "-3", True),
        ("It fell to -3 degrees", "3", False),
        ("from 3-5", "5", True),  # no sign after a digit
        ("(2)-5", "5", True),
        ("-$5", "-5", True),
        ("1, 2, 3", "3", True),
        ("1,2,3", "3", True),  # commas of a list
        ("12,345,678", "12345678", True),
        (".5", "0.5", True),
        ("0.50", "1/2", False),  # a fraction is text
        ("007", "7", True),
        ("-0", "0", True),
        ("12345678901234567891", "12345678901234567890", False),  # exact beyond float precision
        ("nothing to see", "3", False),
        ("", "3", False),
        ("three", "3", False),
        ("18 apples", "18", True),
    ],
)
def test_numbers(generated: str, gold: str, right: bool) -> None:
    assert is_correct(generated, {"answer": gold}) is right


def test_no_number_is_no_answer() -> None:
    assert extract("none at all", "3") is None


@pytest.mark.parametrize(
    ("generated", "gold", "right"),
    [
        ("The answer is (B).", "B", True),
        ("(B)", "(B)", True),
        ("(b)", "B", True),
        ("B", "B", True),
        ("The answer is B.", "(B)", True),
        ("(A) is tempting, but it is (B)", "B", True),
        ("(A) is tempting, but it is (B)", "A", False),
        ("The answer is (C).", "B", False),
        ("", "B", False),
    ],
)
def test_options(generated: str, gold: str, right: bool) -> None:
    assert is_correct(generated, {"answer": gold}) is right


@pytest.mark.parametrize(
    ("generated", "gold", "right"),
    [
        ("Paris", "paris", True),
        ("The answer is Paris.", "Paris", True),
        ("the answer is: no\nand more", "no", True),
        ("Rome.\nThe answer is Paris.", "Paris", True),
        ("Paris\nand more", "Paris", True),
        ("  new   york ", "New York", True),
        ("London", "Paris", False),
        ("", "Paris", False),
        ("", "?", False),  # nothing does not equal punctuation
        ("?", "?", True),
        ("x", "-x", False),  # a sign is part of an answer
        ("C", "C++", False),
        ('"yes"', "yes", True),
        ("[1, 2]", "[1, 2]", True),
        ("1 2\n3 4", "1 2\n3 4", True),  # an answer of several lines
        ("1 2\n3 5", "1 2\n3 4", False),
        ("1 2\n3 4\nand more", "1 2\n3 4", True),
        ("True", "True", True),
        ("False", "True", False),
    ],
)
def test_texts(generated: str, gold: str, right: bool) -> None:
    assert is_correct(generated, {"answer": gold}) is right


def test_an_answer_need_not_be_text() -> None:
    assert is_correct("It is 7.", {"answer": 7})
    assert is_correct("true", {"answer": True})
    assert not is_correct("It is 8.", {"answer": 7})


@given(st.integers(-(10**25), 10**25), st.integers(0, 3), st.booleans(), st.booleans())
def test_a_number_is_found_however_it_is_written(number: int, zeros: int, dollar: bool, commas: bool) -> None:
    sign, digits = ("-" if number < 0 else ""), abs(number)
    written = f"{digits:,}" if commas else str(digits)
    decimals = f".{'0' * zeros}" if zeros else ""
    text = f"So it is {sign}{'$' if dollar else ''}{written}{decimals}."
    assert is_correct(text, {"answer": str(number)})
    assert not is_correct(text, {"answer": str(number + 1)})


@given(st.text(max_size=30))
def test_a_text_equals_itself(text: str) -> None:
    assert canonical(text) == canonical(canonical(text)) or as_number(text) is None
    if text.strip() and as_number(text.strip()) is None and "the answer is" not in text.lower():
        assert is_correct(text, {"answer": text})


# generated tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One record of every family."""
    path: Path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    generate(path, FAMILIES, 1, seed=11)
    return {record["family"]: record for record in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize(
    "family",
    ["chain_sum", "spell_backward", "family_relationships", "syllogism", "gsm_symbolic", "fraction_simplification",
     "sudoku", "countdown", "rotate_matrix", "game_of_life_halting"],
)  # fmt: skip
def test_families_tell_right_from_wrong(family: str, tasks: dict[str, dict[str, Any]]) -> None:
    record = tasks[family]
    assert is_correct(record["answer"], record)
    assert is_correct(record["response"], record)  # with its reasoning, where the family gives one
    assert is_correct(f" {record['answer']}\n", record)
    assert not is_correct("", record)
    assert not is_correct("I do not know", record)
    assert not is_correct("987654321", record)


def test_an_answer_that_is_another_than_the_record_s_can_be_right(tasks: dict[str, dict[str, Any]]) -> None:
    record = tasks["countdown"]  # any expression with the right value will do
    assert is_correct(f"({record['answer']})", record)


def test_reasoning_before_the_answer_does_no_harm(tasks: dict[str, dict[str, Any]]) -> None:
    record = tasks["gsm_symbolic"]
    assert is_correct(f"First 12 and 99, then 5.\nThe answer is {record['answer']}.", record)
    assert not is_correct(f"First {record['answer']}.\nThe answer is 123456.", record)


JUNK = (
    "",
    "nonsense",
    "{]",
    "1/0",
    "((((",
    "[[1,2],[3]]",
    '{"a": 1}',
    "9" * 5000,
    "1e400",
    "nan",
    "\0",
    "🙂",
    "-",
    "x",
)


def test_no_text_breaks_a_judge_and_every_family_accepts_its_answer(tasks: dict[str, dict[str, Any]]) -> None:
    """A model may write anything; prime_factorization, for one, fails on whatever is no product of numbers."""
    for family, record in tasks.items():
        assert is_correct(record["answer"], record), family
        judgements = [is_correct(text, record) for text in JUNK]
        assert not all(judgements), family
    assert reasoning_gym_score("nonsense", tasks["prime_factorization"]) == 0


def test_other_data_may_have_fields_of_those_names() -> None:
    record = {"prompt": "x", "answer": "7", "family": "house_of_york", "entry": {"page": 3}}
    assert is_correct("It is 7", record)
    assert is_correct("It is 7", {**record, "entry": "page 3"})
    assert not is_correct("It is 8", record)
