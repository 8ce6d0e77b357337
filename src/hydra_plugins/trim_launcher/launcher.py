"""The launcher plugin. Hydra imports it at every start, so nothing heavy is imported at its top."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)


class SharingLauncher(Launcher):
    """Sees all jobs of a multirun, runs the passes that they share, then lets another launcher run the jobs.

    Args:
        inner: Config of that launcher: ``basic``, ``joblib``, ``submitit_local``, ``submitit_slurm`` …
        share: False launches the jobs at once.
    """

    def __init__(self, inner: DictConfig, share: bool = True) -> None:
        self._inner_config, self._share = inner, share

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the inner launcher from a config in which it is the only one: Hydra permits no nested target."""
        self._context, self._config = hydra_context, config
        alone = copy.deepcopy(config)
        with open_dict(alone):
            alone.hydra.launcher = copy.deepcopy(self._inner_config)
        self._inner = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=alone
        )
        self._inner.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Share, launch, and list the jobs that failed."""
        if self._share and len(job_overrides) > 1:
            self._share_passes(job_overrides, initial_job_idx)
        results = self._inner.launch(job_overrides, initial_job_idx)
        failed = [(place, result) for place, result in enumerate(results) if result.status == JobStatus.FAILED]
        if failed:
            log.error("%d of %d jobs failed:", len(failed), len(results))
        for place, result in failed:
            overrides = " ".join(job_overrides[place])
            log.error("\t#%d %s: %s", initial_job_idx + place, overrides, reason_of(result))
        return results

    def _console_logging(self) -> DictConfig:
        """The jobs' logging without their log files: there is no job yet."""
        logging_config = copy.deepcopy(self._config.hydra.job_logging)
        with open_dict(logging_config):
            logging_config.handlers = {"console": logging_config.handlers.console}
            logging_config.root.handlers = ["console"]
        return logging_config

    def _share_passes(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        from trim_lightning.config import to_settings
        from trim_lightning.errors import UserError
        from trim_lightning.settings import SelectSettings, TrainSettings
        from trim_lightning.sweep.planner import share_passes

        setup_globals()
        configure_log(self._console_logging(), self._config.hydra.verbose)
        jobs = []
        for place, overrides in enumerate(job_overrides):
            try:
                job = self._context.config_loader.load_sweep_config(self._config, list(overrides))
                with open_dict(job):
                    job.hydra.job.id = job.hydra.job.num = initial_job_idx + place
                    job.paths.output_dir = ""  # known only when the job runs, and no part of what is shared
                    del job["hydra"]
                kind: Any = TrainSettings if "train" in job else SelectSettings
                jobs.append(to_settings(job, kind))
            except UserError:
                continue  # the job itself will say what is wrong with it
        share_passes(jobs)


def reason_of(result: JobReturn) -> str:
    """Why a job failed, in one line."""
    from trim_lightning.cli import mistake
    from trim_lightning.config import first_line

    error: Any = result._return_value
    return mistake(error) or f"internal failure ({type(error).__name__}: {first_line(error)})"
