"""From a ranking to a coreset: the budget and the optional filters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.records.record_file import RecordFile
from trim_lightning.selection.filters import LengthBounds, admit_row, make_filters
from trim_lightning.selection.ranking import DEFAULT_FRACTION, ScoreTable, budget_count, choose
from trim_lightning.settings.schema import SelectionSettings
from trim_lightning.store.ledger import Ledger


def check_budget(selection: SelectionSettings, pool_size: int) -> None:
    """Check the budget against the pool, before anything is computed.

    Raises:
        UserError: if more records are asked for than there are.
    """
    if selection.count is not None and selection.count > pool_size:
        raise UserError(
            f"selection.count={selection.count}: the pool has only {pool_size} records; ask for at most {pool_size}"
        )


def budget_of(selection: SelectionSettings, pool_size: int) -> int | None:
    """Records that the budget allows; None if it counts tokens."""
    if selection.count is not None or selection.tokens is not None:
        return selection.count
    return budget_count(pool_size, selection.fraction or DEFAULT_FRACTION)


def select_rows(
    selection: SelectionSettings,
    pool: RecordFile,
    scores: ScoreTable,
    order: NDArray[np.int64],
    ledger: Ledger,
    *,
    costs: NDArray[np.integer[Any]] | None = None,
    everything: bool = False,
) -> NDArray[np.int64]:
    """Selected rows, best first.

    Args:
        selection: Budget and filters.
        pool: The pool, for field values and texts.
        scores: For token counts.
        order: Scored rows, best first.
        ledger: Is warned when filters leave less than the budget, or when a budget is ignored.
        costs: ``[records]`` tokens that a budget in tokens spends on each record; by default its content tokens.
        everything: Take every record that the filters admit; for methods that have no budget.
    """
    count, tokens = budget_of(selection, len(scores.score)), selection.tokens
    if everything:
        for name in ("fraction", "count", "tokens"):
            if getattr(selection, name) is not None:
                ledger.warn(f"this method takes the whole pool: selection.{name}={getattr(selection, name)} is ignored")
        count = tokens = None
    costs = scores.num_tokens if costs is None else costs
    filters = make_filters(selection, pool, scores)
    if tokens is not None and selection.token_scope == "response":
        filters.insert(0, LengthBounds(costs, 1, None))  # else a record whose response is cut off would cost nothing
    offered = 0

    def admit(row: int) -> bool:
        nonlocal offered
        offered += 1
        return admit_row(filters, row)

    chosen = choose(
        order,
        costs,
        count=count,
        tokens=tokens,
        admit=admit if filters else None,
    )
    if count is not None and len(chosen) < count:
        ledger.warn(f"only {len(chosen)} of the {count} records of the budget could be selected")
    spent = int(costs[chosen].sum(dtype=np.int64))
    if tokens is not None and filters and offered == len(order) and spent + int(costs[order[-1:]].sum()) < tokens:
        ledger.warn(f"only {spent} of the {tokens} tokens of the budget could be spent")
    elif tokens is not None and len(chosen) == len(order) > 0 and spent < tokens:
        ledger.warn(f"selection.tokens={tokens}: all {len(order)} scored records have only {spent}; all are selected")
    if tokens is not None and spent > tokens:
        ledger.warn(f"the best record alone has {spent} tokens, above selection.tokens={tokens}")
    return chosen
