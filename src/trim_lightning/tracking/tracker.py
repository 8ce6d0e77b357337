"""Experiment tracking: a CSV file, Weights & Biases, or nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.files.atomic import write_text

if TYPE_CHECKING:
    from trim_lightning.report.facts import SelectionFacts


class Tracker:
    """What a run reports to; this base class reports to nobody."""

    def metrics(self, values: Mapping[str, float | int | None]) -> None:
        """Report final numbers under ``stage/name`` keys."""

    def artifact(self, name: str, kind: str, files: Sequence[Path], uses: Sequence[str] = ()) -> None:
        """Attach files as a versioned artifact; ``uses`` names artifacts of this run that it was made from."""

    def report(self, facts: SelectionFacts, page: Path) -> None:
        """Show a selection: its page and its tables."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report a table: one mapping of column to value per row."""

    def training_logger(self) -> Any:
        """A Lightning logger for the curves of a training, or False."""
        return False

    def finish(self, succeeded: bool) -> None:
        """Close the run, so that the next job of a multirun opens its own."""


class CsvTracker(Tracker):
    """Writes the final numbers to ``metrics.csv`` in the output directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "metrics.csv"
        self._values: dict[str, Any] = {}

    def metrics(self, values: Mapping[str, float | int | None]) -> None:
        """Add numbers and write the file anew."""
        self._values.update(values)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["metric", "value"])
        writer.writerows(sorted(self._values.items()))
        write_text(text.getvalue(), self.path)

    def training_logger(self) -> Any:
        """Curves in ``training/metrics.csv``."""
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(self.path.parent, name="training", version="")
