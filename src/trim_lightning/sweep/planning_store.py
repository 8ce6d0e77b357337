"""A store that says what a run would ask of it, without doing the work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trim_lightning.store import Cost, Entry, StageKey, Store


class NotBuilt(Exception):
    """A plan has come to where the content of a result is needed that is not there yet."""


class UnbuiltEntry(Entry):
    """A result that is not there yet: it has a key, and nothing to read."""

    def __init__(self, key: StageKey) -> None:
        facts: Mapping[str, Any] = defaultdict(float)
        for name, value in {"key": key, "facts": facts, "cached": False, "versions": None}.items():
            object.__setattr__(self, name, value)

    @property
    def path(self) -> Path:
        """There is none.

        Raises:
            NotBuilt: always.
        """
        raise NotBuilt(self.key.stage)


@dataclass(frozen=True)
class Wanted:
    """A result that a run asked for.

    Attributes:
        key: Its key.
        cost: What building it takes; None for a light one.
        found: True if the store has it.
        users: Numbers of the jobs that asked for it.
    """

    key: StageKey
    cost: Cost | None
    found: bool
    users: set[int] = field(default_factory=set)


class PlanningStore(Store):
    """Finds what is there, builds what is light (records, tokens), and notes the rest.

    A light result that is made from one that is not there is noted as well.

    Attributes:
        wanted: Every result that was asked for, in order.
    """

    def __init__(self, root: Path | str, lock: str = "file") -> None:
        super().__init__(root, lock)
        self.wanted: list[Wanted] = []

    def get(
        self,
        key: StageKey,
        build: Callable[[Path], Mapping[str, Any] | None],
        *,
        resumable: bool = False,
        together: bool = False,
        cost: Cost | None = None,
    ) -> Entry:
        """The result if it is there or light; else an entry that cannot be read."""
        entry = self.find(key)
        self.wanted.append(Wanted(key, cost, entry is not None))
        if entry is None and cost is None:
            try:
                entry = super().get(key, build, resumable=resumable)
            except NotBuilt:
                entry = None
        return UnbuiltEntry(key) if entry is None else entry
