"""Near duplicates among selected records, by MinHash over word triples (the library datasketch)."""

from __future__ import annotations

from collections.abc import Callable

from trim_lightning.errors import UserError

PERMUTATIONS = 128
SHINGLE = 3  # words


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
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._last: tuple[int, object] | None = None

    def admits(self, row: int) -> bool:
        """True if no selected record is a near duplicate."""
        return not self._index.query(self._sketch(row))

    def take(self, row: int) -> None:
        """Note the record."""
        self._index.insert(row, self._sketch(row))

    def _sketch(self, row: int) -> object:
        if self._last is None or self._last[0] != row:
            words = self._text_of(row).split()
            pieces = {" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))}
            sketch = self._new(num_perm=PERMUTATIONS, seed=1)
            sketch.update_batch([piece.encode() for piece in sorted(pieces)])
            self._last = (row, sketch)
        return self._last[1]
