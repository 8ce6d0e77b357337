"""The contract's files about tokens: ``target_tokens.parquet`` and ``token_scores.parquet``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.engine.batches import WINDOW
from trim_lightning.engine.shards import column_name, shard_path
from trim_lightning.stages.task import SelectionTask
from trim_lightning.stages.token_scores import shard_facts
from trim_lightning.store import Entry
from trim_lightning.trim.pooling import penalise

if TYPE_CHECKING:
    from trim_lightning.stages.fingerprints import SalientTarget


def spread(values: NDArray[Any], scope: NDArray[np.bool_]) -> list[Any]:
    """Put scoped values back at their tokens, null elsewhere, and where there is no value (NaN)."""
    full = np.full(len(scope), None, dtype=object)
    full[scope] = [None if value != value else value for value in values.tolist()]
    return full.tolist()


def write_target_tokens(targets: list[SalientTarget], path: Path) -> None:
    """Write the scaled saliency of every target; the id column holds the row until `name_targets`."""
    pq.write_table(
        pa.table(
            {
                "row": pa.array([target.row for target in targets], pa.int64()),
                "token_ids": pa.array([target.token_ids.tolist() for target in targets], pa.list_(pa.int32())),
                "scope": pa.array([target.scope.tolist() for target in targets], pa.list_(pa.bool_())),
                **{
                    name: pa.array(
                        [spread(getattr(target, name).numpy(), target.scope.numpy()) for target in targets],
                        pa.list_(pa.float32()),
                    )
                    for name in ("row_saliency", "column_saliency", "saliency")
                },
            }
        ),
        path,
    )


def name_targets(source: Path, records: Any, path: Path) -> None:
    """Copy a target token file with ids in place of rows."""
    from trim_lightning.files.tables import write_table

    table = pq.read_table(source)
    ids = pa.array([records.id(row) for row in table["row"].to_pylist()], pa.string())
    write_table(table.set_column(0, "id", ids), path)


def write_token_scores(task: SelectionTask, scoring: Entry, path: Path) -> None:
    """Write ``token_scores.parquet``: one line per pool record in pool order, unscored ones too.

    Similarities carry the fallback penalty. Shards hold records sorted by length within windows of the pool,
    so one window at a time is put back in order. With target groups the columns are ``similarity/<group>``
    and ``direct/<group>``.
    """
    from trim_lightning.files.tables import table_writer

    facts = shard_facts(scoring.path)
    groups: list[str] = facts["groups"]
    lists = {"token_ids": pa.int32(), "scope": pa.bool_()}
    for group in groups:
        lists |= {column_name("similarity", group): pa.float32(), column_name("direct", group): pa.bool_()}
    schema = pa.schema({"row": pa.int64(), "id": pa.string(), **{name: pa.list_(kind) for name, kind in lists.items()}})
    shard_rows = iter(range(facts["shards"]))
    pending: dict[int, dict[str, Any]] = {}
    with table_writer(path, schema) as writer:
        for start in range(0, len(task.pool), WINDOW):
            rows = range(start, min(len(task.pool), start + WINDOW))
            expected = int((task.pool_tokens.lengths[rows.start : rows.stop] > 0).sum())
            while len(pending) < expected:
                table = pq.read_table(shard_path(scoring.path, next(shard_rows)))
                pending.update((record["row"], record) for record in table.to_pylist())
            lines = [token_line(pending.get(row), row, task, groups) for row in rows]
            writer.write(pa.Table.from_pylist(lines, schema=schema))
            pending.clear()


def token_line(record: Mapping[str, Any] | None, row: int, task: SelectionTask, groups: list[str]) -> dict[str, Any]:
    """One line of ``token_scores.parquet``."""
    token_ids = np.array(record["token_ids"] if record else [], dtype=np.int32)
    scope = np.array(record["scope"] if record else [], dtype=bool)
    line: dict[str, Any] = {
        "row": row,
        "id": task.pool.id(row),
        "token_ids": token_ids.tolist(),
        "scope": scope.tolist(),
    }
    for group in groups:
        similarity_name, fallback = column_name("similarity", group), task.settings.fallback
        direct = np.array(record[column_name("match", group)] if record else [], dtype=np.int32) == token_ids
        similarity = np.array(record[similarity_name] if record else [], dtype=np.float64)
        penalised = penalise(similarity, direct, fallback.mode, fallback.penalty)
        line[similarity_name] = spread(penalised[scope], scope)
        line[column_name("direct", group)] = (direct & scope).tolist()
    return line
