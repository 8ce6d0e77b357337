"""What the launcher notes of a sweep for the entry point (Hydra loads plugins as modules apart)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trim_lightning.settings.schema import LoggerSettings

finished_sweeps: dict[Path, LoggerSettings] = {}  # multirun folder to its jobs' logger
failed_jobs: list[Exception] = []  # what ended each
warnings_of_jobs: dict[str, None] = {}  # in the order in which they came


def note_warnings(folders: Iterable[Path]) -> None:
    """Note the warnings in the manifests of finished jobs; a job without a manifest has told its own."""
    from trim_lightning.runs.manifest import BrokenRun, read_json
    from trim_lightning.runs.names import MANIFEST

    for folder in folders:
        try:
            manifest = read_json(folder / MANIFEST)
        except BrokenRun:
            continue
        for part in (manifest.get("selection"), manifest):
            warnings_of_jobs.update(dict.fromkeys((part or {}).get("warnings", ())))
