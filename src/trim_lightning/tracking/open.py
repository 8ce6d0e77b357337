"""The tracker that the config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trim_lightning.settings.schema import LoggerSettings
from trim_lightning.tracking.tracker import CsvTracker, NoTracker, Tracker


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
