"""The coreset behind a run: which records, of which pool, chosen how."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import read_json_object
from trim_lightning.privacy.local import read_local, with_local

READING_KEYS = ("where", "exclude", "limit", "sample")
MODEL_STAGES = ("warmup", "fingerprint", "score")


class BrokenRun(Exception):
    """A run that cannot be compared; the message is the reason that the user sees."""


@dataclass(frozen=True, eq=False)
class Coreset:
    """A coreset, and the selection that chose it where that is known.

    Attributes:
        directory: The selection's output directory, None for a coreset file that came from elsewhere.
        file: The coreset's lines, None if they are not at hand.
        name: What messages call it.
        config: The selection's config, None if unknown.
        inputs: The selection's inputs, empty if unknown.
        records: Number of records.
        tokens: Content tokens, None if unknown.
        seconds: Seconds of the selection's stages, loading excluded; for stages found in the store those of the first
            time. None if unknown.
        uses_model: True if a model scored the pool.
        takes_all: True if every scored record was selected.
        response_tokens: Content tokens of its responses, None if unknown.
    """

    directory: Path | None
    file: Path | None
    name: str
    config: Mapping[str, Any] | None
    inputs: Mapping[str, Any]
    records: int
    tokens: int | None
    seconds: float | None
    uses_model: bool = False
    takes_all: bool = False
    response_tokens: int | None = None

    @property
    def method(self) -> str:
        """Name of the method, or of the file."""
        return str(self.config["method"]["name"]) if self.config else f"file {self.name}"

    @property
    def mean_tokens(self) -> float | None:
        """Mean content tokens of a record."""
        return self.tokens / self.records if self.tokens is not None and self.records else None

    @cached_property
    def pool(self) -> str | None:
        """What decides which record a row number means: the pool's bytes and which of its records were read.

        None if unknown.
        """
        digest = self.inputs.get("pool", {}).get("sha256")
        if self.config is None or self.directory is None or not digest:
            return None
        source = self.config["pool"]
        read = {key: source.get(key) for key in READING_KEYS}
        return json.dumps([digest, read, self.config["seed"] if source.get("sample") else None], sort_keys=True)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Selected rows of the pool, ascending."""
        return np.flatnonzero(self._column("selected").to_numpy(zero_copy_only=False)).astype(np.int64)

    @cached_property
    def scores(self) -> NDArray[np.float32]:
        """``[pool]`` scores, NaN where unscored."""
        scores: NDArray[np.float32] = self._column("score").to_numpy(zero_copy_only=False)
        return scores

    @cached_property
    def lines(self) -> Counter[bytes] | None:
        """How often each line occurs (as its digest), None if the file is not at hand."""
        if self.file is None:
            return None
        with self.file.open("rb") as file:
            stripped = (line.rstrip(b"\r\n") for line in file)
            return Counter(hashlib.sha256(line).digest() for line in stripped if line)

    def _column(self, name: str) -> pa.ChunkedArray:
        assert self.directory is not None
        path = self.directory / "scores.parquet"
        try:
            return pq.read_table(path, columns=[name])[name]
        except Exception as error:  # the library raises many types, and Python's own among them
            raise UserError(f"{path}: cannot be read ({type(error).__name__}); run the selection again") from None


def read_selection(directory: Path, manifest: Mapping[str, Any]) -> Coreset:
    """The coreset that a finished selection left in its directory.

    Raises:
        BrokenRun: if a file is missing, unreadable, or disagrees with the manifest.
    """
    counts = section(manifest, "counts")
    config = with_local(section(manifest, "config"), read_local(directory))
    selected, pool_size = counts.get("selected"), counts.get("pool")
    if not is_count(selected) or not is_count(pool_size):
        raise BrokenRun("manifest.json has no counts.selected and counts.pool")
    for name in ("selected_tokens", "selected_response_tokens"):
        if counts.get(name) is not None and not is_count(counts[name]):
            raise BrokenRun(f"manifest.json has a counts.{name} that is no number of tokens")
    file, scores = directory / "coreset.jsonl", directory / "scores.parquet"
    for path in (file, scores):
        if not path.is_file():
            raise BrokenRun(f"{path.name} is missing")
    lines = count_lines(file)
    if lines != selected:
        raise BrokenRun(f"coreset.jsonl has {lines} records, the manifest says {selected}")
    try:
        opened = pq.ParquetFile(scores)
        rows, columns = opened.metadata.num_rows, opened.schema_arrow
        kinds = [columns.field(name).type for name in ("selected", "score")]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise BrokenRun(f"scores.parquet cannot be read ({type(error).__name__})") from error
    if not pa.types.is_boolean(kinds[0]) or not pa.types.is_floating(kinds[1]):
        raise BrokenRun("scores.parquet has columns of other types than a selection writes")
    if rows != pool_size:
        raise BrokenRun(f"scores.parquet has {rows} rows, the manifest counts a pool of {pool_size}")
    stages = section(manifest, "stages")
    return Coreset(
        directory=directory,
        file=file,
        name=file.name,
        config=config,
        inputs=section(manifest, "inputs"),
        records=selected,
        tokens=counts.get("selected_tokens"),
        seconds=sum(float(stage.get("seconds", 0)) for stage in stages.values()),
        uses_model=any(stages[name].get("tokens") for name in MODEL_STAGES if name in stages),
        takes_all=selected == counts.get("scored", pool_size),
        response_tokens=counts.get("selected_response_tokens"),
    )


def is_count(value: Any) -> TypeGuard[int]:
    """True for a whole number that can count something on a disk."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def count_lines(path: Path) -> int:
    """Lines that are not blank."""
    with path.open("rb") as file:
        return sum(not line.isspace() for line in file)


def section(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a manifest.

    Raises:
        BrokenRun: if it is not there.
    """
    value = manifest.get(name)
    if not isinstance(value, Mapping):
        raise BrokenRun(f"manifest.json has no {name}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BrokenRun: if it is missing or not a JSON object.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError:
        raise BrokenRun(f"{path.name} is missing: the run did not finish") from None
    except OSError as error:
        raise BrokenRun(f"{path.name} cannot be read ({type(error).__name__})") from error
    except ValueError as error:
        raise BrokenRun(f"{path.name} cannot be read: {error}") from error
