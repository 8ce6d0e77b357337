"""Entry points: Hydra in, exit codes and one clear error line out."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from trim_lightning.cli.arguments import (
    FULL_HELP,
    as_dry_run,
    as_full_help,
    as_helper,
    check_flags,
    expand_home,
    keys_text,
)
from trim_lightning.cli.exits import INTERNAL_ERROR, mistake, run_to_end
from trim_lightning.console.terminal import wants_colour, wrapped
from trim_lightning.console.visible import visible
from trim_lightning.errors import UserError, first_line
from trim_lightning.privacy.keys import KeylessStream, hide_keys_in, hide_keys_in_logs
from trim_lightning.privacy.paths import run_name, shareable_command
from trim_lightning.settings.compose import SCHEMAS, config_directory, register_schemas, to_settings
from trim_lightning.settings.guard import guard_hydra
from trim_lightning.settings.mistakes import explain
from trim_lightning.settings.schema import SelectSettings, TrainSettings
from trim_lightning.store.processes import PartDone, launched_rank
from trim_lightning.sweep.finished import failed_jobs, finished_sweeps, warnings_of_jobs

if TYPE_CHECKING:
    from trim_lightning.pipeline.select import Selection

log = logging.getLogger(__name__)
Settings = TypeVar("Settings", bound=SelectSettings)
WARNINGS = "warnings:"  # heads the list of them


def select_task(config: DictConfig) -> float | None:
    """One selection job; returns the coreset's mean score, which a Hydra sweeper may maximise."""
    settings = settings_of_job(config, SelectSettings)
    if settings is None:
        return None
    from trim_lightning.pipeline.select import select

    selection = select(settings, command_line("trim-select"))
    show_selection(selection)
    return mean_score(selection)


def mean_score(selection: Selection) -> float | None:
    """Mean score of the coreset; records that a cascade has not scored in full have none, and do not count."""
    import numpy as np

    scores = selection.scores.score[selection.chosen]
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if len(known) else None


def train_task(config: DictConfig) -> float | None:
    """One training job; returns the metric ``evaluation.objective``, which a Hydra sweeper may minimise."""
    settings = settings_of_job(config, TrainSettings)
    if settings is None:
        return None
    from trim_lightning.pipeline.train import train
    from trim_lightning.pipeline.training_outputs import objective

    training = train(settings, command_line("trim-train"), show_selection)
    print(f"\n{visible(of_job(training.summary))}", flush=True)
    return objective(training.metrics, settings.evaluation.objective)


def show_selection(selection: Selection) -> None:
    """Print the first picks and the closing tables."""
    from trim_lightning.pipeline.picks import picks_text

    if selection.picks:
        print(f"\n{picks_text(selection.picks, len(selection.chosen), wants_colour())}")
    print(f"\n{visible(of_job(selection.summary))}", flush=True)


def of_job(summary: str) -> str:
    """The closing tables of a job; in a multirun without the warnings, which are told once for all jobs."""
    if not in_multirun():
        return summary
    return "\n\n".join(part for part in summary.split("\n\n") if not part.startswith(WARNINGS))


def settings_of_job(config: DictConfig, kind: type[Settings]) -> Settings | None:
    """The settings of a job to be run; None for one that is only planned, which is done here.

    In a multirun the tracker groups the jobs under the sweep's own name, unless the user named a group.

    Raises:
        UserError: if a planned job cannot run.
    """
    settings = to_settings(config, kind)
    if not in_multirun() and launched_rank() <= 0:  # the jobs of a sweep of methods share their keys
        from trim_lightning.pipeline.unused import unused_keys

        for remark in unused_keys(settings, HydraConfig.get().overrides.task):
            log.warning("%s", visible(remark))
    if settings.dry_run:
        from trim_lightning.sweep.dry_run import dry_run

        plan = dry_run({0: settings}, Path(settings.paths.output_dir))
        if plan.problems:
            raise UserError(plan.problems[0])
        return None
    if in_multirun() and settings.logger.group is None:
        settings.logger.group = run_name(Path(HydraConfig.get().sweep.dir))
    return settings


def command_line(program: str) -> str:
    """The command that repeats this job alone, as it may be shown to others."""
    return shlex.join(shareable_command([program, *HydraConfig.get().overrides.task]))


def train_main() -> int:
    """``trim-train``: fine-tune on a coreset and measure what it bought."""
    return run("train", train_task)


def select_main() -> int:
    """``trim-select``: choose a coreset; ``trim-select init`` writes a config for that."""
    if sys.argv[1:2] == ["init"]:
        from trim_lightning.cli.init import main

        return main(sys.argv[2:])
    return run("select", select_task)


