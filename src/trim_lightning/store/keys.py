"""What identifies a stage result: everything that matters to it, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trim_lightning.store.versions import key_versions


def canonical(value: Any) -> Any:
    """Bring JSON-able values to one form, so that equal settings give equal keys.

    A float that is a whole number becomes an int (YAML gives 1 where Python code gives 1.0); tuples become
    lists; mapping keys become text.

    Raises:
        TypeError: for a value that has no JSON form.
    """
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(name): canonical(value[name]) for name in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be part of a stage key: {value!r}")


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a value."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class StageKey:
    """The identity of one stage result.

    Attributes:
        stage: Stage name, e.g. ``score``.
        version: Schema version of the stage: raised whenever its code changes what it writes.
        settings: The config values that the stage reads.
        inputs: sha256 of inputs by role, and the hexes of the stages before.

    The versions of the libraries that change what this stage computes are part of it too.
    """

    stage: str
    version: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def hex(self) -> str:
        """sha256 (hex) of all that."""
        return digest_of(self.description)

    def __hash__(self) -> int:
        return hash(self.hex)

    @property
    def description(self) -> dict[str, Any]:
        """JSON-able form, kept beside the result."""
        return {
            "stage": self.stage,
            "version": self.version,
            "settings": canonical(self.settings),
            "inputs": canonical(self.inputs),
            **({"versions": versions} if (versions := key_versions(self.stage)) else {}),
        }
