"""The scores of records that a program holds: the best of them, as a table, in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.selection.ranking import DEFAULT_FRACTION, budget_count, rank_by_score

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Scores:
    """Scores of an iterable of records.

    Attributes:
        score: ``[records]`` float32; NaN where a record has no scoped token; likewise the next three.
        mean: Mean similarity.
        max: Highest similarity.
        coverage: Share of directly matched tokens.
        num_tokens: ``[records]`` int32 content tokens.
        num_scored: ``[records]`` int32 scoped tokens.
    """

    score: NDArray[np.float32]
    mean: NDArray[np.float32]
    max: NDArray[np.float32]
    coverage: NDArray[np.float32]
    num_tokens: NDArray[np.int32]
    num_scored: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.score)

    def to_pandas(self) -> pandas.DataFrame:
        """A line a record, in the iterable's order; ``rank`` is empty where there is no score."""
        import pandas

        order = rank_by_score(self.score)
        ranks = pandas.array([None] * len(self), dtype="Int64")
        ranks[order] = np.arange(1, len(order) + 1)
        return pandas.DataFrame({"row": np.arange(len(self)), **vars(self), "rank": ranks})

    def pick(self, records: Any, fraction: float | None = None, *, count: int | None = None) -> Any:
        """The best of the records that were scored, best first, in what holds them.

        A data set of the library datasets gives a data set, a table of pandas, Arrow or polars a table, anything with
        places a list.

        Args:
            records: What was given to `TrimScorer.score`.
            fraction: As in `top`.
            count: As in `top`.

        Raises:
            UserError: as `top`, and for a generator, or another number of records than were scored.
        """
        if not hasattr(records, "__len__") or not hasattr(records, "__getitem__"):
            raise UserError("pick: a generator is read only once; make it a list before it is scored")
        if len(records) != len(self):
            raise UserError(f"pick: these are {len(records)} records, scored were {len(self)}; give the same ones")
        rows = self.top(fraction, count=count)
        if hasattr(records, "iloc"):
            return records.iloc[rows]
        if hasattr(records, "iter_rows"):  # polars, whose `select` takes columns
            return records[rows]
        if hasattr(records, "to_pylist"):  # Arrow, likewise
            return records.take(rows)
        return records.select(rows) if hasattr(records, "select") else [records[row] for row in rows]

    def _repr_html_(self) -> str:
        """For notebooks: how many were scored, and the best ten."""
        scored = int(np.isfinite(self.score).sum())
        table = self.to_pandas().sort_values("rank").head(min(10, scored)).set_index("rank")
        return f"<p>{scored:,} of {len(self):,} records have a score; the best:</p>{table.to_html(float_format='%.4f')}"

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
