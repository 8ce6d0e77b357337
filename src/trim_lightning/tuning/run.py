"""Run one training with Lightning, resuming from its last checkpoint if there is one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from transformers import PreTrainedModel

from trim_lightning.engine.devices import device_of, number_of_devices, one_device
from trim_lightning.engine.ending import deferred
from trim_lightning.engine.trainer import interruptible, let_go, make_trainer
from trim_lightning.errors import UserError
from trim_lightning.files.atomic import write_text
from trim_lightning.files.json_files import read_json_object
from trim_lightning.models.divided import is_divided, own, whole_weights
from trim_lightning.models.lora import add_lora, lora_facts, save_adapter
from trim_lightning.models.loss import response_logits
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.store.processes import ALONE, Processes, ToldElsewhere
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
    most_for_each,
    most_tokens,
    predicted_share,
    room_for_training,
    weight_bytes,
)
from trim_lightning.tuning.micro_batches import MicroBatch, StepLoader, plan_micro_batches
from trim_lightning.tuning.sums import largest

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
        trainer: Arguments of the Lightning Trainer.
        title: Name on the progress bar.
        logger: A Lightning logger, or False.
        early_stop: See there.
        callbacks: Others that look on.
        processes: Those that share the training, this one among them.
    """

    directory: Path
    trainer: Mapping[str, Any]
    title: str
    logger: Any = False
    early_stop: EarlyStop | None = None
    callbacks: Sequence[Callback] = ()
    processes: Processes = ALONE


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
        them, ``gradient_checkpointing``, ``processes``, with an early stop the ``epoch`` whose weights are kept, and of
        LoRA ``lora``, see `trim_lightning.models.lora.lora_facts`.

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
    module = TuningModule(wrapped, settings, count_steps(plan), seed)
    if micro.recomputes:
        module.recompute_activations()
    processes, divided = around.processes, is_divided(wrapped)
    facts = fit(module, StepLoader(records, plan, processes.rank, processes.size, even=divided), settings, around)
    wrapped.eval()
    facts |= {"lora": trained} if trained else {}
    facts |= {"tokens_per_micro_batch": micro.tokens, "gradient_checkpointing": module.recomputes}
    if not processes.leads and not divided:  # all have the same, and the first one writes
        return wrapped, facts
    try:
        check(wrapped, records, plan[0].rows[-1], around)
    except UserError as error:
        raise error if processes.leads else ToldElsewhere(str(error)) from None
    save(wrapped, around.directory, processes.leads)
    checkpoint = around.directory / CHECKPOINT
    if processes.leads:
        for path in (checkpoint, half_written(checkpoint), around.directory / MICRO_BATCHES):  # a kill can leave each
            path.unlink(missing_ok=True)
    return wrapped, facts


def train_checkpoints(
    model: PreTrainedModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    around: TrainingSite,
    *,
    seed: int,
) -> tuple[None, dict[str, Any]]:
    """Train fresh LoRA matrices for ``settings.epochs`` and keep a checkpoint after each epoch.

    A killed training goes on from its last resumable state and writes the checkpoints after it anew.

    Returns:
        No model, the facts of `train_model`, and ``rates`` among them: the mean learning rate of each epoch.

    Raises:
        UserError: as `train_model` does, or if an epoch had no learning rate, so that its checkpoint changes nothing.
    """
    around = replace(around, callbacks=(*around.callbacks, EpochCheckpoints(around.directory)))
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
    if around.processes.leads:
        shutil.rmtree(around.directory / ADAPTER)  # the last checkpoint has the same
    return None, facts


def choose_micro_batches(
    model: PreTrainedModel | PeftModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    around: TrainingSite,
) -> MicroBatches:
    """Micro-batches for which the device has room; a training that goes on keeps those that it began with."""
    file, processes = around.directory / MICRO_BATCHES, around.processes
    goes_on = file.exists() and (around.directory / CHECKPOINT).exists()
    known = processes.agree("micro-batches so far", lambda: read_json_object(file) if goes_on else None)
    if known is not None:
        return MicroBatches(**known)
    measure: Callable[[], MicroBatches] = partial(micro_batches_that_fit, model, records, rows, settings, around)
    if is_divided(model):  # a forward pass takes all processes
        measured = measure()
        measure = lambda: measured  # noqa: E731
    micro = processes.agree("micro-batches", measure)
    if micro != MicroBatches(most_tokens(settings, device_of(around.trainer)), False):
        recomputed = ", activations recomputed" if micro.recomputes else ""
        log.info("%s: micro-batches of up to %s tokens%s", around.title, f"{micro.tokens:,}", recomputed)
    if processes.leads:
        write_text(json.dumps(asdict(micro)), file)
    return micro


