"""What lies in an entry of the store, sealed with checksums."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from trim_lightning.files.atomic import sha256_of, write_atomically
from trim_lightning.store.keys import StageKey
from trim_lightning.store.versions import versions

RECEIPT = "entry.json"
LONGEST_NAME = 1024  # characters of a file's path in an entry
SAMPLED = 64 << 20  # bytes of an entry that a check by samples reads
BLOCK, BLOCKS = 64 << 10, 64  # bytes and number of the blocks that are read of a file larger than all of them


class StoreError(Exception):
    """An entry whose files do not match their checksums."""


class Listed(NamedTuple):
    """A file in a receipt: its name, bytes, sha256 and, if it is large, `sample_of` it."""

    name: str
    size: int
    sha256: str
    sample: str | None

    def differs(self, path: Path, whole: bool) -> bool:
        """True if the file's content is another; with ``whole`` all of it is read."""
        if whole or self.sample is None:
            return sha256_of(path) != self.sha256
        return sample_of(path, self.size) != self.sample

    @property
    def cost(self) -> int:
        """Bytes that are read of it if not all are."""
        return self.size if self.sample is None else BLOCK * BLOCKS


def sample_of(path: Path, size: int) -> str:
    """sha256 (hex) of blocks spread evenly over a file, its first and last among them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in range(BLOCKS):
            file.seek(place * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def some_of(files: Sequence[Listed]) -> set[str]:
    """Names of files drawn at random whose check reads about `SAMPLED` bytes; all if that is enough for all."""
    room, taken = SAMPLED, set()
    for file in random.sample(files, len(files)):
        if room <= 0:
            break
        room -= file.cost
        taken.add(file.name)
    return taken


def seal(workspace: Path, key: StageKey, facts: Mapping[str, Any]) -> None:
    """Write the receipt of a finished workspace: the checksum of every file and of the receipt itself, versions."""
    files = {
        str(path.relative_to(workspace)): described(path)
        for path in sorted(workspace.rglob("*"))
        if path.is_file() and path != workspace / RECEIPT
    }
    content = {"key": key.description, "files": files, "facts": facts, "created": time.time(), "versions": versions()}
    receipt = json.loads(json.dumps(content))  # as it will be read: JSON turns some keys and values into others
    write_atomically(workspace / RECEIPT, json.dumps({**receipt, "seal": seal_of(receipt)}, indent=1))


def described(path: Path) -> dict[str, Any]:
    """A file's line in a receipt."""
    size = path.stat().st_size
    sample = {"sample": sample_of(path, size)} if size > BLOCK * BLOCKS else {}
    return {"sha256": sha256_of(path), "size": size, **sample}


def listed_files(receipt: Mapping[str, Any]) -> list[Listed]:
    """Every file in a receipt; older receipts have no samples.

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
        sample = known.get("sample")
        listed.append(Listed(name, size, digest, sample if isinstance(sample, str) else None))
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
