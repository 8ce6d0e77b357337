"""Sweeps whose jobs are done, noted by the launcher for the entry point (Hydra loads plugins as modules apart)."""

from __future__ import annotations

from pathlib import Path

from trim_lightning.settings.schema import LoggerSettings

finished_sweeps: dict[Path, LoggerSettings] = {}  # multirun folder to its jobs' logger


def sweep_name(folder: Path) -> str:
    """The name of a multirun folder by which a tracker groups its jobs.

    The last two parts below the working directory (a date and a time, as a rule); of a folder elsewhere its own name
    alone, for what is above may name a user.
    """
    try:
        below = folder.absolute().relative_to(Path.cwd())
    except ValueError:
        return folder.name
    return "/".join(below.parts[-2:])
