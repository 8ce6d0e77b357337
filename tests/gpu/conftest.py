"""The GPU kit's modules, and where its parts run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from gpu_materials import Place

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The CPU, with small shapes."""
    import passes
    from gpu_materials import Place

    monkeypatch.setattr(passes, "WORK", tmp_path)
    return Place(torch.device("cpu"), True, tmp_path)


@pytest.fixture
def card(tmp_path: Path) -> Place:
    """The GPU; without one the test is skipped, unless it is to be tried on the CPU (TRIM_GPU_TESTS_ON_CPU=1)."""
    from gpu_materials import Place

    if torch.cuda.is_available():
        return Place(torch.device("cuda"), False, tmp_path)
    if os.environ.get("TRIM_GPU_TESTS_ON_CPU"):
        return Place(torch.device("cpu"), True, tmp_path)
    pytest.skip("no GPU here")
