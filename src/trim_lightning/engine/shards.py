"""Shard files, whole or absent: lists of records as Parquet, numbers or vectors of theirs as safetensors.

Beside them is the time that was spent on them, over all attempts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trim_lightning.errors import UserError, first_line
from trim_lightning.files.atomic import write_atomically

if TYPE_CHECKING:  # results are read without torch
    import torch

    from trim_lightning.engine.batches import Shard

CHECKSUM = b"trim_sha256"
CLOCK = "clock.json"
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
    """Indexes of shards that an earlier attempt finished, of those that the plan gives so many records (``rows``).

    Damaged ones are removed, to be computed again.
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


def ragged(values: np.ndarray, lengths: np.ndarray, without: np.ndarray | None = None) -> pa.ListArray:
    """A list column from flat ``values`` cut into pieces of ``lengths``; null ``without`` a value (True)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, mask=without))


FACTS = "values.json"


def values_path(directory: Path, index: int) -> Path:
    """File of shard ``index``: tensors ``rows [n]`` int64 and ``values [n, width]``."""
    return directory / f"values-{index:06d}.safetensors"


def write_values(directory: Path, index: int, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
    """Write one shard (``rows [n]``, ``values [n, width]``); see `write_tensors`."""
    write_tensors(values_path(directory, index), {"rows": rows, "values": values})


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write tensors under a temporary name and rename the file; a checksum of them stands in its metadata."""
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_atomically(path, save(whole, {"sha256": checksum(whole)}))


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """What `write_tensors` wrote.

    Raises:
        ValueError: if it has another checksum.
        OSError, SafetensorError: if it cannot be read.
    """
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get("sha256") != checksum(tensors):
            raise ValueError(f"{path.name} has another checksum")
    return tensors


def read_stored(path: Path) -> dict[str, NDArray[Any]]:
    """`read_tensors` of a store entry's file: of a large entry the store has looked at samples alone.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return read_tensors(path)
    except (OSError, ValueError, SafetensorError) as error:
        entry = path.parent
        raise UserError(
            f"store entry {entry.parent.name}/{entry.name[:12]}: {path.name} cannot be read ({first_line(error)}); "
            "trim-store verify --whole --delete removes the entry, and the next run computes it again"
        ) from None


def is_intact(path: Path) -> bool:
    """True for a file that `read_tensors` can read."""
    try:
        return bool(read_tensors(path))
    except (OSError, ValueError, SafetensorError):
        return False


def checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    """sha256 (hex) over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def rows_of(plan: Sequence[Shard]) -> dict[int, list[int]]:
    """Index of each shard of a plan to its rows, in order."""
    return {shard.index: [row for rows in shard.batches for row in rows] for shard in plan}


def finished_values(
    directory: Path, rows: Mapping[int, Sequence[int]], path_of: Callable[[Path, int], Path] = values_path
) -> set[int]:
    """Indexes of shards that an earlier attempt finished, of those that the plan gives these ``rows``, in order.

    Damaged ones are removed, to be computed again.
    """

    def has_rows(path: Path, expected: Sequence[int]) -> bool:
        return read_tensors(path)["rows"].tolist() == list(expected)

    return finished_files(directory, path_of, rows, has_rows)


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Write what a reader of the shards must know; ``shards``, their number, is among it."""
    write_atomically(directory / FACTS, json.dumps(facts))


def read_values(directory: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield ``rows [n]`` and ``values [n, width]`` of every shard; only one shard is in memory at a time.

    Raises:
        UserError: if a shard is damaged.
    """
    for index in range(json.loads((directory / FACTS).read_text())["shards"]):
        tensors = read_stored(values_path(directory, index))
        yield tensors["rows"], tensors["values"]


def gather_values(directory: Path, size: int) -> NDArray[np.float64]:
    """All values as ``[size, width]`` float64, NaN in rows without; for few numbers a record."""
    table: NDArray[np.float64] | None = None
    for rows, values in read_values(directory):
        if table is None:
            table = np.full((size, values.shape[1]), np.nan)
        table[rows] = values
    return np.full((size, 0), np.nan) if table is None else table


class ShardForm(Protocol):
    """How the results of a shard's batches become a file that is whole or absent."""

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        """Indexes of the plan's shards that are whole; removes damaged ones and what a kill left half written."""

    def is_there(self, index: int) -> bool:
        """True if the shard's file exists; it was written by rename, so it need not be read again."""

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        """Write one shard by rename from its batches' rows and predictions."""


class TableShards(ShardForm):
    """Shards that are Parquet files in one directory, a line a record."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        return finished_shards(self.directory, {shard.index: sum(map(len, shard.batches)) for shard in plan})

    def is_there(self, index: int) -> bool:
        return shard_path(self.directory, index).exists()


class ValueShards(ShardForm):
    """The values of a shard's records as one file, keyed by row."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        return finished_values(self.directory, rows_of(plan))

    def is_there(self, index: int) -> bool:
        return values_path(self.directory, index).exists()

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        import torch

        places = torch.cat([rows for rows, _ in parts]).cpu().numpy()
        values = np.concatenate([prediction.cpu().numpy() for _, prediction in parts])
        write_values(self.directory, index, places, values)


class Elapsed:
    """Adds up the seconds of every attempt at a pass; a killed attempt counts up to its last finished shard.

    The sum is in a file, for the process that computes may be another than the one that asks.

    Args:
        directory: The pass's directory, where the sum is kept until `finish`.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / CLOCK
        self._started: float | None = None
        self._earlier = 0.0

    def start(self) -> None:
        """Begin this attempt."""
        self._earlier = self.read()
        self._started = time.perf_counter()

    def tick(self) -> None:
        """Note the seconds so far; called when a shard is finished."""
        assert self._started is not None
        seconds = self._earlier + time.perf_counter() - self._started
        write_atomically(self._file, json.dumps({"seconds": seconds}))

    def read(self) -> float:
        """Seconds noted so far."""
        try:
            return float(json.loads(self._file.read_text())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def finish(self) -> float:
        """Remove the note and return the sum."""
        seconds = self.read()
        self._file.unlink(missing_ok=True)
        return seconds
