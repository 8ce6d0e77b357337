"""Digests of the texts of records, read once for an input however large it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.progress import progress_bar
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.shared import digest_of_text, text_of
from trim_lightning.store import StageKey, Store

FILE, WIDTH = "digests.uint64", 8  # bytes of a digest that are kept


def text_digests(store: Store, records: RecordFile) -> NDArray[np.uint64]:
    """``[records]`` digests of the records' texts, case and white space evened out, from the store or made now."""

    def build(directory: Path) -> None:
        with progress_bar("texts", total=len(records), unit="records") as bar, (directory / FILE).open("wb") as file:
            for row in range(len(records)):
                file.write(digest_of_text(text_of(records.record(row).turns))[:WIDTH])
                bar.update(1)

    entry = store.get(StageKey("texts", 1, {}, {"records": records.identity()}), build)
    return np.fromfile(entry.path / FILE, dtype=np.uint64)


def rows_with_texts(digests: NDArray[np.uint64], texts: list[str]) -> dict[str, list[int]]:
    """Each text (as `text_of` gives it) that a row has, to its rows; the empty text is none."""
    wanted = {int(np.frombuffer(digest_of_text(text)[:WIDTH], np.uint64)[0]): text for text in texts if text}
    found: dict[str, list[int]] = {}
    for row in np.flatnonzero(np.isin(digests, np.array(list(wanted), np.uint64))):
        found.setdefault(wanted[int(digests[row])], []).append(int(row))
    return found
