"""What the predict loops write and show: token shards, tokens/s and time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback

from trim_lightning.console.progress import progress_bar
from trim_lightning.engine.shards import Elapsed, ShardForm
from trim_lightning.engine.trainer import hush_lightning

TOKENS = "tokens"


class TokenProgress(Callback):
    """A progress bar over real tokens: percentage, tokens/s, time left. Shown on the first process only.

    With another ``unit`` than tokens it counts records.
    """

    def __init__(self, title: str, total: int, unit: str = TOKENS) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._bar: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        if trainer.is_global_zero:
            self._bar = progress_bar(self.title, self.total, self.unit)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance by the batch's real tokens."""
        if self._bar is not None and not batch.get("repeated", False):
            done = batch["tokens"] if self.unit == TOKENS else len(batch["rows"])
            done *= trainer.world_size  # the other processes are as fast as this one
            self._bar.update(min(done, self.total - self._bar.n))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


PENDING = 2  # shards computed but not yet on disk: a slow disk holds the model up rather than filling memory


class ShardWriter(BasePredictionWriter):
    """Collects the results of a shard's batches and writes them in a thread of its own while the model goes on."""

    def __init__(self, form: ShardForm, elapsed: Elapsed) -> None:
        super().__init__(write_interval="batch")
        self.form, self.elapsed = form, elapsed
        self._open: dict[int, list[tuple[torch.Tensor, Any]]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting, and the thread."""
        self._thread = ThreadPoolExecutor(1, "shard-writer")
        if trainer.is_global_zero:
            self.elapsed.start()

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
        if ticks:
            self.elapsed.tick()

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
