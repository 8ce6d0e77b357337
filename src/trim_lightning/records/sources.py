"""Where records come from: the generated pool, files of every usual format, the Hub. All end up as one `RecordFile`.

Inputs other than plain JSON lines are converted once into the spool and read from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.records import generated_pool
from trim_lightning.records.file_formats import (
    decoder_of,
    format_of,
    head_of,
    lines_of,
    most_unpacked,
    packing_of,
    refuse_bomb,
    unpack,
)
from trim_lightning.records.file_search import FoundFiles, find_files, format_suffix, label_of
from trim_lightning.records.indexing import index
from trim_lightning.records.json_lines import BATCH_ROWS, json_line, one_line
from trim_lightning.records.record_file import LineSource, RecordFile, check_file, options_of, sha256_of
from trim_lightning.settings.schema import SourceSettings

Spool = Callable[[str, Mapping[str, object], Callable[[Path], None]], Path]
"""``spool(kind, key, build)``: a directory that holds what ``build(directory)`` wrote for that key."""

_RECORDS, _PARTS = "records.jsonl", "parts.json"
# Raise it whenever the same Parquet or Hub rows give other lines.
_CONVERSION = 1
# The same of other files.
_FILES = 2


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
        "file": _files,
        "jsonl": _files,
        "parquet": _files,
        "hub": _hub,
    }
    if source.source not in readers:
        if what == "pool":
            raise UserError(f"pool={source.source}: a pool is one of {', '.join(readers)}")
        raise ValueError(f"{what}.source={source.source} has no input of its own")
    options = options_of(source, seed=seed, limit=limit, sample=sample)
    options.keys.check(what)
    lines = readers[source.source](source, what, spool)
    return index(lines, options)


def check_source(source: SourceSettings, what: str) -> None:
    """Refuse files that are not there, before anything else takes time; nothing is read.

    Raises:
        UserError: as `open_records` does.
    """
    if source.source in ("file", "jsonl", "parquet"):
        _find(source, what)


def _path(source: SourceSettings, what: str, placeholder: str = "FILE") -> Any:
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


def _find(source: SourceSettings, what: str) -> tuple[str, FoundFiles]:
    """The files of a source, and what messages call them."""
    given = _path(source, what)
    label = label_of(given, what)
    found = find_files(given, source.source, source.split, what)
    for path in found.files:
        check_file(path, label)
    return label, found


def _files(source: SourceSettings, what: str, spool: Spool) -> LineSource:
    label, found = _find(source, what)
    kind = source.source
    if kind == "parquet" or (kind == "file" and all(_is_parquet(path, label) for path in found.files)):
        return _parquet(found, label, what, spool)
    if len(found.files) == 1:
        path, packing = found.files[0], packing_of(found.files[0], label)
        digest = None
        if packing is not None:
            digest = sha256_of(path, label)
            path = spool("decompressed", {"sha256": digest}, partial(_unpack_to, path, packing, label)) / _RECORDS
        form = format_of(path, format_suffix(found.files[0]), label)
        if form == "jsonl" or (kind == "jsonl" and form != "json"):
            if form == "csv":
                raise UserError(f"{label} looks like CSV, not JSON lines: read it with {what}=file")
            return LineSource(path.absolute(), label, found.name, what, digest, remarks=found.remarks)
    return _converted(found, label, what, spool)


def _is_parquet(path: Path, label: str) -> bool:
    return head_of(path, label, 4) == b"PAR1"


def _unpack_to(path: Path, packing: str, label: str, directory: Path) -> None:
    unpack(path, directory / _RECORDS, packing, label)


def _converted(found: FoundFiles, label: str, what: str, spool: Spool) -> LineSource:
    """One file of JSON lines out of any others."""
    digests = [sha256_of(path, label) for path in found.files]

    def build(directory: Path) -> None:
        starts, number, plain = [], 0, directory / "unpacked"
        limit, size = sum(most_unpacked(path.stat().st_size) for path in found.files), 0
        with (directory / _RECORDS).open("wb") as out:
            for path, name in zip(found.files, found.names, strict=True):
                told = label if len(found.files) == 1 else f"{label}: {name}"
                starts.append(number)
                suffix, packing = format_suffix(path), packing_of(path, told)
                if packing is not None:
                    unpack(path, plain, packing, told)
                    path = plain
                for line in lines_of(path, format_of(path, suffix, told), suffix, told):
                    size += len(line) + 1
                    refuse_bomb(size, limit, told)
                    out.write(line + b"\n")
                    number += 1
        plain.unlink(missing_ok=True)
        (directory / _PARTS).write_text(json.dumps(starts), encoding="utf-8")

    suffixes = [format_suffix(path) for path in found.files]  # they decide the delimiter
    directory = spool("files", {"files": digests, "suffixes": suffixes, "conversion": _FILES}, build)
    several = len(found.files) > 1
    return LineSource(
        directory / _RECORDS,
        label=label,
        name=found.name,
        what=what,
        sha256=_digest(digests),
        unit="record",
        reader=f"files-{_FILES}",
        files=found.names if several else (),
        starts=tuple(json.loads((directory / _PARTS).read_text(encoding="utf-8"))) if several else (),
        remarks=found.remarks,
    )


def _digest(digests: Sequence[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _parquet(found: FoundFiles, label: str, what: str, spool: Spool) -> LineSource:
    for path in found.files:
        if not _is_parquet(path, label):
            raise UserError(f"{label}: {path.name} is not a Parquet file; for JSON lines use {what}=jsonl")
    digests = [sha256_of(path, label) for path in found.files]

    def build(directory: Path) -> None:
        limit, size = most_unpacked(sum(path.stat().st_size for path in found.files)), 0
        with (directory / _RECORDS).open("wb") as out:
            for path in found.files:
                for line in lines_of(path, "parquet", "", label):
                    size += len(line) + 1
                    refuse_bomb(size, limit, label)
                    out.write(line + b"\n")

    directory = spool("parquet", {"files": digests, "conversion": _CONVERSION}, build)
    return LineSource(
        directory / _RECORDS,
        label=label,
        name=found.name,
        what=what,
        sha256=_digest(digests),
        unit="record",
        reader=f"parquet-{_CONVERSION}",
        files=found.names if len(found.files) > 1 else (),
        remarks=found.remarks,
    )


def _hub(source: SourceSettings, what: str, spool: Spool) -> LineSource:
    given = _path(source, what, "OWNER/NAME")
    label = f"{what}.path={given}"
    hub = None if Path(os.path.expanduser(given)).exists() else given
    dataset = _load_dataset(source, given, what)
    key = {
        "path": given,
        "split": source.split or "train",
        "fingerprint": dataset._fingerprint,
        "conversion": _CONVERSION,
    }
    directory = spool("hub", key, lambda directory: _write_rows(directory / _RECORDS, dataset))
    return LineSource(
        directory / _RECORDS,
        label=label,
        name=given.rstrip("/").rpartition("/")[2],
        what=what,
        unit="record",
        reader=f"hub-{_CONVERSION}",
        hub=hub,
    )


def _load_dataset(source: SourceSettings, given: str, what: str) -> Any:
    import datasets

    local = Path(os.path.expanduser(given))
    try:
        with no_progress_bars():
            if (local / "state.json").is_file():
                return datasets.load_from_disk(str(local))
            return datasets.load_dataset(
                str(local) if local.exists() else given,
                source.subset,
                split=source.split or "train",
                revision=source.revision,
            )
    except Exception as error:  # the library raises dozens of types, from its own to those of fsspec
        raise UserError(
            f"{what}.path={given}: the data set cannot be loaded from the Hub ({one_line(error)}): check "
            f"{what}.path, {what}.subset, {what}.split and {what}.revision; a gated set needs HF_TOKEN, "
            f"a set already in the cache loads with HF_HUB_OFFLINE=1, else download it and use {what}=jsonl"
        ) from error


def _write_rows(path: Path, dataset: Any) -> None:
    with path.open("wb") as out:
        for row in _hub_rows(dataset):
            out.write(json_line(row).encode() + b"\n")


def _hub_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    decode = decoder_of(dataset.features.arrow_schema)
    # The Arrow format hands images and audio over undecoded, which would need further libraries.
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield from map(decode, table.to_pylist())


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
