"""Files of a few numbers or a vector for each record: shards that are whole or absent, read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trim_lightning.files.atomic import write_atomically

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
    done = set()
    for leftover in directory.glob(".values-*"):
        leftover.unlink(missing_ok=True)
    for index, expected in rows.items():
        path = values_path(directory, index)
        if not path.exists():
            continue
        try:
            with safe_open(path, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in ("rows", "values")}
                whole = file.metadata()["sha256"] == checksum(tensors) and tensors["rows"].tolist() == list(expected)
        except (OSError, SafetensorError, KeyError, TypeError):
            whole = False
        if whole:
            done.add(index)
        else:
            path.unlink(missing_ok=True)
    return done


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
