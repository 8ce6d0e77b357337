"""TRIM from Python, without Hydra: load a scorer, fingerprint a few targets, score an iterable, take the top.

    scorer = trim_lightning.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    bank = scorer.fingerprint(targets)
    scores = scorer.score(pool, bank)
    coreset = [pool[row] for row in scores.top(fraction=0.05)]

Records are dicts in any layout that the command line recognises, in a list, a generator, a pandas table or a data set
of the library datasets. There is no store here: what is computed is returned and forgotten.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.modules import ScoringPass, TargetPass
from trim_lightning.engine.record_pass import RecordPass
from trim_lightning.engine.record_statistics import PositionWeightedMean
from trim_lightning.engine.target_pass import TargetSignals
from trim_lightning.errors import UserError
from trim_lightning.models.adapter import apply_adapter
from trim_lightning.models.load import load_model, load_tokenizer
from trim_lightning.models.loss import hidden_width
from trim_lightning.models.precision import resolve_dtype
from trim_lightning.models.reading import number_of_layers, reading_of
from trim_lightning.models.source import find_model
from trim_lightning.records.fields import LayoutError
from trim_lightning.records.layouts import LayoutReader
from trim_lightning.records.python_records import as_records
from trim_lightning.records.record import Turn
from trim_lightning.records.shapes import FieldKeys
from trim_lightning.selection.ranking import DEFAULT_FRACTION, budget_count, rank_by_score
from trim_lightning.settings.schema import FallbackSettings, ModelSettings, PoolerSettings, SaliencySettings
from trim_lightning.stages.fingerprints import banks_of, weigh
from trim_lightning.stages.token_scores import ScopedTokens, pool_tokens, scaled_idf
from trim_lightning.store import Store
from trim_lightning.tokens.rendering import ChatRenderer, RenderError
from trim_lightning.tokens.tokenized import TokenSequence, scope_mask
from trim_lightning.trim.fingerprints import FingerprintBank

CHUNK = 1024  # records of an iterable that are held at once


@dataclass(frozen=True)
class Scores:
    """Scores of an iterable of records, each ``[records]`` float32; NaN where a record has no scoped token."""

    score: NDArray[np.float32]
    mean: NDArray[np.float32]
    max: NDArray[np.float32]
    coverage: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.score)

    def top(self, fraction: float | None = None, *, count: int | None = None) -> list[int]:
        """Rows of the best records, best first, ties in the order of the iterable.

        Args:
            fraction: Share of all records, unscored ones included; 5 % if neither budget is given.
            count: Number of records.

        Raises:
            UserError: if both are given or one is out of bounds.
        """
        if fraction is not None and count is not None:
            raise UserError("top: give a fraction or a count, not both")
        if fraction is not None and not 0 < fraction <= 1:
            raise UserError(f"top: fraction={fraction} must be above 0 and at most 1")
        if count is not None and not 1 <= count <= len(self):
            raise UserError(f"top: count={count} must be between 1 and {len(self)}, the number of records")
        if count is None:
            count = budget_count(len(self), DEFAULT_FRACTION if fraction is None else fraction)
        return [int(row) for row in rank_by_score(self.score)[:count]]


class TrimScorer:
    """A model that can fingerprint target records and score candidates.

    Args:
        model: A causal LM loaded with the attention hook (see `load`).
        tokenizer: Its fast tokenizer.
        scope: Content tokens that count: ``all``, ``prompt`` or ``response``.
        max_length: Tokens kept of a record.
        tokens_per_batch: Padded tokens of a forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        scope: str = "all",
        max_length: int = 2048,
        tokens_per_batch: int = 2048,
    ) -> None:
        self.model = model
        self.renderer = ChatRenderer(tokenizer)
        self.scope = scope
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.num_layers = number_of_layers(model)

    def fingerprint(
        self, targets: Iterable[Mapping[str, Any]], saliency: SaliencySettings | None = None
    ) -> FingerprintBank:
        """Build the fingerprint bank of a few target records.

        Raises:
            UserError: if there is no record, or no token in scope.
        """
        saliency = saliency or SaliencySettings(num_layers=min(6, self.num_layers))
        if saliency.num_layers > self.num_layers:
            raise UserError(f"saliency.num_layers={saliency.num_layers}: the model has only {self.num_layers} layers")
        reading = reading_of(self.model)
        if not reading.layers and (saliency.row_weight or saliency.column_weight):
            raise UserError(
                f"the model's saliency cannot be read: {reading.why}; set the weights of row and column to 0"
            )
        sequences = list(itertools.chain.from_iterable(self._encode(targets)))
        forward = TargetPass(self.model, self.num_layers)
        results: list[dict[str, Any]] = []
        for batch in self._batches(sequences):
            results.extend(forward.predict_step(batch, 0))
        signals = [TargetSignals(**{**result, "token_ids": result["token_ids"].long()}) for result in results]
        bank = banks_of(weigh(signals, saliency, self.scope), {"": list(range(len(sequences)))}) if signals else {}
        if not bank or len(bank[""]) == 0:
            raise UserError(f"targets: no record has a token in scope={self.scope}")
        return bank[""]

    def score(
        self,
        records: Iterable[Mapping[str, Any]],
        bank: FingerprintBank,
        pooler: PoolerSettings | None = None,
        fallback: FallbackSettings | None = None,
    ) -> Scores:
        """Score an iterable of records; only a thousand of them are held at a time."""
        pooler, fallback = pooler or PoolerSettings(), fallback or FallbackSettings()
        forward = ScoringPass(self.model, [(bank, fallback.nearest)])
        forward.on_predict_start()
        idf = scaled_idf(bank.token_ids.numpy(), bank.idf.double().numpy())
        chunks = []
        for sequences in self._encode(records):
            pooled = np.full((4, len(sequences)), np.nan)
            for batch in self._batches(sequences):
                result = {name: value.cpu() for name, value in forward.predict_step(batch, 0).items()}
                scope = torch.from_numpy(scope_mask(result["roles"].numpy(), self.scope))
                match = forward.match_of(result, 0)[scope].numpy()
                tokens = ScopedTokens(
                    similarity=result["similarity"][0][scope].double().numpy(),
                    match=match,
                    direct=match == result["token_ids"][scope].numpy(),
                    lengths=np.array([int(part.sum()) for part in scope.split(result["lengths"].tolist())]),
                )
                pooled[:, result["rows"].numpy()] = np.stack(pool_tokens(tokens, fallback, pooler, idf))
            chunks.append(pooled.astype(np.float32))
        if not chunks:
            raise UserError("score: there are no records")
        return Scores(*np.concatenate(chunks, axis=1))

    def embed(self, records: Iterable[Mapping[str, Any]]) -> NDArray[np.float32]:
        """A vector per record, ``[records, hidden]``: RDS+'s mean of the last hidden states, weighted by position.

        Zeros for a record that the chat template refuses.
        """
        forward = RecordPass(self.model, PositionWeightedMean())
        width = hidden_width(self.model)
        chunks = [np.zeros((0, width), dtype=np.float32)]
        for sequences in self._encode(records):
            vectors = np.zeros((len(sequences), width), dtype=np.float32)
            for batch in self._batches(sequences):
                vectors[batch["rows"].cpu().numpy()] = forward.predict_step(batch, 0).float().cpu().numpy()
            chunks.append(vectors)
        return np.concatenate(chunks)

    def _encode(self, records: Iterable[Mapping[str, Any]]) -> Iterator[list[TokenSequence]]:
        """Tokenise an iterable a chunk at a time; a record that cannot be rendered has no tokens."""
        reader = LayoutReader(FieldKeys(), "records")
        rows = enumerate(as_records(records))
        while chunk := list(itertools.islice(rows, CHUNK)):
            conversations: list[tuple[Turn, ...]] = []
            for row, record in chunk:
                layout = None
                try:
                    layout = reader.layout_of(record)
                    turns = layout.turns(record)
                except LayoutError as error:
                    named = "" if layout is None else f" (layout {layout.name})"
                    raise UserError(f"record {row}: {error}{named}") from None
                reader.counts[layout.name] += 1
                reader.note(record, layout, turns, "record {}".format, row)
                conversations.append(turns)
            yield [
                TokenSequence(np.empty(0, np.int32), np.empty(0, np.uint8))
                if isinstance(encoded, RenderError)
                else TokenSequence(encoded.token_ids, encoded.roles)
                for encoded in self.renderer.encode(conversations, self.max_length)
            ]
        for remark in reader.remarks():
            warnings.warn(remark, stacklevel=2)

    def _batches(self, sequences: Sequence[TokenSequence]) -> Iterator[dict[str, Any]]:
        lengths = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
        batches = ShardBatches(sequences, plan_shards(lengths, self.tokens_per_batch), self.scope)
        device = self.model.device
        with torch.inference_mode():
            for place in range(len(batches)):
                batch = batches[place]
                yield {
                    name: value.to(device) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.items()
                }


def load(
    path: str = "bundled:smollm2_135m",
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    store_dir: str | Path | None = None,
    **options: Any,
) -> TrimScorer:
    """Load a scorer.

    Args:
        path: A model directory, a Hub id, or ``bundled:smollm2_135m``.
        adapter: A PEFT adapter folder (for example a warm-up's) to put onto it.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: A torch device; by default the first GPU, else the CPU.
        store_dir: Where the converted bundled model and file checksums are kept; by default ``TRIM_STORE_DIR``, else
            ``.trim_store``.
        **options: ``scope``, ``max_length``, ``tokens_per_batch`` of `TrimScorer`.

    Raises:
        UserError: if the model or the adapter cannot be found or loaded.
    """
    source = find_model(ModelSettings(path=path), Store(store_dir or os.environ.get("TRIM_STORE_DIR", ".trim_store")))
    model = load_model(source, resolve_dtype(dtype))
    if adapter is not None:
        model = apply_adapter(model, Path(adapter), gradients=False)
    if source.max_positions is not None:
        options["max_length"] = min(options.get("max_length", source.max_positions), source.max_positions)
    target: Any = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(target)
    return TrimScorer(model, load_tokenizer(source), **options)
