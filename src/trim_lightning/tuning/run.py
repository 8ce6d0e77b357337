"""Run one training with Lightning, resuming from its last checkpoint if there is one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from transformers import PreTrainedModel

from trim_lightning.engine.devices import device_of, one_device
from trim_lightning.engine.trainer import interruptible, make_trainer
from trim_lightning.errors import UserError
from trim_lightning.files.atomic import write_text
from trim_lightning.files.json_files import read_json_object
from trim_lightning.models.lora import add_lora, lora_facts, save_adapter
from trim_lightning.models.loss import response_logits
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.callbacks import (
    EarlyStop,
    EpochCheckpoints,
    HeldOutStop,
    PeriodicCheckpoint,
    TrainingProgress,
    half_written,
)
from trim_lightning.tuning.lora_module import TuningModule, learning_rates
from trim_lightning.tuning.memory import (
    MicroBatches,
    TrainingMemory,
    most_tokens,
    predicted_share,
    room_for_training,
    weight_bytes,
)
from trim_lightning.tuning.micro_batches import MicroBatch, MicroBatchLoader, plan_micro_batches

log = logging.getLogger(__name__)
CHECKPOINT = "resume.ckpt"
ADAPTER = "adapter"
MODEL = "model"
MICRO_BATCHES = "micro_batches.json"


@dataclass(frozen=True)
class TrainingSite:
    """Where a training runs and what looks on.

    Attributes:
        directory: Holds the result at the end, and a checkpoint until then: a killed training goes on from there.
        trainer: Arguments of the Lightning Trainer; training uses one device.
        title: Name on the progress bar.
        logger: A Lightning logger, or False.
        early_stop: See there.
        callbacks: Others that look on.
    """

    directory: Path
    trainer: Mapping[str, Any]
    title: str
    logger: Any = False
    early_stop: EarlyStop | None = None
    callbacks: Sequence[Callback] = ()


def train_model(
    model: PreTrainedModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    around: TrainingSite,
    *,
    seed: int,
    mode: str = "lora",
    length_grouped: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Train fresh LoRA matrices and save them to ``adapter/``, or all weights and save them to ``model/``; safetensors.

    Args:
        model: The base model. With ``lora`` its own weights stay as they are; for ``full`` it should be in float32:
            steps of a usual size vanish in bfloat16 weights.
        records: Tokenised records.
        rows: Which of them to train on.
        settings: Hyperparameters.
        around: Directory, Trainer and the like.
        seed: Of LoRA's initial weights, order and dropout.
        mode: ``lora`` or ``full``.
        length_grouped: Put records of similar length into one optimiser step.

    Returns:
        The trained PEFT model (``full``: the model) and facts: ``records`` learned from, ``tokens`` fed to the model,
        ``trained_tokens`` labelled, ``steps``, ``loss`` of the last step, ``seconds`` of earlier attempts that a kill
        ended, ``tokens_per_micro_batch`` as they were chosen and ``micro_batch_parts`` into which lack of memory cut
        them, ``gradient_checkpointing``, and of LoRA ``lora``, see `trim_lightning.models.lora.lora_facts`.

    Raises:
        UserError: if no record has a response token, the training diverged, or the adapter changed nothing.
    """
    wrapped = add_lora(model, settings, seed) if mode == "lora" else model.requires_grad_(True)
    trained = lora_facts(wrapped, settings) if isinstance(wrapped, PeftModel) else {}
    if trained:
        modules = ", ".join(f"{number} {name}" for name, number in trained["modules"].items())
        log.info("%s: LoRA on %s, %s numbers", around.title, modules, f"{trained['parameters']:,}")
    micro = choose_micro_batches(wrapped, records, rows, settings, around)
    plan = make_plan(records, rows, settings, micro.tokens, around.title, seed, length_grouped)
    module = TuningModule(wrapped, settings, total_steps=count_steps(plan))
    if micro.recomputes:
        module.recompute_activations()
    facts = fit(module, MicroBatchLoader(records, plan), settings, around, seed)
    wrapped.eval()
    if isinstance(wrapped, PeftModel):
        require_effect(wrapped, records, plan[0].rows[-1], around.title)
        save_adapter(wrapped, around.directory / ADAPTER)
    else:
        wrapped.requires_grad_(False)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in wrapped.parameters()):
            raise UserError(f"{around.title}: training diverged (weights are not finite); lower the learning rate")
        wrapped.save_pretrained(str(around.directory / MODEL), safe_serialization=True)
    checkpoint = around.directory / CHECKPOINT
    for path in (checkpoint, half_written(checkpoint), around.directory / MICRO_BATCHES):  # a kill can leave the second
        path.unlink(missing_ok=True)
    facts |= {"lora": trained} if trained else {}
    facts |= {"tokens_per_micro_batch": micro.tokens, "micro_batch_parts": module.parts}
    return wrapped, {**facts, "gradient_checkpointing": module.recomputes}


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
        The facts of `train_model`, and ``rates``: the mean learning rate of each epoch.

    Raises:
        UserError: as `train_model` does, or if an epoch had no learning rate, so that its checkpoint changes nothing.
    """
    around = TrainingSite(directory, trainer, "warm-up", callbacks=(EpochCheckpoints(directory),))
    _, facts = train_model(model, records, rows, settings, around, seed=seed)
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


def choose_micro_batches(
    model: PreTrainedModel | PeftModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    around: TrainingSite,
) -> MicroBatches:
    """Micro-batches for which the device has room; a training that goes on keeps those that it began with."""
    file = around.directory / MICRO_BATCHES
    if file.exists() and (around.directory / CHECKPOINT).exists():
        return MicroBatches(**read_json_object(file))
    device = device_of(around.trainer)
    most = most_tokens(settings, device)
    micro = MicroBatches(most, bool(settings.gradient_checkpointing))
    if settings.tokens_per_micro_batch is None or settings.gradient_checkpointing is None:
        memory = TrainingMemory.of(model, predicted_share(records))
        room = room_for_training(device, weight_bytes(model, device))
        micro = memory.fitting(settings, most, int(records.lengths[list(rows)].max(initial=1)), room)
    if micro != MicroBatches(most, False):
        recomputed = ", activations recomputed" if micro.recomputes else ""
        log.info("%s: micro-batches of up to %s tokens%s", around.title, f"{micro.tokens:,}", recomputed)
    write_text(json.dumps(asdict(micro)), file)
    return micro


def make_plan(
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    tokens_per_micro_batch: int,
    title: str,
    seed: int,
    length_grouped: bool,
) -> list[MicroBatch]:
    """All micro-batches of a training.

    Raises:
        UserError: if no record has a response token.
    """
    plan = plan_micro_batches(
        records,
        rows,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        tokens_per_micro_batch=tokens_per_micro_batch,
        seed=seed,
        length_grouped=length_grouped,
    )
    if not plan:
        raise UserError(f"{title}: none of the {len(rows)} records has a response to learn from")
    return plan


def count_steps(plan: Sequence[MicroBatch]) -> int:
    """Optimiser steps of a plan."""
    return sum(micro.closes_step for micro in plan)


def fit(
    module: TuningModule, loader: MicroBatchLoader, settings: TuningSettings, around: TrainingSite, seed: int
) -> dict[str, Any]:
    """Run the Lightning loop over all epochs' micro-batches, from the checkpoint if there is one."""
    tokens = int(sum(loader.records.lengths[list(micro.rows)].sum() for micro in loader.plan))
    checkpoint = around.directory / CHECKPOINT
    callbacks: list[Callback] = [TrainingProgress(around.title, tokens), *around.callbacks]
    if around.early_stop is not None:
        callbacks.append(HeldOutStop(around.early_stop))
    callbacks.append(PeriodicCheckpoint(checkpoint, settings.checkpoint_seconds))
    # one Lightning epoch holds all of ours, so that a checkpoint may lie anywhere
    runner = make_trainer(
        one_device(around.trainer),
        callbacks,
        max_epochs=1,
        logger=around.logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    resumes = checkpoint.exists()
    if resumes:
        log.info("%s: resuming from its last checkpoint", around.title)
    torch.manual_seed(seed)
    with interruptible(runner):
        runner.fit(module, loader, ckpt_path=str(checkpoint) if resumes else None, weights_only=True)
    return {**asdict(module.done), "records": len({row for micro in loader.plan for row in micro.rows})}


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
