"""Sweeps whose jobs are done, noted by the launcher for the entry point (Hydra loads plugins as modules apart)."""

from __future__ import annotations

from pathlib import Path

from trim_lightning.settings.schema import LoggerSettings

finished_sweeps: dict[Path, LoggerSettings] = {}  # multirun folder to its jobs' logger
