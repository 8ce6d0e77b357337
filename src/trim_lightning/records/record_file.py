"""Random access to the records of a JSON-lines file of any size.

One pass over the file checks every line and keeps its byte offset; the records themselves stay on disk and
are read through a memory map. All of this is our choice; the method takes the pool as given.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import load_json
from trim_lightning.records.filters import RecordFilter, conditions, limit_and_sample
from trim_lightning.records.layouts import (
    MISSING,
    Layout,
    LayoutError,
    check_fields,
    choose_layout,
    clean_text,
    kind_of,
    lookup,
    scalar_field,
    scalar_text,
)
from trim_lightning.records.record import Record, Turn

MOST_LINE_BYTES = 16 << 20
"""Longest line that is read. Parsed, it takes up to some sixty times that in memory (our choice)."""

_BOM = b"\xef\xbb\xbf"
TOO_LONG = f"is longer than {MOST_LINE_BYTES >> 20} MiB"
_MAGIC = (
    (b"PAR1", "is a Parquet file: read it with {what}=parquet"),
    (b"\x1f\x8b", "is gzip-compressed: unpack it first"),
    (b"PK\x03\x04", "is a zip archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed: unpack it first"),
    (b"BZh", "is bzip2-compressed: unpack it first"),
    (b"\xfd7zXZ", "is xz-compressed: unpack it first"),
    (b"\xff\xfe", "is UTF-16 text: convert it to UTF-8, e.g. with iconv"),
    (b"\xfe\xff", "is UTF-16 text: convert it to UTF-8, e.g. with iconv"),
)


@dataclass(frozen=True)
class LineSource:
    """A JSON-lines file on disk, and how to speak of the input that it came from.

    Attributes:
        path: The file that is read.
        label: The input in the user's words, e.g. ``pool.path=data/pool.jsonl``, for messages.
        name: Base name of the input, for manifests.
        what: ``pool`` or ``target``, for the config keys in messages.
        sha256: Hex digest of the input as the user gave it; null if that is ``path`` itself.
        unit: What one record is called in messages: a line, or a record of another format.
        reader: The format and the version of its conversion, part of the identity.
    """

    path: Path
    label: str
    name: str
    what: str
    sha256: str | None = None
    unit: str = "line"
    reader: str = "jsonl-1"


@dataclass(frozen=True)
class ReadOptions:
    """The keys of a source that decide which records there are and how they read; see `SourceSettings`."""

    prompt_field: str | None = None
    response_field: str | None = None
    id_field: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    exclude: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    sample: int | None = None
    seed: int = 0


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
    """

    def __init__(
        self,
        source: LineSource,
        options: ReadOptions,
        layout: Layout,
        offsets: np.ndarray,
        lines: np.ndarray,
        *,
        sha256: str,
        source_rows: int,
        stamp: tuple[int, int],
    ) -> None:
        """Wrap what `index` found; use that instead.

        Args:
            source: The file.
            options: The options it was indexed with.
            layout: The layout of its records.
            offsets: int64 ``[rows]``, byte at which each record's line starts.
            lines: int64 ``[rows]``, 0-based line number of each record.
            sha256: Hex digest of the input.
            source_rows: Records before filters.
            stamp: Size in bytes and modification time in ns of the file when it was read.
        """
        self.what, self.name, self.sha256 = source.what, source.name, sha256
        self.source_rows, self.layout = source_rows, layout
        self._source, self._options, self._stamp = source, options, stamp
        self._offsets, self._lines = offsets, lines
        self._map: mmap.mmap | None = None
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
        data = self._data()
        start = int(self._offsets[self._checked(row)])
        end = data.find(b"\n", start)
        line = data[start:] if end < 0 else data[start:end]
        return line.removesuffix(b"\r")

    def object(self, row: int) -> dict[str, Any]:
        """The record's JSON object."""
        value: dict[str, Any] = json.loads(self.line(row).decode())
        return value

    def record(self, row: int) -> Record:
        """The record, its lone surrogates replaced by U+FFFD."""
        value = self.object(row)
        turns = tuple(Turn(turn.role, clean_text(turn.content)) for turn in self.layout.turns(value))
        return Record(self._id(value, row), turns)

    def id(self, row: int) -> str:
        """The record's id as text: the id field, else ``id``, else the 0-based line number in the input."""
        return self._id(self.object(row), row)

    def place(self, row: int) -> str:
        """Where the record is, for messages: the input and the 1-based line."""
        return f"{self._source.label} {self._source.unit} {int(self._lines[self._checked(row)]) + 1}"

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
        taken._taken = self._lines[places].tolist()
        return taken

    def _id(self, value: Mapping[str, Any], row: int) -> str:
        found = lookup(value, self._options.id_field or "id")
        if found is MISSING or found is None or isinstance(found, list | Mapping):
            return str(int(self._lines[row]))
        return clean_text(scalar_text(found))

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return row

    def _data(self) -> mmap.mmap:
        if self._map is None:
            with _open(self._source) as handle:
                if _stamp(handle.fileno()) != self._stamp:
                    raise UserError(f"{self._source.label} has changed since it was read: run again")
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map


def index(source: LineSource, options: ReadOptions) -> RecordFile:
    """Read a JSON-lines file once: check every line, apply the filters, remember where the records are.

    Every line must be JSON; the layout is asked of the records that pass ``where`` and ``exclude`` only.

    Raises:
        UserError: if the file cannot be read, a line is not a JSON object in UTF-8, a record does not fit the
            layout, a filter names a field that no record has, or nothing is left.
    """
    check_fields(options.prompt_field, options.response_field, source.what)
    check_file(source.path, source.label)
    indexer = _Indexer(source, options)
    with _open(source) as handle:
        stamp = _stamp(handle.fileno())
        _check_head(handle.read(4096), source)
        handle.seek(0)
        indexer.read(handle)
    return indexer.finish(stamp)


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


