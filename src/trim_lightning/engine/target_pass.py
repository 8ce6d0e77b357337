"""Run the target pass and keep its raw signals."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.engine.batches import Shard, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.modules import TargetPass
from trim_lightning.engine.sharded_pass import run_sharded_pass
from trim_lightning.engine.shards import TableShards, shard_path, write_shard
from trim_lightning.files.atomic import write_atomically
from trim_lightning.models.load import ModelRecipe
from trim_lightning.models.reading import Reading
from trim_lightning.tokens.tokenized import TokenizedRecords

FILE, PARTS, NOTE = "signals.parquet", "parts", "reading.json"
COLUMNS = ("row", "token_ids", "roles", "row_signal", "column_signal", "probability", "hidden")


@dataclass(frozen=True)
class TargetSignals:
    """What the target pass saw of one target example.

    Attributes:
        row: Place in the target file's drawn order.
        token_ids: ``[seq]`` int64, scaffolding included.
        roles: ``[seq]`` uint8.
        row_signal: ``[layers, seq]`` float32.
        column_signal: ``[layers, seq]`` float32.
        probability: ``[seq]`` float32, of each token after those before it; NaN of the first.
        hidden: ``[seq, hidden]`` float32.
    """

    row: int
    token_ids: Tensor
    roles: Tensor
    row_signal: Tensor
    column_signal: Tensor
    probability: Tensor
    hidden: Tensor


class SignalShards(TableShards):
    """What the target pass saw of a shard's records, as one Parquet file: a line a record, `COLUMNS` flattened."""

    def write(self, index: int, parts: Sequence[tuple[Tensor, Any]]) -> None:
        records = [record for _, prediction in parts for record in prediction]
        lines = [{**record, **{name: record[name].flatten().numpy() for name in COLUMNS[1:]}} for record in records]
        write_shard(as_table(lines), self.directory, index)

    def read(self, plan: Sequence[Shard]) -> list[dict[str, Any]]:
        """The lines of all shards in row order."""
        lines = []
        for shard in plan:
            table = pq.read_table(shard_path(self.directory, shard.index))
            values = [table[name].combine_chunks() for name in COLUMNS[1:]]
            for place, row in enumerate(table["row"].to_pylist()):
                own = (column[place].values.to_numpy() for column in values)
                lines.append({"row": row, **dict(zip(COLUMNS[1:], own, strict=True))})
        return sorted(lines, key=lambda line: line["row"])


def as_table(lines: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Lines with `COLUMNS` as a table."""
    return pa.table({name: [line[name] for line in lines] for name in COLUMNS})


def run_target_pass(
    model: PreTrainedModel | ModelRecipe,
    records: TokenizedRecords,
    directory: Path,
    *,
    resources: Resources,
) -> dict[str, Any]:
    """One forward over the targets with attention read in every layer, written to ``signals.parquet``.

    Batches are shards of their own, of which an earlier attempt's are kept: a few targets go around all devices.

    Returns:
        In the first process ``seconds`` over all attempts, ``tokens`` fed to the model and, unless all layers were
        read, ``softmax``: the ``layers`` that have softmax attention, ``of`` how many, and ``why`` none was read.
    """
    plan = plan_shards(records.lengths, resources.tokens_per_batch, shard_tokens=1)
    folder = directory / PARTS
    folder.mkdir(exist_ok=True)
    form = SignalShards(folder)
    forward = TargetPass(model, folder / NOTE)
    seconds = run_sharded_pass(forward, records, plan, form, folder, resources=resources, title="fingerprint")
    if not resources.processes.leads:
        return {}
    started = time.perf_counter()
    noted = json.loads((folder / NOTE).read_text())
    reading = Reading(**{**noted, "layers": tuple(noted["layers"])})
    content = pa.BufferOutputStream()
    pq.write_table(as_table(form.read(plan)), content, compression="zstd")
    write_atomically(directory / FILE, content.getvalue().to_pybytes())
    shutil.rmtree(folder)
    seconds += time.perf_counter() - started
    return {"seconds": seconds, "tokens": records.total_tokens, **reading.facts}


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
                row_signal=tensor("row_signal", len(record["row_signal"]) // seq, seq),
                column_signal=tensor("column_signal", len(record["column_signal"]) // seq, seq),
                probability=tensor("probability", seq),
                hidden=tensor("hidden", seq, -1),
            )
        )
    return signals
