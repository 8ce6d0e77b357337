"""Token similarities of a scoring pass, read back shard by shard and pooled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trim_lightning.engine.shards import read_stored
from trim_lightning.engine.token_shards import MATCHES, cosines_of, similarity_path
from trim_lightning.records.flat import sums_of
from trim_lightning.settings.schema import FallbackSettings, PoolerSettings
from trim_lightning.stages.scoring import BANKS
from trim_lightning.stages.task import MatchedTokens
from trim_lightning.tokens.tokenized import TokenizedRecords, predicted_responses, scope_mask
from trim_lightning.trim.pooling import Pooled, penalise, pool

LEAST_ERROR = 1e-3  # weight of a token that the model is sure of: a record of such tokens alone has a mean


@dataclass(frozen=True)
class ScopedTokens:
    """The scoped tokens of some records in one bank, record after record.

    Attributes:
        similarity: ``[tokens]`` raw cosines.
        match: ``[tokens]`` ids of the matched classes.
        direct: ``[tokens]`` True where that is the token's own class.
        lengths: ``[records]`` scoped tokens of each record.
        error: ``[tokens]`` the model's 1 - p of each token; None where it was not asked for.
        alignment: ``[tokens]`` how far a step for each token would go for the targets, 0 outside responses; None where
            it was not asked for.
    """

    similarity: NDArray[np.float64]
    match: NDArray[np.int32]
    direct: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    error: NDArray[np.float64] | None = None
    alignment: NDArray[np.float32] | None = None


class ResponseParts(NamedTuple):
    """What a shard of a scoring pass keeps of whole responses.

    Attributes:
        rows: ``[records]`` rows.
        responses: ``[records]`` int32 response tokens.
        mean_alignment: ``[banks, records]`` float32 mean of `ScopedTokens.alignment`; NaN without a response.
        mean_state: ``[records, hidden]`` float16 mean last hidden state of those; None where it was not kept.
    """

    rows: NDArray[np.int64]
    responses: NDArray[np.int32]
    mean_alignment: NDArray[np.float32]
    mean_state: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class ScoredShard:
    """A shard of a scoring pass with what all banks share.

    Attributes:
        rows: ``[records]`` rows.
        token_ids: ``[tokens]`` of their scoped tokens, record after record.
        lengths: ``[records]`` scoped tokens of each record.
        similarity: ``[banks, tokens]`` raw cosines as they are stored; see `cosines_of`.
        match: ``[banks, tokens]`` ids of the matched classes, or the table ``[banks, vocabulary]`` that has them.
        has_table: Which of both it is.
        error: ``[tokens]`` float16, see `ScopedTokens`.
        alignment: ``[banks, tokens]`` float32, see `ScopedTokens`.
        whole: What was kept of whole responses; None where nothing was, and of a part of a shard.
    """

    rows: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    similarity: NDArray[Any]
    match: NDArray[np.int32]
    has_table: bool
    error: NDArray[np.float16] | None = None
    alignment: NDArray[np.float32] | None = None
    whole: ResponseParts | None = None

    def bank(self, place: int) -> ScopedTokens:
        """The tokens as the bank at a place saw them."""
        match = self.match[place][self.token_ids] if self.has_table else self.match[place]
        error = None if self.error is None else self.error.astype(np.float64)
        alignment = None if self.alignment is None else self.alignment[place]
        cosines = cosines_of(self.similarity[place])
        return ScopedTokens(cosines, match, match == self.token_ids, self.lengths, error, alignment)

    def part(self, places: NDArray[np.int64], tokens: NDArray[np.int64]) -> ScoredShard:
        """The records at some places, whose tokens are at these."""
        return replace(
            self,
            rows=self.rows[places],
            token_ids=self.token_ids[tokens],
            lengths=self.lengths[places],
            similarity=self.similarity[:, tokens],
            match=self.match if self.has_table else self.match[:, tokens],
            error=None if self.error is None else self.error[tokens],
            alignment=None if self.alignment is None else self.alignment[:, tokens],
            whole=None,
        )


def parts_of(tensors: Mapping[str, NDArray[Any]]) -> ResponseParts | None:
    """What a shard's tensors hold of whole responses, None where they hold nothing."""
    if "mean_alignment" not in tensors:
        return None
    return ResponseParts(*(tensors.get(name) for name in ResponseParts._fields))  # type: ignore[arg-type]


