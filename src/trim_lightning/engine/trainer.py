"""Build a Lightning Trainer from the ``trainer`` group."""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from trim_lightning.engine.devices import ONE_DEVICE, number_of_devices
from trim_lightning.errors import UserError, suggest
from trim_lightning.store.processes import LOST, launched_size

OURS = {"callbacks", "logger", "default_root_dir", "enable_checkpointing", "enable_progress_bar"}
TUNED = "the keys of warmup and train (epochs, batch_size, gradient_clip ...)"
# arguments that change or cut short a stage's result, which the store's keys would not show
REPLACED = {
    "precision": "model.dtype",
    "fast_dev_run": "debug=fast",
    "overfit_batches": "debug=fast",
    "limit_predict_batches": "pool.limit",
    "limit_train_batches": "pool.limit",
    "min_epochs": TUNED,
    "max_epochs": TUNED,
    "min_steps": TUNED,
    "max_steps": TUNED,
    "max_time": TUNED,
    "accumulate_grad_batches": TUNED,
    "gradient_clip_val": TUNED,
    "gradient_clip_algorithm": TUNED,
}


def make_trainer(
    settings: Mapping[str, Any], callbacks: Sequence[Callback], *, training: bool = False, **extra: Any
) -> Trainer:
    """A Trainer with our callbacks and no surprises: no checkpoints, no sampler of its own, no model summary.

    Args:
        settings: Arguments of the Trainer.
        callbacks: What looks on.
        training: Take the strategy of a training, in a process that is one of its own already.
        extra: Arguments that the stage sets itself (``max_epochs`` and the like).

    Raises:
        UserError: for an argument that Trainer does not have or that would change results behind the store's
            back, or a device that is absent.
    """
    arguments = {name: value for name, value in settings.items() if value is not None}
    permitted = set(inspect.signature(Trainer.__init__).parameters) - {"self"} - OURS
    for name in arguments:
        if name in REPLACED:
            raise UserError(f"trainer.{name}: cannot be set here; use {REPLACED[name]}")
        if name not in permitted:
            hint = suggest(name, permitted, "trainer.")
            raise UserError(f"trainer.{name}: not an argument of lightning.Trainer that can be set here{hint}")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    hush_lightning()
    if arguments.get("strategy") != ONE_DEVICE:
        arguments = training_strategy(arguments) if training else with_strategy(arguments)
    else:
        arguments["strategy"] = "auto"
    try:
        return Trainer(**{**quiet, **arguments, **extra}, callbacks=list(callbacks))
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        unusual = {name: value for name, value in settings.items() if value not in (1, "auto", None)}
        given = ", ".join(f"trainer.{name}={value}" for name, value in unusual.items()) or "trainer"
        reason = str(error).strip().splitlines()[0].rstrip(".!")
        raise UserError(f"{given}: {reason}; choose what this machine has, or trainer=auto") from None


def number_of_processes(arguments: Mapping[str, Any]) -> int:
    """How many processes these arguments ask for, one for each device.

    Raises:
        UserError: if a launcher started another number.
    """
    launched, devices, nodes = launched_size(), arguments.get("devices", "auto"), int(arguments.get("num_nodes") or 1)
    asked = number_of_devices(arguments) * nodes
    if launched > 1 and asked != launched:
        many = "1 process" if asked == 1 else f"{asked} processes"
        raise UserError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}: {many}, but the launcher started {launched}; "
            "make the two agree"
        )
    return asked


def needs_launcher(arguments: Mapping[str, Any]) -> UserError | None:
    """What is wrong with a command that no launcher started, if it asks for what only a launcher can start."""
    nodes = int(arguments.get("num_nodes") or 1)
    if launched_size() > 1 or not (nodes > 1 or arguments.get("strategy") == "fsdp"):
        return None
    what = f"trainer.num_nodes={nodes}" if nodes > 1 else "trainer.strategy=fsdp"
    return UserError(f"{what}: needs one process for each device; start the command with torchrun or srun")


