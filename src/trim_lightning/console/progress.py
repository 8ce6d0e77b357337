"""Progress bars that also read well in a Slurm log: tqdm, never Rich."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines in a log file

# no process shares a bar with another; tqdm's own lock would leave a semaphore behind in every process that is killed,
# of which Python then tells after the command's last line
tqdm.set_lock(threading.RLock())


class ProgressLines(tqdm):
    """Progress for a log file: whole lines, and none for what is done within the first interval."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write one line; an empty message would clear a terminal's line and writes nothing."""
        text = str(self) if msg is None else msg
        if text:
            self.fp.write(text.strip() + "\n")
            self.fp.flush()
        return bool(text)


def progress_bar(title: str, total: int, unit: str = "tokens") -> tqdm[Any]:
    """A bar with rate and time left.

    A terminal gets a bar with ten updates a second that goes away when done, a log file one line every ten seconds.
    """
    shared: dict[str, Any] = {
        "total": total,
        "unit": f" {unit}",
        "unit_scale": total > 10_000,
        "leave": False,
        "file": sys.stderr,
    }
    if sys.stderr.isatty():
        return tqdm(desc=f"{title:<12}", dynamic_ncols=True, **shared)
    line = "{desc}: {percentage:.0f}% of {total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return ProgressLines(desc=title, bar_format=line, mininterval=LINE_SECONDS, delay=LINE_SECONDS, **shared)
