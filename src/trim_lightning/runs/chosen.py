"""The coreset of a run, its records and their scores, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import read_json_object
from trim_lightning.privacy.local import read_local, with_local
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile

CORESET, MANIFEST, SCORES = "coreset.jsonl", "manifest.json", "scores.parquet"


@dataclass(frozen=True)
class ChosenRecords:
    """A finished selection, ready to be exported.

    Attributes:
        directory: The selection's own output directory.
        manifest: Its manifest.
        records: The coreset, best first.
        scores: The lines of ``scores.parquet`` that were selected, in the order of ``records``.
    """

    directory: Path
    manifest: Mapping[str, Any]
    records: RecordFile
    scores: pa.Table


def open_chosen(run: Path) -> ChosenRecords:
    """Open the coreset of a selection run, or of a training run that selected one.

    Raises:
        UserError: if the directory holds no finished selection, or its files do not fit together.
    """
    directory = selection_directory(run)
    manifest = read_manifest(directory / MANIFEST)
    pool = manifest.get("config", {}).get("pool", {})
    if not isinstance(pool, dict) or not all(
        isinstance(pool.get(name), str | None) for name in ("prompt_field", "response_field")
    ):
        raise UserError(f"{directory / MANIFEST}: config.pool is not what a run writes; run the selection again")
    path = directory / CORESET
    options = ReadOptions(prompt_field=pool.get("prompt_field"), response_field=pool.get("response_field"))
    records = index(LineSource(path, label=str(path), name=CORESET, what="pool"), options)
    scores = selected_scores(directory / SCORES)
    if len(scores) != len(records):
        raise UserError(
            f"{directory}: {CORESET} has {len(records)} records, but {SCORES} marks {len(scores)} as selected; they "
            "are not of one run: select again"
        )
    return ChosenRecords(directory, manifest, records, scores)


def selection_directory(run: Path) -> Path:
    """Where the files of the selection are: the run itself, or its ``selection`` folder.

    Raises:
        UserError: if there is none.
    """
    if not run.is_dir():
        raise UserError(f"{run}: is not a directory; name the output directory of a run")
    for directory in (run, run / "selection"):
        if (directory / CORESET).is_file():
            return directory
    hint = "name a run of trim-select, or of trim-train without coreset.path"
    given = given_coreset(run)
    if given:
        hint = f"it was trained on coreset.path={given}; name the selection that wrote that file"
    raise UserError(f"{run}: holds no {CORESET}; {hint}")


def given_coreset(run: Path) -> str | None:
    """The coreset file that a training run was given, if its manifest tells of one."""
    try:
        config = read_json_object(run / MANIFEST)["config"]
        given = with_local(config, read_local(run))["coreset"]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(given) if given else None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the selection.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        manifest = read_json_object(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing, so the run did not finish; run it again") from None
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); run the selection again") from error
    for section in ("config", "inputs", "stages", "counts", "versions"):
        if not isinstance(manifest.get(section, {}), dict):
            raise UserError(f"{path}: {section} is not an object; run the selection again")
    return manifest


def selected_scores(path: Path) -> pa.Table:
    """The selected lines of ``scores.parquet``, best first, as the coreset is.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        table = pq.read_table(path, filters=pc.field("selected")).sort_by("rank").drop_columns(["selected"])
        table.validate(full=True)  # text that is no UTF-8 would come to light amid the export
    except Exception as error:  # the library raises many types, and Python's own among them
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); run the selection again") from error
    if not all(is_plain(kind) for kind in table.schema.types):
        raise UserError(f"{path}: has columns of other types than a selection writes; run the selection again")
    return table


def is_plain(kind: pa.DataType) -> bool:
    """True for the types that a table of scores has: text, numbers, truth values."""
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return texts or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
