"""What building a stage result will cost, said beside the building, for plans made before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol


class Recipe(Protocol):
    """How to load a model."""

    @property
    def identity(self) -> Hashable:
        """Equal where the same model is loaded."""

    def load(self) -> Any:
        """Load it."""


@dataclass(frozen=True)
class Measured:
    """What a sample of a stage's work took on this machine.

    Attributes:
        tokens_per_second: Real tokens, padding not counted.
        bytes_per_token: Size of the result on disk, per token.
        bytes_beside: Size of what does not grow with the tokens, such as an adapter.
    """

    tokens_per_second: float
    bytes_per_token: float = 0.0
    bytes_beside: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The work behind one stage result.

    Attributes:
        stage: Name in the manifest that it is booked under.
        count: Gives the real tokens that will be fed to the model; called only for a plan.
        recipe: How to load the model that runs it; called only to measure.
        measure: Runs a sample of it on the loaded model; None if that cannot be done.
        speed: Works with an equal value run at one speed, so that one measurement serves them.
        shared: Results with an equal value come from one pass when they are planned together; None for a pass of
            its own.
        devices: Devices that divide the tokens among themselves.
        assumed: What had to be assumed about ``tokens``; empty if they are exact.
        spoils: True if measuring changes the model's weights.
        loads: True if the model is loaded for this work alone.
    """

    stage: str
    count: Callable[[], int]
    recipe: Callable[[], Recipe] | None = None
    measure: Callable[[Any], Measured] | None = None
    speed: Hashable = None
    shared: Hashable = None
    devices: int = 1
    assumed: str = ""
    spoils: bool = False
    loads: bool = False

    @cached_property
    def tokens(self) -> int:
        """Real tokens that will be fed to the model."""
        return self.count()


def folder_size(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
