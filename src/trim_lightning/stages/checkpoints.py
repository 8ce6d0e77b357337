"""What the methods share that look at the scorer along its warm-up: checkpoints, and passes at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.stages.passes import mean_losses, record_values, refuse_divided_weights
from trim_lightning.stages.scorer import Scorer
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry
from trim_lightning.tokens.tokenized import TokenizedRecords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trim_lightning.models.load import ModelRecipe

CHECKPOINTS = "warm-up epochs, each of which leaves a checkpoint; in place of warmup.epochs"


@dataclass
class Checkpoint:
    """The scorer after one epoch of its warm-up; see `trim_lightning.stages.passes.KnownWeights`.

    Attributes:
        scorer: Gives base model and number format.
        entry: The stored warm-up.
        number: The epoch, from 1.
        gradients: Whether gradients are taken of it.
    """

    scorer: Scorer
    entry: Entry
    number: int
    gradients: bool
    _model: PreTrainedModel | None = field(default=None, repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        """See above."""
        return {"checkpoints": self.entry.key.hex, "number": self.number}

    def recipe(self) -> ModelRecipe:
        """See above."""
        from trim_lightning.models.load import ModelRecipe
        from trim_lightning.tuning.callbacks import checkpoint_path

        adapter = checkpoint_path(self.entry.path, self.number)
        return ModelRecipe(self.scorer.source, self.scorer.dtype, adapter, gradients=self.gradients)

    def model(self) -> PreTrainedModel:
        """See above; kept until `release`."""
        if self._model is None:
            self._model = self.recipe().load()
        return self._model

    def release(self) -> None:
        """Give the weights' memory back."""
        self._model = None


@dataclass(frozen=True)
class Checkpoints:
    """A warm-up with a checkpoint after every epoch.

    Attributes:
        task: For scorer and store.
        entry: The stored warm-up.
        number: How many there are.
    """

    task: SelectionTask
    entry: Entry
    number: int

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """``[checkpoints]`` each epoch's share of the mean learning rates; they sum to 1."""
        assert self.entry.path  # a plan of what is not there yet ends here
        rates = np.array(self.entry.facts["rates"])
        return rates / rates.sum()

    def moments(self, number: int) -> Path:
        """File of Adam's moments after epoch ``number``; its place is known before it is there."""
        from trim_lightning.engine.adam_moments import FILE
        from trim_lightning.tuning.callbacks import checkpoint_path

        return checkpoint_path(self.task.store.path_of(self.entry.key), number) / FILE

    def at(self, number: int, *, gradients: bool) -> Checkpoint:
        """The scorer after epoch ``number``, from 1."""
        return Checkpoint(self.task.scorer, self.entry, number, gradients)


def train_checkpoints(
    task: SelectionTask, name: str, number: int, *, whole_pool: bool = False, gradients: bool = False
) -> Checkpoints:
    """Warm the scorer up for ``number`` epochs, or find that in the store.

    Raises:
        UserError: if the warm-up is switched off, or ``gradients`` are to be taken of weights that are divided.
    """
    settings = task.settings.warmup
    if gradients:
        refuse_divided_weights(task.settings.trainer)
    if not settings.enabled:
        raise UserError(f"method={name}: needs the checkpoints of a warm-up, which warmup=none switches off")
    if whole_pool and settings.fraction < 1:
        task.ledger.warn(
            f"method={name}: the original follows a training on the whole pool, "
            f"this one is on warmup.fraction={settings.fraction:g} of it"
        )
    entry = task.scorer.train_checkpoints(settings, number, task.pool_tokens, task.pool_key)
    return Checkpoints(task, entry, number)


def gradient_features(
    task: SelectionTask,
    checkpoints: Checkpoints,
    dimension: int,
    targets: tuple[TokenizedRecords, Entry] | None,
    last_layers: int | None = None,
) -> tuple[list[Entry], list[Entry]]:
    """The stored gradients of the pool (Adam's steps) and of the targets (plain) at every checkpoint.

    ``last_layers`` is that of `trim_lightning.engine.gradients.GradientFeatures`.

    Returns:
        One entry a checkpoint for the pool, and one for the targets if there are any.
    """
    from trim_lightning.engine.gradients import GradientFeatures

    seed = task.settings.seed
    pool_entries, target_entries = [], []
    for number in range(1, checkpoints.number + 1):
        weights = checkpoints.at(number, gradients=True)
        if targets is not None:
            tokens, entry = targets
            plain = GradientFeatures(dimension, seed, last_layers=last_layers)
            inputs = {"tokens": entry.key.hex}
            title = f"fingerprint {number}/{checkpoints.number}"
            target_entries.append(record_values(task, plain, tokens, inputs, "fingerprint", weights, title))
        adam = GradientFeatures(dimension, seed, checkpoints.moments(number), last_layers)
        inputs = {"tokens": task.pool_key.hex}
        title = f"score {number}/{checkpoints.number}"
        pool_entries.append(record_values(task, adam, task.pool_tokens, inputs, "score", weights, title))
        weights.release()
    return pool_entries, target_entries


def loss_passes(
    task: SelectionTask,
    checkpoints: Checkpoints,
    records: TokenizedRecords,
    inputs: dict[str, str],
    booked: str,
    *,
    from_start: bool,
) -> list[Entry]:
    """The stored response losses of some records along the warm-up, a forward pass for each point.

    ``from_start`` begins with the model before its warm-up; ``inputs`` and ``booked`` are as in `record_values`.
    """
    from trim_lightning.engine.record_statistics import ResponseLoss

    entries = []
    models: list[Checkpoint | Scorer] = [task.scorer] if from_start else []
    models += [checkpoints.at(number, gradients=False) for number in range(1, checkpoints.number + 1)]
    for place, weights in enumerate(models, start=1):
        title = f"{booked} {place}/{len(models)}"
        entries.append(record_values(task, ResponseLoss("given"), records, inputs, booked, weights, title))
        weights.release()
    return entries


def trajectories(entries: Sequence[Entry], size: int) -> NDArray[np.float64]:
    """``[size, points]`` mean losses (nats per response token); NaN in the rows of records without a response."""
    return np.stack([mean_losses(entry, size) for entry in entries], axis=1)
