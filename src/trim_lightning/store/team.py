"""Several processes that a launcher (torchrun, srun) started with one command: who leads, and how they agree.

Every process runs the same program. The leader does all the work that is done once (reading, tokenising, training,
writing); the others wait for it at the store, take their part in the passes that are spread, and then are done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from trim_lightning.errors import UserError

Value = TypeVar("Value")
MEETING = timedelta(minutes=10)  # all processes have started by then, or one of them never will
PATIENCE = timedelta(days=14)  # helpers wait through a whole training of the leader


class PartDone(Exception):
    """A helper has done its part; the leader goes on alone."""


class LeaderFailed(UserError):
    """The leader cannot go on, and has said why itself."""


class Team:
    """The processes of one command; this base class is a team of one."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """True in the process that writes results."""
        return self.rank == 0

    def agree(self, value: Callable[[], Value]) -> Value:
        """The leader's value, computed there alone, in every process. All processes must call it in step.

        Raises:
            LeaderFailed: in the others, if the leader said `give_up` or has ended.
        """
        return value()

    def give_up(self) -> None:
        """Tell the others that the leader cannot go on with what they wait for."""


class LaunchedTeam(Team):
    """Processes that speak through a torch process group, which Lightning's strategies use as well."""

    def __init__(self) -> None:
        import torch
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            rank, size = launched_rank(), launched_size()
            for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
                os.environ.setdefault(name, str(value))
            if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
                from lightning.pytorch.plugins.environments import SLURMEnvironment

                environment = SLURMEnvironment()
                os.environ["MASTER_ADDR"] = environment.main_address
                os.environ["MASTER_PORT"] = str(environment.main_port)
            store, _, _ = next(rendezvous("env://", rank, size, timeout=MEETING))
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def agree(self, value: Callable[[], Value]) -> Value:
        """See `Team.agree`."""
        went_well, found = self._broadcast((True, value()) if self.leads else None)
        if not went_well:
            raise LeaderFailed("the first process cannot go on; its own message says why")
        return found

    def give_up(self) -> None:
        """See `Team.give_up`."""
        self._broadcast((False, None))

    def _broadcast(self, message: tuple[bool, Any] | None) -> tuple[bool, Any]:
        import torch
        from torch import distributed

        box: list[Any] = [message]
        try:
            distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        except RuntimeError:
            raise LeaderFailed("another process of this command has ended; its own message says why") from None
        return box[0]


ALONE = Team()


@cache
def find_team() -> Team:
    """The team that this process belongs to; joins its process group when first called."""
    return LaunchedTeam() if launched_size() > 1 else ALONE


def launched_size() -> int:
    """Processes that torchrun or srun started for this command; 1 if neither did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if in_slurm_step():
        return int(os.environ["SLURM_NTASKS"])
    return 1


def launched_rank() -> int:
    """This process's place among them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if in_slurm_step() else 0


def in_slurm_step() -> bool:
    """True in a task that srun started; a batch script itself, or an interactive shell, is none."""
    return "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ and "SLURM_NTASKS" in os.environ
