"""The tracker that the config asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trim_lightning.privacy.paths import run_name
from trim_lightning.settings.schema import LoggerSettings
from trim_lightning.tracking.tracker import CsvTracker, Tracker


@contextmanager
def tracked(
    settings: LoggerSettings, directory: Path, *, job_type: str, config: Mapping[str, Any], name: str | None = None
) -> Iterator[Tracker]:
    """The tracker that ``logger.name`` asks for, closed with the run: as a success only if the block ends well."""
    tracker: Tracker
    if settings.name == "none":
        tracker = Tracker()
    elif settings.name == "csv":
        tracker = CsvTracker(directory)
    else:
        from trim_lightning.tracking.wandb import WandbTracker

        name = name or run_name(directory)
        tracker = WandbTracker(settings, directory, job_type=job_type, name=name, config=config)
    succeeded = False
    try:
        yield tracker
        succeeded = True
    finally:
        tracker.finish(succeeded)
