"""Run one training with Lightning, resuming from its last checkpoint if there is one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from transformers import PreTrainedModel

from trim_lightning.engine.trainer import interruptible, make_trainer
from trim_lightning.errors import UserError
from trim_lightning.progress import progress_bar
from trim_lightning.settings import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.lora_module import TuningModule, add_lora, response_logits
from trim_lightning.tuning.plan import MicroBatchLoader, plan_micro_batches

log = logging.getLogger(__name__)
CHECKPOINT = "resume.ckpt"
ADAPTER = "adapter"
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}


def train_lora(
    model: PreTrainedModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    directory: Path,
    *,
    seed: int,
    trainer: Mapping[str, Any],
    title: str,
    logger: Any = False,
) -> tuple[PeftModel, dict[str, Any]]:
    """Train fresh LoRA matrices and save them to ``directory/adapter`` as safetensors.

    Args:
        model: The base model; its own weights stay as they are.
        records: Tokenised records.
        rows: Which of them to train on.
        settings: Hyperparameters.
        directory: Holds the adapter at the end, and a checkpoint until then: called again after a kill, the
            training goes on from there.
        seed: Of LoRA's initial weights, order and dropout.
        trainer: Arguments of the Lightning Trainer; training uses one device.
        title: Name on the progress bar.
        logger: A Lightning logger, or False.

    Returns:
        The trained PEFT model and facts: ``tokens`` fed to the model, ``steps``, ``loss`` of the last step.

    Raises:
        UserError: if no record has a response token, or the adapter changed nothing.
    """
    plan = plan_micro_batches(
        records,
        rows,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        tokens_per_micro_batch=settings.tokens_per_micro_batch or MICRO_BATCH_TOKENS[_device_kind()],
        seed=seed,
    )
    if not plan:
        raise UserError(f"{title}: none of the {len(rows)} records has a response to learn from")
    wrapped = add_lora(model, settings, seed)
    module = TuningModule(wrapped, settings, total_steps=sum(micro.closes_step for micro in plan))
    if settings.gradient_checkpointing:
        module.causal_lm.gradient_checkpointing_enable()
        wrapped.enable_input_require_grads()
    loader = MicroBatchLoader(records, plan)
    tokens = int(sum(records.lengths[list(micro.rows)].sum() for micro in plan))
    checkpoint = directory / CHECKPOINT
    callbacks: list[Callback] = [
        TrainingProgress(title, tokens),
        PeriodicCheckpoint(checkpoint, settings.checkpoint_seconds),
    ]
    one_device = {**trainer, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    runner = make_trainer(
        one_device, callbacks, max_epochs=1, logger=logger, log_every_n_steps=1, num_sanity_val_steps=0
    )
    resumes = checkpoint.exists()
    if resumes:
        log.info("%s: resuming from its last checkpoint", title)
    torch.manual_seed(seed)
    with interruptible(runner):
        runner.fit(module, loader, ckpt_path=str(checkpoint) if resumes else None, weights_only=True)
    wrapped.eval()
    require_effect(wrapped, records, plan[0].rows[-1], title)
    wrapped.save_pretrained(str(directory / ADAPTER), safe_serialization=True)
    checkpoint.unlink(missing_ok=True)
    loss = runner.callback_metrics.get("train/loss")
    facts = {"tokens": tokens, "steps": module.total_steps, "loss": None if loss is None else float(loss)}
    return wrapped, facts


def require_effect(wrapped: PeftModel, records: TokenizedRecords, row: int, title: str) -> None:
    """Compare logits with and without the adapter.

    Raises:
        UserError: if they are equal or not finite.
    """
    input_ids = torch.from_numpy(records[row].token_ids.astype("int64"))[None].to(wrapped.device)
    wanted = torch.ones_like(input_ids, dtype=torch.bool)
    inner = wrapped.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    with torch.inference_mode():
        trained = response_logits(inner, input_ids, wanted)
        with wrapped.disable_adapter():
            before = response_logits(inner, input_ids, wanted)
    if not torch.isfinite(trained).all():
        raise UserError(f"{title}: training diverged (logits are not finite); lower the learning rate")
    if torch.equal(trained, before):
        raise UserError(f"{title}: the adapter changed nothing; raise the learning rate, epochs or records")


def merge(wrapped: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Merge the adapter into the base weights and return the plain model in ``dtype``, ready to score."""
    merged = wrapped.merge_and_unload().to(dtype)
    merged.eval()
    merged.requires_grad_(False)
    assert isinstance(merged, PreTrainedModel)
    return merged


def _device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class TrainingProgress(Callback):
    """A progress bar over the tokens of all epochs."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self._bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._bar = progress_bar(self.title, self.total)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        """Advance by the batch's real tokens."""
        self._bar.update(int(batch["tokens"]))
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            self._bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class PeriodicCheckpoint(Callback):
    """Saves a checkpoint between optimiser steps, at most every so many seconds, by rename."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self.seconds = seconds
        self._last = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        """Save if it is time."""
        if not batch["closes_step"] or time.monotonic() - self._last < self.seconds:
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        trainer.save_checkpoint(temporary)
        temporary.replace(self.path)
        self._last = time.monotonic()
