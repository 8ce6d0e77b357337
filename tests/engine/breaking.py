"""A scoring pass that breaks off after some shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trim_lightning.engine import token_shards


def break_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the writer fail after so many shards; returns the list of written ones."""
    written: list[int] = []
    real = token_shards.write_tensors

    def write(path: Path, tensors: Any) -> None:
        if len(written) == shards:
            raise RuntimeError("killed")
        written.append(int(path.stem.rpartition("-")[2]))
        real(path, tensors)

    monkeypatch.setattr(token_shards, "write_tensors", write)
    return written
