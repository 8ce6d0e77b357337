"""Texts or numbers of many records end to end in one array, without an object for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


def spans(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[sum of lengths]`` the places ``start, start + 1, …`` of every span, one span after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def sums_of(values: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[spans]`` the sum over each of the spans of these lengths that lie one after the other."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(lengths)
    return running[ends] - running[ends - lengths]


class FlatTexts:
    """Texts by their place.

    Args:
        data: ``[bytes]`` all of them in UTF-8.
        bounds: ``[texts + 1]`` where each begins, and where the last one ends.
    """

    def __init__(self, data: NDArray[np.uint8], bounds: NDArray[np.int64]) -> None:
        self._data, self._bounds = data, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, place: int) -> str:
        return self._data[self._bounds[place] : self._bounds[place + 1]].tobytes().decode()

    def take(self, places: NDArray[np.int64]) -> FlatTexts:
        """The texts at some places."""
        starts = self._bounds[places]
        lengths = self._bounds[places + 1] - starts
        return FlatTexts(self._data[spans(starts, lengths)], np.concatenate([[0], np.cumsum(lengths)]))

    def column(self, start: int, stop: int) -> pa.StringArray:
        """Some that follow one another as a column of a table."""
        import pyarrow as pa

        bounds = self._bounds[start : stop + 1]
        offsets, data = (bounds - bounds[0]).astype(np.int32), self._data[bounds[0] : bounds[-1]]
        return pa.StringArray.from_buffers(len(bounds) - 1, pa.py_buffer(offsets), pa.py_buffer(data))
