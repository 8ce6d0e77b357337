"""The coreset behind a run: which records, of which pool, chosen how."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import FIELD_KEYS, LineSource, ReadOptions, RecordFile
from trim_lightning.runs.manifest import BrokenRun, Manifest
from trim_lightning.runs.names import CORESET, MANIFEST, SCORES

READING_KEYS = ("where", "exclude", "limit", "sample")
MODEL_STAGES = ("warmup", "fingerprint", "cascade", "score")


@dataclass(frozen=True, eq=False)
class Coreset:
    """A coreset, and the selection that chose it where that is known.

    Attributes:
        file: The coreset's lines, None if they are not at hand.
        name: What messages call it.
        records: Number of records.
        tokens: Content tokens, None if unknown.
        directory: The selection's output directory, None for a coreset file that came from elsewhere.
        config: The selection's config, None if unknown.
        inputs: The selection's inputs, empty if unknown.
        seconds: Seconds of the selection's stages, loading excluded; for stages found in the store those of the first
            time. None if unknown.
        uses_model: True if a model scored the pool.
        takes_all: True if every scored record was selected.
        response_tokens: Content tokens of its responses, None if unknown.
    """

    file: Path | None
    name: str
    records: int
    tokens: int | None
    directory: Path | None = None
    config: Mapping[str, Any] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
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
    def digests(self) -> list[bytes] | None:
        """sha256 of each line that is not blank, best first; None if the file is not at hand."""
        if self.file is None:
            return None
        with self.file.open("rb") as file:
            stripped = (line.rstrip(b"\r\n") for line in file)
            return [hashlib.sha256(line).digest() for line in stripped if line.strip()]

    @cached_property
    def lines(self) -> Counter[bytes] | None:
        """How often each line occurs (as its digest), None if the file is not at hand."""
        return None if self.digests is None else Counter(self.digests)

    def open_records(self) -> RecordFile | None:
        """The records, None if they cannot be read."""
        if self.file is None:
            return None
        try:
            return read_records(self.file, self.name, self.config or {})
        except UserError:
            return None

    def _column(self, name: str) -> pa.ChunkedArray:
        assert self.directory is not None
        return read_scores(self.directory, columns=[name])[name]


def read_scores(directory: Path, **options: Any) -> pa.Table:
    """The scores of a selection, one line for each pool record; ``options`` are those of ``read_table``.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        table = pq.read_table(directory / SCORES, **options)
        table.validate(full=True)  # text that is no UTF-8 would come to light later
    except Exception as error:  # the library raises many types, and Python's own among them
        raise BrokenRun(f"{SCORES} cannot be read ({type(error).__name__})").refusal(directory) from None
    return table


def read_records(file: Path, label: str, config: Mapping[str, Any]) -> RecordFile:
    """The records of a coreset, best first; the selection's config names the fields of prompt and response.

    Raises:
        UserError: if a line is no record, or the config is not one that a run writes.
    """
    pool = config.get("pool", {})
    if not isinstance(pool, Mapping) or not all(isinstance(pool.get(name), str | list | None) for name in FIELD_KEYS):
        raise BrokenRun(f"{MANIFEST} config.pool is not what a run writes").refusal(file.parent)
    named: dict[str, Any] = {name: pool.get(name) for name in FIELD_KEYS}
    options = ReadOptions(**named)
    return index(LineSource(file, label=label, name=file.name, what="coreset"), options)


def read_selection(manifest: Manifest) -> Coreset:
    """The coreset that a finished selection left beside its manifest.

    Raises:
        BrokenRun: if a file is missing, unreadable, or disagrees with the manifest.
    """
    counts, config, directory = manifest.counts, manifest.config, manifest.directory
    selected, pool_size = counts.get("selected"), counts.get("pool")
    if not is_count(selected) or not is_count(pool_size):
        raise BrokenRun(f"{MANIFEST} has no counts.selected and counts.pool")
    for name in ("selected_tokens", "selected_response_tokens"):
        if counts.get(name) is not None and not is_count(counts[name]):
            raise BrokenRun(f"{MANIFEST} has a counts.{name} that is no number of tokens")
    file, scores = directory / CORESET, directory / SCORES
    for path in (file, scores):
        if not path.is_file():
            raise BrokenRun(f"{path.name} is missing")
    lines = count_lines(file)
    if lines != selected:
        raise BrokenRun(f"{CORESET} has {lines} records, the manifest says {selected}")
    try:
        opened = pq.ParquetFile(scores)
        rows, columns = opened.metadata.num_rows, opened.schema_arrow
        kinds = [columns.field(name).type for name in ("selected", "score")]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise BrokenRun(f"{SCORES} cannot be read ({type(error).__name__})") from error
    if not pa.types.is_boolean(kinds[0]) or not pa.types.is_floating(kinds[1]):
        raise BrokenRun(f"{SCORES} has columns of other types than a selection writes")
    if rows != pool_size:
        raise BrokenRun(f"{SCORES} has {rows} rows, the manifest counts a pool of {pool_size}")
    stages = manifest.stages
    return Coreset(
        directory=directory,
        file=file,
        name=file.name,
        config=config,
        inputs=manifest.inputs,
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
