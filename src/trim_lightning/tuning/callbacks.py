"""What happens between the optimiser steps of a training: progress, early stop, checkpoints."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from transformers import PreTrainedModel

from trim_lightning.console.progress import progress_bar
from trim_lightning.engine.adam_moments import FILE, AdamMoments
from trim_lightning.engine.ending import Ending
from trim_lightning.engine.modules import in_step
from trim_lightning.engine.strategies import take
from trim_lightning.engine.writer import TokenProgress
from trim_lightning.models.divided import whole
from trim_lightning.models.lora import save_adapter
from trim_lightning.store.processes import ALONE, Processes
from trim_lightning.tuning.lora_module import TuningModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EarlyStop:
    """When to end a training before its last epoch.

    Attributes:
        patience: Epochs without a lower held-out loss after which it ends; the best epoch's weights are kept.
        held_out_loss: Measures the loss (nats per token) of the model as it is now.
    """

    patience: int
    held_out_loss: Callable[[PreTrainedModel], float]


def half_written(checkpoint: Path) -> Path:
    """Where a checkpoint is until it is whole."""
    return checkpoint.with_name(f".{checkpoint.name}.tmp")


def checkpoint_path(directory: Path, number: int) -> Path:
    """Folder of the checkpoint after epoch ``number``, from 1: a PEFT adapter and ``moments.safetensors``."""
    return directory / f"checkpoint-{number:03d}"


class AfterStep(Callback):
    """Looks on after every optimiser step, in every process."""

    def after(self, trainer: Trainer, module: TuningModule, batch: Mapping[str, Any]) -> None:
        """Called with what the loader gave."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TuningModule)
        self.after(trainer, pl_module, batch)


class TrainingProgress(TokenProgress, AfterStep):
    """A progress bar over the tokens of all epochs."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        assert isinstance(pl_module, TuningModule)
        if not trainer.is_global_zero:
            return
        self._bar = progress_bar(self.title, self.total)
        self._bar.update(pl_module.done.tokens)  # of the run that this one resumes
        pl_module.watch = self._bar.update

    def after(self, trainer: Trainer, module: TuningModule, batch: Mapping[str, Any]) -> None:
        """Add what the other processes did, and tell the loss."""
        if self._bar is not None:
            self._bar.update(module.done.tokens - self._bar.n)
            self._bar.set_postfix_str(f"loss {module.done.loss:.3f}", refresh=False)


class HeldOutStop(AfterStep):
    """Measures the held-out loss after every epoch, ends the training in time, and keeps the best epoch's weights.

    The first process measures for all, or all do where each holds a part of the weights.
    """

    def __init__(self, rule: EarlyStop, processes: Processes) -> None:
        self.rule, self.processes = rule, processes
        self._best: float | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._bad_epochs = 0
        self._epochs: int | None = 0

    @property
    def best_epoch(self) -> int | None:
        """The epoch, from 1, whose weights are kept; None where an older checkpoint does not tell."""
        return None if self._epochs is None else self._epochs - self._bad_epochs

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training must know; whole in the first process."""
        weights = {name: whole(value, self.processes.leads) for name, value in self._weights.items()}
        return {"best": self._best, "weights": weights, "bad_epochs": self._bad_epochs, "epochs": self._epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._best, self._weights = state_dict["best"], state_dict["weights"]
        self._bad_epochs = state_dict["bad_epochs"]
        self._epochs = state_dict.get("epochs")  # older checkpoints do not have it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End at once a resumed training that had decided to end."""
        if self._bad_epochs >= self.rule.patience:
            trainer.should_stop = True

    def after(self, trainer: Trainer, module: TuningModule, batch: Mapping[str, Any]) -> None:
        """Measure if the epoch is over."""
        if not batch["closes_epoch"]:
            return
        module.model.eval()
        measure: Callable[[], float] = partial(self.rule.held_out_loss, module.causal_lm)
        if in_step(trainer.strategy):
            measured = measure()
            measure = lambda: measured  # noqa: E731
        loss = self.processes.agree("held-out loss", measure)
        module.model.train()
        module.report({"train/held_out_loss": loss})
        self._epochs = None if self._epochs is None else self._epochs + 1
        if self._best is None or loss < self._best:
            self._best, self._bad_epochs = loss, 0
            self._weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        else:
            self._bad_epochs += 1
            trainer.should_stop = self._bad_epochs >= self.rule.patience

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the best epoch."""
        if self._weights:
            take(pl_module, self._weights)


class PeriodicCheckpoint(AfterStep):
    """Saves a checkpoint between optimiser steps, at most every so many seconds, by rename.

    Attributes:
        ending: Where a signal asks for an early end, which then follows on a checkpoint.
    """

    def __init__(self, path: Path, seconds: float, processes: Processes = ALONE) -> None:
        self.path = path
        self.seconds = seconds
        self.processes = processes
        self.ending = Ending()
        self._last = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the first process say when it is time."""
        assert isinstance(pl_module, TuningModule)
        pl_module.checkpoint_due = lambda: self.asked or time.monotonic() - self._last >= self.seconds

    @property
    def asked(self) -> bool:
        """True if this process is to end."""
        return self.ending.asked is not None

    def after(self, trainer: Trainer, module: TuningModule, batch: Mapping[str, Any]) -> None:
        """Save if it is time."""
        if not module.saves:
            return
        temporary = half_written(self.path)
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            temporary.replace(self.path)
        self._last = time.monotonic()
        if self.processes.agree("early end", lambda: self.asked):
            log.info("step %d: a signal asks for an early end; the checkpoint is written", module.done.steps)
            self.ending.ordered = trainer.should_stop = True


class EpochCheckpoints(AfterStep):
    """Saves adapter and moments when an epoch is over, by rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def after(self, trainer: Trainer, module: TuningModule, batch: Mapping[str, Any]) -> None:
        """Save if the epoch is over; all processes have the same, and the first one writes."""
        if not batch["closes_epoch"] or not trainer.is_global_zero:
            return
        assert isinstance(module.model, PeftModel)
        number = module.done.steps * module.settings.epochs // module.total_steps
        final = checkpoint_path(self.directory, number)
        temporary = final.with_name(f".{final.name}")
        for folder in (temporary, final):  # of an attempt that was killed before its next resumable state
            shutil.rmtree(folder, ignore_errors=True)
        save_adapter(module.model, temporary)
        weights = {name: weight for name, weight in module.causal_lm.named_parameters() if weight.requires_grad}
        AdamMoments.of(trainer.optimizers[0], weights).save(temporary / FILE)
        temporary.rename(final)
