"""What a selector is given, and what it may tell of single tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.targets import TargetSet
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.stages.scorer import Scorer
from trim_lightning.store import StageKey, Store
from trim_lightning.store.ledger import Ledger
from trim_lightning.tokens.tokenized import TokenizedRecords


@dataclass(frozen=True)
class MatchedTokens:
    """One record's tokens as a method matched them with the targets.

    Attributes:
        token_ids: ``[tokens]`` int32, scaffolding included.
        scope: ``[tokens]`` bool, the tokens that count.
        similarity: ``[tokens]`` float64 with the fallback penalty; meaningless outside the scope.
        match: ``[tokens]`` int32 vocabulary ids of the matched classes; direct where that is the token's own.
        group: The target group that they were matched with, the best of the record's groups.
        alignment: ``[tokens]`` float64 how far a step for each response token would go for the targets (For-Value), NaN
            elsewhere; None from methods that do not ask.
    """

    token_ids: NDArray[np.int32]
    scope: NDArray[np.bool_]
    similarity: NDArray[np.float64]
    match: NDArray[np.int32]
    group: str = ""
    alignment: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class SelectionTask:
    """All that a selector may use.

    Attributes:
        settings: Typed settings; a selector reads the groups that are its own.
        pool: The candidate pool.
        pool_tokens: The pool, tokenised.
        pool_key: Key of ``pool_tokens``, for the keys of later stages.
        targets: The target set; None for methods that need none.
        scorer: The model.
        store: Stage results.
        ledger: Where stages and warnings are booked.
    """

    settings: SelectSettings
    pool: RecordFile
    pool_tokens: TokenizedRecords
    pool_key: StageKey
    targets: TargetSet | None
    scorer: Scorer
    store: Store
    ledger: Ledger
