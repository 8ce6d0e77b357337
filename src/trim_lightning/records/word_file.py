"""The words of records as flat memory-mapped ids, for methods that compare texts without a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.progress import progress_bar
from trim_lightning.records.record import Record
from trim_lightning.records.record_file import RecordFile

WORD = re.compile(r"\w+|[^\w\s]+")


def scoped_text(record: Record, scope: str) -> str:
    """A record's turns that ``scope`` lets count, joined by line breaks; not cut at ``max_length``.

    A turn that its record keeps out of the loss counts for nothing.
    The prompt is the system, user and tool turns, the response the assistant's.
    """
    wanted = {"all": (True, False), "response": (True,), "prompt": (False,)}[scope]
    turns = [turn for turn in record.turns if turn.trained and (turn.role == "assistant") in wanted]
    return "\n".join(turn.text for turn in turns)


def words_of(text: str) -> list[str]:
    """Lower-cased words (letters, digits, underscore) and runs of punctuation, in order (our choice)."""
    return WORD.findall(text.lower())


def write_words(records: RecordFile, scope: str, directory: Path, title: str) -> dict[str, Any]:
    """Write the words of every record's scoped text as ids, numbered by first appearance.

    Records are read one at a time; only the vocabulary is held in memory. The files are ``ids.int32``,
    ``offsets.int64`` and ``vocabulary.json``.

    Returns:
        ``words``: how many there are.
    """
    vocabulary: dict[str, int] = {}
    offsets = np.zeros(len(records) + 1, dtype=np.int64)
    with (directory / "ids.int32").open("wb") as file, progress_bar(title, len(records), unit="records") as bar:
        for row in range(len(records)):
            words = words_of(scoped_text(records.record(row), scope))
            ids = np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], dtype=np.int32)
            file.write(ids.tobytes())
            offsets[row + 1] = offsets[row] + len(ids)
            bar.update(1)
    offsets.tofile(directory / "offsets.int64")
    (directory / "vocabulary.json").write_text(json.dumps(list(vocabulary)))
    return {"words": int(offsets[-1])}


class WordFile:
    """Random access to what `write_words` wrote.

    Attributes:
        vocabulary: Word of each id.
        offsets: ``[records + 1]`` int64 start of each record's words.
        ids: ``[words]`` int32, memory-mapped.
    """

    def __init__(self, directory: Path) -> None:
        self.vocabulary: list[str] = json.loads((directory / "vocabulary.json").read_text())
        self.offsets = np.fromfile(directory / "offsets.int64", dtype=np.int64)
        self.ids: NDArray[np.int32] = (
            np.memmap(directory / "ids.int32", dtype=np.int32, mode="r")
            if self.offsets[-1]
            else np.empty(0, dtype=np.int32)
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]
