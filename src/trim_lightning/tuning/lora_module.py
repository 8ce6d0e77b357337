"""The LightningModule that warm-up and fine-tuning share: LoRA (or full) training on response tokens."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning import LightningModule
from peft import PeftModel
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, get_scheduler

from trim_lightning.engine.memory import is_out_of_memory
from trim_lightning.errors import UserError
from trim_lightning.models.loss import summed_loss
from trim_lightning.settings.schema import TuningSettings

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


def generators() -> list[torch.Tensor]:
    """States of torch's generators: the CPU's, then each GPU's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_generators(states: Sequence[torch.Tensor]) -> None:
    """Go back to such states; of another number of GPUs only the CPU's is taken."""
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(list(states[1:]))


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
    """

    def __init__(self, model: PeftModel | PreTrainedModel, settings: TuningSettings, total_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.model = model
        self.settings = settings
        self.total_steps = total_steps
        self.done = Progress()
        self._started = time.perf_counter()
        self._step_loss = 0.0
        self._step: list[Mapping[str, Any]] = []  # micro-batches of the present step
        self._generators: list[torch.Tensor] = []  # as the step found them
        self.recomputes = False
        self.parts = 1  # into which a micro-batch is cut, once memory has run out

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model itself, with LoRA inside where there is LoRA."""
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(inner, PreTrainedModel)
        return inner

    def on_train_start(self) -> None:
        """Dropout on (Lightning keeps the mode that the model was loaded in)."""
        self.model.train()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        if not self._step:
            self._generators = generators()
        self._step.append(batch)
        if not self.fits(batch):
            self.repeat_step()
        self.done.tokens += batch["tokens"]
        if not batch["closes_step"]:
            return
        if not math.isfinite(self._step_loss):  # now, not after hours of the same
            raise UserError(
                f"training diverged at step {self.done.steps + 1} (the loss is not finite); lower the learning rate"
            )
        optimizer = self.optimizers()
        if self.settings.gradient_clip > 0:
            torch.nn.utils.clip_grad_norm_(
                [parameter for parameter in self.model.parameters() if parameter.requires_grad],
                self.settings.gradient_clip,
            )
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        schedule = self.lr_schedulers()
        schedule.step()  # type: ignore[union-attr]
        self.done.steps += 1
        self.done.trained_tokens += batch["step_labels"]
        self.done.loss = self._step_loss
        self._step_loss = 0.0
        self._step = []
        rate = float(schedule.get_last_lr()[0])  # type: ignore[union-attr]
        self.report({"train/loss": self.done.loss, "train/learning_rate": rate})

    def learn_from(self, batch: Mapping[str, Any]) -> None:
        """Add a micro-batch's gradients and loss to those of the step, in as many parts as memory asks for."""
        size = len(batch["input_ids"])
        each = -(-size // self.parts)
        for start in range(0, size, each):
            input_ids, labels = (batch[name][start : start + each] for name in ("input_ids", "labels"))
            loss = summed_loss(self.causal_lm, input_ids, labels) / batch["step_labels"]
            self.manual_backward(loss)
            self._step_loss += float(loss.detach())

    def repeat_step(self) -> None:
        """Do the present step again from its first micro-batch, in smaller parts; memory has run out within it.

        From its first, since a backward pass that ran out of memory has left part of its gradients.

        Raises:
            UserError: if memory does not suffice for a single record.
        """
        while True:
            gc.collect()  # the failed pass's tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size = max(len(batch["input_ids"]) for batch in self._step)
            if self.parts < size:
                self.parts *= 2
                log.warning("memory ran out: micro-batches are cut into %d parts from here on", self.parts)
            elif self.settings.gradient_checkpointing is None and not self.recomputes:
                log.warning("memory ran out: activations are recomputed from here on (gradient_checkpointing)")
                self.recompute_activations()
            else:
                longest = max(batch["input_ids"].shape[1] for batch in self._step)
                thrifty = "" if self.recomputes else "set gradient_checkpointing=true, "
                raise UserError(
                    f"memory does not suffice to train on a single record of {longest} tokens: lower max_length, "
                    f"{thrifty}choose a smaller model, or spread it (model.device_map=auto); what was done before this "
                    "training is kept"
                )
            for parameter in self.model.parameters():
                parameter.grad = None
            self._step_loss = 0.0
            set_generators(self._generators)
            if all(self.fits(batch) for batch in self._step):
                return

    def fits(self, batch: Mapping[str, Any]) -> bool:
        """Learn from a micro-batch; False if memory ran out, told without the exception, which holds the tensors."""
        try:
            self.learn_from(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
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
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = AdamW(
            trainable, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, foreach=False
        )
        return [optimizer], [schedule(optimizer, self.settings, self.total_steps)]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trainable weights only: the base model does not change."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if name in trainable}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the generators (dropout) and what was done, so that a resumed run repeats an unbroken one."""
        spent = self.done.seconds + time.perf_counter() - self._started
        checkpoint["trim_done"] = asdict(replace(self.done, seconds=spent))
        checkpoint["trim_generators"] = generators()
        checkpoint["trim_memory"] = [self.parts, int(self.recomputes)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        self.done = Progress(**checkpoint["trim_done"])
        set_generators(checkpoint["trim_generators"])
        self.parts, recomputes = checkpoint["trim_memory"]
        if recomputes and not self.recomputes:
            self.recompute_activations()
