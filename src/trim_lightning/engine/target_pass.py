"""Run the target pass and keep its raw signals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.devices import one_device
from trim_lightning.engine.modules import TargetPass
from trim_lightning.engine.trainer import interruptible, make_trainer
from trim_lightning.engine.writer import TokenProgress
from trim_lightning.tokens.tokenized import TokenizedRecords

FILE = "signals.parquet"


@dataclass(frozen=True)
class TargetSignals:
    """What the target pass saw of one target example.

    Attributes:
        row: Place in the target file's drawn order.
        token_ids: ``[seq]`` int64, scaffolding included.
        roles: ``[seq]`` uint8.
        row_signal: ``[layers, seq]`` float32.
        column_signal: ``[layers, seq]`` float32.
        hidden: ``[seq, hidden]`` float32.
    """

    row: int
    token_ids: Tensor
    roles: Tensor
    row_signal: Tensor
    column_signal: Tensor
    hidden: Tensor


def run_target_pass(
    model: PreTrainedModel,
    records: TokenizedRecords,
    num_layers: int,
    directory: Path,
    *,
    trainer: Mapping[str, Any],
    tokens_per_batch: int,
) -> dict[str, int]:
    """One forward over the targets with attention read in every layer, written to ``signals.parquet``.

    The pass runs on one device, whatever the Trainer's arguments name.

    Returns:
        ``tokens`` fed to the model.
    """
    shards = plan_shards(records.lengths, tokens_per_batch)
    batches = ShardBatches(records, shards, "all")
    runner = make_trainer(one_device(trainer), [TokenProgress("fingerprint", batches.tokens)])
    with interruptible(runner):
        found: Any = runner.predict(TargetPass(model, num_layers), DataLoader(batches, batch_size=None))
    seen = sorted(itertools.chain.from_iterable(found or ()), key=lambda record: record["row"])
    table = {
        name: [record[name].flatten().numpy() if name != "row" else record[name] for record in seen]
        for name in ("row", "token_ids", "roles", "row_signal", "column_signal", "hidden")
    }
    pq.write_table(pa.table(table), directory / FILE, compression="zstd")
    return {"tokens": batches.tokens}


def read_signals(directory: Path) -> list[TargetSignals]:
    """Read what `run_target_pass` wrote, in row order."""
    signals = []
    for record in pq.read_table(directory / FILE).to_pylist():
        seq = len(record["token_ids"])

        def tensor(name: str, *shape: int, record: dict[str, Any] = record) -> Tensor:
            return torch.from_numpy(np.asarray(record[name], dtype=np.float32)).reshape(*shape)

        signals.append(
            TargetSignals(
                row=record["row"],
                token_ids=torch.tensor(record["token_ids"], dtype=torch.int64),
                roles=torch.tensor(record["roles"], dtype=torch.uint8),
                row_signal=tensor("row_signal", -1, seq),
                column_signal=tensor("column_signal", -1, seq),
                hidden=tensor("hidden", seq, -1),
            )
        )
    return signals
