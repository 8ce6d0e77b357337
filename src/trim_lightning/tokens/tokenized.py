"""Tokenised records on disk: flat memory-mapped arrays, so that a pool may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.progress import progress_bar
from trim_lightning.records.record_file import RecordFile
from trim_lightning.tokens.rendering import ChatRenderer, RenderError
from trim_lightning.tokens.spans import PROMPT, RESPONSE, SCAFFOLD

BATCH = 512  # records rendered and tokenised in one call
EXAMPLES_KEPT = 20  # problems described in full; the rest are only counted


class TokenSequence(NamedTuple):
    """One record's tokens: ``token_ids`` int32 ``[tokens]`` and ``roles`` uint8 ``[tokens]``."""

    token_ids: NDArray[np.int32]
    roles: NDArray[np.uint8]


class TokenizedRecords:
    """Random access to what `tokenize_records` wrote.

    Attributes:
        lengths: ``[records]`` int64 tokens of each rendered record, 0 where it could not be rendered.
        truncated: Records cut at ``max_length``.
        problems: Descriptions of records that could not be rendered (the first few).
        unrendered: Number of those.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        summary = json.loads((directory / "summary.json").read_text())
        self.truncated: int = summary["truncated"]
        self.problems: list[str] = summary["problems"]
        self.unrendered: int = summary["unrendered"]
        self._offsets = np.fromfile(directory / "offsets.int64", dtype=np.int64)
        self.lengths = np.diff(self._offsets)
        self._arrays: tuple[NDArray[np.int32], NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> TokenSequence:
        token_ids, roles = self._open()
        part = slice(self._offsets[row], self._offsets[row + 1])
        return TokenSequence(token_ids[part], roles[part])

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}  # a worker process maps the files anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])  # type: ignore[misc]

    @property
    def total_tokens(self) -> int:
        """Tokens of all rendered records, scaffolding included."""
        return int(self._offsets[-1])

    def content_lengths(self, scope: str = "all") -> NDArray[np.int64]:
        """``[records]`` int64 number of content tokens of each record within ``scope``."""
        _, roles = self._open()
        counts = np.zeros(len(self), dtype=np.int64)
        for start in range(0, len(self), 65536):
            end = min(len(self), start + 65536)
            low, high = self._offsets[start], self._offsets[end]
            running = np.concatenate([[0], np.cumsum(scope_mask(roles[low:high], scope), dtype=np.int64)])
            counts[start:end] = np.diff(running[self._offsets[start : end + 1] - low])
        return counts

    def _open(self) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        if self._arrays is None:
            if self.total_tokens == 0:
                self._arrays = (np.empty(0, np.int32), np.empty(0, np.uint8))
            else:
                self._arrays = (
                    np.memmap(self.directory / "token_ids.int32", dtype=np.int32, mode="r"),
                    np.memmap(self.directory / "roles.uint8", dtype=np.uint8, mode="r"),
                )
        return self._arrays


def scope_mask(roles: NDArray[np.uint8], scope: str) -> NDArray[np.bool_]:
    """True at the content tokens that ``scope`` (all, prompt or response) lets count."""
    return {"all": roles != SCAFFOLD, "prompt": roles == PROMPT, "response": roles == RESPONSE}[scope]


def tokenize_records(
    records: RecordFile, renderer: ChatRenderer, max_length: int, directory: Path, title: str = "tokenize"
) -> dict[str, int]:
    """Render and tokenise every record into flat files in ``directory``.

    Args:
        records: The records, read one batch at a time.
        renderer: Chat rendering with content spans.
        max_length: Tokens kept of a record; the rest is cut at the end and counted.
        directory: Where ``token_ids.int32``, ``roles.uint8``, ``offsets.int64`` and ``summary.json`` go.
        title: Name on the progress bar.

    Returns:
        ``tokens``: all tokens written.
    """
    offsets, truncated, unrendered = [0], 0, 0
    problems: list[str] = []
    with (
        (directory / "token_ids.int32").open("wb") as ids_file,
        (directory / "roles.uint8").open("wb") as roles_file,
        progress_bar(title, total=len(records), unit="records") as bar,
    ):
        for rows in batches(len(records), BATCH):
            conversations = [records.record(row).turns for row in rows]
            for row, encoded in zip(rows, renderer.encode(conversations, max_length), strict=True):
                if isinstance(encoded, RenderError):
                    unrendered += 1
                    if len(problems) < EXAMPLES_KEPT:
                        problems.append(f"row {row} (id {records.id(row)}): {encoded}")
                    offsets.append(offsets[-1])
                    continue
                ids_file.write(encoded.token_ids.astype(np.int32).tobytes())
                roles_file.write(encoded.roles.astype(np.uint8).tobytes())
                offsets.append(offsets[-1] + len(encoded.token_ids))
                truncated += encoded.truncated
            bar.update(len(rows))
    np.asarray(offsets, dtype=np.int64).tofile(directory / "offsets.int64")
    summary = {"truncated": int(truncated), "unrendered": unrendered, "problems": problems}
    (directory / "summary.json").write_text(json.dumps(summary))
    return {"tokens": offsets[-1]}


def batches(total: int, size: int) -> Iterator[Sequence[int]]:
    """Ranges of at most ``size`` consecutive rows."""
    for start in range(0, total, size):
        yield range(start, min(total, start + size))
