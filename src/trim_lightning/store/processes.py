"""Several processes that a launcher (torchrun, srun) started with one command: who leads, and how they agree.

Every process runs the same program. The leader does all the work that is done once (reading, tokenising, writing); the
others wait for its word at the store and take their part in what is spread: passes, and tasks that it gives to all.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from trim_lightning.errors import UserError

log = logging.getLogger(__name__)
Value = TypeVar("Value")
MEETING = timedelta(minutes=10)  # all processes have started by then, or one of them never will
LOST = timedelta(minutes=30)  # after which a process that does not answer in a pass is given up
ENDED = "another process of this command has ended; its own message says why"
PATIENCE = timedelta(days=14)  # helpers wait through whatever the leader does alone
TASK = "a task"  # the topic of something that all are to do


class PartDone(Exception):
    """A helper has done its part; the leader goes on alone."""


class LeaderFailed(UserError):
    """The leader cannot go on, and has said why itself."""


class ToldElsewhere(LeaderFailed):
    """All processes have found the same; the leader tells it."""


class Processes:
    """The processes of one command; this base class is one by itself."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """True in the process that writes results."""
        return self.rank == 0

    def agree(self, topic: str, value: Callable[[], Value]) -> Value:
        """The leader's value, computed there alone, in every process. All processes must call it in step.

        Args:
            topic: What it is about: a process that is out of step finds out instead of taking another's value.
            value: Gives it.

        Raises:
            LeaderFailed: in the others, if the leader said `give_up`, has ended, or speaks of another topic.
        """
        return value()

    def meet(self) -> None:
        """Wait until all processes are here.

        Raises:
            LeaderFailed: if one of them has ended.
        """

    def give_up(self) -> None:
        """Tell the others, who wait in `agree`, that the leader cannot go on with what they wait for."""

    def together(self, task: Callable[[Processes], Value]) -> Value:
        """Do a task in all processes at once, each with its own `Processes`; called by the leader alone.

        The others take it up wherever they wait in `agree`. A failure ends the process, for the others are
        amid the task and hear nothing else.

        Args:
            task: Can be pickled.

        Returns:
            What it gives in the leader.
        """
        return task(self)

    def take_part(self, task: Callable[[], Value]) -> Value:
        """Do this process's part of what all do; a failure is told and ends the process.

        Raises:
            SystemExit: if it fails.
        """
        try:
            return task()
        except Exception as error:
            if not isinstance(error, ToldElsewhere):
                log.error("%s", ENDED if is_lost(error) else error)
            raise SystemExit(1) from error


class LaunchedProcesses(Processes):
    """Processes that speak through a torch process group of their own.

    The default group, which Lightning's strategies use, keeps the usual time limit: a lost process must not leave
    the others waiting for long. Only these messages may take as long as the leader's longest stage.
    """

    def __init__(self) -> None:
        import torch
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            rank, size = launched_rank(), launched_size()
            for name, number in (("RANK", rank), ("WORLD_SIZE", size)):
                os.environ.setdefault(name, str(number))
            try:
                if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
                    from lightning.pytorch.plugins.environments import SLURMEnvironment

                    environment = SLURMEnvironment()
                    os.environ["MASTER_ADDR"] = environment.main_address
                    os.environ["MASTER_PORT"] = str(environment.main_port)
                store, _, _ = next(rendezvous("env://", rank, size, timeout=MEETING))
                distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LOST)
            except (RuntimeError, ValueError, OSError) as error:  # torch's own errors are RuntimeErrors
                reason = (str(error).splitlines() or [""])[0]
                raise UserError(f"the {size} processes that the launcher started do not meet: {reason}") from None
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def agree(self, topic: str, value: Callable[[], Value]) -> Value:
        """See `Processes.agree`."""
        message = self._broadcast((topic, value()) if self.leads else None)
        while not self.leads and message is not None and message[0] == TASK:
            task = message[1]
            self.take_part(lambda task=task: task(self))  # type: ignore[misc]
            message = self._broadcast(None)
        if message is None:
            raise LeaderFailed("the first process cannot go on; its own message says why")
        if message[0] != topic:
            raise LeaderFailed(f"this process is at {topic}, the first one at {message[0]}: they are out of step")
        return message[1]

    def meet(self) -> None:
        """See `Processes.meet`."""
        from torch import distributed

        try:
            distributed.barrier(group=self._group)
        except RuntimeError:
            raise LeaderFailed(ENDED) from None

    def give_up(self) -> None:
        """See `Processes.give_up`."""
        with suppress(LeaderFailed):  # they have ended already
            self._broadcast(None)

    def together(self, task: Callable[[Processes], Value]) -> Value:
        """See `Processes.together`."""
        self._broadcast((TASK, task))
        return self.take_part(lambda: task(self))

    def _broadcast(self, message: tuple[str, Any] | None) -> tuple[str, Any] | None:
        import torch
        from torch import distributed

        box: list[Any] = [message]
        try:
            distributed.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        except RuntimeError:
            raise LeaderFailed(ENDED) from None
        return box[0]


def is_lost(error: BaseException) -> bool:
    """True for what torch raises where another process does not answer any more."""
    told = str(error)
    return isinstance(error, RuntimeError) and any(name in told for name in ("gloo", "NCCL", "ProcessGroup", "by peer"))


ALONE = Processes()


@cache
def find_processes() -> Processes:
    """Those that this process belongs to; joins their process group when first called."""
    return LaunchedProcesses() if launched_size() > 1 else ALONE


@cache
def helper_folder() -> str:
    """Where a helper's own output goes; removed when it ends."""
    folder = tempfile.mkdtemp(prefix="trim-helper-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def launched_size() -> int:
    """Processes that torchrun or srun started for this command; 1 if neither did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ["SLURM_STEP_NUM_TASKS"]) if in_slurm_step() else 1


def launched_rank() -> int:
    """This process's place among them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if in_slurm_step() else 0


def local_rank() -> int:
    """This process's place among those of its machine."""
    return int(os.environ["LOCAL_RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_LOCALID"])


def in_slurm_step() -> bool:
    """True in a task that srun started for this command; a batch script itself, or an interactive shell, is none."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return not interactive and "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ
