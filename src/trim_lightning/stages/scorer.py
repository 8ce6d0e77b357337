"""The scorer: a model, warmed up or not, loaded only when a stage has to run it."""

from __future__ import annotations

from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.settings.schema import WarmupSettings
from trim_lightning.stages.model import ModelHandle
from trim_lightning.store import Entry, StageKey
from trim_lightning.tokens.tokenized import TokenizedRecords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trim_lightning.models.load import ModelRecipe


class Scorer(ModelHandle):
    """The model that scores; `ModelHandle` gives it tokens and weights, warm-up is its own."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._adapter: Entry | None = None
        self._model: PreTrainedModel | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the model's outputs: weights, warm-up and number format."""
        return {**super().identity, "warmup": None if self._adapter is None else self._adapter.key.hex}

    def warm_up(self, settings: WarmupSettings, pool: TokenizedRecords, pool_key: StageKey) -> None:
        """Train the warm-up adapter on a part of the pool, or find it in the store."""

        self._adapter = self._trained("warmup", settings, pool, pool_key)

    def train_checkpoints(
        self, settings: WarmupSettings, epochs: int, pool: TokenizedRecords, pool_key: StageKey
    ) -> Entry:
        """Train on the same part of the pool for ``epochs``, keeping a checkpoint after each.

        The scorer itself stays as it is; see `trim_lightning.tuning.run.train_checkpoints` for what is kept.
        """
        return self._trained("checkpoints", replace(settings, epochs=epochs), pool, pool_key)

    def _trained(self, stage: str, settings: WarmupSettings, pool: TokenizedRecords, pool_key: StageKey) -> Entry:
        """What a training on the warm-up's part of the pool leaves, made or found in the store."""
        matters = {name: value for name, value in asdict(settings).items() if name != "checkpoint_seconds"}
        key = StageKey(
            stage,
            4,
            {"warmup": matters, "seed": self.seed},
            {"pool": pool_key.hex, "scorer": super().identity},
        )
        rows = draw_warmup_rows(pool.lengths, settings.fraction, self.seed)
        empty = int((pool.content_lengths("response")[rows] == 0).sum())
        if empty:
            self.ledger.warn(
                f"{empty} of the {len(rows)} records drawn for the warm-up have no response token and teach it nothing"
            )

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.models.adapter import without_gradients
            from trim_lightning.models.load import ModelRecipe
            from trim_lightning.tuning.job import TrainingJob

            self.before_load()
            recipe, checkpoints = ModelRecipe(self.source, self.dtype), stage == "checkpoints"
            job = TrainingJob(recipe, pool, rows, settings, directory, self.trainer, "warm-up", self.seed, checkpoints)
            model, facts = job.run(self.store.processes)
            if model is not None:
                self._model = without_gradients(model)
            return {**facts, "records": len(rows)}

        kept = 1 if stage == "warmup" else 3 * settings.epochs  # with Adam's two moments at every checkpoint
        cost = self.cost("warmup", "lora training", pool, training=settings, rows=rows, how_many=lambda: kept)
        entry = self.store.get(key, build, resumable=True, cost=cost)
        self.book_training("warmup", entry, settings)
        return entry

    def model(self) -> PreTrainedModel:
        """The scorer's model with its warm-up adapter."""
        if self._model is None:
            self.before_load()
            self._model = self.recipe().load()
        return self._model

    @property
    def holds_model(self) -> bool:
        """True while the weights are in memory."""
        return self._model is not None

    def release(self) -> None:
        """Give the weights' memory back; they are loaded again when they are needed."""
        self._model = None

    def recipe(self) -> ModelRecipe:
        """How to load the same model in another process."""
        from trim_lightning.models.load import ModelRecipe
        from trim_lightning.tuning.run import ADAPTER

        return ModelRecipe(self.source, self.dtype, None if self._adapter is None else self._adapter.path / ADAPTER)


def draw_warmup_rows(lengths: NDArray[np.int64], fraction: float, seed: int) -> list[int]:
    """Rows of the warm-up subset: ``max(1, floor(fraction * N))`` of the non-empty records, drawn by seed.

    Args:
        lengths: ``[records]`` tokens of each pool record.
        fraction: Share of the pool.
        seed: Of the draw.

    Returns:
        Ascending rows.
    """
    usable = np.flatnonzero(lengths > 0)
    number = min(len(usable), max(1, int(Fraction(str(fraction)) * len(lengths))))
    drawn = np.random.default_rng([seed, 0x5741]).choice(usable, size=number, replace=False)
    return sorted(int(row) for row in drawn)
