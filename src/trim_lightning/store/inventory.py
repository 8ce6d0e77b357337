"""What is in a store: entries and unfinished work, their size and age; checking and deleting them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from filelock import Timeout

from trim_lightning.files.json_files import read_json_object
from trim_lightning.store.receipt import RECEIPT, StoreError
from trim_lightning.store.store import ORPHAN_AGE, Store, last_change

PARTIAL = "partial"
KEY = re.compile(r"[0-9a-f]{64}")
WORK = re.compile(r".+-[0-9a-f]{64}(-[0-9a-f]{32})?|damaged-[0-9a-f]{32}")


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
    """Everything in a store, largest first; what no store makes is passed over."""
    return sorted(_items(root), key=lambda item: (-item.size, item.stage, item.name))


def _items(root: Path) -> Iterator[Item]:
    for stage in real_folders(root):
        for path in real_folders(stage):
            if not (WORK if stage.name == PARTIAL else KEY).fullmatch(path.name):
                continue
            states = [state for file in path.rglob("*") if (state := state_of(file)) is not None]
            size = sum(state.st_size for state in states if S_ISREG(state.st_mode))
            changed, receipt = last_change(path), state_of(path / RECEIPT)
            used = receipt.st_mtime if receipt is not None else changed
            try:
                made = float(receipt_of(path)["created"])
            except (StoreError, ValueError, KeyError, TypeError, OverflowError):
                made = changed
            yield Item(stage.name, path.name, path, size, made, used)


def real_folders(folder: Path) -> list[Path]:
    """The folders in a folder, symbolic links passed over."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def state_of(path: Path) -> os.stat_result | None:
    """Size and times of a file; None if it has gone meanwhile."""
    try:
        return path.stat(follow_symlinks=False)
    except OSError:
        return None


def receipt_of(path: Path) -> dict[str, Any]:
    """The receipt of an entry.

    Raises:
        StoreError: if there is none that can be read.
    """
    try:
        return read_json_object(path / RECEIPT)
    except (OSError, ValueError):
        raise StoreError("unreadable receipt") from None


def damage(root: Path, item: Item, whole: bool = True) -> str | None:
    """What is wrong with an entry, every file or (not ``whole``) samples read; None if nothing is."""
    try:
        Store(root).verify(item.path, whole)
    except StoreError as error:
        return str(error)
    except FileNotFoundError:
        pass  # deleted meanwhile: nothing is damaged
    return None


def delete(root: Path, item: Item, lock: str = "file") -> bool:
    """Delete an entry or unfinished work; False if a running process is building it.

    Args:
        root: The store.
        item: What goes.
        lock: ``paths.store_lock`` of those who use the store. With ``none`` nobody can tell who is building, so
            that unfinished work of the last day stays.
    """
    name = item.name if item.stage == PARTIAL else f"{item.stage}-{item.name}"
    name = re.sub(r"(-[0-9a-f]{64})-[0-9a-f]{32}$", r"\1", name)  # unfinished work that cannot be resumed
    if lock == "none" and not item.finished and time.time() - item.used < ORPHAN_AGE:
        return False
    store = Store(root, lock)
    try:
        with store.lock(name, timeout=0):
            store.discard(item.path)
    except Timeout:
        return False
    return True


def chosen(
    found: list[Item],
    *,
    stages: list[str] | None = None,
    unused_seconds: float | None = None,
    keep_bytes: int | None = None,
) -> list[Item]:
    """What a pruning takes, longest unused first.

    Args:
        found: Everything.
        stages: Only these stages.
        unused_seconds: Only what no run has asked for since.
        keep_bytes: Take no more than is needed to bring the store down to this size.
    """
    candidates = sorted(found, key=lambda item: (item.used, item.name))
    if stages:
        candidates = [item for item in candidates if item.stage in stages]
    if unused_seconds is not None:
        candidates = [item for item in candidates if time.time() - item.used >= unused_seconds]
    if keep_bytes is None:
        return candidates
    size, taken = sum(item.size for item in found), []
    for item in candidates:
        if size <= keep_bytes:
            break
        taken.append(item)
        size -= item.size
    return taken
