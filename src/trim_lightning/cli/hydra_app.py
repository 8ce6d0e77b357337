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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from trim_lightning.cli.arguments import as_dry_run, as_helper, check_flags, expand_home
from trim_lightning.cli.exits import INTERNAL_ERROR, mistake, run_to_end
from trim_lightning.console.visible import visible
from trim_lightning.errors import UserError, first_line
from trim_lightning.privacy.keys import KeylessStream, hide_keys_in, hide_keys_in_logs
from trim_lightning.privacy.paths import run_name, shareable_command
from trim_lightning.settings.compose import SCHEMAS, config_directory, register_schemas, to_settings
from trim_lightning.settings.guard import guard_hydra
from trim_lightning.settings.mistakes import explain
from trim_lightning.settings.schema import SelectSettings, TrainSettings
from trim_lightning.store.processes import PartDone, launched_rank
from trim_lightning.sweep.finished import finished_sweeps

log = logging.getLogger(__name__)
Settings = TypeVar("Settings", bound=SelectSettings)


def select_task(config: DictConfig) -> float | None:
    """One selection job; returns the coreset's mean score, which a Hydra sweeper may maximise."""
    settings = settings_of_job(config, SelectSettings)
    if settings is None:
        return None
    from trim_lightning.pipeline.select import select

    selection = select(settings, command_line("trim-select"))
    print(f"\n{visible(selection.summary)}", flush=True)
    return float(selection.scores.score[selection.chosen].mean()) if len(selection.chosen) else None


def train_task(config: DictConfig) -> float | None:
    """One training job; returns the metric ``evaluation.objective``, which a Hydra sweeper may minimise."""
    settings = settings_of_job(config, TrainSettings)
    if settings is None:
        return None
    from trim_lightning.pipeline.train import train
    from trim_lightning.pipeline.training_outputs import objective

    training = train(settings, command_line("trim-train"))
    if training.selection is not None:
        print(f"\n{visible(training.selection.summary)}", flush=True)
    print(f"\n{visible(training.summary)}", flush=True)
    return objective(training.metrics, settings.evaluation.objective)


def settings_of_job(config: DictConfig, kind: type[Settings]) -> Settings | None:
    """The settings of a job to be run; None for one that is only planned, which is done here.

    In a multirun the tracker groups the jobs under the sweep's own name, unless the user named a group.

    Raises:
        UserError: if a planned job cannot run.
    """
    settings = to_settings(config, kind)
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
    """``trim-select``: choose a coreset."""
    return run("select", select_task)


def run(config_name: str, task: Callable[[DictConfig], Any]) -> int:
    """Run a Hydra application and turn its end into an exit code.

    0 when it went well; 2 with ``error: ...`` as the last line of standard error for the user's mistake; 1 with a
    traceback for ours; 130 when interrupted.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises rather than prints: the last line is ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.raiseExceptions = False  # a log file on a full disk is no reason for a traceback a line
    # a scheduler's SIGTERM ends a run as Ctrl-C does: finished shards and checkpoints stay
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv[1:] = [expand_home(argument) for argument in sys.argv[1:]]
    if launched_rank() > 0:
        sys.argv[1:] = as_helper(sys.argv[1:])
    job = Job(task)

    def apply() -> None:
        sys.argv[1:] = as_dry_run(sys.argv[1:])
        check_flags()
        register_schemas()
        guard_hydra()
        try:
            # Hydra prints and logs the overrides of jobs: no keys onto the terminal
            out, err = map(KeylessStream, (sys.stdout, sys.stderr))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=config_name)(job)()
        except SystemExit as error:  # of a library; before the job began, that is Hydra over the flags
            if error.code and not job.began:
                raise UserError(
                    "the command line asks for something that is not there; the line above says what"
                ) from None
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


class Job:
    """A Hydra task that notes whether it began, and leaves the telling of a user's mistake to the entry point."""

    def __init__(self, task: Callable[[DictConfig], Any]) -> None:
        functools.update_wrapper(self, task)
        self.task = task
        self.began = False

    def __call__(self, config: DictConfig) -> Any:
        """Run the task; in a multirun a mistake is logged at once, since the other jobs go on."""
        self.began = True
        hide_keys_in(hydra_records())
        hide_keys_in_logs()
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
    """Tell the tracker of each finished sweep as a whole; a tracker that fails takes no result with it."""
    while finished_sweeps:
        folder, logger = finished_sweeps.popitem()
        try:
            from trim_lightning.sweep.summary_run import log_summary

            log_summary(folder, logger, run_name(folder))
        except Exception as error:
            log.warning("W&B: no summary of the sweep (%s)", first_line(error))
