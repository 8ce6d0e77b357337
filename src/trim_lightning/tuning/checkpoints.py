"""A warm-up that leaves a checkpoint after every epoch: adapter, Adam's moments, and the epoch's learning rate."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from transformers import PreTrainedModel

from trim_lightning.engine.adam_moments import FILE, AdamMoments
from trim_lightning.errors import UserError
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.lora_module import TuningModule, learning_rates
from trim_lightning.tuning.run import ADAPTER, TrainingSite, save_adapter, train_lora


def checkpoint_path(directory: Path, number: int) -> Path:
    """Folder of the checkpoint after epoch ``number``, from 1: a PEFT adapter and ``moments.safetensors``."""
    return directory / f"checkpoint-{number:03d}"


def train_checkpoints(
    model: PreTrainedModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    directory: Path,
    trainer: Mapping[str, Any],
    *,
    seed: int,
) -> dict[str, Any]:
    """Train fresh LoRA matrices for ``settings.epochs`` and keep a checkpoint after each epoch.

    A killed training goes on from its last resumable state and writes the checkpoints after it anew.

    Returns:
        The facts of `train_lora`, and ``rates``: the mean learning rate of each epoch.

    Raises:
        UserError: as `train_lora` does, or if an epoch had no learning rate, so that its checkpoint changes nothing.
    """
    around = TrainingSite(directory, trainer, "warm-up", callbacks=(EpochCheckpoints(directory),))
    _, facts = train_lora(model, records, rows, settings, around, seed=seed)
    rates, per_epoch = learning_rates(settings, facts["steps"]), facts["steps"] // settings.epochs
    facts["rates"] = [
        sum(rates[start : start + per_epoch]) / per_epoch for start in range(0, facts["steps"], per_epoch)
    ]
    if min(facts["rates"]) <= 0:
        raise UserError(
            f"warmup.warmup_ratio={settings.warmup_ratio}: the learning rate of a whole epoch is 0; lower it, or raise "
            "warmup.fraction"
        )
    shutil.rmtree(directory / ADAPTER)  # the last checkpoint has the same
    return facts


class EpochCheckpoints(Callback):
    """Saves adapter and moments when an epoch is over, by rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Save if the epoch is over."""
        if not batch["closes_epoch"]:
            return
        assert isinstance(pl_module, TuningModule)
        assert isinstance(pl_module.model, PeftModel)
        number = pl_module.done.steps * pl_module.settings.epochs // pl_module.total_steps
        final = checkpoint_path(self.directory, number)
        temporary = final.with_name(f".{final.name}")
        for folder in (temporary, final):  # of an attempt that was killed before its next resumable state
            shutil.rmtree(folder, ignore_errors=True)
        save_adapter(pl_module.model, temporary)
        weights = {name: weight for name, weight in pl_module.causal_lm.named_parameters() if weight.requires_grad}
        AdamMoments.of(trainer.optimizers[0], weights).save(temporary / FILE)
        temporary.rename(final)
