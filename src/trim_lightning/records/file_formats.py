"""Records out of files of every usual format, one JSON line each; the format is told by the content."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import load_json
from trim_lightning.records.json_lines import BATCH_ROWS, json_line, one_line
from trim_lightning.records.names import CONVERSATIONS, PROMPTS, RESPONSES
from trim_lightning.records.record_file import MOST_LINE_BYTES, TOO_LONG

_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_BY_SUFFIX = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_MOST_VALUE = 1 << 28  # bytes of one JSON value, be it a whole file in one object
_CHUNK = 1 << 20
_DELIMITERS = ",\t;|"
WRAPPERS = ("data", "train", "examples", "records", "rows", "instances", "items", "dataset", "samples")
# A file that grows beyond both when it is unpacked is taken for a bomb: text shrinks to a fifth, seldom to a fiftieth.
_MOST_GROWTH = 200
_FREE_GROWTH = 256 << 20


def packing_of(path: Path, label: str) -> str | None:
    """How a file is compressed, by its content or else its suffix; None if it is not."""
    head = head_of(path, label, 6)
    by_content = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
    return by_content or _BY_SUFFIX.get(path.suffix.lower())


def format_of(path: Path, suffix: str, label: str) -> str:
    """The format of an unpacked file: ``jsonl``, ``json``, ``csv``, ``parquet`` or ``arrow``.

    ``json`` is one array, objects of several lines, or one object with all records in it. What is none of them counts
    as ``jsonl``, whose reader says what is wrong. The suffix is that of the file as the user named it.
    """
    head = head_of(path, label, 4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return "json"
    if text.startswith(b"{"):
        return "json" if _spreads(path) else "jsonl"
    first = text.partition(b"\n")[0].decode("utf-8", "replace").lower()
    names = {cell.strip().strip('"') for sign in _DELIMITERS for cell in first.split(sign)}
    known = names & {*PROMPTS, *RESPONSES, *CONVERSATIONS, "text"}
    return "csv" if suffix in (".csv", ".tsv") or len(known) > 1 else "jsonl"


def _spreads(path: Path) -> bool:
    """True for a file that begins with an object of several lines, or holds one object with all records in it."""
    with path.open("rb") as file:
        line = b""
        while not line.strip(b"\xef\xbb\xbf \t\r\n"):
            line = file.readline(MOST_LINE_BYTES + 1)
        if len(line) > MOST_LINE_BYTES:
            if path.stat().st_size > _MOST_VALUE:
                return False  # too large for one object
            line += file.readline(_MOST_VALUE)
        rest = file.read(1 << 16)
    alone, below = not rest.strip(), rest.split(b"\n")[:3]
    text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").strip()
    try:
        value = load_json(text)
    except json.JSONDecodeError:
        # a broken line of JSON lines ends with a brace or is followed by other objects
        return text == "{" or (text.endswith((",", "{", "[", ":")) and not _are_objects(below))
    except ValueError:
        return False
    return alone and isinstance(value, dict) and unwrapped(value) is not None


def _are_objects(lines: list[bytes]) -> bool:
    """True for some lines of which each but blank ones, and the last, which may be cut, is an object."""
    texts = [text for line in lines if (text := line.decode("utf-8", "replace").strip())]
    try:
        return bool(texts) and all(isinstance(load_json(text), dict) for text in texts[:2])
    except ValueError:
        return False


def head_of(path: Path, label: str, size: int) -> bytes:
    """The first bytes of a file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with path.open("rb") as handle:
            return handle.read(size)
    except OSError as error:
        raise UserError(f"{label} cannot be read: {error.strerror or error}") from error


def lines_of(path: Path, form: str, suffix: str, label: str) -> Iterator[bytes]:
    """The records of an unpacked file as JSON lines without line breaks; plain JSON lines as they are.

    The suffix is that of the file as the user named it.

    Raises:
        UserError: if it cannot be read as what it seems to be.
    """
    if form == "jsonl":
        with path.open("rb") as file:
            for line in iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""):
                if len(line) > MOST_LINE_BYTES:
                    raise UserError(f"{label} holds a line that {TOO_LONG}: mend or delete that line")
                yield line.rstrip(b"\r\n")
        return
    readers: dict[str, Callable[[Path, str], Iterator[Any]]] = {
        "json": json_rows,
        "csv": partial(csv_rows, tabs=suffix == ".tsv"),
        "parquet": parquet_rows,
        "arrow": arrow_rows,
    }
    for row in readers[form](path, label):
        yield json_line(row).encode()


