"""Records without a response to learn from: empty, absent, or cut off by ``max_length``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.records.record_file import RecordFile
from trim_lightning.tokens.tokenized import TokenizedRecords


@dataclass(frozen=True)
class MissingResponses:
    """Which records have no response token. One whose response is cut partway has some, and is none of them.

    Attributes:
        rows: Their rows, ascending; a record that could not be rendered is none of them.
        cut: Those whose response the cut at ``max_length`` took.
        max_length: Tokens kept of a record.
    """

    rows: NDArray[np.int64]
    cut: NDArray[np.int64]
    max_length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        number = len(self) - len(self.cut)
        parts = [f"{number} empty or absent"] * (number > 0)
        parts += [f"{len(self.cut)} cut off by max_length={self.max_length}"] * (len(self.cut) > 0)
        return ", ".join(parts)

    @property
    def or_longer(self) -> str:
        """The remedy for responses that are cut off, to follow another one."""
        return " or a larger max_length" if len(self.cut) else ""

    def leave_some(self, tokens: TokenizedRecords, name: str) -> None:
        """Refuse records of which none has a response.

        Raises:
            UserError: naming them by ``name``.
        """
        rendered = int((tokens.lengths > 0).sum())
        if rendered and rendered == len(self):
            raise UserError(
                f"pool {name}: none of its {rendered} records has a response to learn from ({self}); give another pool"
                f"{self.or_longer}; selection.require_response=false ranks them all the same"
            )

    def among(self, rows: NDArray[np.int64]) -> MissingResponses:
        """Those that are among some rows."""
        return replace(self, rows=np.intersect1d(self.rows, rows), cut=np.intersect1d(self.cut, rows))


def missing_responses(records: RecordFile, tokens: TokenizedRecords, max_length: int) -> MissingResponses:
    """The records without a response token; only those that may be cut are read."""
    rows = np.flatnonzero((tokens.lengths > 0) & (tokens.content_lengths("response") == 0))
    cut = [row for row in rows.tolist() if tokens.lengths[row] >= max_length and has_response(records, row)]
    return MissingResponses(rows, np.array(cut, dtype=np.int64), max_length)


def has_response(records: RecordFile, row: int) -> bool:
    """True for a record with text in an assistant turn."""
    return any(turn.role == "assistant" and turn.trained and turn.text.strip() for turn in records.record(row).turns)
