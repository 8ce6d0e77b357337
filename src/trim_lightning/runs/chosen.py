"""The coreset of a run, its records and their scores, line by line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from trim_lightning.errors import UserError
from trim_lightning.privacy.local import read_local, with_local
from trim_lightning.records.record_file import RecordFile
from trim_lightning.runs.manifest import BrokenRun, Manifest, read_json
from trim_lightning.runs.names import CORESET, MANIFEST, SCORES, SELECTION
from trim_lightning.runs.selection import read_records, read_scores


@dataclass(frozen=True)
class ChosenRecords:
    """A finished selection, ready to be exported.

    Attributes:
        manifest: Its manifest.
        records: The coreset, best first.
        scores: The lines of ``scores.parquet`` that were selected, in the order of ``records``.
    """

    manifest: Manifest
    records: RecordFile
    scores: pa.Table

    @property
    def file(self) -> Path:
        """The coreset's own lines."""
        return self.manifest.directory / CORESET


def open_chosen(run: Path) -> ChosenRecords:
    """Open the coreset of a selection run, or of a training run that selected one.

    Raises:
        UserError: if the directory holds no finished selection, or its files do not fit together.
    """
    directory = selection_directory(run)
    try:
        manifest = Manifest.read(directory)
        records = read_records(directory / CORESET, str(directory / CORESET), manifest.config)
        scores = read_scores(directory, filters=pc.field("selected")).sort_by("rank").drop_columns(["selected"])
        if not all(is_plain(kind) for kind in scores.schema.types):
            raise BrokenRun(f"{SCORES} has columns of other types than a selection writes")
    except BrokenRun as error:
        raise error.refusal(directory) from error
    if len(scores) != len(records):
        raise UserError(
            f"{directory}: {CORESET} has {len(records)} records, but {SCORES} marks {len(scores)} as selected; they "
            "are not of one run: select again"
        )
    return ChosenRecords(manifest, records, scores)


def selection_directory(run: Path) -> Path:
    """Where the files of the selection are: the run itself, or its ``selection`` folder.

    Raises:
        UserError: if there is none, or it did not finish.
    """
    if not run.is_dir():
        raise UserError(f"{run}: is not a directory; name the output directory of a run")
    for directory in (run, run / SELECTION):
        if (directory / CORESET).is_file():
            if not (directory / MANIFEST).exists():
                raise UserError(f"{directory / MANIFEST}: is missing, so the run did not finish; run it again")
            return directory
    hint = "name a run of trim-select, or of trim-train without coreset.path"
    given = given_coreset(run)
    if given:
        hint = f"it was trained on coreset.path={given}; name the selection that wrote that file"
    raise UserError(f"{run}: holds no {CORESET}; {hint}")


def given_coreset(run: Path) -> str | None:
    """The coreset file that a training run was given, if its manifest tells of one."""
    try:
        given = with_local(read_json(run / MANIFEST)["config"], read_local(run))["coreset"]["path"]
    except (BrokenRun, KeyError, TypeError):
        return None
    return str(given) if given else None


def is_plain(kind: pa.DataType) -> bool:
    """True for the types that a table of scores has: text, numbers, truth values."""
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return texts or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
