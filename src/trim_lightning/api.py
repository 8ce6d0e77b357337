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
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from trim_lightning.report.page import token_text
from trim_lightning.report.token_texts import TokenTexts
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.selection.scores import Scores
from trim_lightning.settings.key import check
from trim_lightning.settings.schema import (
    FallbackSettings,
    FingerprintSettings,
    ModelSettings,
    PoolerSettings,
    SaliencySettings,
)
from trim_lightning.settings.typed import checked
from trim_lightning.stages.fingerprints import SalientTarget, banks_of, weigh
from trim_lightning.stages.task import MatchedTokens
from trim_lightning.stages.token_scores import ScopedTokens, pool_tokens, scaled_idf
from trim_lightning.store import Store
from trim_lightning.tokens.rendering import ChatRenderer, RenderError
from trim_lightning.tokens.tokenized import TokenSequence, scope_mask
from trim_lightning.trim.fingerprints import FingerprintBank
from trim_lightning.trim.pooling import penalise

if TYPE_CHECKING:
    from trim_lightning.report.in_memory import Report

CHUNK = 1024  # records of an iterable that are held at once


class TrimScorer:
    """A model that can fingerprint target records and score candidates.

    Args:
        model: A causal LM loaded with the attention hook (see `load`).
        tokenizer: Its fast tokenizer.
        scope: Content tokens that count: ``all``, ``prompt`` or ``response``.
        max_length: Tokens kept of a record.
        tokens_per_batch: Padded tokens of a forward pass.
        described: Name and checksum of the model, for reports.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        scope: str = "all",
        max_length: int = 2048,
        tokens_per_batch: int = 2048,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.described = described or {"name": type(model).__name__, "sha256": ""}
        self.tokenizer = tokenizer
        self.renderer = ChatRenderer(tokenizer)
        self.scope = scope
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.num_layers = number_of_layers(model)
        self.tokens_fed = 0  # through the model so far

    def fingerprint(
        self,
        targets: Iterable[Mapping[str, Any]],
        saliency: SaliencySettings | None = None,
        fingerprint: FingerprintSettings | None = None,
    ) -> FingerprintBank:
        """Build the fingerprint bank of a few target records; it knows which states candidates are matched by.

        Raises:
            UserError: if there is no record, or no token in scope.
        """
        saliency, fingerprint = self._weighing(saliency, fingerprint)
        return self._bank(self._salient(targets, saliency, fingerprint))

    def _weighing(
        self, saliency: SaliencySettings | None, fingerprint: FingerprintSettings | None
    ) -> tuple[SaliencySettings, FingerprintSettings]:
        """Settings of the targets, checked; the usual ones in place of None."""
        usual = SaliencySettings(num_layers=min(6, self.num_layers))
        return checked(saliency, usual, "saliency"), checked(fingerprint, FingerprintSettings(), "fingerprint")

    def _salient(
        self,
        targets: Iterable[Mapping[str, Any]],
        saliency: SaliencySettings,
        fingerprint: FingerprintSettings,
    ) -> list[SalientTarget]:
        """The tokens of target records with their saliency."""
        if saliency.num_layers > self.num_layers:
            raise UserError(f"saliency.num_layers={saliency.num_layers}: the model has only {self.num_layers} layers")
        reading = reading_of(self.model)
        if not reading.layers and (saliency.row_weight or saliency.column_weight):
            raise UserError(
                f"the model's saliency cannot be read: {reading.why}; set the weights of row and column to 0"
            )
        sequences = list(itertools.chain.from_iterable(self._encode(targets)))
        if not sequences:
            raise UserError("targets: there are no records")
        forward = TargetPass(self.model)
        results: list[dict[str, Any]] = []
        for batch in self._batches(sequences):
            results.extend(forward.predict_step(batch, 0))
        signals = [TargetSignals(**{**result, "token_ids": result["token_ids"].long()}) for result in results]
        salient = weigh(signals, saliency, self.scope, fingerprint.token_class)
        return sorted(salient, key=lambda target: target.row)

    def _bank(self, targets: Sequence[SalientTarget]) -> FingerprintBank:
        """Their bank, with the tokens' texts for those who look at it."""
        bank = banks_of(targets, {"": [target.row for target in targets]})[""] if targets else None
        if bank is None or len(bank) == 0:
            raise UserError(f"targets: no record has a token in scope={self.scope}")
        texts = TokenTexts(self.tokenizer.backend_tokenizer)
        return replace(bank, names={token: token_text(texts.name(token)) for token in bank.token_ids.tolist()})

    def score(
        self,
        records: Iterable[Mapping[str, Any]],
        bank: FingerprintBank,
        pooler: PoolerSettings | None = None,
        fallback: FallbackSettings | None = None,
    ) -> Scores:
        """Score an iterable of records; only a thousand of them are held at a time."""
        if not isinstance(bank, FingerprintBank):
            raise UserError(f"score: the bank is a {type(bank).__name__}; give what TrimScorer.fingerprint returned")
        pooler = checked(pooler, PoolerSettings(), "pooler")
        fallback = checked(fallback, FallbackSettings(), "fallback")
        error_scopes = [self.scope] if pooler.token_weight == "error" else []
        forward = ScoringPass(self.model, [(bank, fallback.nearest)], error_scopes=error_scopes)
        forward.on_predict_start()
        idf = scaled_idf(bank.token_ids.numpy(), bank.idf.double().numpy())
        chunks, lengths = [], []
        for sequences in self._encode(records):
            pooled = np.full((4, len(sequences)), np.nan)
            masks = [
                [scope_mask(sequence.roles, scope).sum() for sequence in sequences] for scope in ("all", self.scope)
            ]
            lengths.append(np.array(masks, dtype=np.int32))
            for batch in self._batches(sequences):
                result = {name: value.cpu() for name, value in forward.predict_step(batch, 0).items()}
                scope = torch.from_numpy(scope_mask(result["roles"].numpy(), self.scope))
                match = forward.match_of(result, 0)[scope].numpy()
                tokens = ScopedTokens(
                    similarity=result["similarity"][0][scope].double().numpy(),
                    match=match,
                    direct=match == result["token_ids"][scope].numpy(),
                    lengths=np.array([int(part.sum()) for part in scope.split(result["lengths"].tolist())]),
                    error=result[f"error/{self.scope}"][scope].double().numpy() if error_scopes else None,
                )
                pooled[:, result["rows"].numpy()] = np.stack(pool_tokens(tokens, fallback, pooler, idf))
            chunks.append(pooled.astype(np.float32))
        if not chunks:
            raise UserError("score: there are no records")
        return Scores(*np.concatenate(chunks, axis=1), *np.concatenate(lengths, axis=1))

    def report(
        self,
        pool: Iterable[Mapping[str, Any]],
        targets: Iterable[Mapping[str, Any]],
        *,
        fraction: float | None = None,
        count: int | None = None,
        examples: int = 8,
        saliency: SaliencySettings | None = None,
        pooler: PoolerSettings | None = None,
        fallback: FallbackSettings | None = None,
        fingerprint: FingerprintSettings | None = None,
    ) -> Report:
        """Select, and show what was picked and why: the page that ``trim-select`` writes. All records are held.

        Args:
            pool: The candidates.
            targets: The target examples.
            fraction: As in `Scores.top`.
            count: As in `Scores.top`.
            examples: Candidates that are shown token by token at the top, around the cut, and at the bottom.
            saliency: As in `fingerprint`.
            pooler: As in `score`.
            fallback: As in `score`.
            fingerprint: As in `fingerprint`.

        Raises:
            UserError: as `fingerprint`, `score` and `Scores.top`.
        """
        from trim_lightning.report.in_memory import Shown, report_of

        saliency, fingerprint = self._weighing(saliency, fingerprint)
        pooler = checked(pooler, PoolerSettings(), "pooler")
        fallback = checked(fallback, FallbackSettings(), "fallback")
        records, wanted = list(as_records(pool)), list(as_records(targets))
        marks = [(time.perf_counter(), self.tokens_fed)]
        salient = self._salient(wanted, saliency, fingerprint)
        bank = self._bank(salient)
        marks.append((time.perf_counter(), self.tokens_fed))
        scores = self.score(records, bank, pooler, fallback)
        marks.append((time.perf_counter(), self.tokens_fed))
        chosen = scores.top(fraction, count=count)
        shown = Shown(
            records, wanted, salient, bank, ScoreTable(**vars(scores)), np.array(chosen, dtype=np.int64),
            {"count": count} if count is not None else {"fraction": fraction},
            lambda rows: self._matched({row: records[row] for row in rows}, bank, fallback),
            self.tokenizer, self.described,
            {"saliency": saliency, "fingerprint": fingerprint, "pooler": pooler, "fallback": fallback,
             "scope": self.scope, "max_length": self.max_length},
            {name: (after[0] - before[0], after[1] - before[1])
             for name, before, after in zip(("fingerprint", "score"), marks, marks[1:], strict=False)},
        )  # fmt: skip
        return report_of(shown, examples)

    def _matched(
        self, records: Mapping[int, Mapping[str, Any]], bank: FingerprintBank, fallback: FallbackSettings
    ) -> dict[int, MatchedTokens]:
        """The tokens of some records, by their rows, as they were scored."""
        forward = ScoringPass(self.model, [(bank, fallback.nearest)])
        forward.on_predict_start()
        found = {}
        for row, record in records.items():
            with warnings.catch_warnings(action="ignore"):  # what is to be said of the records was said of all
                ((sequence,),) = self._encode([record])
            (batch,) = self._batches([sequence])
            result = {name: value.cpu() for name, value in forward.predict_step(batch, 0).items()}
            match = forward.match_of(result, 0).numpy().astype(np.int32)
            similarity = penalise(
                result["similarity"][0].double().numpy(), match == sequence.token_ids, fallback.mode, fallback.penalty
            )
            found[row] = MatchedTokens(sequence.token_ids, scope_mask(sequence.roles, self.scope), similarity, match)
        return found

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
            self.tokens_fed += int(lengths.sum())
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
    quantize: str | None = None,
    device: str | None = None,
    store_dir: str | Path | None = None,
    **options: Any,
) -> TrimScorer:
    """Load a scorer.

    Args:
        path: A model directory, a Hub id, or ``bundled:smollm2_135m``.
        adapter: A PEFT adapter folder (for example a warm-up's) to put onto it.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        quantize: ``4bit`` or ``8bit`` keeps the weights of linear layers so (extra ``quantize``).
        device: A torch device; by default the first GPU, else the CPU.
        store_dir: Where the converted bundled model and file checksums are kept; by default ``TRIM_STORE_DIR``, else
            ``.trim_store``.
        **options: ``scope``, ``max_length``, ``tokens_per_batch`` of `TrimScorer`.

    Raises:
        UserError: if the model or the adapter cannot be found or loaded.
    """
    settings = ModelSettings(path=path, quantize=quantize, dtype=dtype)
    check(settings)
    if (scope := options.get("scope", "all")) not in ("all", "prompt", "response"):
        raise UserError(f"scope={scope}: must be all, prompt or response")
    source = find_model(settings, Store(store_dir or os.environ.get("TRIM_STORE_DIR", ".trim_store")))
    model = load_model(source, resolve_dtype(dtype))
    if adapter is not None:
        model = apply_adapter(model, Path(adapter), gradients=False)
    if source.max_positions is not None:
        options["max_length"] = min(options.get("max_length", source.max_positions), source.max_positions)
    target: Any = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(target)
    described = (
        source.describe() if adapter is None else {**source.describe(), "name": f"{source.name} with an adapter"}
    )
    return TrimScorer(model, load_tokenizer(source), described=described, **options)