def json_rows(path: Path, label: str) -> Iterator[Any]:
    """The elements of a JSON array, or objects one after the other, each of any number of lines.

    Raises:
        UserError: if the file is not that.
    """
    first, number = None, 0
    for value in json_values(path, label):
        number += 1
        if number == 1:
            first = value
            continue
        if number == 2:
            yield first
        yield value
    if number == 1:
        rows = unwrapped(first) if isinstance(first, dict) else None
        if rows is not None and isinstance(first, dict):
            lists = [name for name, value in first.items() if is_table(value)]
            if len(lists) > 1:
                names = ", ".join(lists)
                raise UserError(f"{label} holds several lists of records ({names}): write each to a file")
        yield from [first] if rows is None else rows


def is_table(value: Any) -> bool:
    """True for a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def json_values(path: Path, label: str) -> Iterator[Any]:
    """Values of a JSON text one at a time: the elements of an array, or values with white space between."""
    decoder, buffer, at, array, over = json.JSONDecoder(), "", 0, False, False
    with open_text(path) as file:
        try:
            while True:
                buffer, at = buffer[at:].lstrip(), 0
                more = file.read(max(_CHUNK, len(buffer))) if not over else ""
                over = over or not more
                buffer = (buffer + more).lstrip()
                if buffer[:1] == "[" and not array:
                    array, at = True, 1
                while True:
                    while at < len(buffer) and (buffer[at].isspace() or buffer[at] == ","):
                        at += 1
                    if at == len(buffer) or (array and buffer[at] == "]"):
                        break
                    try:
                        value, end = decoder.raw_decode(buffer, at)
                    except json.JSONDecodeError as error:
                        if not over and len(buffer) - at < _MOST_VALUE:
                            break
                        raise UserError(
                            f"{label} is not valid JSON ({error.msg}): mend the file, or write one object per line"
                        ) from None
                    if not over and end == len(buffer):
                        break  # a number may go on in the next chunk
                    at = end
                    yield value
                if array and buffer[at : at + 1] == "]" and buffer[at + 1 :].strip():
                    raise UserError(
                        f"{label} is not valid JSON (there is more after its array): write all records into one "
                        "array, or one object per line"
                    )
                if over:
                    if array and buffer[at : at + 1] != "]":
                        raise UserError(f"{label} is not valid JSON (the array does not end): fetch or mend the file")
                    return
        except UnicodeDecodeError:
            raise UserError(f"{label} is not UTF-8 text: convert the file to UTF-8") from None
        except RecursionError:
            raise UserError(f"{label} is not valid JSON (nested too deeply to read): mend the file") from None


def unwrapped(value: Mapping[str, Any]) -> list[Any] | None:
    """The records in an object that holds all of a file: a list of objects in it, or columns; None if it is one."""
    if all(any(isinstance(value.get(name), str) for name in names) for names in (PROMPTS, RESPONSES)):
        return None  # a record that has such a list beside its own text
    lists = [
        name
        for name in WRAPPERS
        if isinstance(value.get(name), list)
        and value[name]
        and all(isinstance(row, Mapping) and not {"role", "from"} & set(row) for row in value[name])
    ]
    if lists:
        return list(value[lists[0]])
    names = {*PROMPTS, *RESPONSES, *CONVERSATIONS}
    columns = {key: list(column.values()) if isinstance(column, Mapping) else column for key, column in value.items()}
    known = [key for key in columns if key in names]
    if len(known) < 2 or not all(isinstance(column, list) for column in columns.values()):
        return None
    if len({len(column) for column in columns.values()}) != 1 or not all(
        isinstance(cell, str) or cell is None for key in known for cell in columns[key]
    ):
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def csv_rows(path: Path, label: str, *, tabs: bool = False) -> Iterator[Any]:
    """The rows of a CSV or, with ``tabs``, TSV file with a header; every cell is text.

    A row of another length stays a list.

    Raises:
        UserError: if it is not sound, or two columns have one name.
    """
    csv.field_size_limit(MOST_LINE_BYTES)
    with open_text(path) as file:
        try:
            first = file.readline()
            while first and not first.strip():
                first = file.readline()
            sign = "\t" if tabs else max(_DELIMITERS, key=first.count)
            file.seek(0)
            rows = (row for row in csv.reader(file, delimiter=sign, strict=True) if row)
            names = [name.strip() for name in next(rows, [])]
            if names.count("") > 1:
                names = [name or f"column {place}" for place, name in enumerate(names, 1)]
            if twice := [name for name, number in Counter(names).items() if number > 1]:
                raise UserError(f"{label} has several columns named {', '.join(twice)}: rename or delete all but one")
            for row in rows:
                yield dict(zip(names, row, strict=True)) if len(row) == len(names) else row
        except UnicodeDecodeError:
            raise UserError(f"{label} is not UTF-8 text: convert the file to UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{label} is not a sound CSV file ({error}): write it again") from None


def open_text(path: Path) -> IO[str]:
    """A file as UTF-8 text, without its byte order mark."""
    return path.open(encoding="utf-8-sig", newline="")


def parquet_rows(path: Path, label: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            decode, found = decoder_of(file.schema_arrow), 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from map(decode, batch.to_pylist())
                found += batch.num_rows
            if found != file.metadata.num_rows:
                raise ValueError(f"it speaks of {file.metadata.num_rows} rows and holds {found}")
    except Exception as error:  # values that Python has no object for raise OverflowError, KeyError and others
        raise UserError(
            f"{label}: {path.name} is not a readable Parquet file ({one_line(error)}): fetch or write it again"
        ) from error


def arrow_rows(path: Path, label: str) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow file, as a stream (what ``save_to_disk`` writes) or with a footer."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if head_of(path, label, 6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(place) for place in range(file.num_record_batches))
            else:
                file = pa.ipc.open_stream(source)
                batches = iter(file)
            decode = decoder_of(file.schema)
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield from map(decode, batch.slice(start, BATCH_ROWS).to_pylist())
    except Exception as error:  # as above
        raise UserError(
            f"{label}: {path.name} is not a readable Arrow file ({one_line(error)}): fetch or write it again"
        ) from error


def decoder_of(schema: Any) -> Any:
    """What makes a row of Arrow one of records: the identity, unless columns hold JSON by the library datasets."""
    if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return lambda row: row
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    return features.decode_example


def unpack(source: Path, target: Path, packing: str, label: str) -> None:
    """Write a compressed file unpacked.

    Raises:
        UserError: if it is damaged, holds a line that is too long, or grows beyond all measure.
    """
    try:
        with open_packed(source, packing) as packed, target.open("wb") as plain:
            size, limit = 0, most_unpacked(source.stat().st_size)
            while chunk := packed.read(_CHUNK):
                size += len(chunk)
                refuse_bomb(size, limit, label)
                plain.write(chunk)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError) as error:
        fault = "is cut short" if isinstance(error, EOFError) else f"is not a sound {packing} file"
        raise UserError(f"{label} {fault} ({one_line(error)}): fetch or compress it again") from error


def open_packed(path: Path, packing: str) -> Any:
    """A compressed file, to be read unpacked."""
    if packing == "zstd":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    openers: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
    return openers[packing](path)


def most_unpacked(packed: int) -> int:
    """Bytes that an input of ``packed`` bytes may become."""
    return max(_FREE_GROWTH, _MOST_GROWTH * packed)


def refuse_bomb(size: int, limit: int, label: str) -> None:
    """Stop before a small file fills the disk.

    Raises:
        UserError: if ``size`` is beyond ``limit``.
    """
    if size > limit:
        raise UserError(
            f"{label} unpacks to more than {_MOST_GROWTH} times its size (stopped at {size >> 20} MiB): no text "
            "shrinks so much; if it is what you want, unpack it yourself and name the unpacked file"
        )
