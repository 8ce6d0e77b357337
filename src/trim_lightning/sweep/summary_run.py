"""One tracker run for a whole sweep: the table over its jobs, and what each axis did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trim_lightning.compare.files import run_rows
from trim_lightning.compare.measures import lower_is_better
from trim_lightning.compare.report import Report, compare
from trim_lightning.runs.run import text_of
from trim_lightning.settings.schema import LoggerSettings
from trim_lightning.tracking.open import tracked

SAMPLES = 100  # bootstrap resamples of intervals that are not logged


def log_summary(sweep: Path, logger: LoggerSettings, group: str) -> None:
    """Report a finished sweep as a run of its own in the jobs' group; their logger is W&B.

    Raises:
        UserError: if the folder has no finished run.
    """
    report = compare([sweep], all_pairs=False, samples=SAMPLES, seed=0)
    logger.group = logger.group or group
    config = {
        "axes": {axis.name: [" + ".join(map(text_of, level)) for level in axis.levels] for axis in report.axes},
        "jobs": len(report.runs),
    }
    with tracked(logger, sweep, job_type="sweep", name=group, config=config) as tracker:
        tracker.table("sweep", run_rows(report))
        tracker.metrics(best_values(report))


def best_values(report: Report) -> dict[str, Any]:
    """The best value of every metric, over runs, and how many runs finished."""
    values: dict[str, Any] = {"sweep/runs": len(report.runs), "sweep/unfinished": len(report.broken)}
    for metric in report.metrics:
        found = [run.measurements[metric].value for run in report.runs if metric in run.measurements]
        if found:
            values[f"best/{metric}"] = min(found) if lower_is_better(metric) else max(found)
    return values