def run(config_name: str, task: Callable[[DictConfig], Any]) -> int:
    """Run a Hydra application and turn its end into an exit code.

    0 when it went well; 2 with ``error: ...`` as the last line of standard error for the user's mistake; 1 with a
    traceback for ours; 130 when interrupted.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises rather than prints: the last line is ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    quieten_libraries(sys.argv[1:])
    logging.raiseExceptions = False  # a log file on a full disk is no reason for a traceback a line
    # a scheduler's signals end a run as Ctrl-C does: finished shards and checkpoints stay
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    sys.argv[1:] = [expand_home(argument) for argument in sys.argv[1:]]
    if launched_rank() > 0:
        sys.argv[1:] = as_helper(sys.argv[1:])
    job = Job(task)
    failed_jobs.clear()
    warnings_of_jobs.clear()

    def apply() -> None:
        full_help = FULL_HELP in sys.argv[1:]
        sys.argv[1:] = as_full_help(sys.argv[1:], config_name) if full_help else as_dry_run(sys.argv[1:])
        check_flags()
        register_schemas()
        guard_hydra()
        try:
            # Hydra prints and logs the overrides of jobs: no keys onto the terminal
            out, err = map(KeylessStream, (sys.stdout, sys.stderr))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=config_name)(job)()
            if failed_jobs:  # with a sweeper that goes on without them, such as Optuna's
                raise failed_jobs[0]
        except SystemExit as error:  # of a library; before the job began, that is Hydra over the flags
            if error.code and not job.began:
                raise UserError(
                    "the command line asks for something that is not there; the line above says what"
                ) from None
            if full_help:
                print(keys_text(SCHEMAS[config_name]))
            sys.exit(INTERNAL_ERROR if error.code else 0)

    def explained(error: Exception) -> str | None:
        if isinstance(error, HydraException | OmegaConfBaseException):
            return explain(error, SCHEMAS[config_name])
        message = mistake(error)
        if message is None and isinstance(error, ValueError) and not job.began:
            return f"config: {first_line(error)}; --help and --hydra-help say what the command line takes"
        return message

    try:
        return run_to_end(apply, explained, "\ninterrupted: finished work is kept; the same command goes on from there")
    finally:
        report_sweeps()


def quieten_libraries(arguments: Sequence[str]) -> None:
    """Say by their variables what libraries hear in no other way, before they are loaded; what the user says wins."""
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        os.environ.setdefault("NO_COLOR", "1")  # Optuna colours log files too
    if any("profile" in argument for argument in arguments):
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above its highest
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class TellOnce(logging.Filter):
    """Lets each warning pass once: the jobs of a sweep often have the same, and each has its own log file besides."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a warning that was told before."""
        message = record.getMessage()
        known = record.levelno == logging.WARNING and message in self._told
        self._told.add(message)
        return not known


def terminal_handlers() -> list[logging.Handler]:
    """What writes log lines to the terminal; Hydra sets logging up anew for every job."""
    streams = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    return [handler for handler in streams if not isinstance(handler, logging.FileHandler)]


class Job:
    """A Hydra task that notes whether it began, and leaves the telling of a user's mistake to the entry point."""

    def __init__(self, task: Callable[[DictConfig], Any]) -> None:
        functools.update_wrapper(self, task)
        self.task = task
        self.began = False
        self.once = TellOnce()

    def __call__(self, config: DictConfig) -> Any:
        """Run the task; in a multirun a mistake is logged at once, since the other jobs go on."""
        from trim_lightning.console.progress import InPlaceOfBars

        self.began = True
        hide_keys_in(hydra_records())
        hide_keys_in_logs()
        for handler in terminal_handlers():
            handler.addFilter(InPlaceOfBars())
            if in_multirun():
                handler.addFilter(self.once)
        try:
            return self.task(config)
        except PartDone:
            return None
        except Exception as error:
            message = mistake(error)
            if message is not None and in_multirun():
                log.error("this job failed: %s", message)
            elif not in_multirun():
                # Hydra prints all overrides before it raises: noise above our line
                sys.stderr = io.StringIO()
            raise


def hydra_records() -> list[Path]:
    """The files in which Hydra keeps what was asked: of this job, and of its multirun."""
    if not HydraConfig.initialized():
        return []
    hydra_config = HydraConfig.get()
    found = []
    if hydra_config.output_subdir is not None:
        found += sorted((Path(hydra_config.runtime.output_dir) / hydra_config.output_subdir).glob("*.yaml"))
    if hydra_config.mode == RunMode.MULTIRUN:
        found.append(Path(hydra_config.sweep.dir) / "multirun.yaml")
    return found


def in_multirun() -> bool:
    """True inside a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def report_sweeps() -> None:
    """Tell what concerns a sweep as a whole: its jobs' warnings, once each; to the tracker how it ended.

    A tracker that fails takes no result with it.
    """
    if warnings_of_jobs:
        told = [wrapped(visible(line), "- ", "  ") for line in warnings_of_jobs]
        print("\n".join(["", "warnings of the jobs:", *told]), flush=True)
    while finished_sweeps:
        folder, logger = finished_sweeps.popitem()
        try:
            from trim_lightning.sweep.summary_run import log_summary

            log_summary(folder, logger, run_name(folder))
        except Exception as error:
            log.warning("W&B: no summary of the sweep (%s)", first_line(error))
