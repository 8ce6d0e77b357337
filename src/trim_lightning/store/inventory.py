"""What is in a store: entries and unfinished work, their size and age; checking and deleting them."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trim_lightning.store.store import RECEIPT, Store, StoreError, last_change

PARTIAL = "partial"
NO_STAGES = (PARTIAL, "locks", "digests")


@dataclass(frozen=True)
class Item:
    """One entry, or one piece of unfinished work.

    Attributes:
        stage: The stage; ``partial`` for unfinished work.
        name: The key (hex), or the directory's name.
        path: Its directory.
        size: Bytes of all its files.
        made: Time (seconds) when it was finished, or last changed.
        used: Time when a run last asked for it.
    """

    stage: str
    name: str
    path: Path
    size: int
    made: float
    used: float

    @property
    def finished(self) -> bool:
        """True for a result, False for unfinished work."""
        return self.stage != PARTIAL


def items(root: Path) -> list[Item]:
    """Everything in a store, largest first."""
    return sorted(_items(root), key=lambda item: (-item.size, item.stage, item.name))


def _items(root: Path) -> Iterator[Item]:
    for stage in sorted(path for path in root.iterdir() if path.is_dir()):
        if stage.name in NO_STAGES[1:]:
            continue
        for path in sorted(entry for entry in stage.iterdir() if entry.is_dir()):
            files = [file for file in path.rglob("*") if file.is_file()]
            size, changed = sum(file.stat().st_size for file in files), last_change(path)
            receipt = path / RECEIPT
            used = receipt.stat().st_mtime if receipt.exists() else changed
            yield Item(stage.name, path.name, path, size, made_at(receipt, changed), used)


def made_at(receipt: Path, otherwise: float) -> float:
    """Time noted in a receipt."""
    try:
        return float(json.loads(receipt.read_text())["created"])
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise


def receipt_of(item: Item) -> dict[str, Any]:
    """The receipt of an entry.

    Raises:
        StoreError: if there is none that can be read.
    """
    try:
        content: dict[str, Any] = json.loads((item.path / RECEIPT).read_text())
    except (OSError, ValueError):
        raise StoreError("unreadable receipt") from None
    return content


def damage(root: Path, item: Item) -> str | None:
    """What is wrong with an entry, every file read; None if nothing is."""
    try:
        Store(root).verify(item.path)
    except StoreError as error:
        return str(error)
    except FileNotFoundError:
        return "vanished meanwhile"
    return None


def delete(root: Path, item: Item) -> bool:
    """Delete an entry or unfinished work; False if a running process is building it."""
    name = item.name if item.stage == PARTIAL else f"{item.stage}-{item.name}"
    name = re.sub(r"(-[0-9a-f]{64})-[0-9a-f]{32}$", r"\1", name)  # unfinished work that cannot be resumed
    locks = root / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(locks / f"{name}.lock"), timeout=0):
            grave = item.path.with_name(f".{item.path.name}.deleted")
            shutil.rmtree(grave, ignore_errors=True)
            item.path.rename(grave)  # at once for everybody else
            shutil.rmtree(grave, ignore_errors=True)
    except Timeout:
        return False
    except FileNotFoundError:
        pass  # another process was faster
    return True


def chosen(
    found: list[Item],
    *,
    stages: list[str] | None = None,
    unused_seconds: float | None = None,
    keep_bytes: int | None = None,
    now: Callable[[], float] = time.time,
) -> list[Item]:
    """What a pruning takes, longest unused first.

    Args:
        found: Everything.
        stages: Only these stages.
        unused_seconds: Only what no run has asked for since.
        keep_bytes: Take no more than is needed to bring the store down to this size.
        now: Gives the time in seconds.
    """
    candidates = sorted(found, key=lambda item: (item.used, item.name))
    if stages:
        candidates = [item for item in candidates if item.stage in stages]
    if unused_seconds is not None:
        candidates = [item for item in candidates if now() - item.used >= unused_seconds]
    if keep_bytes is None:
        return candidates
    size, taken = sum(item.size for item in found), []
    for item in candidates:
        if size <= keep_bytes:
            break
        taken.append(item)
        size -= item.size
    return taken
