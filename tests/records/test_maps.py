"""Large files are read without becoming this process's memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from trim_lightning.files import maps
from trim_lightning.files.maps import ReadMap


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def read_through(path: Path) -> int:
    """Bytes by which memory has grown when a file has been read through, piece by piece; the content is checked."""
    with path.open("rb") as file:
        read = ReadMap(file)
    before, step, most = resident(), 1 << 20, 0
    for start in range(0, path.stat().st_size, step):
        read.note(step)
        assert read.data[start] == read.data[start + step - 1] == start >> 20
        assert len(read.data[start : start + step]) == step
        most = max(most, resident() - before)
    assert read.data[5] == 0, "what was given back is read again"
    return most


def test_pages_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * (1 << 20) for number in range(64)))
    monkeypatch.setattr(maps, "KEPT", 1 << 40)
    everything = read_through(path)
    monkeypatch.setattr(maps, "KEPT", 4 << 20)
    assert everything > 40 << 20
    assert read_through(path) < 24 << 20
