"""From a ranking to a coreset: the budget and the optional filters."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.records.layouts import MISSING, lookup
from trim_lightning.records.record_file import RecordFile
from trim_lightning.selection.ranking import DEFAULT_FRACTION, ScoreTable, budget_count, choose
from trim_lightning.settings.schema import SelectionSettings, SelectSettings, check
from trim_lightning.store.ledger import Ledger


def check_settings(settings: SelectSettings) -> None:
    """Check every key by itself and those that depend on each other, before anything is read.

    Raises:
        UserError: naming the keys.
    """
    check(settings)
    for name, source in (("pool", settings.pool), ("target", settings.target)):
        if source.path is not None and source.source in ("generated", "from_pool"):
            raise UserError(
                f"{name}.path={source.path}: {name}={source.source} reads no file; add {name}=jsonl (or parquet, hub)"
            )
    selection = settings.selection
    budgets = {name: getattr(selection, name) for name in ("fraction", "count", "tokens")}
    given = [f"selection.{name}={value}" for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: two budgets at once; give one of them")
    if selection.token_scope != "all" and selection.tokens is None:
        raise UserError(
            f"selection.token_scope={selection.token_scope}: there is no budget in tokens; give selection.tokens too"
        )
    if (selection.cap is None) != (selection.cap_field is None):
        raise UserError("selection.cap and selection.cap_field go together; give both or neither")
    low, high = selection.min_tokens, selection.max_tokens
    if low is not None and high is not None and low > high:
        raise UserError(f"selection.min_tokens={low} is above selection.max_tokens={high}")


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
    costs: NDArray[np.int64] | None = None,
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
    costs = scores.num_tokens.astype(np.int64) if costs is None else costs
    filters = make_filters(selection, pool, scores)
    if tokens is not None and selection.token_scope == "response":
        filters.insert(0, LengthBounds(costs, 1, None))  # else a record whose response is cut off would cost nothing
    chosen = choose(
        order,
        costs,
        count=count,
        tokens=tokens,
        admit=(lambda row: admit_row(filters, row)) if filters else None,
    )
    if count is not None and len(chosen) < count:
        ledger.warn(f"only {len(chosen)} of the {count} records of the budget could be selected")
    spent = int(costs[chosen].sum())
    if tokens is not None and spent > tokens:
        ledger.warn(f"the best record alone has {spent} tokens, above selection.tokens={tokens}")
    return chosen


class RowFilter(Protocol):
    """Says whether a record may be selected, and is told when it is."""

    def admits(self, row: int) -> bool:
        """True if the record may be selected."""

    def take(self, row: int) -> None:
        """Note that the record was selected."""


def admit_row(filters: Sequence[RowFilter], row: int) -> bool:
    """Ask all filters; only if all agree do they note the record."""
    if not all(rule.admits(row) for rule in filters):
        return False
    for rule in filters:
        rule.take(row)
    return True


def make_filters(selection: SelectionSettings, pool: RecordFile, scores: ScoreTable) -> list[RowFilter]:
    """The filters that are switched on."""
    filters: list[RowFilter] = []
    if selection.min_tokens is not None or selection.max_tokens is not None:
        filters.append(LengthBounds(scores.num_tokens, selection.min_tokens or 0, selection.max_tokens))
    if selection.cap_field is not None and selection.cap is not None:
        filters.append(FieldCap(pool, selection.cap_field, selection.cap))
    if selection.dedup == "exact":
        filters.append(ExactDuplicates(pool))
    elif selection.dedup == "near":
        from trim_lightning.selection.near_duplicates import NearDuplicates

        filters.append(NearDuplicates(lambda row: text_of(pool, row), selection.near_threshold))
    return filters


class LengthBounds:
    """Content tokens between two bounds, both included."""

    def __init__(self, num_tokens: NDArray[np.int32] | NDArray[np.int64], low: int, high: int | None) -> None:
        self._num_tokens, self._low, self._high = num_tokens, low, high

    def admits(self, row: int) -> bool:
        """True within the bounds."""
        length = int(self._num_tokens[row])
        return self._low <= length and (self._high is None or length <= self._high)

    def take(self, row: int) -> None:
        """Nothing to note."""


class FieldCap:
    """At most ``cap`` selected records with one value of a field."""

    def __init__(self, pool: RecordFile, field: str, cap: int) -> None:
        self._pool, self._field, self._cap = pool, field, cap
        self._taken: Counter[str] = Counter()

    def admits(self, row: int) -> bool:
        """True while the value's cap is not reached."""
        return self._taken[self._value(row)] < self._cap

    def take(self, row: int) -> None:
        """Count the value."""
        self._taken[self._value(row)] += 1

    def _value(self, row: int) -> str:
        value = lookup(self._pool.object(row), self._field)
        if value is MISSING:
            raise UserError(
                f"selection.cap_field={self._field}: {self._pool.place(row)} has no such field; name one that "
                "every record has"
            )
        return str(value)


class ExactDuplicates:
    """No two selected records with the same text (case and white space evened out)."""

    def __init__(self, pool: RecordFile) -> None:
        self._pool = pool
        self._seen: set[bytes] = set()

    def admits(self, row: int) -> bool:
        """True if no selected record has this text."""
        return self._mark(row) not in self._seen

    def take(self, row: int) -> None:
        """Note the text."""
        self._seen.add(self._mark(row))

    def _mark(self, row: int) -> bytes:
        return hashlib.sha256(text_of(self._pool, row).encode()).digest()


def text_of(pool: RecordFile, row: int) -> str:
    """All turns of a record as one text, case and white space evened out."""
    return " ".join(" ".join(turn.content for turn in pool.record(row).turns).lower().split())
