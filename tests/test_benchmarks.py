"""The benchmark script runs; what it measures is for a quiet machine, not for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_an_unknown_figure_is_refused_and_the_known_ones_named() -> None:
    done = run(str(BENCHMARKS / "run.py"), "engines")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: engines: no such figure; there are engine, padding")


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_selection_stages_of_less_and_trim_run_on_a_small_model() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import json, shutil, materials; "
        "import figures_less as figures; from pathlib import Path; "
        "materials.WORK.mkdir(parents=True, exist_ok=True); small = materials.tiny(); materials.smollm2 = "
        "lambda: small; figures.WORK = Path(materials.WORK / 'small'); shutil.rmtree(figures.WORK, True); "
        "figures.WORK.mkdir(); print(json.dumps(figures.selection_stages(4, '', number=12, rounds=1)))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    figure = json.loads(done.stdout.splitlines()[-1])
    assert figure["less_seconds"][0] / figure["trim_seconds"][0] == pytest.approx(figure["ratio"])
    assert figure["ratio"] > 0
