"""Option accuracy: which of a record's ``choices`` the model finds likeliest."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.records.fields import scalar_text
from trim_lightning.records.record import conversation_of
from trim_lightning.records.record_file import RecordFile
from trim_lightning.tokens.spans import PROMPT, RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence


class LastResponses(TokenizedRecords):
    """Records whose earlier responses count as prompt: options differ in the last one alone."""

    def __getitem__(self, row: int) -> TokenSequence:
        token_ids, roles = super().__getitem__(row)
        prompt = np.flatnonzero(roles == PROMPT)
        earlier = np.arange(len(roles)) < (prompt[-1] if len(prompt) else 0)
        return TokenSequence(token_ids, np.where(earlier & (roles == RESPONSE), np.uint8(PROMPT), roles))


def option_responses(record: Mapping[str, Any], response: str) -> list[str] | None:
    """One response per option, in the record's own form.

    Where the response names the answer's letter ("The answer is (B)."), that letter is exchanged, so that options
    differ in nothing else; where it does not, each choice's text is the response.

    Args:
        record: With ``choices`` (texts) and ``answer`` (a letter, or a choice's text).
        response: The record's own response.

    Returns:
        The responses, or None if the record has no usable choices.
    """
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or answer is None or len(choices) > 26:
        return None
    letters = string.ascii_uppercase[: len(choices)]
    marked = f"({answer})"
    if isinstance(answer, str) and answer in letters and response.count(marked) == 1:
        return [response.replace(marked, f"({letter})") for letter in letters]
    return [scalar_text(choice) for choice in choices]


def correct_option(record: Mapping[str, Any]) -> int | None:
    """Place of the right choice, or None if the record does not say."""
    choices, answer = record["choices"], record["answer"]
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return letters.index(answer)
    texts = [scalar_text(choice) for choice in choices]
    return texts.index(scalar_text(answer)) if scalar_text(answer) in texts else None


def write_option_records(records: RecordFile, path: Path) -> list[tuple[int, int]]:
    """Write every option of every record as a prompt/response record of its own.

    Returns:
        ``(row, option)`` of each line.
    """
    lines: list[tuple[int, int]] = []
    with path.open("w", encoding="utf-8") as file:
        for row in range(len(records)):
            record, turns = records.object(row), records.record(row).turns
            if not turns or turns[-1].role != "assistant":
                continue
            responses = option_responses(record, turns[-1].content)
            if responses is None or correct_option(record) is None:
                continue
            for option, response in enumerate(responses):
                conversation = conversation_of([*turns[:-1], turns[-1]._replace(content=response)])
                file.write(json.dumps(conversation) + "\n")
                lines.append((row, option))
    return lines


def likeliest(lines: list[tuple[int, int]], losses: NDArray[np.float64], tokens: NDArray[np.int64]) -> dict[int, int]:
    """The option with the lowest loss per token of each record (ties: the first).

    Args:
        lines: ``(row, option)`` of each scored response.
        losses: Summed loss of each.
        tokens: Response tokens of each, 0 for a response that was not scored whole.

    Returns:
        Row to option; a record with a response that was not scored whole is left out.
    """
    options: dict[int, list[float]] = {}
    for (row, _), loss, count in zip(lines, losses, tokens, strict=True):
        options.setdefault(row, []).append(float(loss / count) if count else float("nan"))
    return {row: int(np.argmin(values)) for row, values in options.items() if not np.isnan(values).any()}
