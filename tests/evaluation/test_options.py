"""Option accuracy against a naive computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.conftest import Opened, Plain
from trim_lightning.errors import UserError
from trim_lightning.evaluation.evaluate import evaluate, mean_options, measures
from trim_lightning.evaluation.options import correct_option, likeliest, option_responses
from trim_lightning.models.source import ModelSource
from trim_lightning.settings.schema import EvaluationSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger

CHOICES = ["a train", "twelve quiet ferries cross", "butter", "flour and sugar"]
LETTERS = [
    {"prompt": f"which? ({number})", "response": f"It rains {number} times. The answer is ({letter}).",
     "answer": letter, "choices": CHOICES}
    for number, letter in enumerate("ABCDAB")
]  # fmt: skip
TEXTS = [
    {
        "prompt": f"which one {number}",
        "response": CHOICES[number % 4],
        "answer": CHOICES[number % 4],
        "choices": CHOICES,
    }
    for number in range(6)
]


@pytest.fixture
def judged(tiny_source: Callable[[str], ModelSource], tmp_path: Path, opened: Callable[..., Opened]) -> Any:
    """``judged(records)``: the product's results on them with the tiny llama."""

    def run(records: list[dict[str, Any]], max_length: int = 400, **settings: Any) -> list[dict[str, Any]]:
        trainee = Trainee(
            tiny_source("llama"), "float32", Store(tmp_path / "store"), Ledger(), trainer={"accelerator": "cpu"},
            seed=0, max_length=max_length,
        )  # fmt: skip
        return evaluate(trainee, None, opened(records)[0], EvaluationSettings(**settings), title="before")

    return run


def naive_choice(
    reference: Plain, before: list[tuple[str, str]], responses: list[str], *, last_only: bool = True
) -> int:
    """The response with the lowest mean loss of its own tokens (or of all responses' tokens)."""
    losses = []
    for response in responses:
        ids, counted = reference.encode([*before, ("assistant", response)])
        _, earlier = reference.encode(before)
        own = [holds and (place >= len(earlier) or not last_only) for place, holds in enumerate(counted)]
        losses.append(reference.loss(ids, own) / sum(own))
    return losses.index(min(losses))


def test_letters_are_exchanged_in_the_record_s_own_response(judged: Any, plain: Callable[[str], Plain]) -> None:
    results = judged(LETTERS)
    for record, result in zip(LETTERS, results, strict=True):
        forms = [record["response"][: record["response"].index("(")] + f"({letter})." for letter in "ABCD"]
        assert result["choice"] == naive_choice(plain("llama"), [("user", record["prompt"])], forms)
        assert result["choice_correct"] == ("ABCD"[result["choice"]] == record["answer"])


def test_texts_are_compared_by_loss_per_token(judged: Any, plain: Callable[[str], Plain]) -> None:
    results = judged(TEXTS)
    for record, result in zip(TEXTS, results, strict=True):
        assert result["choice"] == naive_choice(plain("llama"), [("user", record["prompt"])], CHOICES)
        assert result["choice_correct"] == (CHOICES[result["choice"]] == record["answer"])


def test_earlier_responses_of_a_conversation_do_not_count(judged: Any, plain: Callable[[str], Plain]) -> None:
    """Options differ in length: a long first response, counted in, would level their means."""
    before = [("user", "tell me a story"), ("assistant", "passengers buy tickets near harbour " * 4)]
    reference, records, expected, levelled = plain("llama"), [], [], []
    for number in range(8):
        turns = [*before, ("user", f"{'which one? ' * number} {number}")]
        messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", CHOICES[0])]]
        records.append({"messages": messages, "answer": CHOICES[0], "choices": CHOICES})
        expected.append(naive_choice(reference, turns, CHOICES))
        levelled.append(naive_choice(reference, turns, CHOICES, last_only=False))
    assert [result["choice"] for result in judged(records)] == expected
    assert levelled != expected  # it does make a difference here


def test_a_record_whose_options_are_cut_is_not_judged(judged: Any, opened: Callable[..., Opened]) -> None:
    long = {**TEXTS[0], "prompt": "how many words " * 8}
    _, tokens, _ = opened([{**long, "response": choice} for choice in CHOICES])
    within = sorted(tokens.lengths.tolist())[2] + 1  # the longest option does not fit, the others do
    assert within < max(tokens.lengths)
    results = judged([TEXTS[0], long], max_length=within)
    assert ["choice" in result for result in results] == [True, False]
    results = judged([TEXTS[0], {**long, "prompt": "word " * 200}], max_length=within)  # none fits
    assert ["choice" in result for result in results] == [True, False]


