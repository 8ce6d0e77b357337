"""Run a forward pass over some records: shards written as they finish, resumable, on one device or many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader

from trim_lightning.engine.batches import Shard, ShardBatches
from trim_lightning.engine.devices import Resources, is_spread
from trim_lightning.engine.elapsed import WorkClock
from trim_lightning.engine.modules import in_step
from trim_lightning.engine.trainer import hush_lightning, interruptible, make_trainer
from trim_lightning.engine.writer import TokenProgress
from trim_lightning.errors import UserError, first_line
from trim_lightning.tokens.tokenized import TokenizedRecords

log = logging.getLogger(__name__)
PENDING = 2  # shards computed but not yet on disk: a slow disk holds the model up rather than filling memory


class ShardForm(Protocol):
    """How the results of a shard's batches become a file that is whole or absent."""

    def finished(self, plan: Sequence[Shard]) -> set[int]:
        """Indexes of the plan's shards that are whole; removes damaged ones and what a kill left half written."""

    def is_there(self, index: int) -> bool:
        """True if the shard's file exists; it was written by rename, so it need not be read again."""

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        """Write one shard by rename from its batches' rows and predictions."""


def run_sharded_pass(
    module: LightningModule,
    records: TokenizedRecords,
    plan: Sequence[Shard],
    form: ShardForm,
    directory: Path,
    *,
    scope: str = "all",
    resources: Resources,
    title: str,
) -> float:
    """Compute those of the plan's shards that are not there yet.

    Each process of a spread pass takes every n-th missing shard; the data alone decide what a shard holds.

    Args:
        module: Its ``predict_step`` is run on every batch.
        records: The tokens.
        plan: All shards.
        form: Where they go and what they look like; those of an earlier attempt are kept.
        directory: Where the time spent is noted.
        scope: Content tokens that are in the batches' ``scope``.
        resources: Devices, batch size, workers.
        title: Name on the progress bar.

    Returns:
        Seconds over all attempts, from the first batch to the last shard's file.
    """
    team = resources.team
    clock = WorkClock(directory)
    done = team.agree(title, lambda: form.finished(plan))
    missing = [shard for shard in plan if shard.index not in done]

    def compute(shards: Sequence[Shard], num_workers: int | None) -> None:
        data = ShardData(records, shards, scope, num_workers)
        runner = make_trainer(resources.trainer, [ShardWriter(form, clock), TokenProgress(title, data.tokens)])
        with interruptible(runner):
            runner.predict(module, datamodule=data, return_predictions=False)

    if missing:
        try:
            compute(missing, resources.num_workers)
            death = None
        except RuntimeError as error:
            if not is_of_a_worker(error):
                raise
            death = first_line(error)  # not the error, whose frames hold the first attempt's loader and results
        if death is not None:
            if is_spread(resources.trainer):  # the other processes wait at their next meeting
                raise UserError(
                    f"a process that made batches died ({death}); the same command goes on from the last shard, "
                    "scoring.num_workers=0 does without such processes"
                )
            log.warning("a process that made batches died (%s); this one makes them from here on", death)
            done = form.finished(plan)
            if len(done) < len(plan):
                compute([shard for shard in plan if shard.index not in done], 0)
        team.meet()  # all have written their last shard, and nobody's temporary files are about
        if team.leads and not all(form.is_there(shard.index) for shard in missing):
            raise RuntimeError("the pass ended without all of its shards")  # never seal a part as the whole
    return clock.finish() if team.leads else 0.0


def is_of_a_worker(error: RuntimeError) -> bool:
    """True for the error that torch raises when one of a loader's processes has died; it has no class of its own."""
    return str(error).startswith("DataLoader worker (pid")


class ShardData(LightningDataModule):
    """Gives each process its part of the missing shards.

    Args:
        records: The tokens.
        shards: Shards to compute.
        scope: Content tokens that count.
        num_workers: See `Resources`.
    """

    def __init__(
        self, records: TokenizedRecords, shards: Sequence[Shard], scope: str, num_workers: int | None = None
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards than processes
        self.records, self.shards, self.scope = records, shards, scope
        self.num_workers = num_workers

    @property
    def tokens(self) -> int:
        """Real tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

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


class ShardWriter(BasePredictionWriter):
    """Collects the results of a shard's batches and writes them in a thread of its own while the model goes on."""

    def __init__(self, form: ShardForm, clock: WorkClock | None = None) -> None:
        super().__init__(write_interval="batch")
        self.form, self.clock = form, clock
        self._open: dict[int, list[tuple[torch.Tensor, Any]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start clock and thread."""
        self._thread = ThreadPoolExecutor(1, "shard-writer")
        if self.clock is not None and trainer.is_global_zero:
            self.clock.start()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep one batch's result; with the last batch of its shard, hand the shard to the thread."""
        if batch["repeated"]:
            return
        shard = int(batch["shard"])
        self._open.setdefault(shard, []).append((batch["rows"], prediction))
        if batch["last"]:
            assert self._thread is not None
            parts = self._open.pop(shard)
            self._settle(PENDING - 1)
            self._pending.append(self._thread.submit(self._write, shard, parts, trainer.is_global_zero))

    def _write(self, shard: int, parts: Sequence[tuple[torch.Tensor, Any]], ticks: bool) -> None:
        self.form.write(shard, parts)
        if self.clock is not None and ticks:
            self.clock.tick()

    def _settle(self, most: int = 0) -> None:
        """Wait until at most ``most`` shards are pending; raises what their writing raised."""
        while len(self._pending) > most:
            self._pending.pop(0).result()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last shard."""
        self._settle()
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the thread finish what is computed: a restart then need not compute it again."""
        self._close()

    def _close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_pending": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        hush_lightning()  # a spawned process has none of this one's filters, and unpickles this first
        self.__dict__.update(state)


def model_for(resources: Resources, model: Callable[[], Any], recipe: Callable[[], Any]) -> Any:
    """The loaded model for a pass on one device; for a spread one what each process loads it by.

    Args:
        resources: What the pass runs on.
        model: Gives the model of this process.
        recipe: Gives a `trim_lightning.models.load.ModelRecipe`.

    Raises:
        UserError: for a model that is itself spread over devices.
    """
    if not is_spread(resources.trainer):
        return model()
    loader = recipe()
    if loader.source.device_map is not None:
        raise UserError(
            f"model.device_map={loader.source.device_map}: one process spreads the model over all devices; use "
            "trainer.devices=1 with it, or trainer=fsdp without it"
        )
    return loader
