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
# scripts that put no blanks between words: Thai to Tibetan, Burmese, Khmer, kana, Han
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
_RUN = re.compile(f"([{_UNSPACED}]+)")
_LETTER = re.compile(f"([{_UNSPACED}])")


def scoped_text(record: Record, scope: str) -> str:
    """A record's turns that ``scope`` lets count, joined by line breaks; not cut at ``max_length``.

    A turn that its record keeps out of the loss counts for nothing.
    The prompt is the system, user and tool turns, the response the assistant's.
    """
    wanted = {"all": (True, False), "response": (True,), "prompt": (False,)}[scope]
    turns = [turn for turn in record.turns if turn.trained and (turn.role == "assistant") in wanted]
    return "\n".join(turn.text for turn in turns)


def words_of(text: str) -> list[str]:
    """Lower-cased words (letters, digits, underscore) and runs of punctuation, in order (our choice).

    Chinese, Japanese, Thai and other scripts without blanks between words give pairs of neighbouring letters.
    """
    lower = text.lower()
    if lower.isascii() or not _RUN.search(lower):
        return WORD.findall(lower)
    words: list[str] = []
    for place, piece in enumerate(_RUN.split(lower)):  # every second piece is a run of such letters
        if place % 2 == 0:
            words += WORD.findall(piece)
        else:
            words += [piece[at : at + 2] for at in range(max(1, len(piece) - 1))]
    return words


def split_words(text: str) -> list[str]:
    """What stands between blanks; each letter of a script without them by itself."""
    return text.split() if text.isascii() else _LETTER.sub(r" \1 ", text).split()


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
