"""Records that two inputs share, found by their text and not by their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set

from trim_lightning.records.record import Turn
from trim_lightning.records.record_file import RecordFile


def text_of(turns: Sequence[Turn]) -> str:
    """All turns of a record as one text, case and white space evened out."""
    return " ".join(" ".join(turn.text for turn in turns).lower().split())


def question_of(turns: Sequence[Turn]) -> str:
    """What a record asks: its text without the last response, or all of it where nothing stands before that."""
    asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
    return text_of(asked) or text_of(turns)


def digest_of_text(text: str) -> bytes:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).digest()


def questions(records: RecordFile) -> set[bytes]:
    """Digests of what some records ask; a record without text asks nothing."""
    return {digest_of_question(records, row) for row in range(len(records))} - {digest_of_text("")}


def asked_too(records: RecordFile, asked: Set[bytes]) -> list[int]:
    """Rows of some records that ask what is among the `questions` of others."""
    return [row for row in range(len(records)) if digest_of_question(records, row) in asked]


def digest_of_question(records: RecordFile, row: int) -> bytes:
    """sha256 of what a record asks."""
    return digest_of_text(question_of(records.record(row).turns))


def first_ids(records: RecordFile, rows: Sequence[int], most: int = 5) -> str:
    """Ids of the first few rows, for messages."""
    return ", ".join(records.id(int(row)) for row in rows[:most]) + (", ..." if len(rows) > most else "")
