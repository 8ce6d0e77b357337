"""The trainee: the model that is fine-tuned on the coreset and evaluated before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.engine.devices import Weights
from trim_lightning.settings.schema import FineTuneSettings
from trim_lightning.stages.model import ModelHandle
from trim_lightning.store import Entry, StageKey
from trim_lightning.tokens.tokenized import TokenizedRecords

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from trim_lightning.models.load import ModelRecipe

NO_PART_OF_THE_RESULT = ("checkpoint_seconds", "model", "base", "seed", "early_stop_path")


class Trainee(ModelHandle):
    """The model that learns; `ModelHandle` gives it tokens and weights."""

    def __init__(self, *arguments: Any, mode: str = "lora", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.mode = mode
        self._kept: tuple[str | None, PreTrainedModel] | None = None

    @property
    def training_dtype(self) -> torch.dtype:
        """Number format of the weights in training: float32 where all of them are trained."""
        import torch

        return torch.float32 if self.mode == "full" else self.dtype

    def fine_tune(
        self,
        settings: FineTuneSettings,
        coreset: TokenizedRecords,
        coreset_key: StageKey,
        held_out: tuple[TokenizedRecords, StageKey] | None,
        make_logger: Callable[[], Any] = lambda: False,
    ) -> Entry:
        """Fine-tune on the coreset, or find the result in the store; the held-out records serve early stopping.

        ``make_logger`` gives a Lightning logger, or False, if there is anything to train.

        Returns:
            The entry with ``adapter/`` (LoRA) or ``model/`` (full).
        """
        matters = {name: value for name, value in asdict(settings).items() if name not in NO_PART_OF_THE_RESULT}
        inputs = {
            "coreset": coreset_key.hex,
            "trainee": {"model": self.source.digest, "dtype": self.number_format(self.training_dtype)},
            "held_out": held_out[1].hex if settings.early_stop is not None and held_out is not None else None,
        }
        key = StageKey("finetune", 4, {"train": matters, "seed": self.seed}, inputs)

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.engine.response_loss import mean_response_loss
            from trim_lightning.models.load import ModelRecipe
            from trim_lightning.tuning.callbacks import EarlyStop
            from trim_lightning.tuning.job import TrainingJob
            from trim_lightning.tuning.run import MODEL

            stop = None
            if settings.early_stop is not None and held_out is not None:
                measure = partial(mean_response_loss, records=held_out[0], tokens_per_batch=self.tokens_per_batch)
                stop = EarlyStop(settings.early_stop, measure)
            self._kept = None  # a large model has no room beside the one in training
            job = TrainingJob(
                ModelRecipe(self.source, self.training_dtype, whole=settings.mode == "full"),
                coreset,
                range(len(coreset)),
                settings,
                directory,
                self.trainer,
                "fine-tune",
                self.seed,
                early_stop=stop,
                options={"mode": settings.mode, "length_grouped": settings.length_grouped},
            )
            _, facts = job.run(self.store.processes, make_logger)
            if settings.mode == "full":
                self.tokenizer.save_pretrained(str(directory / MODEL))  # whole: it loads without the model it came from
            return facts

        kind, rows = f"{settings.mode} training", range(len(coreset))
        cost = self.cost("finetune", kind, coreset, training=settings, rows=rows, loads=True)
        entry = self.store.get(key, build, resumable=True, cost=cost)
        self.book_training("finetune", entry, settings)
        return entry

    def model(self, tuned: Entry | None) -> PreTrainedModel:
        """The trainee as it is on disk (None), or fine-tuned, on its device; the last one asked for is kept.

        A fine-tuned one is always read from the store: what is evaluated is what was saved.
        """
        wanted = None if tuned is None else tuned.key.hex
        if self._kept is None or self._kept[0] != wanted:
            self._kept = None  # before the next is loaded
            self._kept = (wanted, self.recipe(tuned).load())
        return self.placed(self._kept[1])

    def recipe(self, tuned: Entry | None) -> ModelRecipe:
        """How any process loads what `model` gives."""
        from trim_lightning.models.load import ModelRecipe
        from trim_lightning.tuning.run import ADAPTER, MODEL

        if tuned is None:
            return ModelRecipe(self.source, self.dtype)
        if self.mode == "full":
            return ModelRecipe(replace(self.source, directory=tuned.path / MODEL, adapters=()), self.dtype)
        return ModelRecipe(self.source, self.dtype, tuned.path / ADAPTER, gradients=True)

    def release(self) -> None:
        """Give the weights' memory back."""
        self._kept = None


@dataclass(frozen=True)
class Evaluated(Weights):
    """The trainee as it is evaluated: before its fine-tuning (None), or after.

    Attributes:
        trainee: The model.
        tuned: The fine-tuning.
    """

    trainee: Trainee
    tuned: Entry | None

    def model(self) -> PreTrainedModel:
        return self.trainee.model(self.tuned)

    def recipe(self) -> ModelRecipe:
        return self.trainee.recipe(self.tuned)

    def release(self) -> None:
        self.trainee.release()
