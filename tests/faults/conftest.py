"""The undisturbed of the faults, and the table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from disturbed import Undisturbed
from tabulate import tabulate

injected: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    """Built once."""
    made = Undisturbed(tmp_path_factory.mktemp("faults"))
    yield made
    made.nursery.close()


@pytest.fixture
def count_fault() -> Any:
    """``count_fault(kind, stage, number)`` for the table at the end."""

    def note(kind: str, stage: str, number: int = 1) -> None:
        injected[kind, stage] += number

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The number of injections by kind and stage."""
    if not injected:
        return
    rows = [[kind, stage, number] for (kind, stage), number in sorted(injected.items())]
    terminalreporter.write_line(
        tabulate([*rows, ["all", "", sum(injected.values())]], ["fault", "where", "injections"])
    )