class _Indexer:
    """The state of one index pass."""

    def __init__(self, source: LineSource, options: ReadOptions) -> None:
        self.source, self.options = source, options
        self.filter = RecordFilter(options.where, options.exclude, source.what)
        self.hash = hashlib.sha256()
        self.offsets, self.lines = array("q"), array("q")
        self.layout: Layout | None = None
        self.source_rows = 0

    def read(self, handle: BinaryIO) -> None:
        """Take in every line of the open file, of which never more than the longest permitted line is in memory."""
        place, hashed = 0, self.source.sha256 is None
        lines = iter(lambda: handle.readline(MOST_LINE_BYTES + 1), b"")
        try:
            for number, raw in enumerate(lines):
                if len(raw) > MOST_LINE_BYTES:
                    raise UserError(f"{self._place(number)} {TOO_LONG}: mend or delete that {self.source.unit}")
                if hashed:
                    self.hash.update(raw)
                skip = len(_BOM) if number == 0 and raw.startswith(_BOM) else 0
                if not raw[skip:].isspace() and len(raw) > skip:
                    self._line(raw[skip:], number, place + skip)
                place += len(raw)
        except OSError as error:
            raise UserError(f"{self.source.label} cannot be read: {error.strerror or error}") from error

    def finish(self, stamp: tuple[int, int]) -> RecordFile:
        """Apply what needs the whole file."""
        source, options = self.source, self.options
        if not self.source_rows:
            raise UserError(f"{source.label} is empty: it holds no records")
        self.filter.check(source.name)
        if self.layout is None:
            raise UserError(
                f"{source.what} is empty: {self.filter.describe()} keeps none of the "
                f"{self.source_rows} records of {source.name}; relax the filter"
            )
        kept = limit_and_sample(len(self.offsets), options.limit, options.sample, options.seed, source.what)
        return RecordFile(
            source,
            options,
            self.layout,
            np.frombuffer(self.offsets, dtype=np.int64)[kept],
            np.frombuffer(self.lines, dtype=np.int64)[kept],
            sha256=source.sha256 or self.hash.hexdigest(),
            source_rows=self.source_rows,
            stamp=stamp,
        )

    def _line(self, raw: bytes, number: int, offset: int) -> None:
        record = self._parse(raw, number)
        self.source_rows += 1
        if not self.filter.keep(record):
            return
        options, what = self.options, self.source.what
        if self.layout is None:
            self.layout = choose_layout(
                record, options.prompt_field, options.response_field, what=what, where=self._place(number)
            )
        try:
            self.layout.turns(record)
        except LayoutError as error:
            raise UserError(
                f"{self._place(number)}: {error} (layout {self.layout.name}): mend or delete that {self.source.unit}"
            ) from None
        if options.id_field is not None:
            self._check_id(record, options.id_field, number)
        self.offsets.append(offset)
        self.lines.append(number)

    def _check_id(self, record: Mapping[str, Any], id_field: str, number: int) -> None:
        key = f"{self.source.what}.id_field={id_field}: {self._place(number)}"
        scalar_field(record, id_field, key, "an id is text or a number")

    def _parse(self, raw: bytes, number: int) -> dict[str, Any]:
        place, mend = self._place(number), f"mend or delete that {self.source.unit}"
        try:
            text = raw.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{place} is not UTF-8 text (byte {error.start + 1}): convert the file to UTF-8") from None
        if not self.source_rows and text.lstrip().startswith("["):
            raise UserError(
                f"{self.source.label} is a JSON array; convert to one object per line, e.g. with jq -c '.[]'"
            )
        try:
            value = load_json(text)
        except json.JSONDecodeError as error:
            if not self.source_rows and text.strip() == "{":
                mend = "write one object per line, e.g. with jq -c ."
            raise UserError(f"{place} is not valid JSON ({error.msg} at column {error.colno}): {mend}") from None
        except ValueError as error:
            # The interpreter's limit on the digits of an integer; its own hint is about code, not data.
            reason = str(error).partition(":")[0]
            raise UserError(f"{place} is not valid JSON ({reason}): {mend}") from None
        if not isinstance(value, dict):
            raise UserError(f"{place} is {kind_of(value)}, not a JSON object: {mend}")
        return value

    def _place(self, number: int) -> str:
        return f"{self.source.label} {self.source.unit} {number + 1}"


def options_of(source: Any, *, seed: int, limit: int | None, sample: int | None) -> ReadOptions:
    """The reading options among the keys of a source."""
    shared = ("prompt_field", "response_field", "id_field", "where", "exclude")
    return dataclasses.replace(
        ReadOptions(**{name: getattr(source, name) for name in shared}), seed=seed, limit=limit, sample=sample
    )


def _open(source: LineSource) -> Any:
    try:
        return source.path.open("rb")
    except OSError as error:
        raise UserError(f"{source.label} cannot be read: {error.strerror or error}") from error


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _check_head(head: bytes, source: LineSource) -> None:
    for magic, problem in _MAGIC:
        if head.startswith(magic):
            raise UserError(f"{source.label} {problem.format(what=source.what)}")
    if b"\0" in head:
        raise UserError(f"{source.label} is a binary file, not JSON lines: give a text file with one object per line")
