"""Sentence embeddings: cosine between vectors of a sentence-transformers model (an optional extra)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trim_lightning.console.progress import progress_bar
from trim_lightning.engine.shards import Elapsed, finished_values, write_facts, write_values
from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import (
    AGGREGATE,
    AGGREGATES,
    ROUND_ROBIN,
    check_aggregates,
    cosine_groups,
    targets_table,
    usable_groups,
)
from trim_lightning.models.encoder import Encoder
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.word_file import scoped_text
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Cost, Entry, StageKey

SHARD = 512  # records a kill may lose


@dataclass
class EmbeddingSelector(Selector):
    """A record's score is the cosine of its text's embedding with the nearest target's; targets take turns to pick.

    The text is that of the turns in scope, cut where the embedding model cuts. The scorer's weights are not
    used. Which model, and whether to put a prompt before the targets, is the user's choice; we add none.
    """

    uses_model: ClassVar[bool] = False
    path: str | None = key(None, "sentence-transformers model: a directory or a Hub id")
    batch_size: int = key(32, "records per forward pass", low=1)
    target_prompt: str = key("", "text before each target, for models that want one (NV-Embed, E5)")
    aggregate: str = key(ROUND_ROBIN, AGGREGATE, choices=AGGREGATES)

    def score(self, task: SelectionTask) -> ScoreTable:
        """Embed targets and pool, then cosines shard by shard."""
        assert task.targets is not None
        check_aggregates(task, self.aggregate)
        encoder = Encoder(self.path, self.batch_size, task.store)
        records, scope = task.targets.records, task.settings.scope
        groups = usable_groups(task, lambda row: not is_blank(records, row, scope), "no text")
        target_vectors = self._embed(task, encoder, records, "fingerprint", self.target_prompt)
        pool_vectors = self._embed(task, encoder, task.pool, "score", "")
        score = partial(cosine_groups, task, pool_vectors, target_vectors)
        return targets_table(task, groups, self.aggregate, score)

    def _embed(self, task: SelectionTask, encoder: Encoder, records: RecordFile, booked: str, prompt: str) -> Entry:
        """The stored embeddings of some records' scoped texts, a prompt before each."""
        scope = task.settings.scope
        stage_key = StageKey(
            "embeddings",
            2,
            {"scope": scope, "batch_size": self.batch_size, "prompt": prompt},
            {"records": records.identity(), "model": encoder.digest},
        )

        def build(directory: Path) -> dict[str, Any]:
            encoder.load()
            return {"seconds": embed_records(records, scope, encoder, directory, booked, prompt)}

        entry = task.store.get(stage_key, build, resumable=True, cost=Cost(booked, lambda: 0))
        task.ledger.book(booked, entry)
        return entry


def is_blank(records: RecordFile, row: int, scope: str) -> bool:
    """True if a record has no text in scope."""
    return not scoped_text(records.record(row), scope).strip()


def embed_records(records: RecordFile, scope: str, encoder: Encoder, directory: Path, title: str, prompt: str) -> float:
    """Embed a prompt and every record's scoped text; shards that an earlier attempt left in ``directory`` are kept.

    Returns:
        Seconds over all attempts.
    """
    elapsed = Elapsed(directory)
    shards = [range(start, min(len(records), start + SHARD)) for start in range(0, len(records), SHARD)]
    done = finished_values(directory, dict(enumerate(shards)))
    elapsed.start()
    with progress_bar(title, len(records), unit="records") as bar:
        for index, rows in enumerate(shards):
            if index not in done:
                vectors = encoder.encode([prompt + scoped_text(records.record(row), scope) for row in rows])
                write_values(directory, index, np.array(rows, dtype=np.int64), vectors)
                elapsed.tick()
            bar.update(len(rows))
    write_facts(directory, {"shards": len(shards)})
    return elapsed.finish()