class StoredPass:
    """A scoring pass in the store, read a shard at a time, with the tokens that it was over.

    Attributes:
        groups: Names of the banks, ``[""]`` without groups.
        scope: Content tokens that count.
        window: Records of the pool that were sorted by length together.
        has_alignment: True if what each response token teaches was kept.
    """

    def __init__(self, directory: Path, tokens: TokenizedRecords) -> None:
        self.directory, self.tokens = directory, tokens
        facts: dict[str, Any] = json.loads((directory / "shards.json").read_text())
        self.groups: list[str] = facts["groups"]
        self.scope: str = facts["scope"]
        self.window: int = facts["window"]
        self.has_alignment: bool = facts.get("alignment", False)
        self._ends = np.cumsum(facts["shard_records"], dtype=np.int64)
        self._held: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._ends)

    @cached_property
    def _table(self) -> NDArray[np.int32] | None:
        """``[banks, vocabulary]`` the class that a token of each class is matched with; None if that varies."""
        path = self.directory / MATCHES
        return read_stored(path)["match"] if path.exists() else None

    def shard(self, index: int) -> ScoredShard:
        """Read one shard.

        Raises:
            UserError: if it is damaged.
        """
        tensors = read_stored(similarity_path(self.directory, index))
        rows = tensors["rows"]
        token_ids, roles = self.tokens.together(rows)
        scope = scope_mask(roles, self.scope)
        match = tensors["match"] if self._table is None else self._table
        lengths = sums_of(scope, self.tokens.lengths[rows])
        return ScoredShard(
            rows,
            token_ids[scope],
            lengths,
            tensors["similarity"],
            match,
            self._table is not None,
            tensors.get("error"),
            tensors.get("alignment"),
            parts_of(tensors),
        )

    def response_parts(self, index: int) -> ResponseParts:
        """What one shard keeps of responses, of a pass that was asked for it.

        Raises:
            UserError: if it is damaged.
        """
        parts = parts_of(read_stored(similarity_path(self.directory, index)))
        assert parts is not None, "the pass kept nothing of responses"
        return parts

    def indexes(self, rows: range) -> range:
        """The shards that hold these rows, and others of their windows: a shard lies in one window of the pool."""
        lengths = self.tokens.lengths
        first = int(np.count_nonzero(lengths[: rows.start // self.window * self.window]))
        last = int(np.count_nonzero(lengths[: -(-rows.stop // self.window) * self.window]))
        return range(
            int(np.searchsorted(self._ends, first, "right")), int(np.searchsorted(self._ends, last, "left")) + 1
        )

    def holding(self, rows: range) -> Iterator[ScoredShard]:
        """Read the shards that hold some of these rows.

        Which rows a shard holds is known once it was read, and kept as long as rows of its window are asked for.
        """
        wanted = self.indexes(rows)
        self._held = {index: held for index, held in self._held.items() if index in wanted}
        for index in wanted:
            shard = None if index in self._held else self.shard(index)
            held = self._held[index] if shard is None else self._held.setdefault(index, shard.rows)
            if ((held >= rows.start) & (held < rows.stop)).any():
                yield self.shard(index) if shard is None else shard

    def matched(self, groups: Mapping[int, str], fallback: FallbackSettings) -> dict[int, MatchedTokens]:
        """Token similarities of some records, each (by its row) as a target group saw it."""
        found = {}
        for index in sorted({index for row in groups for index in self.indexes(range(row, row + 1))}):
            shard = self.shard(index)
            ends = np.cumsum(shard.lengths)
            for place in np.flatnonzero(np.isin(shard.rows, list(groups))).tolist():
                row, part = int(shard.rows[place]), slice(int(ends[place] - shard.lengths[place]), int(ends[place]))
                scoped = shard.bank(self.groups.index(groups[row]))
                found[row] = self._whole(row, scoped, part, groups[row], fallback)
        return found

    def _whole(
        self, row: int, scoped: ScopedTokens, part: slice, group: str, fallback: FallbackSettings
    ) -> MatchedTokens:
        """One record with the tokens outside the scope as well, which are matched with nothing but themselves."""
        sequence = self.tokens[row]
        scope = scope_mask(sequence.roles, self.scope)
        similarity, match = np.full(len(scope), np.nan), np.array(sequence.token_ids)
        similarity[scope] = penalise(scoped.similarity[part], scoped.direct[part], fallback.mode, fallback.penalty)
        match[scope] = scoped.match[part]
        alignment = None
        if scoped.alignment is not None:
            alignment = np.full(len(scope), np.nan)
            alignment[scope] = scoped.alignment[part]
            alignment[~predicted_responses(sequence.roles, np.array([len(scope)]))] = np.nan
        return MatchedTokens(np.array(sequence.token_ids), scope, similarity, match, group, alignment)


def pool_tokens(
    tokens: ScopedTokens, fallback: FallbackSettings, pooler: PoolerSettings, idf: NDArray[np.float64]
) -> Pooled:
    """Penalise and pool one shard.

    ``idf`` is ``[vocabulary]``, that of each fingerprint class, scaled to a largest value of 1; with
    ``pooler.token_weight=idf`` a token weighs as much as the class that it was matched with, with ``error`` as much as
    the model is wrong there, 1 - p (both our choice).
    """
    weights = None
    if pooler.token_weight == "idf":
        weights = idf[tokens.match]
    elif pooler.token_weight == "error":
        assert tokens.error is not None, "the pass kept no errors"
        weights = np.maximum(tokens.error, LEAST_ERROR)
    return pool(
        penalise(tokens.similarity, tokens.direct, fallback.mode, fallback.penalty),
        tokens.direct,
        tokens.lengths,
        name=pooler.name,
        mean_weight=pooler.mean_weight,
        max_weight=pooler.max_weight,
        coverage_weight=pooler.coverage_weight,
        token_weights=weights,
        k=pooler.k,
        temperature=pooler.temperature,
        q=pooler.q,
    )


def bank_coverage(seen: set[int], idf: list[NDArray[np.float64]]) -> float | None:
    """Share of the pool's token classes that have a fingerprint, the mean over the banks; None of no class.

    Each bank has its idf by token id, 0 where there is no fingerprint.
    """
    if not seen:
        return None
    ids = np.array(sorted(seen))
    return float(np.mean([np.count_nonzero(bank[ids[ids < len(bank)]]) / len(ids) for bank in idf]))


def read_idf(directory: Path) -> dict[str, NDArray[np.float64]]:
    """Scaled idf by token id for every bank; read with numpy alone."""
    from safetensors.numpy import load_file

    tensors = load_file(directory / BANKS)
    result = {}
    for name in tensors:
        if not name.endswith("token_ids"):
            continue
        prefix = name.removesuffix("token_ids")
        token_ids, idf = tensors[name], tensors[f"{prefix}idf"].astype(np.float64)
        result[prefix.removesuffix("/")] = scaled_idf(token_ids, idf)
    return result


def scaled_idf(token_ids: NDArray[np.int64], idf: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[highest id + 1]`` idf by token id, scaled to a largest value of 1; 0 where there is no fingerprint."""
    table = np.zeros(int(token_ids.max()) + 1)
    table[token_ids] = idf / idf.max()
    return table


def best_group(scores: Mapping[str, NDArray[Any]], row: int) -> str:
    """The target group with the highest score of a record; the first if it has none."""
    return max(scores, key=lambda group: -np.inf if np.isnan(scores[group][row]) else float(scores[group][row]))
