"""The LightningModule that warm-up and fine-tuning share: LoRA (or full) training on response tokens."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from peft import PeftModel
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, get_scheduler

from trim_lightning.engine.memory import is_out_of_memory
from trim_lightning.engine.modules import in_step
from trim_lightning.errors import UserError
from trim_lightning.models.loss import summed_loss
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.store.processes import ToldElsewhere
from trim_lightning.tuning.sums import add_up, clip

log = logging.getLogger(__name__)


def schedule(optimizer: Optimizer, settings: TuningSettings, total_steps: int) -> Any:
    """The learning-rate scheduler of a training of ``total_steps``."""
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    rising = round(settings.warmup_ratio * total_steps)
    return get_scheduler(name, optimizer, num_warmup_steps=rising, num_training_steps=total_steps)


def learning_rates(settings: TuningSettings, total_steps: int) -> list[float]:
    """The learning rate of every optimiser step of a training."""
    nothing = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    (factor,) = schedule(nothing, settings, total_steps).lr_lambdas
    return [settings.learning_rate * float(factor(step)) for step in range(total_steps)]


def seed_of(seed: int, place: int) -> int:
    """What torch's generators start from for the micro-batch at a place of the plan, in whatever process it is run."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])


@dataclass
class Progress:
    """What a training has done so far, before a kill and after.

    Attributes:
        steps: Optimiser steps.
        tokens: Real tokens fed to the model.
        trained_tokens: Labelled tokens of the finished steps.
        loss: Of the last step, nats per labelled token; None before the first.
        seconds: Wall time of the attempts before this one, each up to its last checkpoint.
    """

    steps: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    loss: float | None = None
    seconds: float = 0.0


