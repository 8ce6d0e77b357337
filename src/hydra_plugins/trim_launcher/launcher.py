"""The launcher plugin. Hydra imports it at every start, so nothing heavy is imported at its top."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from trim_lightning.settings.schema import SelectSettings

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
        """Share, launch, and list the jobs that failed.

        Raises:
            UserError: if several jobs would write into one folder.
        """
        self._refuse_one_folder(job_overrides)
        from trim_lightning.privacy.keys import hide_keys_in
        from trim_lightning.sweep.finished import failed_jobs, finished_sweeps, note_warnings

        # before the first job, which may be hours away: Hydra wrote down what was typed
        hide_keys_in([Path(self._config.hydra.sweep.dir) / "multirun.yaml"])
        may_plan = self._config.get("dry_run") or any("dry_run" in text for job in job_overrides for text in job)
        may_share = self._share and len(job_overrides) > 1
        jobs, mistakes = self._compose(job_overrides, initial_job_idx) if may_plan or may_share else ({}, {})
        if any(job.dry_run for job in jobs.values()) or (may_plan and not jobs):
            return self._plan(jobs, mistakes, job_overrides, initial_job_idx)
        if may_share:
            from trim_lightning.sweep.sharing import share_passes

            share_passes(list(jobs.values()))
        results = self._inner.launch(job_overrides, initial_job_idx)
        failed = [(place, result) for place, result in enumerate(results) if result.status == JobStatus.FAILED]
        if failed:
            log.error("%d of %d jobs failed:", len(failed), len(results))
        results = [QuietReturn(**vars(result)) if result.status == JobStatus.FAILED else result for result in results]
        for place, result in failed:
            overrides = " ".join(job_overrides[place])
            log.error("\t#%d %s: %s", initial_job_idx + place, overrides, reason_of(result))
        failed_jobs.extend(result._return_value for _, result in failed)
        finished = [result.hydra_cfg for result in results if result.status == JobStatus.COMPLETED]
        note_warnings(Path(job.hydra.runtime.output_dir) for job in finished if job is not None)
        jobs = jobs or self._compose(job_overrides[:1], initial_job_idx)[0]
        logger = next((job.logger for job in jobs.values() if job.logger.name == "wandb"), None)
        if logger is not None:  # the tracker is to be told of the sweep as a whole, when its last job is done
            finished_sweeps[Path(self._config.hydra.sweep.dir)] = logger
        return results

    def _refuse_one_folder(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """Refuse jobs that would write their files one over the other's.

        Raises:
            UserError: naming the folder.
        """
        from trim_lightning.errors import UserError

        usual = str(OmegaConf.to_container(self._config.paths, resolve=False)["output_dir"])  # type: ignore[index, call-overload]
        seen: set[str] = set()
        for overrides in job_overrides:
            given = [text.partition("=")[2] for text in overrides if text.lstrip("+").startswith("paths.output_dir=")]
            folder = given[-1] if given else usual
            if folder in seen and "$" not in folder:  # an interpolation may differ
                raise UserError(
                    f"paths.output_dir={folder}: several jobs would write there, one over the other; name the folder "
                    f"of all jobs with hydra.sweep.dir={folder}"
                )
            seen.add(folder)

    def _console_logging(self) -> DictConfig:
        """The jobs' logging without their log files: there is no job yet."""
        logging_config = copy.deepcopy(self._config.hydra.job_logging)
        with open_dict(logging_config):
            handlers = logging_config.get("handlers") or {}  # hydra/job_logging=none has none
            logging_config.handlers = {name: handlers[name] for name in ("console",) if name in handlers}
            if logging_config.get("root") is not None:
                logging_config.root.handlers = list(logging_config.handlers)
        return logging_config

    def _compose(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> tuple[dict[int, SelectSettings], dict[int, str]]:
        """Settings of the jobs by their place, and what is wrong with the others."""
        from trim_lightning.errors import UserError
        from trim_lightning.settings.compose import to_settings
        from trim_lightning.settings.schema import SelectSettings, TrainSettings

        setup_globals()
        configure_log(self._console_logging(), self._config.hydra.verbose)
        jobs: dict[int, SelectSettings] = {}
        mistakes: dict[int, str] = {}
        for place, overrides in enumerate(job_overrides):
            try:
                job = self._context.config_loader.load_sweep_config(self._config, list(overrides))
                with open_dict(job):
                    job.hydra.job.id = job.hydra.job.num = initial_job_idx + place
                    job.paths.output_dir = ""  # known only when the job runs, and no part of what is shared
                    del job["hydra"]
                kind: Any = TrainSettings if "train" in job else SelectSettings
                jobs[place] = to_settings(job, kind)
            except UserError as error:
                mistakes[place] = str(error)
        return jobs, mistakes

    def _plan(
        self,
        jobs: Mapping[int, SelectSettings],
        mistakes: Mapping[int, str],
        job_overrides: Sequence[Sequence[str]],
        initial_job_idx: int,
    ) -> list[JobReturn]:
        """Print the plan of all jobs; one that cannot run is returned as a failed one.

        Raises:
            UserError: under a sweeper that chooses its jobs by the results of others.
        """
        from trim_lightning.errors import UserError
        from trim_lightning.sweep.dry_run import dry_run

        sweeper = str(self._config.hydra.sweeper.get("_target_", ""))
        if not sweeper.endswith("BasicSweeper"):
            raise UserError(
                "dry_run=true: this sweeper chooses its jobs as it goes, so there is no plan of them; plan one job "
                "without hparams_search and hydra/sweeper"
            )
        common = set.intersection(*map(set, job_overrides))  # what all jobs share says nothing of any
        names = {place: " ".join(text for text in job if text not in common) for place, job in enumerate(job_overrides)}

        def numbered(values: Mapping[int, Any]) -> dict[int, Any]:
            return {initial_job_idx + place: value for place, value in values.items()}

        folder = Path(self._config.hydra.sweep.dir)
        problems = dry_run(numbered(jobs), folder, numbered(mistakes), numbered(names)).problems
        results: list[JobReturn] = []
        for place, overrides in enumerate(job_overrides):
            if (problem := problems.get(initial_job_idx + place)) is None:
                results.append(JobReturn(overrides=overrides, status=JobStatus.COMPLETED))
            else:
                failed = QuietReturn(overrides=overrides, status=JobStatus.FAILED, _return_value=UserError(problem))
                results.append(failed)
        return results


class QuietReturn(JobReturn):
    """A failed job that raises its error without printing all its overrides: the list of failed jobs has them."""

    @property
    def return_value(self) -> Any:
        """There is none.

        Raises:
            Exception: what ended the job.
        """
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def reason_of(result: JobReturn) -> str:
    """Why a job failed, in one line."""
    from trim_lightning.cli.exits import mistake
    from trim_lightning.errors import first_line

    error: Any = result._return_value
    return mistake(error) or f"internal failure ({type(error).__name__}: {first_line(error)})"
