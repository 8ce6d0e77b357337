"""Real runs of a tiny model, made once, and copies of them with changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import Change, MadeRuns, edit


@pytest.fixture(scope="session")
def made_runs(tmp_path_factory: pytest.TempPathFactory) -> MadeRuns:
    """The runs of this test session."""
    return MadeRuns(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="session")
def selections(made_runs: MadeRuns) -> dict[str, Path]:
    """Selections: TRIM, and random with three seeds."""
    runs = {"trim": made_runs.select(made_runs.root / "select" / "trim", "selection.count=6")}
    for seed in range(3):
        folder = made_runs.root / "select" / f"random_{seed}"
        runs[f"random_{seed}"] = made_runs.select(folder, "method=random", "selection.count=6", f"seed={seed}")
    return runs


@pytest.fixture(scope="session")
def trained(made_runs: MadeRuns) -> dict[str, Path]:
    """Fine-tuning runs: random with three seeds, and the longest records."""
    runs = {}
    for name, method, seed in [*((f"random_{seed}", "random", seed) for seed in range(3)), ("longest", "longest", 0)]:
        runs[name] = made_runs.train(
            made_runs.root / "train" / name, f"method={method}", "selection.count=4", f"seed={seed}"
        )
    return runs


@pytest.fixture
def sweep(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A multirun folder as Hydra lays it: the training runs as jobs 0 to 3."""
    folder = tmp_path / "sweep"
    for job, run in enumerate(trained.values()):
        shutil.copytree(run, folder / str(job))
    (folder / "multirun.yaml").write_text("hydra: {}\n")
    return folder


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """Gives a copy of a run whose manifest was changed by a function."""

    def make(run: Path, name: str, change: Change = lambda manifest: None) -> Path:
        shutil.copytree(run, tmp_path / name)
        return edit(tmp_path / name, change)

    return make
