"""Scoring passes over different rows of one pool with the same banks, read as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from trim_lightning.engine.shards import read_stored
from trim_lightning.engine.token_shards import ROWS
from trim_lightning.settings.schema import FallbackSettings
from trim_lightning.stages.task import MatchedTokens
from trim_lightning.stages.token_scores import ResponseParts, ScoredShard, StoredPass
from trim_lightning.tokens.tokenized import SomeRecords, TokenizedRecords


class JoinedPasses:
    """What one pass over a pool left in the store, or several together; those of some rows have them noted.

    Attributes:
        tokens: The whole pool.
        groups: Names of the banks, ``[""]`` without groups.
        scope: Content tokens that count.
        window: Records of the pool that were sorted by length together.
        has_alignment: True if what each response token teaches was kept.
    """

    def __init__(self, directories: Sequence[Path], tokens: TokenizedRecords) -> None:
        self._passes = [StoredPass(directory, part_of(directory, tokens)) for directory in directories]
        first = self._passes[0]
        self.tokens, self.groups, self.scope, self.window = tokens, first.groups, first.scope, first.window
        self.has_alignment = first.has_alignment

    def shards(self, rows: range | None = None) -> Iterator[ScoredShard]:
        """Read every shard, or those that hold some of these rows."""
        for stored in self._passes:
            if rows is None:
                yield from map(stored.shard, range(len(stored)))
            elif stored.tokens.lengths[rows.start : rows.stop].any():
                yield from stored.holding(rows)

    def response_parts(self) -> Iterator[ResponseParts]:
        """What every shard keeps of responses, of passes that were asked for it."""
        for stored in self._passes:
            yield from map(stored.response_parts, range(len(stored)))

    def matched(self, groups: Mapping[int, str], fallback: FallbackSettings) -> dict[int, MatchedTokens]:
        """Token similarities of some records, each (by its row) as a target group saw it; none of unscored ones."""
        found = {}
        for stored in self._passes:
            mine = {row: group for row, group in groups.items() if stored.tokens.lengths[row]}
            found.update(stored.matched(mine, fallback))
        return found


def part_of(directory: Path, tokens: TokenizedRecords) -> TokenizedRecords:
    """The records that a pass was over."""
    path = directory / ROWS
    return SomeRecords(tokens, read_stored(path)["rows"].astype(np.int64)) if path.exists() else tokens
