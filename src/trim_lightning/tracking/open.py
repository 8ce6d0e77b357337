"""The tracker that the config asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trim_lightning.privacy.paths import run_name
from trim_lightning.settings.schema import LoggerSettings
from trim_lightning.tracking.tracker import CsvTracker, NoTracker, Tracker


@contextmanager
def tracked(
    settings: LoggerSettings, directory: Path, *, job_type: str, config: Mapping[str, Any], name: str | None = None
) -> Iterator[Tracker]:
    """The tracker of a run, closed with it: as a success only if the block ends well."""
    tracker = open_tracker(settings, directory, job_type=job_type, name=name or run_name(directory), config=config)
    succeeded = False
    try:
        yield tracker
        succeeded = True
    finally:
        tracker.finish(succeeded)


def open_tracker(
    settings: LoggerSettings, directory: Path, *, job_type: str, name: str, config: Mapping[str, Any]
) -> Tracker:
    """The tracker that ``logger.name`` asks for."""
    if settings.name == "none":
        return NoTracker()
    if settings.name == "csv":
        return CsvTracker(directory)
    from trim_lightning.tracking.wandb import WandbTracker

    return WandbTracker(settings, directory, job_type=job_type, name=name, config=config)
