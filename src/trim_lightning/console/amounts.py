"""Sizes, times and places for people."""

from __future__ import annotations

import os
from pathlib import Path

SIZES = ("B", "kB", "MB", "GB", "TB")


def size_text(size: float) -> str:
    """Bytes in the unit that people would use."""
    for unit in SIZES:
        if size < 1000 or unit == SIZES[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def time_text(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def place_text(path: Path) -> str:
    """A path relative to the working directory if it is below, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