def training_strategy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the Lightning strategy of a training, in each of its processes.

    Raises:
        UserError: if the number of processes is another than asked for, or for a strategy that trains otherwise.
    """
    from trim_lightning.engine.strategies import DividedStrategy, SummedDDP

    asked, strategy = number_of_processes(arguments), str(arguments.get("strategy", "auto"))
    if asked <= 1:
        return {**arguments, "strategy": "auto"}
    if not strategy.startswith(("auto", "ddp")) and strategy != "fsdp":
        raise UserError(f"trainer.strategy={strategy}: a training is spread with ddp or fsdp; choose one of them")
    plugins = [TorchElasticEnvironment()] if "TORCHELASTIC_RUN_ID" in os.environ else None  # not what Slurm says
    if strategy == "fsdp":
        spread: Any = DividedStrategy(data_parallel_size=asked, tensor_parallel_size=1, timeout=LOST)
        return {**arguments, "strategy": spread, "plugins": plugins, "inference_mode": False}
    return {**arguments, "strategy": SummedDDP(timeout=LOST), "plugins": plugins}


def with_strategy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the Lightning strategy of a pass, which suits how the processes are started.

    ``ddp`` starts its processes itself, for the length of a pass, unless a launcher (torchrun, srun) has started
    them: Lightning's own way of running the command again does not go with a store whose lock this process holds.
    ``fsdp`` is Lightning's strategy for FSDP2.

    Raises:
        UserError: if the number of processes is another than asked for, or a strategy needs a launcher.
    """
    asked, launched, strategy = number_of_processes(arguments), launched_size(), arguments.get("strategy", "auto")
    if asked <= 1:
        return {**arguments, "strategy": "auto"} if strategy in ("ddp", "fsdp") else dict(arguments)
    mistake = needs_launcher(arguments)
    if mistake is not None:
        raise mistake
    if strategy == "fsdp":
        from lightning.pytorch.strategies import ModelParallelStrategy

        divided = ModelParallelStrategy(data_parallel_size=asked, tensor_parallel_size=1)
        return {**arguments, "strategy": divided, "inference_mode": False}  # FSDP2 changes parameters in place
    if launched > 1 and strategy == "auto":
        return {**arguments, "strategy": "ddp"}
    if launched == 1 and strategy in ("auto", "ddp"):
        # not what Slurm or torchrun say of this one process: it starts its own
        return {**arguments, "strategy": "ddp_spawn", "plugins": [LightningEnvironment()]}
    return dict(arguments)


class ProcessAborted(UserError):
    """A native library ended one of the processes of a pass, as gloo does at times when it closes a connection."""


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM reach the entry point as `KeyboardInterrupt`: Lightning turns them into ``exit(1)``.

    Processes that the pass started are ended with it, and a user's mistake found in one of them is told as such.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt, ProcessRaisedException, ProcessExitedException) as error:
        if isinstance(error, SystemExit) and not trainer.interrupted:
            raise
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)  # what the processes had finished is on disk
        if isinstance(error, SystemExit):
            raise KeyboardInterrupt from None
        if isinstance(error, ProcessExitedException):
            kind = ProcessAborted if error.exit_code == -signal.SIGABRT else UserError
            raise kind(ended_from_outside("pass", error.exit_code)) from None
        raise of_process(str(error)) or error from None
    if trainer.interrupted:
        raise KeyboardInterrupt


def let_go(trainer: Trainer, module: LightningModule) -> None:
    """Take the model and the optimiser from a Trainer that has ended, so that they go with their last user.

    Trainer and module hold each other, and Python looks for such circles only now and then: jobs of a sweep would pile
    up models in memory. The module has no model after this.
    """
    trainer.strategy.optimizers = []
    for name in [name for name, _ in module.named_modules(remove_duplicate=False) if name and "." not in name]:
        delattr(module, name)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)  # what was freed in the meantime goes back to the machine


def ended_from_outside(work: str, code: int) -> str:
    """What to say when one of the processes of a pass or a training is gone."""
    return (
        f"trainer.devices: one of the {work}'s processes was ended from outside (exit code {code}), "
        "perhaps for lack of memory: each holds a model of its own; use fewer devices or trainer=fsdp"
    )


def of_process(traceback: str) -> Exception | None:
    """What a process that we started failed of, if the user can mend it, by the text of its traceback."""
    found = re.findall(rf"^{re.escape(UserError.__module__)}\.UserError: (.*)$", traceback, re.MULTILINE)
    if found:
        return UserError(found[-1])
    full = re.findall(r"^OSError: \[Errno (\d+)\]", traceback, re.MULTILINE)
    return OSError(int(full[-1]), os.strerror(int(full[-1]))) if full else None


def hush_lightning() -> None:
    """Silence advice that does not apply: our loaders read memory-mapped arrays and need no workers."""
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.fabric.utilities.distributed",
        "lightning.pytorch.accelerators.cuda",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*treespec.*",
        ".*GPU available but not used.*",
        ".*Consider setting `persistent_workers=True`.*",
        ".*in eval mode.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*No device id is provided.*",
        ".*Couldn't infer the batch indices.*",  # every batch carries its rows
    ):
        warnings.filterwarnings("ignore", message=message)
