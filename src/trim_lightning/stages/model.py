"""A model by its files: tokenizer, tokenised records and weights, each loaded only when something needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.errors import UserError
from trim_lightning.models.precision import has_cuda, resolve_dtype, resolved_name
from trim_lightning.models.source import ModelSource
from trim_lightning.records.record_file import RecordFile
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.store import Cost, Entry, StageKey, Store
from trim_lightning.store.keys import digest_of
from trim_lightning.store.ledger import Ledger
from trim_lightning.store.versions import coarse_versions
from trim_lightning.tokens.tokenized import TokenizedRecords

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trim_lightning.engine.devices import Resources
    from trim_lightning.tokens.rendering import ChatRenderer

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}

PARTS = {  # what a user calls them
    "thoughts": "thoughts (reasoning_content, thinking, <think>)",
    "calls": "calls (tool_calls, function_call)",
    "tools": "tools (the field of that name)",
}


class ModelHandle:
    """Gives stages a model, its tokenizer and its tokenised records, through the store.

    Args:
        source: The model's files.
        dtype: ``model.dtype``.
        store: Stage results.
        ledger: Where stages are booked.
        trainer: Arguments of the Lightning Trainer.
        seed: Of training.
        max_length: Tokens kept of a record; a model that takes fewer cuts it to what it takes.
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
        self.max_length = min(max_length, source.max_positions or max_length)
        self._wanted_length = max_length
        self.dtype_name = dtype
        self.before_load: Callable[[], None] = lambda: None  # where another model is to make room

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's number format."""
        return resolve_dtype(self.resolved_dtype)

    @cached_property
    def resolved_dtype(self) -> str:
        """The name of `dtype`, known without loading torch."""
        return resolved_name(self.dtype_name)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the outputs of the model as it is on disk: files and number format."""
        return {"model": self.source.digest, "dtype": self.number_format(f"torch.{self.resolved_dtype}")}

    def number_format(self, dtype: torch.dtype | str) -> str:
        """The number format of the weights as keys of stages name it."""
        if self.source.quantize is None:
            return str(dtype)
        (library,) = coarse_versions(["bitsandbytes"]).values()
        return f"{dtype}, {self.source.quantize} of bitsandbytes {library}"

    @cached_property
    def device(self) -> torch.device:
        """Where one model runs outside a Lightning loop: the accelerator that ``trainer`` names or finds."""
        from trim_lightning.engine.devices import device_of

        return device_of(self.trainer)

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

    @cached_property
    def tokens_per_batch(self) -> int:
        """Padded tokens of a batch that suit this device."""
        return TOKENS_PER_BATCH["cuda" if has_cuda() else "cpu"]

    def resources(self, tokens_per_batch: int | None = None, num_workers: int | None = None) -> Resources:
        """What a pass of this model runs on.

        Args:
            tokens_per_batch: Padded tokens of a batch; None fits the device.
            num_workers: Processes that make batches; None fits the device.
        """
        from trim_lightning.engine.devices import Resources

        return Resources(self.trainer, tokens_per_batch or self.tokens_per_batch, num_workers, self.store.processes)

    def cost(
        self,
        stage: str,
        work: str,
        records: TokenizedRecords,
        *,
        training: TuningSettings | None = None,
        rows: Sequence[int] | None = None,
        resources: Resources | None = None,
        **more: Any,
    ) -> Cost:
        """What a stage costs that this model runs.

        Args:
            stage: Name in the manifest.
            work: See `Cost`.
            records: What is fed to the model.
            training: See `Cost`.
            rows: Those that are trained on in every epoch; None: all records, once.
            resources: What it runs on, if it may be spread over devices.
            more: Other attributes of a `Cost`.
        """
        dtype = "float32" if work == "full training" else self.dtype_name

        def count() -> int:
            from trim_lightning.tuning.micro_batches import trained_rows

            if training is None or rows is None:
                return records.total_tokens
            return training.epochs * int(records.lengths[trained_rows(records, rows)].sum())

        def load() -> PreTrainedModel:
            from trim_lightning.engine.devices import one_device
            from trim_lightning.engine.trainer import make_trainer
            from trim_lightning.models.load import load_model
            from trim_lightning.models.precision import resolve_dtype

            make_trainer(one_device(self.trainer), [])  # refuses what this machine does not have
            return self.placed(load_model(self.source, resolve_dtype(dtype)))

        batch = None if training is None else training.tokens_per_micro_batch
        if resources is not None:
            batch = resources.tokens_per_batch
        if resources is not None or training is not None:
            from trim_lightning.engine.devices import number_of_devices

            trainer = self.trainer if resources is None else resources.trainer
            more["per_machine"] = number_of_devices(trainer)
            more["devices"] = more["per_machine"] * int(trainer.get("num_nodes") or 1)
            more["divided"] = more["devices"] > 1 and trainer.get("strategy") == "fsdp"
        batch = batch or self.tokens_per_batch
        model = (self.source.digest, dtype, self.source.quantize)
        return Cost(self.ledger.under or stage, count, work, load, model, records, batch, training, **more)

    def tokens_key(self, records: RecordFile) -> StageKey:
        """Key of the tokenised form of some records."""
        from trim_lightning.tokens.rendering import DATE, RENDERING_VERSION

        template = None if self.source.chat_template is None else digest_of(self.source.chat_template)
        return StageKey(
            "tokens",
            RENDERING_VERSION,
            {"max_length": self.max_length, "chat_template": template, "date": DATE},
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
        tokens = TokenizedRecords(entry.path)
        self._check_ids(tokens)
        told = []
        if tokens.truncated and self.max_length < self._wanted_length:
            told.append(
                f"max_length={self._wanted_length}: {self.source.name} takes at most {self.max_length} tokens, where "
                f"{tokens.truncated} records of {records.what} {records.name} are cut"
            )
        for part, number in tokens.dropped.items():
            told.append(
                f"{records.what} {records.name}: {PARTS[part]} of {number:,} records are not rendered by the chat "
                f"template of {self.source.name} and count for nothing; model.chat_template names another"
            )
        for line in told:
            if line not in self.ledger.warnings:  # the same records are tokenised before each of their passes
                self.ledger.warn(line)
        return tokens, entry

    def _check_ids(self, tokens: TokenizedRecords) -> None:
        """Refuse tokens that the model has no embedding for.

        Raises:
            UserError: naming the first.
        """
        rows = self.source.vocabulary
        if rows is not None and self.source.base is None and (largest := tokens.largest_id()) >= rows:
            raise UserError(
                f"model {self.source.name}: its tokenizer gives the token {largest}, and the model has embeddings for "
                f"0 to {rows - 1} only; use the tokenizer that belongs to the model"
            )

    def book_training(self, stage: str, entry: Entry, settings: TuningSettings) -> None:
        """Book a training, and say which of the modules that were named for LoRA the model does not have."""
        self.ledger.book(stage, entry)
        absent = (entry.facts.get("lora") or {}).get("absent")
        if absent:
            from trim_lightning.models.lora import key_of

            self.ledger.warn(
                f"{key_of(settings)}: {self.source.name} has no {', '.join(absent)}; trained: "
                f"{', '.join(entry.facts['lora']['modules'])}"
            )

    def base_model(self) -> PreTrainedModel:
        """A freshly loaded model as it is on disk."""
        from trim_lightning.models.load import load_model

        return load_model(self.source, self.dtype)

    def placed(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model on its device (a Lightning loop leaves it on the CPU), unless accelerate has spread it."""
        if getattr(model, "hf_device_map", None) is None:
            model.to(self.device)  # type: ignore[arg-type]
        return model
