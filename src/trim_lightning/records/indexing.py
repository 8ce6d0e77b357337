"""One pass over a file of records: where each line begins, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import load_json
from trim_lightning.records.filters import RecordFilter, limit_and_sample
from trim_lightning.records.layouts import Layout, LayoutError, check_fields, choose_layout, kind_of, scalar_field
from trim_lightning.records.record_file import (
    MOST_LINE_BYTES,
    TOO_LONG,
    LineSource,
    ReadOptions,
    RecordFile,
    _open,
    _stamp,
    check_file,
)

_BOM = b"\xef\xbb\xbf"
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


def _check_head(head: bytes, source: LineSource) -> None:
    for magic, problem in _MAGIC:
        if head.startswith(magic):
            raise UserError(f"{source.label} {problem.format(what=source.what)}")
    if b"\0" in head:
        raise UserError(f"{source.label} is a binary file, not JSON lines: give a text file with one object per line")
