"""Progress bars that also read well in a Slurm log: tqdm, never Rich."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(title: str, total: int, unit: str = "tokens") -> tqdm[Any]:
    """A bar with rate and time left.

    A terminal gets ten updates a second, a log file one line every ten seconds.

    Args:
        title: The stage.
        total: Units until it is done.
        unit: What is counted.
    """
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=f"{title:<12}",
        unit=f" {unit}",
        unit_scale=total > 10_000,
        mininterval=0.1 if live else 10,
        dynamic_ncols=live,
        leave=live,
        file=sys.stderr,
    )
