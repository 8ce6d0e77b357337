"""Run a forward pass over some records: shards written as they finish, resumable, on one device or many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from trim_lightning.engine.batches import Records, Shard, ShardBatches
from trim_lightning.engine.devices import Resources, is_spread
from trim_lightning.engine.modules import in_step
from trim_lightning.engine.shards import Elapsed, ShardForm
from trim_lightning.engine.trainer import ProcessAborted, interruptible, let_go, make_trainer
from trim_lightning.engine.writer import TOKENS, ShardWriter, TokenProgress
from trim_lightning.errors import UserError, first_line

log = logging.getLogger(__name__)


def run_sharded_pass(
    module: LightningModule,
    records: Records,
    plan: Sequence[Shard],
    form: ShardForm,
    directory: Path,
    *,
    scope: str = "all",
    resources: Resources,
    title: str,
    unit: str = TOKENS,
) -> float:
    """Compute those of the plan's shards that are not there yet.

    Each process of a spread pass takes every n-th missing shard; the data alone decide what a shard holds. Those of an
    earlier attempt are kept; the time spent is noted in the directory. The bar counts tokens, or records as ``unit``.
    The module has no model any more at the end, so it serves one pass.

    Returns:
        Seconds over all attempts, from the first batch to the last shard's file.
    """
    processes = resources.processes
    elapsed = Elapsed(directory)
    done = processes.agree(title, lambda: form.finished(plan))
    missing = [shard for shard in plan if shard.index not in done]

    def left() -> list[Shard]:
        there = form.finished(plan)
        return [shard for shard in plan if shard.index not in there]

    def compute(shards: Sequence[Shard], num_workers: int | None) -> None:
        if not shards:
            return
        data = ShardData(records, shards, scope, num_workers)
        tokens = sum(shard.tokens for shard in shards)
        total = tokens if unit == TOKENS else sum(len(rows) for shard in shards for rows in shard.batches)
        runner = make_trainer(resources.trainer, [ShardWriter(form, elapsed), TokenProgress(title, total, unit)])
        with interruptible(runner):
            runner.predict(module, datamodule=data, return_predictions=False)
        let_go(runner, module)

    if missing:
        death = None
        try:
            compute(missing, resources.num_workers)
        except ProcessAborted as error:
            log.warning("%s; once more, from the last shard", error)
            compute(left(), resources.num_workers)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):  # torch has no class for a dead loader process
                raise
            death = first_line(error)  # not the error, whose frames hold the first attempt's loader and results
        if death is not None:
            if is_spread(resources.trainer):  # the other processes wait at their next meeting
                raise UserError(
                    f"a process that made batches died ({death}); the same command goes on from the last shard, "
                    "scoring.num_workers=0 does without such processes"
                )
            log.warning("a process that made batches died (%s); this one makes them from here on", death)
            compute(left(), 0)
        processes.meet()  # all have written their last shard, and nobody's temporary files are about
        if processes.leads and not all(form.is_there(shard.index) for shard in missing):
            raise RuntimeError("the pass ended without all of its shards")  # never seal a part as the whole
    return elapsed.finish() if processes.leads else 0.0


class ShardData(LightningDataModule):
    """Gives each process its part of the missing shards."""

    def __init__(self, records: Records, shards: Sequence[Shard], scope: str, num_workers: int | None) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards than processes
        self.records, self.shards, self.scope = records, shards, scope
        self.num_workers = num_workers

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The batches of this process."""
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        mine = self.shards[rank::world]
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        workers = self.num_workers if self.num_workers is not None else 2 * on_gpu
        batches = ShardBatches(self.records, mine, self.scope)
        if in_step(self.trainer.strategy):
            # every process must call the model equally often: the others wait for its part of the weights
            parts = [self.shards[other::world] for other in range(world)]
            batches.fill(max(sum(len(shard.batches) for shard in part) for part in parts), self.shards[-1].batches[-1])
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            pin_memory=on_gpu,
            multiprocessing_context="spawn" if workers else None,  # a fork after torch has threads may hang
        )
