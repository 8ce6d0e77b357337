"""One pass over a file of records: where each line begins, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import load_json
from trim_lightning.records.bad_records import BadRecords
from trim_lightning.records.fields import MISSING, LayoutError, field_names, kind_of, lookup, scalar_field
from trim_lightning.records.filters import FIELDS_REMEMBERED, RecordFilter, limit_and_sample
from trim_lightning.records.flat import FlatTexts
from trim_lightning.records.kinds import KIND_FIELDS
from trim_lightning.records.layouts import LayoutReader, check_named, no_field
from trim_lightning.records.record_file import (
    MOST_LINE_BYTES,
    NO_KINDS,
    TOO_LONG,
    LineSource,
    ReadOptions,
    RecordFile,
    _open,
    _stamp,
    check_file,
    id_of,
)

MOST_KINDS, LONGEST_KIND = 1000, 200  # values of a field, characters of one: with more it tells records apart
MARKS = ("label", "kto_tag")  # of KTO, as TRL and LLaMA-Factory write it
_BOM = b"\xef\xbb\xbf"
_MAGIC = (
    (b"PAR1", "is a Parquet file: read it with {what}=parquet"),
    (b"\x1f\x8b", "is gzip-compressed: unpack it first"),
    (b"PK\x03\x04", "is a zip archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed: unpack it first"),
    (b"BZh", "is bzip2-compressed: unpack it first"),
    (b"\xfd7zXZ", "is xz-compressed: unpack it first"),
    (b"ARROW1", "is an Arrow file: read it with {what}=file"),
    (b"\xff\xfe", "is UTF-16 text: convert it to UTF-8, e.g. with iconv"),
    (b"\xfe\xff", "is UTF-16 text: convert it to UTF-8, e.g. with iconv"),
)


def is_bad(mark: Any, answered: bool) -> bool:
    """True for a mark that says no: false, as text too (CSV), and beside an answer of KTO's 0 as well."""
    text = isinstance(mark, str) and mark.strip().lower() == "false"
    return mark is False or text or (answered and not isinstance(mark, bool) and mark in (0, "0"))


