"""A scheduler's word that time is nearly up: a training writes a checkpoint before it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # what Slurm is told to send, and what submitit listens to


class Ending:
    """Whether a training is to end early.

    Attributes:
        asked: The signal that came, or None.
        ordered: Set where all processes have agreed to end now.
    """

    def __init__(self, pass_on: Callable[[], None] = lambda: None) -> None:
        self.asked: int | None = None
        self.ordered = False
        self._pass_on = pass_on

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal."""
        self.asked = number
        self._pass_on()


@contextmanager
def deferred(pass_on: Callable[[], None] = lambda: None) -> Iterator[Ending]:
    """Within it those of `SIGNALS` that someone handles are only noted; their handler gets them when it is left.

    Args:
        pass_on: Called when one comes.

    Raises:
        KeyboardInterrupt: at its end, if one came and its handler went on, or if it was ordered.
    """
    ending, handlers = Ending(pass_on), dict[int, Any]()
    if threading.current_thread() is threading.main_thread():
        handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, ending.note)
    try:
        yield ending
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if ending.asked is not None:
        handlers[ending.asked](ending.asked, None)
    if ending.asked is not None or ending.ordered:
        raise KeyboardInterrupt
