"""TRIM Lightning: forward-only, attention-based coreset selection for instruction tuning."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trim_lightning.api import TrimScorer, load
    from trim_lightning.errors import UserError
    from trim_lightning.selection.scores import Scores
    from trim_lightning.trim.fingerprints import FingerprintBank

__all__ = ["FingerprintBank", "Scores", "TrimScorer", "UserError", "load"]

_HOMES = {
    "FingerprintBank": "trim_lightning.trim.fingerprints",
    "Scores": "trim_lightning.selection.scores",
    "TrimScorer": "trim_lightning.api",
    "UserError": "trim_lightning.errors",
    "load": "trim_lightning.api",
}

# peft imports bitsandbytes where that is installed, and on some CPUs it tells of a kernel that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trim_lightning' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
