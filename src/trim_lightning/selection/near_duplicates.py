"""Near duplicates among selected records, by their shared word triples; MinHash (datasketch) finds candidates."""

from __future__ import annotations

from collections.abc import Callable

from trim_lightning.errors import UserError

PERMUTATIONS = 128
SHINGLE = 3  # words
MISSES_WEIGH = 0.98  # the index would rather propose too many candidates, which are then compared exactly
HIGHEST = 0.95  # above it the index has too few bands


class NearDuplicates:
    """No selected record too similar to a better one.

    Args:
        text_of: Text of a row.
        threshold: Jaccard similarity of word triples from which two texts are near duplicates.

    Raises:
        UserError: if datasketch is not installed.
    """

    def __init__(self, text_of: Callable[[int], str], threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError(
                "selection.dedup=near: needs the library datasketch; run pip install 'trim-lightning[dedup]'"
            ) from None
        self._text_of = text_of
        self._new = MinHash
        self._threshold = threshold
        self._index = MinHashLSH(
            threshold=min(threshold, HIGHEST), num_perm=PERMUTATIONS, weights=(1 - MISSES_WEIGH, MISSES_WEIGH)
        )
        self._taken: dict[int, set[str]] = {}
        self._last: tuple[int, set[str], object] | None = None

    def admits(self, row: int) -> bool:
        """True if no selected record is a near duplicate."""
        pieces, sketch = self._sketch(row)
        return all(
            similarity(pieces, self._taken[candidate]) < self._threshold for candidate in self._index.query(sketch)
        )

    def take(self, row: int) -> None:
        """Note the record."""
        self._taken[row], sketch = self._sketch(row)
        self._index.insert(row, sketch)

    def _sketch(self, row: int) -> tuple[set[str], object]:
        """Word triples of a record and their MinHash."""
        if self._last is None or self._last[0] != row:
            words = self._text_of(row).split()
            pieces = {" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))}
            sketch = self._new(num_perm=PERMUTATIONS, seed=1)
            sketch.update_batch([piece.encode() for piece in sorted(pieces)])
            self._last = (row, pieces, sketch)
        return self._last[1:]


def similarity(one: set[str], two: set[str]) -> float:
    """Jaccard similarity of two sets that are not empty."""
    return len(one & two) / len(one | two)
