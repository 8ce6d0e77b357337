"""Token similarities of a shard, read back and pooled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.engine.shards import column_name
from trim_lightning.settings.schema import FallbackSettings, PoolerSettings
from trim_lightning.stages.scoring import BANKS
from trim_lightning.stages.task import MatchedTokens
from trim_lightning.trim.pooling import Pooled, penalise, pool


@dataclass(frozen=True)
class ScopedTokens:
    """The scoped tokens of one shard in one bank, record after record.

    Attributes:
        similarity: ``[tokens]`` raw cosines.
        match: ``[tokens]`` ids of the matched classes.
        direct: ``[tokens]`` True where that is the token's own class.
        lengths: ``[records]`` scoped tokens of each record.
    """

    similarity: NDArray[np.float64]
    match: NDArray[np.int32]
    direct: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    @classmethod
    def read(cls, table: pa.Table, group: str) -> ScopedTokens:
        """Take one bank's columns of a shard table."""
        scope, offsets = flat(table, "scope"), table["scope"].combine_chunks().offsets.to_numpy()
        running = np.concatenate([[0], np.cumsum(scope, dtype=np.int64)])
        match = flat(table, column_name("match", group))[scope]
        return cls(
            similarity=flat(table, column_name("similarity", group))[scope].astype(np.float64),
            match=match,
            direct=match == flat(table, "token_ids")[scope],
            lengths=np.diff(running[offsets]),
        )


def flat(table: pa.Table, name: str) -> NDArray[Any]:
    """The values of a list column, record after record."""
    values: NDArray[Any] = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values


def pool_tokens(
    tokens: ScopedTokens, fallback: FallbackSettings, pooler: PoolerSettings, idf: NDArray[np.float64]
) -> Pooled:
    """Penalise and pool one shard.

    ``idf`` is ``[vocabulary]``, that of each fingerprint class, scaled to a largest value of 1; a token weighs as much
    as the class that it was matched with (our choice).
    """
    return pool(
        penalise(tokens.similarity, tokens.direct, fallback.mode, fallback.penalty),
        tokens.direct,
        tokens.lengths,
        name=pooler.name,
        mean_weight=pooler.mean_weight,
        max_weight=pooler.max_weight,
        coverage_weight=pooler.coverage_weight,
        token_weights=idf[tokens.match] if pooler.token_weight == "idf" else None,
        k=pooler.k,
        temperature=pooler.temperature,
        q=pooler.q,
    )


def scoped_classes(table: pa.Table) -> list[int]:
    """The token classes in the scope of one shard table."""
    classes: list[int] = np.unique(flat(table, "token_ids")[flat(table, "scope")]).tolist()
    return classes


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


def shard_facts(directory: Path) -> dict[str, Any]:
    """Number of shards, groups and records per shard of a scoring pass."""
    facts: dict[str, Any] = json.loads((directory / "shards.json").read_text())
    return facts


def best_group(scores: Mapping[str, NDArray[Any]], row: int) -> str:
    """The target group with the highest score of a record; the first if it has none."""
    return max(scores, key=lambda group: -np.inf if np.isnan(scores[group][row]) else float(scores[group][row]))


def read_matched(path: Path, groups: Mapping[int, str], fallback: FallbackSettings) -> dict[int, MatchedTokens]:
    """Token similarities of some records of one shard, each (by its row) as a target group saw it."""
    wanted = sorted(set(groups.values()))
    columns = [column_name(kind, group) for group in wanted for kind in ("similarity", "match")]
    table = pq.read_table(path, columns=["row", "token_ids", "scope", *columns])
    places = {row: place for place, row in enumerate(table["row"].to_pylist())}

    def values(name: str, row: int) -> NDArray[Any]:
        return np.asarray(table[name][places[row]].values.to_numpy(zero_copy_only=False))

    found = {}
    for row, group in groups.items():
        if row not in places:
            continue
        token_ids, match = values("token_ids", row), values(column_name("match", group), row)
        similarity = values(column_name("similarity", group), row).astype(np.float64)
        found[row] = MatchedTokens(
            token_ids=token_ids,
            scope=values("scope", row),
            similarity=penalise(similarity, match == token_ids, fallback.mode, fallback.penalty),
            match=match,
            group=group,
        )
    return found
