"""A scorer's first layers as a scorer of their own: the same weights, tokens and warm-up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trim_lightning.stages.scorer import Scorer
from trim_lightning.store import Cost, StageKey
from trim_lightning.store.ledger import Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trim_lightning.models.load import ModelRecipe
    from trim_lightning.settings.schema import WarmupSettings
    from trim_lightning.tokens.tokenized import TokenizedRecords


class ShallowScorer(Scorer):
    """The first ``layers`` of another scorer, after its warm-up; its weights are not loaded twice.

    Args:
        deep: The scorer.
        layers: How many of its layers.
        ledger: Where stages are booked.
    """

    def __init__(self, deep: Scorer, layers: int, ledger: Ledger) -> None:
        super().__init__(
            replace(deep.source, num_layers=layers),
            deep.dtype_name,
            deep.store,
            ledger,
            trainer=deep.trainer,
            seed=deep.seed,
            max_length=deep.max_length,
        )
        self._deep = deep

    def warm_up(self, settings: WarmupSettings, pool: TokenizedRecords, pool_key: StageKey) -> None:
        """Nothing: the scorer is warmed up before, and its weights are these."""

    @property
    def identity(self) -> dict[str, Any]:
        """That of the scorer, and the depth."""
        return {**self._deep.identity, "layers": self.source.num_layers}

    def cost(self, *arguments: Any, **keywords: Any) -> Cost:
        """What a stage costs: of the scorer's time as much as of its layers."""
        return replace(
            super().cost(*arguments, **keywords), depth=self.source.num_layers / self._deep.source.num_layers
        )

    def model(self) -> PreTrainedModel:
        """The first layers of the scorer's model, which share its weights."""
        from trim_lightning.models.depth import first_layers

        if self._model is None:
            self._model = first_layers(self._deep.model(), self.source.num_layers)
        return self._model

    @property
    def holds_model(self) -> bool:
        """True while the scorer's weights are in memory."""
        return self._deep.holds_model

    def release(self) -> None:
        """Give the weights' memory back."""
        self._model = None
        self._deep.release()

    def recipe(self) -> ModelRecipe:
        """How to load the same layers in another process."""
        return replace(self._deep.recipe(), layers=self.source.num_layers)
