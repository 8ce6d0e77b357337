"""Random access to the records of a JSON-lines file of any size.

One pass over the file checks every line and keeps its byte offset; the records themselves stay on disk and
are read through a memory map. All of this is our choice; the method takes the pool as given.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.files.maps import ReadMap
from trim_lightning.records.fields import MISSING, clean_text, lookup, scalar_text
from trim_lightning.records.filters import conditions
from trim_lightning.records.flat import FlatTexts
from trim_lightning.records.layouts import LayoutReader
from trim_lightning.records.record import NOTHING_MORE, Record, Turn
from trim_lightning.records.shapes import FieldKeys

MOST_LINE_BYTES = 16 << 20
"""Longest line that is read. Parsed, it takes up to some sixty times that in memory (our choice)."""

TOO_LONG = f"is longer than {MOST_LINE_BYTES >> 20} MiB"


@dataclass(frozen=True)
class LineSource:
    """A JSON-lines file on disk, and how to speak of the input that it came from.

    Attributes:
        path: The file that is read.
        label: The input in the user's words, e.g. ``pool.path=data/pool.jsonl``, for messages.
        name: Base name of the input, for manifests.
        what: ``pool`` or ``target``, for the config keys in messages.
        sha256: Hex digest of the input as the user gave it; null if that is ``path`` itself.
        files: Names of the files that the input is made of, where it is more than one.
        starts: First line of each of them in ``path``.
        unit: What one record is called in messages: a line, or a record of another format.
        reader: The format and the version of its conversion, part of the identity.
        remarks: What the user should know of how the files were read.
        hub: Id of the data set of the Hub, where it came from there.
    """

    path: Path
    label: str
    name: str
    what: str
    sha256: str | None = None
    unit: str = "line"
    reader: str = "jsonl-1"
    files: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    hub: str | None = None

    def place(self, number: int) -> str:
        """Where the record in a 0-based line is, for messages: the input, and the line or record in its file."""
        if not self.starts:
            return f"{self.label} {self.unit} {number + 1}"
        part = bisect_right(self.starts, number) - 1
        return f"{self.label} {self.files[part]} {self.unit} {number - self.starts[part] + 1}"


@dataclass(frozen=True)
class ReadOptions(FieldKeys):
    """The keys of a source that decide which records there are and how they read; see `SourceSettings`."""

    id_field: str | None = None
    bad_records: str = "error"
    where: Mapping[str, Any] = field(default_factory=dict)
    exclude: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    sample: int | None = None
    seed: int = 0

    @property
    def keys(self) -> FieldKeys:
        """The fields that are named."""
        return FieldKeys(**{name: getattr(self, name) for name in FIELD_KEYS})


NO_KINDS: Mapping[str, Counter[str]] = MappingProxyType({})
FIELD_KEYS = tuple(spec.name for spec in fields(FieldKeys))


class RecordFile:
    """The records of one input, by row.

    ``row`` is the 0-based place after filters, limit and sample. Instances can be pickled; a worker process
    opens the file again by itself.

    Attributes:
        what: ``pool`` or ``target``.
        name: Base name of the input, for manifests.
        sha256: Hex digest of the input as the user gave it.
        source_rows: Records in the input before filters.
        layout: How a record becomes a conversation.
        bad: Records that cannot be read and are left out: their place, and why.
        remarks: What the user should know of how the input was read.
        files: Names of the files that the input is made of, where it is more than one.
        hub: Id of the data set of the Hub, where it came from there.
        ids: The ids of all records: the id field, else ``id``, else the 0-based line number in the input.
        kinds: How often each value occurs in the fields that say of what kind a record is, as far as they were counted.
    """

    def __init__(
        self,
        source: LineSource,
        options: ReadOptions,
        layout: LayoutReader,
        offsets: np.ndarray,
        lines: np.ndarray,
        ids: FlatTexts,
        *,
        kinds: Mapping[str, Counter[str]] = NO_KINDS,
        sha256: str,
        source_rows: int,
        stamp: tuple[int, int],
        bad: Sequence[tuple[str, str]] = (),
        remarks: Sequence[str] = (),
    ) -> None:
        """Wrap what `index` found; use that instead.

        Args:
            source: The file.
            options: The options it was indexed with.
            layout: The layout of its records.
            offsets: int64 ``[rows]``, byte at which each record's line starts.
            lines: int64 ``[rows]``, 0-based line number of each record.
            ids: ``[rows]`` their ids.
            kinds: See the class.
            sha256: Hex digest of the input.
            source_rows: Records before filters.
            stamp: Size in bytes and modification time in ns of the file when it was read.
            bad: See the class.
            remarks: See the class.
        """
        self.what, self.name, self.sha256 = source.what, source.name, sha256
        self.source_rows, self.layout = source_rows, layout
        self.bad, self.remarks, self.files = bad, (*source.remarks, *remarks), source.files
        self.hub = source.hub
        self._source, self._options, self._stamp = source, options, stamp
        self._offsets, self._lines, self.ids, self.kinds = offsets, lines, ids, kinds
        self._map: ReadMap | None = None
        self._taken: list[int] | None = None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def line(self, row: int) -> bytes:
        """The input line byte for byte, without its line ending.

        Raises:
            IndexError: if there is no such row.
            UserError: if the file has changed since it was indexed.
        """
        opened = self._opened()
        data, start = opened.data, int(self._offsets[self._checked(row)])
        end = data.find(b"\n", start)
        line = data[start:] if end < 0 else data[start:end]
        opened.note(len(line))
        return line.removesuffix(b"\r")

    def object(self, row: int) -> dict[str, Any]:
        """The record's JSON object."""
        value: dict[str, Any] = json.loads(self.line(row).decode())
        return value

    def record(self, row: int) -> Record:
        """The record, its lone surrogates replaced by U+FFFD."""
        value = self.object(row)
        return Record(self.id(row), tuple(map(_cleaned, self.layout.turns(value))))

    def id(self, row: int) -> str:
        """The record's id as text; see the class."""
        return self.ids[self._checked(row)]

    def place(self, row: int) -> str:
        """Where the record is, for messages: the input and the 1-based line."""
        return self._source.place(int(self._lines[self._checked(row)]))

    def identity(self) -> dict[str, Any]:
        """JSON-able: everything that determines the records and their order, for cache keys."""
        options = self._options
        return {
            "reader": self._source.reader,
            "sha256": self.sha256,
            **self.layout.identity(),
            "id_field": options.id_field,
            "where": conditions(options.where),
            "exclude": conditions(options.exclude),
            "bad_records": "skip" if self.bad else "error",  # where there are none, both read the same
            "limit": options.limit,
            "sample": options.sample,
            # The seed decides nothing without a sample, and must not split the cache then.
            "seed": None if options.sample is None else options.seed,
            "taken": self._taken,
        }

    def take(self, rows: Sequence[int]) -> RecordFile:
        """These rows as a file of their own; row 0 of the result is ``rows[0]``.

        Raises:
            IndexError: if there is no such row.
        """
        places = np.array([self._checked(row) for row in rows], dtype=np.int64)
        taken = copy.copy(self)
        taken._map = None
        taken._offsets, taken._lines = self._offsets[places], self._lines[places]
        taken.ids, taken.kinds = self.ids.take(places), NO_KINDS
        taken._taken = self._lines[places].tolist()
        return taken

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return row

    def _opened(self) -> ReadMap:
        if self._map is None:
            with _open(self._source) as handle:
                if _stamp(handle.fileno()) != self._stamp:
                    raise UserError(f"{self._source.label} has changed since it was read: run again")
                self._map = ReadMap(handle)
        return self._map


