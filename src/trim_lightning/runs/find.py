"""From the directories that a user names to the directories of single runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trim_lightning.errors import UserError
from trim_lightning.privacy.paths import different, without_homes
from trim_lightning.runs.names import CORESET, MANIFEST, METRICS, SCORES, SELECTION

SWEEP_FILE = "multirun.yaml"  # what Hydra leaves in the folder of a multirun
RUN_MARKS = (".hydra", SELECTION, SCORES, CORESET, METRICS, "adapter")


@dataclass(frozen=True)
class Found:
    """A run directory and what tables call it."""

    directory: Path
    label: str


def find_runs(paths: Sequence[Path]) -> tuple[list[Found], Path | None]:
    """Every run directory under the given ones, finished or not, each once.

    Args:
        paths: Runs, multirun folders with a numbered folder per job, or folders of runs.

    Returns:
        The runs in the order given (jobs by number), and the multirun folder if exactly one was given and nothing
        else.

    Raises:
        UserError: if a path does not exist or holds no run.
    """
    runs: dict[Path, Path] = {}
    for path in paths:
        for directory in runs_in(path):
            runs.setdefault(directory.resolve(), directory)
    sweep = paths[0] if len(paths) == 1 and not is_run(paths[0]) else None
    labels = short_labels(list(runs.values()))
    return [Found(directory, label) for directory, label in zip(runs.values(), labels, strict=True)], sweep


def runs_in(path: Path) -> list[Path]:
    """The run that a directory is, or the runs in it.

    Raises:
        UserError: if it does not exist or holds no run.
    """
    if not path.exists():
        raise UserError(f"{path}: does not exist; name the output directory of a run or of a multirun")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; name the output directory of a run or of a multirun")
    if is_run(path):
        return [path]
    folders = sorted((child for child in path.iterdir() if child.is_dir()), key=job_order)
    jobs = [child for child in folders if is_number(child.name)] if (path / SWEEP_FILE).exists() else []
    jobs = jobs or [child for child in folders if is_number(child.name) or is_run(child)]
    if not jobs:
        raise UserError(f"{path}: holds no run ({MANIFEST}) and no numbered job folders; name a run or a multirun")
    return jobs


def is_run(path: Path) -> bool:
    """True for the output directory of a run, finished or not; a multirun's folder is none."""
    if (path / MANIFEST).exists():
        return True
    return not (path / SWEEP_FILE).exists() and any((path / mark).exists() for mark in RUN_MARKS)


def job_order(path: Path) -> tuple[int, str]:
    """Job folders by number, others by name after them."""
    return (int(path.name), "") if is_number(path.name) else (1 << 62, path.name)


def is_number(name: str) -> bool:
    """True for the name of a job's folder: other scripts have digits too, and so have superscripts."""
    return name.isascii() and name.isdecimal()


def short_labels(directories: Sequence[Path]) -> list[str]:
    """The paths without what they share at the front; the folder's name for a single one."""
    if not directories:
        return []
    whole = [os.path.abspath(directory) for directory in directories]
    common = os.path.commonpath(whole) if len(whole) > 1 else os.path.dirname(whole[0])
    return different([os.path.basename(path) if path == common else without_homes(path, common) for path in whole])
