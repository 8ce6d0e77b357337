"""Progress bars that also read well in a Slurm log: tqdm, never Rich."""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines in a log file

# no process shares a bar with another; tqdm's own lock would leave a semaphore behind in every process that is killed,
# of which Python then tells after the command's last line
tqdm.set_lock(threading.RLock())
_on_terminal: weakref.WeakSet[Any] = weakref.WeakSet()  # bars that are shown


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
        bar = tqdm(desc=f"{title:<12}", dynamic_ncols=True, **shared)
        _on_terminal.add(bar)
        return bar
    line = "{desc}: {percentage:.0f}% of {total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return ProgressLines(desc=title, bar_format=line, mininterval=LINE_SECONDS, delay=LINE_SECONDS, **shared)


class InPlaceOfBars(logging.Filter):
    """Takes the bars off the terminal before a log line is written; with their next step they come again below it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True, always."""
        for bar in list(_on_terminal):
            if not bar.disable:  # a closed bar is disabled
                bar.clear()
        return True


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module's variable another value for a while, if it has that variable."""
    if not hasattr(module, name):
        yield
        return
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
