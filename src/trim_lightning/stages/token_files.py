"""The contract's files about tokens: ``target_tokens.parquet`` and ``token_scores.parquet``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.engine.shards import ragged
from trim_lightning.records.flat import spans, sums_of
from trim_lightning.records.record_file import RecordFile
from trim_lightning.stages.joined_passes import JoinedPasses
from trim_lightning.stages.task import SelectionTask
from trim_lightning.tokens.tokenized import predicted_responses, scope_mask
from trim_lightning.trim.pooling import penalise

if TYPE_CHECKING:
    from trim_lightning.stages.fingerprints import SalientTarget

MOST_VALUES = 8_000_000  # similarities in memory at once: 72 MB


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


def name_targets(source: Path, records: RecordFile, path: Path) -> None:
    """Copy a target token file with ids in place of rows."""
    from trim_lightning.files.tables import write_table

    table = pq.read_table(source)
    ids = records.ids.take(table["row"].to_numpy())
    write_table(table.set_column(0, "id", ids.column(0, len(ids))), path)


def write_token_scores(task: SelectionTask, passed: JoinedPasses, path: Path) -> None:
    """Write ``token_scores.parquet``: one line per pool record in pool order, unscored ones too.

    Similarities carry the fallback penalty. With target groups the columns are ``similarity/<group>`` and
    ``direct/<group>``; a pass that kept alignments has ``alignment`` of response tokens in scope, named alike.
    """
    from trim_lightning.files.tables import table_writer

    lists = {"token_ids": pa.int32(), "scope": pa.bool_()}
    for group in passed.groups:
        lists |= {column_name("similarity", group): pa.float32(), column_name("direct", group): pa.bool_()}
        if passed.has_alignment:
            lists[column_name("alignment", group)] = pa.float32()
    schema = pa.schema({"row": pa.int64(), "id": pa.string(), **{name: pa.list_(kind) for name, kind in lists.items()}})
    with table_writer(path, schema) as writer:
        for rows in blocks(passed):
            writer.write_table(pa.table(token_lines(task, passed, rows), schema=schema))


def blocks(passed: JoinedPasses) -> Iterator[range]:
    """Rows of the pool whose similarities are in memory together, in one window each: few shards hold them."""
    lengths, most = passed.tokens.lengths, MOST_VALUES // len(passed.groups)
    for start in range(0, len(lengths), passed.window):
        stop = min(len(lengths), start + passed.window)
        while start < stop:
            size = max(1, int(np.searchsorted(np.cumsum(lengths[start:stop]), most, "right")))
            yield range(start, min(stop, start + size))
            start += size


def token_lines(task: SelectionTask, passed: JoinedPasses, rows: range) -> dict[str, pa.Array]:
    """Some lines of ``token_scores.parquet``; all shards that hold them are read."""
    every = np.arange(rows.start, rows.stop)
    token_ids, roles = passed.tokens.together(every)
    scope, lengths = scope_mask(roles, passed.scope), passed.tokens.lengths[every]
    scoped = sums_of(scope, lengths)
    starts = np.cumsum(scoped) - scoped
    similarity = {group: np.full(len(scope), np.nan) for group in passed.groups}
    direct = {group: np.zeros(len(scope), dtype=bool) for group in passed.groups}
    alignment = {group: np.full(len(scope), np.nan) for group in passed.groups if passed.has_alignment}
    inside, silent = np.flatnonzero(scope), ~predicted_responses(roles, lengths)
    for whole in passed.shards(rows):
        mine = np.flatnonzero((whole.rows >= rows.start) & (whole.rows < rows.stop))
        shard = whole.part(mine, spans((np.cumsum(whole.lengths) - whole.lengths)[mine], whole.lengths[mine]))
        places = inside[spans(starts[shard.rows - rows.start], shard.lengths)]
        for place, group in enumerate(passed.groups):
            tokens, fallback = shard.bank(place), task.settings.fallback
            values = penalise(tokens.similarity, tokens.direct, fallback.mode, fallback.penalty)
            similarity[group][places], direct[group][places] = values, tokens.direct
            if tokens.alignment is not None:
                alignment[group][places] = tokens.alignment
    columns = {
        "row": pa.array(every),
        "id": task.pool.ids.column(rows.start, rows.stop),
        "token_ids": ragged(token_ids, lengths),
        "scope": ragged(scope, lengths),
    }
    for group in passed.groups:
        values = similarity[group].astype(np.float32)
        columns[column_name("similarity", group)] = ragged(values, lengths, without=np.isnan(values))
        columns[column_name("direct", group)] = ragged(direct[group], lengths)
        if group in alignment:
            taught = np.where(silent, np.nan, alignment[group]).astype(np.float32)
            columns[column_name("alignment", group)] = ragged(taught, lengths, without=np.isnan(taught))
    return columns


def column_name(kind: str, group: str) -> str:
    """``kind`` or ``kind/<group>``."""
    return f"{kind}/{group}" if group else kind
