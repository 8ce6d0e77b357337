"""Time spent on a resumable pass, over all its attempts."""

from __future__ import annotations

import json
import time
from pathlib import Path

from trim_lightning.files.atomic import write_atomically

FILE = "clock.json"


class WorkClock:
    """Adds up the seconds of every attempt at a pass; a killed attempt counts up to its last finished shard.

    The sum is in a file, for the process that computes may be another than the one that asks.

    Args:
        directory: The pass's directory, where the sum is kept until `finish`.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / FILE
        self._started: float | None = None
        self._earlier = 0.0

    def start(self) -> None:
        """Begin this attempt."""
        self._earlier = self.read()
        self._started = time.perf_counter()

    def tick(self) -> None:
        """Note the seconds so far; called when a shard is finished."""
        assert self._started is not None
        seconds = self._earlier + time.perf_counter() - self._started
        write_atomically(self._file, json.dumps({"seconds": seconds}))

    def read(self) -> float:
        """Seconds noted so far."""
        try:
            return float(json.loads(self._file.read_text())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def finish(self) -> float:
        """Remove the note and return the sum."""
        seconds = self.read()
        self._file.unlink(missing_ok=True)
        return seconds