def micro_batches_that_fit(
    model: PreTrainedModel | PeftModel,
    records: TokenizedRecords,
    rows: Sequence[int],
    settings: TuningSettings,
    around: TrainingSite,
) -> MicroBatches:
    """As set, or what this process's device has room for; not so large that a step has none for some process."""
    device, lengths = device_of(around.trainer), records.lengths[list(rows)]
    most, longest = most_tokens(settings, device), int(lengths.max(initial=1))
    if around.processes.size > 1:
        most = most_for_each(settings, most, longest, float(lengths[lengths > 0].mean()), around.processes.size)
    if settings.tokens_per_micro_batch is not None and settings.gradient_checkpointing is not None:
        return MicroBatches(most, settings.gradient_checkpointing)
    # the machine's memory is for all of its processes
    sharers = number_of_devices(around.trainer) if device.type == "cpu" and around.processes.size > 1 else 1
    room = room_for_training(device, sharers * weight_bytes(model, device)) / sharers
    return TrainingMemory.of(model, predicted_share(records)).fitting(settings, most, longest, room)


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


def fit(module: TuningModule, loader: StepLoader, settings: TuningSettings, around: TrainingSite) -> dict[str, Any]:
    """Run the Lightning loop over all epochs' steps, from the checkpoint if there is one.

    Raises:
        KeyboardInterrupt: if it was interrupted; a scheduler's signal is heard after a checkpoint.
    """
    processes = around.processes
    tokens = int(sum(loader.records.lengths[list(micro.rows)].sum() for micro in loader.plan))
    checkpoint = around.directory / CHECKPOINT
    callbacks: list[Callback] = [TrainingProgress(around.title, tokens), *around.callbacks]
    stop = None if around.early_stop is None else HeldOutStop(around.early_stop, processes)
    if stop is not None:
        callbacks.append(stop)
    periodic = PeriodicCheckpoint(checkpoint, settings.checkpoint_seconds, processes)
    callbacks.append(periodic)
    # one Lightning epoch holds all of ours, so that a checkpoint may lie anywhere
    runner = make_trainer(
        one_device(around.trainer) if processes.size == 1 else around.trainer,
        callbacks,
        training=True,
        max_epochs=1,
        logger=around.logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    resumes = processes.agree("checkpoint", checkpoint.exists)
    if resumes:
        log.info("%s: resuming from its last checkpoint", around.title)
    with deferred() as periodic.ending, interruptible(runner):
        runner.fit(module, loader, ckpt_path=str(checkpoint) if resumes else None, weights_only=True)
    let_go(runner, module)
    kept = None if stop is None else stop.best_epoch
    if kept is not None and processes.leads:
        log.info("%s: the weights of epoch %d of %d are kept", around.title, kept, settings.epochs)
    return {
        **({} if kept is None else {"epoch": kept}),
        **asdict(module.done),
        "records": len({row for micro in loader.plan for row in micro.rows}),
        "processes": processes.size,
        "micro_batch_parts": int(largest(module.parts, processes.size)),
    }


def check(wrapped: PeftModel | PreTrainedModel, records: TokenizedRecords, row: int, around: TrainingSite) -> None:
    """See that a training changed something and ended in numbers; all that hold parts of the weights call it.

    Raises:
        UserError: if not.
    """
    if isinstance(wrapped, PeftModel):
        require_effect(wrapped, records, row, around.title)
        return
    wrapped.requires_grad_(False)
    broken = not all(bool(torch.isfinite(own(parameter)).all()) for parameter in wrapped.parameters())
    if largest(broken, around.processes.size if is_divided(wrapped) else 1):
        raise UserError(f"{around.title}: training diverged (weights are not finite); lower the learning rate")


def save(wrapped: PeftModel | PreTrainedModel, directory: Path, leads: bool) -> None:
    """Let the first process write the result; all that hold parts of the weights call it."""
    if isinstance(wrapped, PeftModel):
        if leads:
            save_adapter(wrapped, directory / ADAPTER)
        return
    weights = dict(whole_weights(wrapped, leads)) if is_divided(wrapped) else None
    if leads:
        wrapped.save_pretrained(str(directory / MODEL), state_dict=weights, safe_serialization=True)


def require_effect(wrapped: PeftModel, records: TokenizedRecords, row: int, title: str) -> None:
    """Compare logits with and without the adapter.

    Raises:
        UserError: if they are equal or not finite.
    """
    input_ids = torch.from_numpy(records[row].token_ids.astype("int64"))[None].to(wrapped.device)
    wanted = torch.ones_like(input_ids, dtype=torch.bool)
    inner = wrapped.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    with torch.no_grad():  # no inference mode: divided weights are put together in place
        trained = response_logits(inner, input_ids, wanted)
        with wrapped.disable_adapter():
            before = response_logits(inner, input_ids, wanted)
    if not torch.isfinite(trained).all():
        raise UserError(f"{title}: training diverged (logits are not finite); lower the learning rate")
    if torch.equal(trained, before):
        raise UserError(f"{title}: the adapter changed nothing; raise the learning rate, epochs or records")
