"""Take the answer out of generated text and compare it with the record's own.

Numbers and options are extracted as lm-eval does for gsm8k and multiple-choice chains of thought: the last number,
the last option letter in parentheses; otherwise what follows "the answer is", else the first lines. Generated tasks
are judged by reasoning-gym itself, on what follows "the answer is" where that is said. What counts as the same answer
is our choice.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

SIGN = r"(?:(?<![\w.)\]])-)?\$?"  # after a digit, a letter or a bracket a minus subtracts
WHOLE = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"  # commas count only between groups of three digits
NUMBER = re.compile(rf"{SIGN}(?:{WHOLE})(?:\.\d+)?|{SIGN}\.\d+")
A_NUMBER = re.compile(rf"(-?)({WHOLE})?(?:\.(\d+))?")
OPTION = re.compile(r"\(([A-Za-z])\)")
ANSWER_IS = re.compile(r"the answer is:?\s*", re.IGNORECASE)
OUTER = ".,;:!?\"'`*()[]{}<>"  # no part of an answer at its ends; signs such as - + % are
UNJUDGED = ("game_of_life_halting",)  # its own judge takes every text for right


def is_correct(generated: str, record: Mapping[str, Any]) -> bool:
    """Judge a generated answer against the record's; one with ``family`` and ``entry`` is reasoning-gym's."""
    if isinstance(record.get("entry"), Mapping) and record.get("family") not in UNJUDGED:
        score = reasoning_gym_score(generated, record)
        if score is not None:
            return score >= 1.0
    gold = str(record["answer"]).strip()
    return extract(generated, gold) == canonical(gold)


def extract(generated: str, gold: str) -> str | None:
    """The answer in a generated text, in the form of ``gold``: number, option letter or text.

    Returns:
        Its canonical form, or None if there is none.
    """
    if as_number(gold) is not None:
        numbers = NUMBER.findall(generated.replace("\N{MINUS SIGN}", "-"))
        return canonical(numbers[-1]) if numbers else None
    if OPTION.fullmatch(gold) or re.fullmatch(r"[A-Z]", gold):
        letters = OPTION.findall(generated)
        if letters:
            return canonical(letters[-1])
    lines = conclusion(generated).splitlines()[: len(gold.splitlines()) or 1]
    return canonical("\n".join(lines))


def conclusion(generated: str) -> str:
    """What follows the last "the answer is"; the whole text where that is not said."""
    said = list(ANSWER_IS.finditer(generated))
    return (generated[said[-1].end() :] if said else generated).strip()


def canonical(answer: str) -> str:
    """One spelling of an answer: numbers as `as_number` gives them, text in lower case, without outer punctuation."""
    number = as_number(answer)
    if number is not None:
        return number
    text = answer.strip()
    # an answer that is nothing but punctuation stays, else an empty text would equal it
    return " ".join((text.strip(OUTER + " \t\r\n") or text).lower().split())


def as_number(text: str) -> str | None:
    """The one spelling of the number that a text is, of any length, or None.

    A dollar sign, thousands commas, zeros that change nothing and a full stop at the end are taken away.
    """
    cleaned = text.replace("\N{MINUS SIGN}", "-").strip().rstrip(".").replace("$", "")
    found = A_NUMBER.fullmatch(cleaned)
    if found is None or (found[2] is None and found[3] is None):
        return None
    whole = (found[2] or "").replace(",", "").lstrip("0") or "0"
    decimals = (found[3] or "").rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return number if number == "0" else found[1] + number


def reasoning_gym_score(generated: str, record: Mapping[str, Any]) -> float | None:
    """reasoning-gym's own score in [0, 1] of an answer to one of its tasks; None if it knows no such family.

    Many families score a number only if it stands alone, so the judge sees what follows "the answer is".
    """
    judge = judge_of(str(record.get("family")))
    if judge is None:
        return None
    entry = {"question": record["prompt"], "answer": record["answer"], "metadata": record["entry"]}
    said = conclusion(generated)
    answer = said if said == generated.strip() else said.removesuffix(".")
    try:
        with warnings.catch_warnings(action="ignore"):
            return float(judge(answer=answer, entry=entry))
    except Exception:  # some families fail on text that is not in the form they expect
        return 0.0


@cache
def judge_of(family: str) -> Callable[..., float] | None:
    """A family's own judge, which is slow to make, or None if there is no such family."""
    import reasoning_gym

    try:
        judge: Callable[..., float] = reasoning_gym.get_score_answer_fn(family)
    except ValueError:
        return None
    return judge
