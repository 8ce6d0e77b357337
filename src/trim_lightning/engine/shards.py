"""Shard files: written whole by the predict loop, read back in pool order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trim_lightning.files.atomic import write_atomically

CHECKSUM = b"trim_sha256"


def shard_path(directory: Path, index: int) -> Path:
    """File of shard ``index``."""
    return directory / f"shard-{index:06d}.parquet"


def write_shard(table: pa.Table, directory: Path, index: int) -> None:
    """Write one shard under a temporary name, flush it to disk and rename it.

    A checksum of the content stands in the Parquet metadata: page checksums do not cover names and lengths.
    """
    table = table.replace_schema_metadata({CHECKSUM: content_checksum(table)})
    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd", write_page_checksum=True)
    write_atomically(shard_path(directory, index), content.getvalue().to_pybytes())


def content_checksum(table: pa.Table) -> bytes:
    """sha256 (hex) of names, types and values of a table of numbers and lists of numbers."""
    checksum = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        kind = column.type
        if pa.types.is_list(kind):
            checksum.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            column, kind = column.flatten(), kind.value_type
        checksum.update(f"{name} {kind}".encode())
        checksum.update(column.to_numpy(zero_copy_only=False).tobytes())
    return checksum.hexdigest().encode()


def finished_shards(directory: Path, rows: Mapping[int, int]) -> set[int]:
    """Indexes of shards that an earlier attempt finished.

    Args:
        directory: Where shards are.
        rows: Index of each shard of the plan to the number of records that it must hold.

    Returns:
        Those that can be read whole; damaged ones are removed, to be computed again.
    """
    done = set()
    for leftover in directory.glob(".shard-*"):
        leftover.unlink(missing_ok=True)
    for index, expected in rows.items():
        path = shard_path(directory, index)
        if not path.exists():
            continue
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            noted = (table.schema.metadata or {}).get(CHECKSUM)
            whole = table.num_rows == expected and noted == content_checksum(table)
        except (OSError, ValueError, pa.ArrowException):
            whole = False
        if whole:
            done.add(index)
        else:
            path.unlink(missing_ok=True)
    return done


def ragged(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """A list column from flat ``values`` cut into pieces of ``lengths``."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def read_in_order(directory: Path, shards: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the tables of all shards, in plan order (not pool order)."""
    for index in range(shards):
        yield pq.read_table(shard_path(directory, index), columns=columns)
