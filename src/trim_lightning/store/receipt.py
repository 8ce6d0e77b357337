"""What lies in an entry of the store, sealed with checksums."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from trim_lightning.files.atomic import sha256_of, write_atomically
from trim_lightning.store.keys import StageKey
from trim_lightning.store.versions import versions

RECEIPT = "entry.json"
LONGEST_NAME = 1024  # characters of a file's path in an entry


class StoreError(Exception):
    """An entry whose files do not match their checksums."""


def seal(workspace: Path, key: StageKey, facts: Mapping[str, Any]) -> None:
    """Write the receipt of a finished workspace: the checksum of every file and of the receipt itself, versions."""
    files = {
        str(path.relative_to(workspace)): {"sha256": sha256_of(path), "size": path.stat().st_size}
        for path in sorted(workspace.rglob("*"))
        if path.is_file() and path != workspace / RECEIPT
    }
    content = {"key": key.description, "files": files, "facts": facts, "created": time.time(), "versions": versions()}
    receipt = json.loads(json.dumps(content))  # as it will be read: JSON turns some keys and values into others
    write_atomically(workspace / RECEIPT, json.dumps({**receipt, "seal": seal_of(receipt)}, indent=1))


def listed_files(receipt: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Name, size and sha256 of every file in a receipt.

    Raises:
        StoreError: if the list is not one, or a name leads out of the entry.
    """
    files = receipt.get("files")
    if not isinstance(files, Mapping):
        raise StoreError("unreadable receipt")
    listed = []
    for name, expected in files.items():
        known = expected if isinstance(expected, Mapping) else {}
        size, digest = known.get("size"), known.get("sha256")
        if not isinstance(size, int) or not isinstance(digest, str):
            raise StoreError("unreadable receipt")
        place = PurePath(name)
        if "\0" in name or not place.parts or place.is_absolute() or ".." in place.parts or len(name) > LONGEST_NAME:
            raise StoreError("the receipt names a file outside the entry")
        listed.append((name, size, digest))
    return listed


def versions_in(receipt: Mapping[str, Any]) -> dict[str, str] | None:
    """Package to the version that a result was computed with; None if the receipt does not say, as older ones."""
    found = receipt.get("versions")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return None
    return found


def has_link(file: Path, entry: Path) -> bool:
    """True if a path below an entry goes through a symbolic link, which no run makes there."""
    return any(place.is_symlink() for place in (file, *file.parents) if place != entry and entry in place.parents)


def seal_of(receipt: Mapping[str, Any]) -> str:
    """sha256 (hex) of a receipt without its seal."""
    unsealed = {name: value for name, value in receipt.items() if name != "seal"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()