class TuningModule(LightningModule):
    """Trains a model on response tokens; only trainable weights go into checkpoints.

    Optimisation is manual because a step's micro-batches vary in number; the loss of a step is the mean over
    all its trained tokens however it is cut.

    Args:
        model: A PEFT model, or a plain one for full fine-tuning.
        settings: Hyperparameters.
        total_steps: Optimiser steps of the whole run, for the schedule.
        seed: Of dropout.

    Attributes:
        done: What was done so far, by all processes.
        parts: Into how many a micro-batch is cut, once memory has run out.
        checkpoint_due: Asked before the processes add up a step: is it time for a checkpoint? The first one decides.
        saves: True after a step that all processes are to save.
        watch: Told the real tokens of each micro-batch of this process.
    """

    def __init__(
        self, model: PeftModel | PreTrainedModel, settings: TuningSettings, total_steps: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.model = model
        self.settings = settings
        self.total_steps = total_steps
        self.seed = seed
        self.done = Progress()
        self.recomputes = False
        self.parts = 1
        self.checkpoint_due: Callable[[], bool] = lambda: False
        self.saves = False
        self.watch: Callable[[int], None] = lambda tokens: None
        self._started = time.perf_counter()
        self._step_loss = 0.0

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model itself, with LoRA inside where there is LoRA."""
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(inner, PreTrainedModel)
        return inner

    def configure_model(self) -> None:
        """Nothing: the model comes as it is trained, divided where the strategy divides it."""

    def on_train_start(self) -> None:
        """Dropout on (Lightning keeps the mode that the model was loaded in)."""
        self.model.train()

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The weights that are trained, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One optimiser step; see `trim_lightning.tuning.micro_batches.StepLoader` for ``batch``.

        Processes learn from their micro-batches by themselves and speak to each other when all are done, so that one
        which runs out of memory may begin anew.

        Raises:
            UserError: if the loss is not finite, or memory does not suffice for a single record.
        """
        self._step_loss = 0.0
        while not all(self.fits(micro, batch["step_labels"]) for micro in batch["micro_batches"]):
            self.make_room(batch["micro_batches"])
        due = float(self.trainer.is_global_zero and self.checkpoint_due())
        loss, due = add_up(self.trained, [self._step_loss, due], self.device, self.trainer.world_size)
        if not math.isfinite(loss):  # now, not after hours of the same
            kind = UserError if self.trainer.is_global_zero else ToldElsewhere
            raise kind(
                f"training diverged at step {self.done.steps + 1} (the loss is not finite); lower the learning rate"
            )
        optimizer = self.optimizers()
        if self.settings.gradient_clip > 0:
            clip(self.trained, self.settings.gradient_clip)
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        schedule = self.lr_schedulers()
        schedule.step()  # type: ignore[union-attr]
        self.saves = bool(due)
        self.done.steps += 1
        self.done.tokens += batch["tokens"]
        self.done.trained_tokens += batch["step_labels"]
        self.done.loss = loss
        rate = float(schedule.get_last_lr()[0])  # type: ignore[union-attr]
        self.report({"train/loss": loss, "train/learning_rate": rate})

    def learn_from(self, micro: Mapping[str, Any], step_labels: int) -> None:
        """Add a micro-batch's gradients and loss to those of the step, in as many parts as memory asks for."""
        torch.manual_seed(seed_of(self.seed, micro["place"]))  # dropout does not depend on who runs it, and when
        size = len(micro["input_ids"])
        each = -(-size // self.parts)
        for start in range(0, size, each):
            input_ids, labels = (micro[name][start : start + each] for name in ("input_ids", "labels"))
            loss = summed_loss(self.causal_lm, input_ids, labels) / step_labels
            self.manual_backward(loss)
            self._step_loss += float(loss.detach())

    def make_room(self, step: Sequence[Mapping[str, Any]]) -> None:
        """Memory has run out within a step: forget what was learned in it, and cut its micro-batches smaller.

        All of the step is to be done again, since a backward pass that ran out of memory has left part of its
        gradients.

        Raises:
            UserError: if memory does not suffice for a single record.
        """
        gc.collect()  # the failed pass's tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = max(len(micro["input_ids"]) for micro in step)
        if self.parts < size:
            self.parts *= 2
            log.warning("memory ran out: micro-batches are cut into %d parts from here on", self.parts)
        elif self.settings.gradient_checkpointing is None and not self.recomputes:
            log.warning("memory ran out: activations are recomputed from here on (gradient_checkpointing)")
            self.recompute_activations()
        else:
            longest = max(micro["input_ids"].shape[1] for micro in step)
            thrifty = "" if self.recomputes else "set gradient_checkpointing=true, "
            raise UserError(
                f"memory does not suffice to train on a single record of {longest} tokens: lower max_length, "
                f"{thrifty}choose a smaller model, or spread it (model.device_map=auto); what was done before this "
                "training is kept"
            )
        for parameter in self.model.parameters():
            parameter.grad = None
        self._step_loss = 0.0

    def fits(self, micro: Mapping[str, Any], step_labels: int) -> bool:
        """Learn from a micro-batch; False if memory ran out, told without the exception, which holds the tensors."""
        try:
            self.learn_from(micro, step_labels)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if in_step(self.trainer.strategy):  # the other processes count on this pass
                raise UserError(
                    "memory ran out in a training with trainer=fsdp, where nothing is cut smaller: lower "
                    "tokens_per_micro_batch of warmup or train, set their gradient_checkpointing=true, or use more "
                    "devices; the same command goes on from the last checkpoint"
                ) from None
            return False
        self.watch(micro["tokens"])
        return True

    def recompute_activations(self) -> None:
        """Turn gradient checkpointing on, which transformers is renaming."""
        model: Any = self.causal_lm
        self.recomputes = True
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        if isinstance(self.model, PeftModel):
            model.enable_input_require_grads()

    def report(self, values: Mapping[str, float]) -> None:
        """Add points to the curves at the present step.

        Not through Lightning's `log`, which would repeat them at every later micro-batch.
        """
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(values), step=self.done.steps)

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(
            self.trained, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, foreach=False
        )
        return [optimizer], [schedule(optimizer, self.settings, self.total_steps)]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trainable weights only: the base model does not change."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if name in trainable}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was done, so that a resumed run repeats an unbroken one."""
        spent = self.done.seconds + time.perf_counter() - self._started
        checkpoint["trim_done"] = asdict(replace(self.done, seconds=spent))
        checkpoint["trim_memory"] = [self.parts, int(self.recomputes)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        self.done = Progress(**checkpoint["trim_done"])
        self.parts, recomputes = checkpoint["trim_memory"]
        if recomputes and not self.recomputes:
            self.recompute_activations()