def index(source: LineSource, options: ReadOptions) -> RecordFile:
    """Read a JSON-lines file once: check every line, apply the filters, remember where the records are.

    Every line must be JSON; the layout is asked of the records that pass ``where`` and ``exclude`` only.

    Raises:
        UserError: if the file cannot be read, a line is not a JSON object in UTF-8, a record does not fit the
            layout, a filter names a field that no record has, or nothing is left.
    """
    options.keys.check(source.what)
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
        self.ids, self.id_bounds = bytearray(), array("q", [0])
        self.kinds: dict[str, Counter[str]] = {name: Counter() for name in KIND_FIELDS}
        self.reader = LayoutReader(options.keys, source.what)
        self.bad = BadRecords(source, skipped=options.bad_records == "skip")
        self.source_rows, self.kept = 0, 0
        self.refused: Counter[str] = Counter()
        self._unseen = options.keys.named if source.what != "coreset" else []  # a part may have none left
        self._fields: dict[str, None] = {}
        self._mend = f"mend or delete that {source.unit}"

    def read(self, handle: BinaryIO) -> None:
        """Take in every line of the open file, of which never more than the longest permitted line is in memory."""
        place, hashed = 0, self.source.sha256 is None
        lines = iter(partial(handle.readline, MOST_LINE_BYTES + 1), b"")
        number, rest = -1, False
        try:
            for raw in lines:
                if hashed:
                    self.hash.update(raw)
                if rest or len(raw) > MOST_LINE_BYTES:
                    if not rest:
                        number += 1
                        self.bad.add(number, f" {TOO_LONG}: {self._mend}", TOO_LONG)
                    rest = not raw.endswith(b"\n")
                else:
                    number += 1
                    # files with marks, laid end to end, have several
                    skip = len(_BOM) if raw[0] == _BOM[0] and raw.startswith(_BOM) else 0
                    line = raw[skip:] if skip else raw
                    if line and not line.isspace():
                        self._line(line, number, place + skip)
                place += len(raw)
        except OSError as error:
            raise UserError(f"{self.source.label} cannot be read: {error.strerror or error}") from error

    def finish(self, stamp: tuple[int, int]) -> RecordFile:
        """Apply what needs the whole file."""
        source, options = self.source, self.options
        self._check_named()
        self.bad.check(self.source_rows)
        if not self.source_rows and not self.bad:
            raise UserError(f"{source.label} is empty: it holds no records")
        if self.source_rows:
            self.filter.check(source.name)
        if self.source_rows and not self.kept:
            raise UserError(
                f"{source.what} is empty: {self.filter.describe()} keeps none of the "
                f"{self.source_rows} records of {source.name}; relax the filter"
            )
        if not self.offsets:
            left_out = "; ".join([*self.bad.remarks(), *self._refused()])
            raise UserError(f"{source.what} is empty: {left_out}; none of {source.name} is left")
        kept = limit_and_sample(len(self.offsets), options.limit, options.sample, options.seed, source.what)
        whole = len(kept) == len(self.offsets)
        offsets, lines, bounds = (np.frombuffer(part, np.int64) for part in (self.offsets, self.lines, self.id_bounds))
        ids = FlatTexts(np.frombuffer(self.ids, np.uint8), bounds)
        return RecordFile(
            source,
            options,
            self.reader,
            offsets if whole else offsets[kept],
            lines if whole else lines[kept],
            ids if whole else ids.take(kept),
            kinds=self.kinds if whole else NO_KINDS,
            sha256=source.sha256 or self.hash.hexdigest(),
            source_rows=self.source_rows,
            stamp=stamp,
            bad=self.bad.listed(),
            remarks=[*self.bad.remarks(), *self.filter.remarks(), *self._refused(), *self.reader.remarks()],
        )

    def _refused(self) -> list[str]:
        return [
            f"{number:,} records with {mark}=false, answers marked as bad, are left out; {self._keeps(mark)}"
            for mark, number in self.refused.items()
        ]

    def _keeps(self, mark: str) -> str:
        if self.source.what in ("pool", "target"):  # the inputs that have filters
            return f"'{self.source.what}.exclude.{mark}=[]' keeps them"
        return f"records without the field {mark} are kept"

    def _line(self, raw: bytes, number: int, offset: int) -> None:
        try:
            record = self._parse(raw)
            self.source_rows += 1
            if self.filter.active and not self.filter.keep(record):
                return
            self.kept += 1
            if ("label" in record or "kto_tag" in record) and (mark := self._marked_bad(record)):
                self.refused[mark] += 1
                return
            self._take(record, number)
        except _BadLine as error:
            self.bad.add(number, *error.args)
            return
        self.offsets.append(offset)
        self.lines.append(number)
        name = record.get("id") if self.options.id_field is None else MISSING
        if name is None or type(name) is int:  # nearly all are one of these, and this is done for every record
            name = str(number if name is None else name)
        elif type(name) is not str or not name.isascii():
            name = id_of(record, self.options.id_field, number)
        self.ids += name.encode()
        self.id_bounds.append(len(self.ids))
        self._count_kinds(record)

    def _count_kinds(self, record: Mapping[str, Any]) -> None:
        """Count what kind the record is of, by every field that may say so until it has too many values."""
        for name in [name for name in self.kinds if name in record]:
            counts, kind = self.kinds[name], str(record[name])
            counts[kind] += 1
            if len(counts) > MOST_KINDS or len(kind) > LONGEST_KIND:
                del self.kinds[name]

    def _take(self, record: Mapping[str, Any], number: int) -> None:
        options = self.options
        if self._unseen:
            self._look_for_named(record, number)
        layout = None
        try:
            layout = self.reader.layout_of(record)
            turns = layout.turns(record)
        except LayoutError as error:
            if layout is None:
                raise _BadLine(f" {error}", "no known layout") from None
            raise _BadLine(f": {error} (layout {layout.name}): {self._mend}", str(error)) from None
        if options.id_field is not None:
            self._check_id(record, options.id_field, number)
        self.reader.counts[layout.name] += 1
        if layout.unread or layout.listed or layout.bare:
            self.reader.note(record, layout, turns, self.source.place, number)

    def _look_for_named(self, record: Mapping[str, Any], number: int) -> None:
        """Cross off the named fields that a record has; without any bad records before it, the first must have them."""
        if not self._fields and self.options.bad_records == "error":
            check_named(record, self.options.keys, self.source.what, self.source.place(number))
        if len(self._fields) < FIELDS_REMEMBERED:
            self._fields.update(dict.fromkeys(field_names(record)))
        self._unseen = [(key, name) for key, name in self._unseen if lookup(record, name) is MISSING]

    def _check_named(self) -> None:
        for key, name in self._unseen if self._fields else ():
            source = self.source
            raise no_field(key, name, list(self._fields), f"no record of {source.name} has", "they have", source.what)

    def _marked_bad(self, record: Mapping[str, Any]) -> str | None:
        """The field by which a record of KTO says that its answer is a bad one, unless a filter asks for it.

        A number says so only beside a ``completion``: elsewhere it may be a class.
        """
        if self.source.what == "coreset":  # which was chosen from records that had been looked at
            return None
        marks = (mark for mark in MARKS if is_bad(record.get(mark), "completion" in record))
        return next((mark for mark in marks if mark not in self.filter.where and mark not in self.filter.exclude), None)

    def _check_id(self, record: Mapping[str, Any], id_field: str, number: int) -> None:
        key = f"{self.source.what}.id_field={id_field}: {self.source.place(number)}"
        scalar_field(record, id_field, key, "an id is text or a number")

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise _BadLine(
                f" is not UTF-8 text (byte {error.start + 1}): convert the file to UTF-8", "not UTF-8 text"
            ) from None
        if not self.source_rows and not self.bad and self.source.unit == "line" and text.lstrip().startswith("["):
            raise UserError(
                f"{self.source.label} is a JSON array; convert to one object per line, e.g. with jq -c '.[]', or "
                f"read it with {self.source.what}=file"
            )
        try:
            value = load_json(text)
        except json.JSONDecodeError:
            fault = _fault_of(text.rstrip("\r\n"))
            if not self.source_rows and not self.bad and text.strip() == "{":
                raise UserError(
                    f"{self.source.place(0)} is not valid JSON ({fault.msg} at column {fault.colno}): read it with "
                    f"{self.source.what}=file, or write one object per line, e.g. with jq -c ."
                ) from None
            raise _BadLine(
                f" is not valid JSON ({fault.msg} at column {fault.colno}): {self._mend}",
                f"not valid JSON ({fault.msg})",
            ) from None
        except ValueError as error:
            # The interpreter's limit on the digits of an integer; its own hint is about code, not data.
            reason = str(error).partition(":")[0]
            raise _BadLine(f" is not valid JSON ({reason}): {self._mend}", f"not valid JSON ({reason})") from None
        if isinstance(value, list) and self.source.unit == "record":
            raise _BadLine(
                f" is a list of {len(value)} values, not an object; so is a row of CSV that has more or fewer cells "
                f"than the header: {self._mend}",
                "a list, not an object",
            )
        if not isinstance(value, dict):
            raise _BadLine(
                f" is {kind_of(value)}, not a JSON object: {self._mend}", f"{kind_of(value)}, not a JSON object"
            )
        return value


def _fault_of(text: str) -> json.JSONDecodeError:
    """What is wrong with a line of JSON, at its place in the line without the end."""
    try:
        load_json(text)
    except json.JSONDecodeError as error:
        return error
    raise AssertionError("white space at its end makes no text invalid")


class _BadLine(Exception):
    """One line cannot be read: what to say after its place, of what kind that is, and if it is the whole truth."""


def _check_head(head: bytes, source: LineSource) -> None:
    for magic, problem in _MAGIC:
        if head.startswith(magic):
            raise UserError(f"{source.label} {problem.format(what=source.what)}")
    if b"\0" in head:
        raise UserError(f"{source.label} is a binary file, not JSON lines: give a text file with one object per line")
