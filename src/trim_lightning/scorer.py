"""The scorer: a model, warmed up or not, loaded only when a stage has to run it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.ledger import Ledger
from trim_lightning.models.source import ModelSource
from trim_lightning.records.record_file import RecordFile
from trim_lightning.settings import WarmupSettings
from trim_lightning.store import Entry, StageKey, Store
from trim_lightning.store.keys import digest_of
from trim_lightning.tokens.tokenized import TokenizedRecords

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trim_lightning.tokens.rendering import ChatRenderer

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}


class Scorer:
    """Gives stages their model, tokenizer and tokenised records, through the store.

    Args:
        source: The model's files.
        dtype: ``model.dtype``.
        store: Stage results.
        ledger: Where stages are booked.
        trainer: Arguments of the Lightning Trainer.
        seed: Of the warm-up.
        max_length: Tokens kept of a record.
    """

    def __init__(
        self,
        source: ModelSource,
        dtype: str,
        store: Store,
        ledger: Ledger,
        *,
        trainer: Mapping[str, Any],
        seed: int,
        max_length: int,
    ) -> None:
        self.source = source
        self.store = store
        self.ledger = ledger
        self.trainer = trainer
        self.seed = seed
        self.max_length = max_length
        self._dtype = dtype
        self._adapter: Entry | None = None
        self._model: PreTrainedModel | None = None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's number format."""
        from trim_lightning.models.precision import resolve_dtype

        return resolve_dtype(self._dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from trim_lightning.models.load import load_tokenizer

        return load_tokenizer(self.source)

    @cached_property
    def renderer(self) -> ChatRenderer:
        """Chat rendering with this tokenizer."""
        from trim_lightning.tokens.rendering import ChatRenderer

        return ChatRenderer(self.tokenizer, self.source.chat_template)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the model's outputs: weights, warm-up and number format."""
        return {
            "model": self.source.digest,
            "warmup": None if self._adapter is None else self._adapter.key.hex,
            "dtype": str(self.dtype),
        }

    @cached_property
    def tokens_per_batch(self) -> int:
        """Padded tokens of a batch that suit this device."""
        import torch

        return TOKENS_PER_BATCH["cuda" if torch.cuda.is_available() else "cpu"]

    def tokens_key(self, records: RecordFile) -> StageKey:
        """Key of the tokenised form of some records."""
        template = self.source.chat_template
        return StageKey(
            "tokens",
            1,
            {
                "max_length": self.max_length,
                "chat_template": None if template is None else digest_of(template),
            },
            {"records": records.identity(), "model": self.source.digest},
        )

    def tokenize(self, records: RecordFile, title: str = "tokenize") -> tuple[TokenizedRecords, Entry]:
        """The tokenised form of some records, from the store or made now."""
        from trim_lightning.tokens.tokenized import tokenize_records

        def build(directory: Path) -> dict[str, Any]:
            renderer = self.renderer
            started = time.perf_counter()
            facts = tokenize_records(records, renderer, self.max_length, directory, title)
            return {**facts, "seconds": time.perf_counter() - started}

        entry = self.store.get(self.tokens_key(records), build)
        return TokenizedRecords(entry.path), entry

    def warm_up(self, settings: WarmupSettings, pool: TokenizedRecords, pool_key: StageKey) -> None:
        """Train the warm-up adapter on a part of the pool, or find it in the store."""
        from dataclasses import asdict

        from trim_lightning.tuning.warmup import draw_warmup_rows

        matters = {name: value for name, value in asdict(settings).items() if name != "checkpoint_seconds"}
        key = StageKey(
            "warmup",
            1,
            {"warmup": matters, "seed": self.seed},
            {"pool": pool_key.hex, "scorer": {"model": self.source.digest, "dtype": str(self.dtype)}},
        )

        def build(directory: Path) -> dict[str, Any]:
            from trim_lightning.tuning.run import merge, train_lora

            model = self.base_model()
            rows = draw_warmup_rows(pool.lengths, settings.fraction, self.seed)
            started = time.perf_counter()
            wrapped, facts = train_lora(
                model, pool, rows, settings, directory, seed=self.seed, trainer=self.trainer, title="warm-up"
            )
            facts["seconds"] = time.perf_counter() - started
            facts["records"] = len(rows)
            self._model = merge(wrapped, self.dtype)
            return facts

        self._adapter = self.store.get(key, build, resumable=True)
        self.ledger.book("warmup", self._adapter)

    def base_model(self) -> PreTrainedModel:
        """A freshly loaded model without warm-up."""
        from trim_lightning.models.load import load_model

        return load_model(self.source, self.dtype)

    def model(self) -> PreTrainedModel:
        """The scorer's model, its warm-up adapter merged."""
        if self._model is None:
            model = self.base_model()
            if self._adapter is not None:
                from peft import PeftModel

                from trim_lightning.tuning.run import ADAPTER, merge

                wrapped = PeftModel.from_pretrained(model, str(self._adapter.path / ADAPTER), is_trainable=False)
                model = merge(wrapped, self.dtype)
            self._model = model
        return self._model
