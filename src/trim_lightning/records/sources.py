"""Where records come from: the generated pool, JSON lines, Parquet, the Hub. All end up as one `RecordFile`.

Inputs other than plain JSON lines are converted once into the spool and read from there.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import with_leaves
from trim_lightning.records import generated_pool
from trim_lightning.records.indexing import index
from trim_lightning.records.layouts import check_fields
from trim_lightning.records.record_file import (
    MOST_LINE_BYTES,
    TOO_LONG,
    LineSource,
    RecordFile,
    check_file,
    options_of,
    sha256_of,
)
from trim_lightning.settings.schema import SourceSettings

Spool = Callable[[str, Mapping[str, object], Callable[[Path], None]], Path]
"""``spool(kind, key, build)``: a directory that holds what ``build(directory)`` wrote for that key."""

_RECORDS = "records.jsonl"
# Raise it whenever the same Parquet or Hub rows give other lines.
_CONVERSION = 1
_BATCH_ROWS = 1024
# A file that grows beyond both when it is unpacked is taken for a bomb: text shrinks to a fifth, seldom to a fiftieth.
_MOST_GROWTH = 200
_FREE_GROWTH = 256 << 20


def open_records(
    source: SourceSettings,
    *,
    what: str,
    seed: int,
    spool: Spool,
    limit: int | None = None,
    sample: int | None = None,
) -> RecordFile:
    """Open the records of a source: the first ``limit`` after its filters, and ``sample`` of those, drawn by ``seed``.

    Raises:
        UserError: if the input cannot be read as records; see `index`.
        ValueError: for ``from_pool``, which the caller draws from the pool itself.
    """
    readers: dict[str, Callable[[SourceSettings, str, Spool], LineSource]] = {
        "generated": _generated,
        "jsonl": _json_lines,
        "parquet": _parquet,
        "hub": _hub,
    }
    if source.source not in readers:
        if what == "pool":
            raise UserError(f"pool={source.source}: a pool is one of {', '.join(readers)}")
        raise ValueError(f"{what}.source={source.source} has no input of its own")
    check_fields(source.prompt_field, source.response_field, what)
    lines = readers[source.source](source, what, spool)
    return index(lines, options_of(source, seed=seed, limit=limit, sample=sample))


def _path(source: SourceSettings, what: str, placeholder: str = "FILE") -> str:
    if not source.path:
        raise UserError(f"{what}={source.source} needs {what}.path={placeholder}")
    return source.path


def _generated(source: SourceSettings, what: str, spool: Spool) -> LineSource:
    families = generated_pool.check_families(source.families, what)
    key = generated_pool.key(families, source.per_family, source.generator_seed)

    def build(directory: Path) -> None:
        generated_pool.generate(directory / _RECORDS, families, source.per_family, source.generator_seed)

    return LineSource(
        spool("generated", key, build) / _RECORDS,
        label=f"{what}=generated",
        name="generated",
        what=what,
        unit="record",
        reader=f"generated-{generated_pool.SCHEMA}",
    )


def _json_lines(source: SourceSettings, what: str, spool: Spool) -> LineSource:
    given = _path(source, what)
    label, path = f"{what}.path={given}", Path(os.path.expanduser(given))
    check_file(path, label)
    if path.suffix.lower() != ".gz" and _magic(path, label, 2) != b"\x1f\x8b":
        return LineSource(path.absolute(), label=label, name=path.name, what=what)
    digest = sha256_of(path, label)
    directory = spool(
        "decompressed", {"sha256": digest}, lambda directory: _decompress(path, directory / _RECORDS, label)
    )
    return LineSource(directory / _RECORDS, label=label, name=path.name, what=what, sha256=digest)


def _decompress(source: Path, target: Path, label: str) -> None:
    try:
        with gzip.open(source, "rb") as packed, target.open("wb") as plain:
            size, line, limit = 0, 0, _most_unpacked(source.stat().st_size)
            while chunk := packed.read(1 << 20):
                size += len(chunk)
                first = chunk.find(b"\n")
                if line + (len(chunk) if first < 0 else first) > MOST_LINE_BYTES:
                    raise UserError(f"{label} holds a line that {TOO_LONG}: mend or delete that line")
                line = line + len(chunk) if first < 0 else len(chunk) - chunk.rfind(b"\n") - 1
                _refuse_bomb(size, limit, label)
                plain.write(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fault = "is cut short" if isinstance(error, EOFError) else "is not a sound gzip file"
        raise UserError(f"{label} {fault} ({_one_line(error)}): fetch or compress it again") from error


def _most_unpacked(packed: int) -> int:
    """Bytes that an input of ``packed`` bytes may become."""
    return max(_FREE_GROWTH, _MOST_GROWTH * packed)


def _refuse_bomb(size: int, limit: int, label: str) -> None:
    """Stop before a small file fills the disk.

    Raises:
        UserError: if ``size`` is beyond ``limit``.
    """
    if size > limit:
        raise UserError(
            f"{label} unpacks to more than {_MOST_GROWTH} times its size (stopped at {size >> 20} MiB): no text "
            "shrinks so much; if it is what you want, unpack it yourself and name the unpacked file"
        )


def _magic(path: Path, label: str, size: int) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(size)
    except OSError as error:
        raise UserError(f"{label} cannot be read: {error.strerror or error}") from error


def _parquet(source: SourceSettings, what: str, spool: Spool) -> LineSource:
    given = _path(source, what)
    label = f"{what}.path={given}"
    files = _parquet_files(given, label)
    for path in files:
        check_file(path, label)
        if _magic(path, label, 4) != b"PAR1":
            raise UserError(f"{label}: {path.name} is not a Parquet file; for JSON lines use {what}=jsonl")
    digests = [sha256_of(path, label) for path in files]
    directory = spool(
        "parquet",
        {"files": digests, "conversion": _CONVERSION},
        lambda directory: _write_lines(
            directory / _RECORDS,
            _parquet_rows(files, label),
            limit=_most_unpacked(sum(path.stat().st_size for path in files)),
            label=label,
        ),
    )
    return LineSource(
        directory / _RECORDS,
        label=label,
        name=Path(given).name,
        what=what,
        sha256=digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        unit="record",
        reader=f"parquet-{_CONVERSION}",
    )


def _parquet_files(given: str, label: str) -> list[Path]:
    """The files that a path stands for: itself, those in the directory, or those the glob finds; sorted."""
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        files = sorted(found for found in path.rglob("*.parquet") if found.is_file())
    elif path.exists() or not glob.has_magic(given):
        files = [path]
    else:
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
    if not files:
        raise UserError(f"{label} holds no Parquet files: name a file, or a directory or glob of *.parquet files")
    return files


def _parquet_rows(files: Iterable[Path], label: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                found = 0
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    yield from batch.to_pylist()
                    found += batch.num_rows
                if found != file.metadata.num_rows:
                    raise ValueError(f"it speaks of {file.metadata.num_rows} rows and holds {found}")
        except Exception as error:  # values that Python has no object for raise OverflowError, KeyError and others
            raise UserError(
                f"{label}: {path.name} is not a readable Parquet file ({_one_line(error)}): fetch or write it again"
            ) from error


def _hub(source: SourceSettings, what: str, spool: Spool) -> LineSource:
    given = _path(source, what, "OWNER/NAME")
    label = f"{what}.path={given}"
    dataset = _load_dataset(source, given, what)
    key = {
        "path": given,
        "split": source.split,
        "fingerprint": dataset._fingerprint,
        "conversion": _CONVERSION,
    }
    directory = spool("hub", key, lambda directory: _write_lines(directory / _RECORDS, _hub_rows(dataset)))
    return LineSource(
        directory / _RECORDS,
        label=label,
        name=given.rstrip("/").rpartition("/")[2],
        what=what,
        unit="record",
        reader=f"hub-{_CONVERSION}",
    )


def _load_dataset(source: SourceSettings, given: str, what: str) -> Any:
    import datasets

    local = Path(os.path.expanduser(given))
    try:
        with no_progress_bars():
            return datasets.load_dataset(
                str(local) if local.exists() else given,
                source.subset,
                split=source.split,
                revision=source.revision,
            )
    except Exception as error:  # the library raises dozens of types, from its own to those of fsspec
        raise UserError(
            f"{what}.path={given}: the data set cannot be loaded from the Hub ({_one_line(error)}): check "
            f"{what}.path, {what}.subset, {what}.split and {what}.revision; a gated set needs HF_TOKEN, "
            f"a set already in the cache loads with HF_HUB_OFFLINE=1, else download it and use {what}=jsonl"
        ) from error


def _hub_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    # The Arrow format hands images and audio over undecoded, which would need further libraries.
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        yield from table.to_pylist()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence the bars of `datasets`."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, limit: int | None = None, label: str = "") -> None:
    """Write JSON lines.

    Raises:
        UserError: if they take more than ``limit`` bytes.
    """
    size = 0
    with path.open("wb") as out:
        for row in rows:
            line = _json_line(row).encode() + b"\n"
            size += len(line)
            if limit is not None:
                _refuse_bomb(size, limit, label)
            out.write(line)


def _json_line(row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return json.dumps(with_leaves(row, _finite), ensure_ascii=False, allow_nan=False, default=_as_text)


def _as_text(value: Any) -> str:
    """What JSON has no type for: dates and decimals as ``str`` gives them, bytes as UTF-8 if they are."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return str(value)


def _finite(name: str, value: Any) -> Any:
    """NaN and the infinities as null: JSON does not have them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(error: BaseException) -> str:
    """The type and the first sentence or so of an exception, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
