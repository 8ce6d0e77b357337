"""The records of a run's coreset."""

from __future__ import annotations

from trim_lightning.errors import UserError
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.runs.run import Run


def open_coreset(run: Run) -> RecordFile | None:
    """The records of a coreset, None if they cannot be read."""
    coreset = run.coreset
    if coreset.file is None:
        return None
    pool = (coreset.config or {}).get("pool", {})
    options = ReadOptions(prompt_field=pool.get("prompt_field"), response_field=pool.get("response_field"))
    try:
        return index(LineSource(coreset.file, label=coreset.name, name=coreset.name, what="pool"), options)
    except UserError:
        return None
