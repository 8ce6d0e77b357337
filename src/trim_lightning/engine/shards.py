"""Shard files, whole or absent: tokens of records as Parquet, a few numbers or a vector of each as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trim_lightning.files.atomic import write_atomically

CHECKSUM = b"trim_sha256"
Expected = TypeVar("Expected")


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

    def is_whole(path: Path, expected: int) -> bool:
        table = pq.read_table(path, page_checksum_verification=True)
        noted = (table.schema.metadata or {}).get(CHECKSUM)
        return table.num_rows == expected and noted == content_checksum(table)

    return finished_files(directory, shard_path, rows, is_whole)


def finished_files(
    directory: Path,
    path_of: Callable[[Path, int], Path],
    expected: Mapping[int, Expected],
    is_whole: Callable[[Path, Expected], bool],
) -> set[int]:
    """Indexes of the shard files that are there whole.

    Args:
        directory: Where they are.
        path_of: Names the file of an index.
        expected: Index of each shard of the plan to what it must hold.
        is_whole: Reads a file and compares; damaged ones are removed, with what a killed process left half written.
    """
    prefix = path_of(directory, 0).name.partition("-")[0]
    for leftover in directory.glob(f".{prefix}-*"):
        leftover.unlink(missing_ok=True)
    done = set()
    for index, content in expected.items():
        path = path_of(directory, index)
        if not path.exists():
            continue
        try:
            whole = is_whole(path, content)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, SafetensorError):
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


FACTS = "values.json"


def values_path(directory: Path, index: int) -> Path:
    """File of shard ``index``: tensors ``rows [n]`` int64 and ``values [n, width]``."""
    return directory / f"values-{index:06d}.safetensors"


def write_values(directory: Path, index: int, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
    """Write one shard under a temporary name and rename it, with a checksum of its numbers in the metadata.

    Args:
        directory: Where shards go.
        index: The shard's place in the plan.
        rows: ``[n]``.
        values: ``[n, width]`` floating-point numbers.
    """
    tensors = {"rows": np.ascontiguousarray(rows), "values": np.ascontiguousarray(values)}
    write_atomically(values_path(directory, index), save(tensors, {"sha256": checksum(tensors)}))


def checksum(tensors: dict[str, NDArray[Any]]) -> str:
    """sha256 (hex) over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def finished_values(directory: Path, rows: Mapping[int, Sequence[int]]) -> set[int]:
    """Indexes of shards that an earlier attempt finished.

    Args:
        directory: Where shards are.
        rows: Index of each shard of the plan to the rows that it must hold, in order.

    Returns:
        Those that are whole; damaged ones are removed, to be computed again.
    """

    def is_whole(path: Path, expected: Sequence[int]) -> bool:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in ("rows", "values")}
            return bool(file.metadata()["sha256"] == checksum(tensors)) and tensors["rows"].tolist() == list(expected)

    return finished_files(directory, values_path, rows, is_whole)


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Write what a reader of the shards must know; ``shards``, their number, is among it."""
    write_atomically(directory / FACTS, json.dumps(facts))


def read_values(directory: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield ``rows [n]`` and ``values [n, width]`` of every shard; only one shard is in memory at a time."""
    for index in range(json.loads((directory / FACTS).read_text())["shards"]):
        with safe_open(values_path(directory, index), framework="numpy") as file:
            yield file.get_tensor("rows"), file.get_tensor("values")


def gather_values(directory: Path, size: int) -> NDArray[np.float64]:
    """All values as ``[size, width]`` float64, NaN in rows without; for few numbers a record."""
    table: NDArray[np.float64] | None = None
    for rows, values in read_values(directory):
        if table is None:
            table = np.full((size, values.shape[1]), np.nan)
        table[rows] = values
    return np.full((size, 0), np.nan) if table is None else table
