"""Sentence embeddings: cosine between vectors of a sentence-transformers model (an optional extra)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trim_lightning.console.progress import progress_bar
from trim_lightning.engine.shards import WorkClock, finished_values, write_facts, write_values
from trim_lightning.errors import UserError
from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import AGGREGATES, cosine_groups, score_table, usable_groups
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.word_file import scoped_text
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Cost, Entry, StageKey, Store
from trim_lightning.store.keys import digest_of

SHARD = 512  # records a kill may lose
PARTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass
class EmbeddingSelector(Selector):
    """A record's score is the cosine of its text's embedding with the nearest target's.

    The text is that of the turns in scope, cut where the embedding model cuts. The scorer's weights are not
    used. Which model and whether to add prompts to texts is the user's choice; we add none.
    """

    uses_model: ClassVar[bool] = False
    path: str | None = key(None, "sentence-transformers model: a directory or a Hub id")
    batch_size: int = key(32, "records per forward pass", low=1)
    aggregate: str = key("max", "how the scores against a group's targets become one", choices=AGGREGATES)

    def score(self, task: SelectionTask) -> ScoreTable:
        """Embed targets and pool, then cosines shard by shard."""
        assert task.targets is not None
        encoder = Encoder(self.path, self.batch_size, task.store)
        records, scope = task.targets.records, task.settings.scope
        groups = usable_groups(task, lambda row: not is_blank(records, row, scope), "no text")
        target_vectors = self._embed(task, encoder, records, "fingerprint")
        pool_vectors = self._embed(task, encoder, task.pool, "score")
        return score_table(task, cosine_groups(task, pool_vectors, target_vectors, groups, self.aggregate))

    def _embed(self, task: SelectionTask, encoder: Encoder, records: RecordFile, booked: str) -> Entry:
        """The stored embeddings of some records' scoped texts."""
        scope = task.settings.scope
        stage_key = StageKey(
            "embeddings",
            1,
            {"scope": scope, "batch_size": self.batch_size},
            {"records": records.identity(), "model": encoder.digest},
        )

        def build(directory: Path) -> dict[str, Any]:
            encoder.load()
            return {"seconds": embed_records(records, scope, encoder, directory, booked)}

        entry = task.store.get(stage_key, build, resumable=True, cost=Cost(booked, lambda: 0))
        task.ledger.book(booked, entry)
        return entry


def is_blank(records: RecordFile, row: int, scope: str) -> bool:
    """True if a record has no text in scope."""
    return not scoped_text(records.record(row), scope).strip()


class Encoder:
    """A sentence-transformers model, a directory or a Hub id, loaded when first needed.

    Attributes:
        digest: sha256 over the contents of the model's files.

    Raises:
        UserError: if the library or the model is missing, or the model has no safetensors weights.
    """

    def __init__(self, path: str | None, batch_size: int, store: Store) -> None:
        if path is None:
            raise UserError("method.path: a value is needed; give a sentence-transformers model, method.path=...")
        self._where = f"method.path={path}"
        self._batch_size = batch_size
        if importlib.util.find_spec("sentence_transformers") is None:
            raise UserError(
                "method=embedding: the package sentence-transformers is not installed; "
                "pip install 'trim-lightning[embedding]'"
            )
        self._directory = find_encoder(path)
        files = sorted(file for part in PARTS for file in self._directory.rglob(part) if file.is_file())
        if not any(file.suffix == ".safetensors" for file in files):
            raise UserError(
                f"{self._where}: has no *.safetensors weights; save the model again with sentence-transformers"
            )
        names = [str(file.relative_to(self._directory)) for file in files]
        self.digest = digest_of([[name, store.file_digest(file)] for name, file in zip(names, files, strict=True)])
        self.load = cache(self._load)

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer

        logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
        try:
            return SentenceTransformer(
                str(self._directory), local_files_only=True, model_kwargs={"use_safetensors": True}
            )
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{self._where}: cannot be loaded as a sentence-transformers model ({lines[0]})") from None

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings ``[texts, width]`` float32."""
        vectors = self.load().encode(
            list(texts), batch_size=self._batch_size, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(vectors, dtype=np.float32)


def find_encoder(path: str) -> Path:
    """The directory of a sentence-transformers model, downloaded if it is a Hub id.

    Raises:
        UserError: if there is no such model.
    """
    from trim_lightning.models.source import is_local

    where = f"method.path={path}"
    if is_local(path):
        directory = Path(path).expanduser()
        if not (directory / "modules.json").is_file():
            raise UserError(f"{where}: is no sentence-transformers model directory (it has no modules.json)")
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=list(PARTS)))
    except HFValidationError:
        raise UserError(f"{where}: neither a directory nor a Hub id (owner/name)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{where}: not on this disk, and the Hub does not give it ({type(error).__name__}); "
            "check the id, or give a directory"
        ) from None


def embed_records(records: RecordFile, scope: str, encoder: Encoder, directory: Path, title: str) -> float:
    """Embed every record's scoped text; shards that an earlier attempt left in ``directory`` are kept.

    Returns:
        Seconds over all attempts.
    """
    clock = WorkClock(directory)
    shards = [range(start, min(len(records), start + SHARD)) for start in range(0, len(records), SHARD)]
    done = finished_values(directory, dict(enumerate(shards)))
    clock.start()
    with progress_bar(title, len(records), unit="records") as bar:
        for index, rows in enumerate(shards):
            if index not in done:
                vectors = encoder.encode([scoped_text(records.record(row), scope) for row in rows])
                write_values(directory, index, np.array(rows, dtype=np.int64), vectors)
                clock.tick()
            bar.update(len(rows))
    write_facts(directory, {"shards": len(shards)})
    return clock.finish()
