"""Time spent on a resumable pass, over all its attempts."""

from __future__ import annotations

import json
import time
from pathlib import Path

from trim_lightning.store.store import write_atomically

FILE = "clock.json"


class WorkClock:
    """Adds up the seconds of every attempt at a pass; a killed attempt counts up to its last finished shard.

    Args:
        directory: The pass's directory, where the sum is kept until `finish`.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / FILE
        self._started = time.perf_counter()
        try:
            self._earlier = float(json.loads(self._file.read_text())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            self._earlier = 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far, earlier attempts included."""
        return self._earlier + time.perf_counter() - self._started

    def tick(self) -> None:
        """Note the seconds so far; called when a shard is finished."""
        write_atomically(self._file, json.dumps({"seconds": self.seconds}))

    def finish(self) -> float:
        """Remove the note and return the sum."""
        self._file.unlink(missing_ok=True)
        return self.seconds
