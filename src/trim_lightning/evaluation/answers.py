"""Take the answer out of generated text and compare it with the record's own.

Numbers and options are extracted as lm-eval does for gsm8k and multiple-choice chains of thought: the last number,
the last option letter in parentheses; otherwise what follows "the answer is". Generated tasks are judged by
reasoning-gym itself.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
OPTION = re.compile(r"\(([A-Za-z])\)")
ANSWER_IS = re.compile(r"the answer is:?\s*(.+)", re.IGNORECASE)


def is_correct(generated: str, record: Mapping[str, Any]) -> bool:
    """Judge a generated answer against the record's ``answer``.

    Args:
        generated: The model's text.
        record: The held-out record; with ``family`` and ``entry`` it is one of reasoning-gym's.
    """
    if "family" in record and "entry" in record:
        return reasoning_gym_score(generated, record) >= 1.0
    gold = str(record["answer"]).strip()
    return extract(generated, gold) == canonical(gold)


def extract(generated: str, gold: str) -> str | None:
    """The answer in a generated text, in the form of ``gold``: number, option letter or text.

    Returns:
        Its canonical form, or None if there is none.
    """
    if as_number(gold) is not None:
        numbers = NUMBER.findall(generated)
        return canonical(numbers[-1]) if numbers else None
    if OPTION.fullmatch(gold) or re.fullmatch(r"[A-Z]", gold):
        letters = OPTION.findall(generated)
        if letters:
            return canonical(letters[-1])
    said = ANSWER_IS.findall(generated)
    text = said[-1] if said else generated.strip()
    text = text.splitlines()[0] if text else ""
    return canonical(text.strip().removesuffix("."))


def canonical(answer: str) -> str:
    """One spelling of an answer: numbers as numbers, options as letters, text without case and outer punctuation."""
    number = as_number(answer)
    if number is not None:
        return repr(number)
    option = OPTION.fullmatch(answer.strip())
    text = option.group(1) if option else answer
    return " ".join(text.strip(string.punctuation + string.whitespace).lower().split())


def as_number(text: str) -> float | None:
    """The number that a text is, or None."""
    cleaned = text.strip().rstrip(".").replace(",", "").replace("$", "")
    if not re.fullmatch(r"-?(?:\d+(?:\.\d+)?|\.\d+)", cleaned):
        return None
    return float(cleaned)


def reasoning_gym_score(generated: str, record: Mapping[str, Any]) -> float:
    """reasoning-gym's own score in [0, 1] of an answer to one of its tasks."""
    import reasoning_gym

    entry = {"question": record["prompt"], "answer": record["answer"], "metadata": record["entry"]}
    return float(reasoning_gym.get_score_answer_fn(record["family"])(answer=generated.strip(), entry=entry))
