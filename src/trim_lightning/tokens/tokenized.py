"""Tokenised records on disk: flat memory-mapped arrays, so that a pool may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.progress import progress_bar
from trim_lightning.files.maps import ReadMap
from trim_lightning.records.flat import spans, sums_of
from trim_lightning.records.record_file import RecordFile
from trim_lightning.tokens.rendering import ChatRenderer, RenderError
from trim_lightning.tokens.spans import PROMPT, RESPONSE, SCAFFOLD

BLOCK = 8192  # records whose tokens are looked through at once: sums over them take 16 bytes a token
BATCH = 512  # records rendered and tokenised in one call
EXAMPLES_KEPT = 20  # problems described in full; the rest are only counted


class TokenSequence(NamedTuple):
    """One record's tokens: ``token_ids`` int32 ``[tokens]`` and ``roles`` uint8 ``[tokens]``."""

    token_ids: NDArray[np.int32]
    roles: NDArray[np.uint8]


NOTHING = TokenSequence(np.empty(0, np.int32), np.empty(0, np.uint8))


class TokenizedRecords:
    """Random access to what `tokenize_records` wrote.

    Attributes:
        lengths: ``[records]`` int64 tokens of each rendered record, 0 where it could not be rendered.
        truncated: Records cut at ``max_length``.
        problems: Descriptions of records that could not be rendered (the first few).
        unrendered: Number of those.
        dropped: Parts that the template does not render (thoughts, calls, tools) to the number of their records.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        summary = json.loads((directory / "summary.json").read_text())
        self.truncated: int = summary["truncated"]
        self.problems: list[str] = summary["problems"]
        self.unrendered: int = summary["unrendered"]
        self.dropped: dict[str, int] = summary.get("dropped", {})
        self._offsets = np.fromfile(directory / "offsets.int64", dtype=np.int64)
        self.lengths = np.diff(self._offsets)
        self._maps: list[ReadMap] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> TokenSequence:
        return self._between(row, row + 1)

    def together(self, rows: NDArray[np.int64], lengths: NDArray[np.int64] | None = None) -> TokenSequence:
        """The tokens of some records, or of each the first so many, record after record."""
        places = spans(self._offsets[rows], self.lengths[rows] if lengths is None else lengths)
        token_ids, roles = self._open(len(places))
        return TokenSequence(token_ids[places], roles[places])

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}  # a worker process maps the files anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])  # type: ignore[misc]

    @property
    def total_tokens(self) -> int:
        """Tokens of all rendered records, scaffolding included."""
        return int(self._offsets[-1])

    def largest_id(self) -> int:
        """The largest token id, -1 if there is no token."""
        largest = -1
        for start in range(0, len(self), BLOCK):
            token_ids, _ = self._between(start, min(len(self), start + BLOCK))
            largest = max(largest, int(token_ids.max(initial=-1)))
        return largest

    def content_lengths(self, scope: str = "all") -> NDArray[np.int64]:
        """``[records]`` int64 number of content tokens of each record within ``scope``."""
        counts = np.zeros(len(self), dtype=np.int64)
        for start in range(0, len(self), BLOCK):
            end = min(len(self), start + BLOCK)
            _, roles = self._between(start, end)
            counts[start:end] = sums_of(scope_mask(roles, scope), np.diff(self._offsets[start : end + 1]))
        return counts

    def _between(self, start: int, end: int) -> TokenSequence:
        """The tokens of records that follow one another."""
        part = slice(self._offsets[start], self._offsets[end])
        token_ids, roles = self._open(int(part.stop - part.start))
        return TokenSequence(token_ids[part], roles[part])

    def _open(self, tokens: int) -> TokenSequence:
        """All tokens, of which so many are to be read."""
        if not self._offsets[-1]:
            return NOTHING
        if self._maps is None:
            with (
                (self.directory / "token_ids.int32").open("rb") as ids,
                (self.directory / "roles.uint8").open("rb") as roles,
            ):
                self._maps = [ReadMap(ids), ReadMap(roles)]
            token_ids, kinds = (part.data for part in self._maps)
            self._arrays = TokenSequence(np.frombuffer(token_ids, np.int32), np.frombuffer(kinds, np.uint8))
        for part in self._maps:
            part.note(4 * tokens)
        return self._arrays


class SomeRecords(TokenizedRecords):
    """Some rows of tokenised records: the others have no tokens, so that a pass leaves them out.

    Args:
        records: All of them.
        rows: Which.
    """

    def __init__(self, records: TokenizedRecords, rows: NDArray[np.int64]) -> None:
        self.__dict__.update(vars(records))  # offsets and maps are the same
        self.rows, self.lengths = rows, np.zeros_like(records.lengths)
        self.lengths[rows] = records.lengths[rows]

    def __reduce__(self) -> tuple[Any, ...]:
        return SomeRecords, (TokenizedRecords(self.directory), self.rows)  # a worker process maps the files anew

    @property
    def total_tokens(self) -> int:
        """Tokens of these rows."""
        return int(self.lengths.sum())


def scope_mask(roles: NDArray[np.uint8], scope: str) -> NDArray[np.bool_]:
    """True at the content tokens that ``scope`` (all, prompt or response) lets count."""
    return {"all": roles != SCAFFOLD, "prompt": roles == PROMPT, "response": roles == RESPONSE}[scope]


def predicted_responses(roles: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``[tokens]`` True at the response tokens that something stands before, of records of these lengths in a row."""
    counted = roles == RESPONSE
    counted[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
    return counted


def tokenize_records(
    records: RecordFile, renderer: ChatRenderer, max_length: int, directory: Path, title: str = "tokenize"
) -> dict[str, int]:
    """Render and tokenise every record, one batch at a time, into flat files in ``directory``.

    The files are ``token_ids.int32``, ``roles.uint8``, ``offsets.int64`` and ``summary.json``. What is beyond
    ``max_length`` is cut at the end of a record and counted.

    Returns:
        ``tokens``: all tokens written.
    """
    summary: dict[str, Any] = {"truncated": 0, "unrendered": 0, "problems": [], "dropped": {}}

    def sequences() -> Iterator[TokenSequence]:
        for start in range(0, len(records), BATCH):
            rows = range(start, min(len(records), start + BATCH))
            conversations = [records.record(row).turns for row in rows]
            for row, encoded in zip(rows, renderer.encode(conversations, max_length), strict=True):
                if isinstance(encoded, RenderError):
                    summary["unrendered"] += 1
                    if len(summary["problems"]) < EXAMPLES_KEPT:
                        summary["problems"].append(f"row {row} (id {records.id(row)}): {encoded}")
                    yield NOTHING
                else:
                    summary["truncated"] += encoded.truncated
                    for part in encoded.dropped:
                        summary["dropped"][part] = summary["dropped"].get(part, 0) + 1
                    yield TokenSequence(encoded.token_ids, encoded.roles)

    return {"tokens": write_sequences(sequences(), len(records), directory, title, summary)}


def write_without_prompts(records: TokenizedRecords, directory: Path, boundary: int) -> None:
    """Write every record `without_prompt` in the form that `TokenizedRecords` opens."""
    summary = {name: getattr(records, name) for name in ("truncated", "unrendered", "problems", "dropped")}
    sequences = (without_prompt(records[row], boundary) for row in range(len(records)))
    write_sequences(sequences, len(records), directory, "prepare", summary)


def without_prompt(sequence: TokenSequence, boundary: int) -> TokenSequence:
    """Take the prompt's content out of a record; scaffolding and response stay (our choice).

    The same response tokens are predicted as in the whole record: where nothing would stand before the first
    one any more, ``boundary``, the id of a token that begins a text, is put there.

    Returns:
        The rest; no tokens if there is no response.
    """
    kept = sequence.roles != PROMPT
    token_ids, roles = sequence.token_ids[kept], sequence.roles[kept]
    if not (roles == RESPONSE).any():
        return TokenSequence(token_ids[:0], roles[:0])
    if roles[0] == RESPONSE and not kept[0]:
        token_ids = np.concatenate([np.array([boundary], token_ids.dtype), token_ids])
        roles = np.concatenate([np.array([SCAFFOLD], roles.dtype), roles])
    return TokenSequence(token_ids, roles)


def write_sequences(
    sequences: Iterable[TokenSequence], number: int, directory: Path, title: str, summary: Mapping[str, Any]
) -> int:
    """Write the flat files, one sequence in memory at a time, then what ``summary`` holds by then.

    Returns:
        All tokens written.
    """
    offsets = np.zeros(number + 1, dtype=np.int64)
    with (
        (directory / "token_ids.int32").open("wb") as ids_file,
        (directory / "roles.uint8").open("wb") as roles_file,
        progress_bar(title, total=number, unit="records") as bar,
    ):
        for row, (token_ids, roles) in enumerate(sequences):
            ids_file.write(token_ids.astype(np.int32).tobytes())
            roles_file.write(roles.astype(np.uint8).tobytes())
            offsets[row + 1] = offsets[row] + len(token_ids)
            bar.update(1)
    offsets.tofile(directory / "offsets.int64")
    (directory / "summary.json").write_text(json.dumps(summary))
    return int(offsets[-1])
