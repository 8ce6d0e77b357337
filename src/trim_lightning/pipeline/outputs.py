"""The contract's files of a selection; every file is written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.files.atomic import replacing, write_text
from trim_lightning.files.tables import table_writer
from trim_lightning.methods.base import load_selector
from trim_lightning.privacy.local import LOCAL
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.shared import first_ids
from trim_lightning.runs.manifest import write_manifest
from trim_lightning.runs.names import FILES, MANIFEST
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.selection.responses import MissingResponses
from trim_lightning.stages.task import SelectionTask

CHUNK = 65_536  # lines written at once
FEW_TOKENS, SOME = 3, 10  # response tokens of a coreset that says little, and records and tokens of one that does not


def writable_directory(path: str, key: str) -> Path:
    """Make a directory, or check that it can be written to.

    Raises:
        UserError: if it cannot, naming the config key.
    """
    try:
        directory = Path(path).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{key}={path}: cannot be made ({reason}); name a directory that you can write to") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{key}={path}: is not writable; name a directory that you can write to")
    return directory


def clear(directory: Path) -> None:
    """Remove an earlier selection's files, so that no mixture of two runs is left if this one is killed."""
    for name in (*FILES, LOCAL):
        (directory / name).unlink(missing_ok=True)


def write_scores(
    pool: RecordFile, scores: ScoreTable, order: NDArray[np.int64], chosen: NDArray[np.int64], path: Path
) -> None:
    """Write ``scores.parquet``: one line per pool record, pool order."""
    size = len(scores)
    ranks = np.zeros(size, dtype=np.int32)  # 0 where a row has none
    ranks[order] = np.arange(1, len(order) + 1, dtype=np.int32)
    selected = np.zeros(size, dtype=bool)
    selected[chosen] = True
    parts = {"score": scores.score, "mean": scores.mean, "max": scores.max, "coverage": scores.coverage}
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("id", pa.string()),
            *((name, pa.float32()) for name in parts),
            ("num_tokens", pa.int32()),
            ("num_scored", pa.int32()),
            ("rank", pa.int64()),
            ("selected", pa.bool_()),
            *((f"score/{group}", pa.float32()) for group in scores.groups),
            *([] if scores.cheap_score is None else [("cheap_score", pa.float32())]),
            *((f"part/{name}", pa.float32()) for name in scores.parts),
        ]
    )

    def floats(values: NDArray[np.float32] | None, part: slice) -> pa.Array:
        if values is None:
            return pa.nulls(part.stop - part.start, pa.float32())
        return pa.array(values[part], pa.float32(), mask=np.isnan(values[part]))

    with table_writer(path, schema) as writer:
        for start in range(0, size, CHUNK):
            part = slice(start, min(size, start + CHUNK))
            columns = [
                pa.array(np.arange(part.start, part.stop)),
                pool.ids.column(part.start, part.stop),
                *(floats(values, part) for values in parts.values()),
                pa.array(scores.num_tokens[part], pa.int32()),
                pa.array(scores.num_scored[part], pa.int32()),
                pa.array(ranks[part].astype(np.int64), mask=ranks[part] == 0),
                pa.array(selected[part]),
                *(floats(values, part) for values in scores.groups.values()),
                *([] if scores.cheap_score is None else [floats(scores.cheap_score, part)]),
                *(floats(values, part) for values in scores.parts.values()),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def write_coreset(pool: RecordFile, chosen: NDArray[np.int64], path: Path) -> None:
    """Write ``coreset.jsonl``: the selected records' lines byte for byte, best first."""
    with replacing(path) as file:
        for row in chosen.tolist():
            file.write(pool.line(row) + b"\n")


def write_bad_records(inputs: Mapping[str, RecordFile], path: Path) -> None:
    """Write ``bad_records.jsonl``: where the records are that could not be read, and why; no file if there are none."""
    lines = [
        json.dumps({"input": what, "place": place, "reason": reason}, ensure_ascii=False) + "\n"
        for what, records in inputs.items()
        for place, reason in records.bad
    ]
    path.unlink(missing_ok=True)
    if lines:
        write_text("".join(lines), path)


def write_selection_manifest(
    task: SelectionTask,
    scores: ScoreTable,
    chosen: NDArray[np.int64],
    responses: NDArray[np.int64],
    missing: MissingResponses,
    directory: Path,
) -> dict[str, Any]:
    """Write ``manifest.json``, after a warning of what could not be scored or rendered, or teaches nothing.

    ``responses`` are the content tokens ``[records]`` of the responses. Returns the content.
    """
    pool, ledger, scorer = task.pool, task.ledger, task.scorer
    unscored, selected = np.flatnonzero(scores.unranked), missing.among(chosen)
    number = len(unscored)
    if len(missing) and (
        task.settings.selection.require_response or load_selector(task.settings.method).scores_responses()
    ):
        ledger.warn(
            f"{len(missing)} of the pool's records have no response token ({missing}) and are left out: "
            f"{first_ids(pool, missing.rows.tolist())}"
        )
        unscored = np.setdiff1d(unscored, missing.rows)
    if len(unscored):
        ledger.warn(
            f"{len(unscored)} of the pool's records could not be scored and are left out: "
            f"{first_ids(pool, unscored.tolist())}"
        )
    if len(selected):
        ledger.warn(
            f"{len(selected)} of the {len(chosen)} selected records have no response token ({selected}), so that "
            f"nothing can be learnt from them: {first_ids(pool, selected.rows.tolist())}; "
            "selection.require_response=true leaves such records out"
        )
    by_responses = task.settings.selection.tokens is not None and task.settings.selection.token_scope == "response"
    if not by_responses and len(chosen) >= SOME and responses.any():
        short, usual = float(np.median(responses[chosen])), float(np.median(responses[responses > 0]))
        if short <= FEW_TOKENS and usual >= SOME:
            ledger.warn(
                f"the selected records have {short:g} response tokens in the median, the pool's {usual:g}: there is "
                "little to learn from; selection.tokens=N selection.token_scope=response takes as many response tokens "
                "from every method"
            )
    cheap = int(np.isnan(scores.score[chosen]).sum())
    if cheap:
        ledger.warn(
            f"{cheap} of the {len(chosen)} selected records have a cheap score only: filters and budget went beyond "
            "the records that were scored in full; a larger scoring.cascade.keep, or scoring=plain, scores more"
        )
    for problem in task.pool_tokens.problems[:5]:
        ledger.warn(f"pool {problem}")
    return write_manifest(
        directory / MANIFEST,
        config=asdict(task.settings),
        inputs={
            "pool": describe(pool),
            **({} if task.targets is None else {"target": task.targets.describe()}),
            "model": scorer.source.describe(),
        },
        counts={
            "pool": len(pool),
            "scored": len(pool) - number,
            "unscored": number,
            "max_length": scorer.max_length,
            "truncated": task.pool_tokens.truncated,
            "no_response": len(missing),
            "response_cut_off": len(missing.cut),
            "selected": len(chosen),
            "selected_tokens": int(scores.num_tokens[chosen].sum()),
            "selected_response_tokens": int(responses[chosen].sum()),
            "selected_no_response": len(selected),
            "mean_tokens_pool": mean(scores.num_tokens),
            "mean_tokens_selected": mean(scores.num_tokens[chosen]),
            "fallback_share": ledger.figures.get("fallback_share"),
            "bank_coverage": ledger.figures.get("bank_coverage"),
            "within_over_between": ledger.figures.get("within_over_between"),
            "padding_share": ledger.figures.get("padding"),
            "spared_share": ledger.figures.get("spared"),
            **ledger.figures.get("cascade", {}),
        },
        ledger=ledger,
    )


def describe(records: RecordFile) -> dict[str, Any]:
    """An input's line in the manifest."""
    return {
        "name": records.name,
        "sha256": records.sha256,
        "rows": len(records),
        "source_rows": records.source_rows,
        **({"files": list(records.files)} if records.files else {}),
        **({"hub": records.hub} if records.hub else {}),
        **({"bad_records": len(records.bad)} if records.bad else {}),
    }


def mean(values: NDArray[Any]) -> float | None:
    """Rounded mean, or None of nothing."""
    return round(float(values.mean()), 2) if len(values) else None