def id_of(record: Mapping[str, Any], id_field: str | None, line: int) -> str:
    """A record's id as text: the id field, else ``id``, else the 0-based line number in the input."""
    found = lookup(record, id_field or "id")
    if found is MISSING or found is None or isinstance(found, list | Mapping):
        return str(line)
    return clean_text(scalar_text(found))


def check_file(path: Path, label: str) -> None:
    """Refuse what is not a regular file.

    Raises:
        UserError: naming the path and what it is.
    """
    if not os.path.exists(path):
        raise UserError(f"{label} does not exist: check the path")
    if os.path.isdir(path):
        raise UserError(f"{label} is a directory: name a file in it")
    if not os.path.isfile(path):
        raise UserError(f"{label} is not a regular file: save the data to a file first")


def sha256_of(path: Path, label: str) -> str:
    """Hex digest of a file.

    Raises:
        UserError: if it cannot be read.
    """
    check_file(path, label)
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{label} cannot be read: {error.strerror or error}") from error


def _cleaned(turn: Turn) -> Turn:
    """A turn without lone surrogates."""
    if turn[2:] == NOTHING_MORE:
        return turn if turn.content.isascii() else turn._replace(content=clean_text(turn.content))
    texts: dict[str, Any] = {
        name: clean_text(getattr(turn, name)) for name in ("content", "thought", "calls", "name", "call_id")
    }
    return turn._replace(**texts)


def options_of(source: Any, *, seed: int, limit: int | None, sample: int | None) -> ReadOptions:
    """The reading options among the keys of a source."""
    shared = (*FIELD_KEYS, "id_field", "where", "exclude", "bad_records")
    return ReadOptions(**{name: getattr(source, name) for name in shared}, seed=seed, limit=limit, sample=sample)


def _open(source: LineSource) -> Any:
    try:
        return source.path.open("rb")
    except OSError as error:
        raise UserError(f"{source.label} cannot be read: {error.strerror or error}") from error


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