def test_a_record_with_an_empty_option_is_not_judged(judged: Any) -> None:
    """It would cost nothing and always win."""
    results = judged([TEXTS[0], {**TEXTS[1], "choices": ["", *CHOICES]}])
    assert "choice" in results[0]
    assert "choice" not in results[1]


def test_records_that_cannot_be_judged_are_left_out(judged: Any) -> None:
    strange = [{**TEXTS[0], "answer": "none of these"}, {**TEXTS[0], "choices": None}, {**TEXTS[0], "choices": ["one"]}]
    results = judged([TEXTS[0], *strange])
    assert ["choice" in result for result in results] == [True, False, False, False]


# the forms


def test_the_letter_of_the_answer_is_exchanged() -> None:
    assert option_responses(LETTERS[1], "So: (B).") == ["So: (A).", "So: (B).", "So: (C).", "So: (D)."]


@pytest.mark.parametrize("response", ["(B) or (B)", "B", "the answer is (A)", ""])
def test_other_responses_are_replaced_by_the_choices(response: str) -> None:
    assert option_responses(LETTERS[1], response) == CHOICES


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (["x", "y"], "B", 1),
        (["x", "y"], "y", 1),
        (["x", "y"], "C", None),
        (["B", "A"], "B", 1),  # a letter is a letter
        ([3, 4], 4, 1),
        ([3, 4], "3", 0),
        (["x", "y"], 1, None),  # counted from 0 or from 1? the record does not say
        (["x", "y"], None, None),
    ],
)
def test_the_right_option(choices: list[Any], answer: Any, expected: int | None) -> None:
    assert correct_option({"choices": choices, "answer": answer}) == expected


@pytest.mark.parametrize(
    "record",
    [
        {"answer": "A"},
        {"choices": "abc", "answer": "A"},
        {"choices": ["one"], "answer": "one"},
        {"choices": ["one", "two"]},
        {"choices": ["x"] * 27, "answer": "x"},
    ],
)
def test_records_without_usable_choices(record: dict[str, Any]) -> None:
    assert option_responses(record, "any") is None


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 30)), min_size=2, max_size=5), min_size=1, max_size=5)
)
def test_the_likeliest_is_the_first_with_the_least_mean(records: list[list[tuple[float, int]]]) -> None:
    lines = [(row, option) for row, options in enumerate(records) for option in range(len(options))]
    losses, tokens = (
        np.array(column) for column in zip(*(pair for options in records for pair in options), strict=True)
    )
    for row, chosen in likeliest(lines, losses, tokens).items():
        means = [loss / count for loss, count in records[row]]
        assert chosen == means.index(min(means))


# when it is measured


def test_what_is_measured_follows_from_the_first_record(opened: Callable[..., Opened]) -> None:
    def plan(record: dict[str, Any], **settings: Any) -> dict[str, bool]:
        return measures(opened([record])[0], EvaluationSettings(**settings))

    bare = {"prompt": "a", "response": "b"}
    assert plan(bare) == {"exact_match": False, "option_accuracy": False}
    assert plan({**bare, "answer": "b"}) == {"exact_match": True, "option_accuracy": False}
    assert plan(TEXTS[0]) == {"exact_match": False, "option_accuracy": True}
    assert plan(TEXTS[0], exact_match="always") == {"exact_match": True, "option_accuracy": True}
    assert plan(TEXTS[0], option_accuracy="never") == {"exact_match": False, "option_accuracy": False}
    assert plan({**bare, "answer": "b"}, exact_match="never") == {"exact_match": False, "option_accuracy": False}
    unclear = {**TEXTS[0], "answer": 2}
    assert plan(unclear) == {"exact_match": True, "option_accuracy": False}
    with pytest.raises(UserError, match=r"option_accuracy=always.*held_out.jsonl line 1 has no choices"):
        plan(unclear, option_accuracy="always")
    with pytest.raises(UserError, match=r"exact_match=always.*held_out.jsonl line 1 has no answer"):
        plan(bare, exact_match="always")


def test_results_are_json(judged: Any) -> None:
    results = judged(TEXTS[:2])
    assert json.loads(json.dumps(results)) == results
    assert set(results[0]) == {"id", "num_tokens", "nll", "choice", "choice_correct"}


def test_a_later_record_with_unusable_choices_ends_nothing(judged: Any, opened: Callable[..., Opened]) -> None:
    odd = {"prompt": "which?", "response": "It rains. The answer is (A).", "answer": "A", "choices": 3}
    results = judged([*LETTERS, odd])
    assert ["choice" in line for line in results] == [True] * 6 + [False]
    assert mean_options(opened([*LETTERS, odd])[0]) == pytest.approx(6 * 4 / 7)
