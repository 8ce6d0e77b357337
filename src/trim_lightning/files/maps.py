"""Files read through a memory map without becoming this process's memory."""

from __future__ import annotations

import mmap
from typing import BinaryIO

KEPT = 64 << 20  # bytes that are read before the pages are given back
LEAST = 16 << 10  # bytes that one reading counts for: the system maps the pages around it as well


class ReadMap:
    """A file mapped for reading.

    What was read of a map counts as memory of the process until the system wants it back, which it may do too late.

    Args:
        file: The open file, not empty.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._read = 0

    def note(self, size: int) -> None:
        """So many bytes are being read; now and then all pages are given back, and read anew if need be."""
        self._read += max(size, LEAST)
        if self._read > KEPT:
            self._read = 0
            if hasattr(mmap, "MADV_DONTNEED"):
                self.data.madvise(mmap.MADV_DONTNEED)
