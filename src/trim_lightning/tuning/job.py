"""A training as something that any process can do: alone, or with others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from trim_lightning.engine.devices import device_of, is_spread, recipe_for_each
from trim_lightning.engine.spawned import run_spawned
from trim_lightning.engine.trainer import needs_launcher, number_of_processes
from trim_lightning.models.divided import mesh_of
from trim_lightning.models.load import ModelRecipe
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.store.processes import ALONE, Processes, local_rank
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.callbacks import EarlyStop
from trim_lightning.tuning.run import TrainingSite, train_checkpoints, train_model


@dataclass(frozen=True)
class TrainingJob:
    """All that a training needs; can be pickled.

    Attributes:
        recipe: Loads the model.
        records: Tokenised records.
        rows: Which of them to train on.
        settings: Hyperparameters.
        directory: See `TrainingSite`.
        trainer: Arguments of the Lightning Trainer.
        title: Name on the progress bar.
        seed: See `train_model`.
        checkpoints: Keep a checkpoint after every epoch, see `trim_lightning.tuning.run.train_checkpoints`.
        early_stop: See there; can be pickled as well.
        options: ``mode`` and ``length_grouped`` of `train_model`.
    """

    recipe: ModelRecipe
    records: TokenizedRecords
    rows: Sequence[int]
    settings: TuningSettings
    directory: Path
    trainer: Mapping[str, Any]
    title: str
    seed: int
    checkpoints: bool = False
    early_stop: EarlyStop | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, crew: Processes, make_logger: Callable[[], Any] = lambda: False) -> tuple[Any, dict[str, Any]]:
        """Train: on one device here; on several in the launched processes, else in some that are started for it.

        Args:
            crew: The launched processes.
            make_logger: Gives a Lightning logger for the curves, or False.

        Returns:
            The trained model if it is in this process and not given up, and the facts of `train_model`;
            ``processes``, and ``seconds`` with those of this attempt, are among them.

        Raises:
            UserError: as `train_model` does, or for what cannot be spread so.
        """
        if not is_spread(self.trainer):
            return self(ALONE, make_logger())
        mistake = needs_launcher(self.trainer)
        if mistake is not None:
            raise mistake
        recipe_for_each(self.recipe)
        number, logger = number_of_processes(self.trainer), make_logger()
        if crew.size == 1:
            return None, run_spawned(self.facts, number, logger)
        return None, crew.together(Part(self, logger))

    def facts(self, processes: Processes, logger: Any = False) -> dict[str, Any]:
        """Train as one of several processes; only the facts are left."""
        device = device_of(self.trainer, local_rank())
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return self(processes, logger)[1]

    def __call__(self, processes: Processes, logger: Any) -> tuple[Any, dict[str, Any]]:
        """Load the model and train it."""
        model = self.recipe.load(self.mesh(processes))
        around = TrainingSite(self.directory, self.trainer, self.title, logger, self.early_stop, processes=processes)
        started = time.perf_counter()
        train: Any = train_checkpoints if self.checkpoints else partial(train_model, **self.options)
        trained, facts = train(model, self.records, self.rows, self.settings, around, seed=self.seed)
        facts["seconds"] += time.perf_counter() - started  # to those of earlier attempts
        return trained, facts

    def mesh(self, processes: Processes) -> DeviceMesh | None:
        """The processes among which the weights are divided, if they are."""
        if processes.size == 1 or self.trainer.get("strategy") != "fsdp":
            return None
        return mesh_of(device_of(self.trainer), processes.size)


class Part:
    """One launched process's part of a job: the curves are the first one's."""

    def __init__(self, job: TrainingJob, logger: Any) -> None:
        self.job, self.logger = job, logger

    def __call__(self, processes: Processes) -> dict[str, Any]:
        """Do it."""
        return self.job.facts(processes, self.logger)

    def __getstate__(self) -> dict[str, Any]:
        return {"job": self.job, "logger": False}
