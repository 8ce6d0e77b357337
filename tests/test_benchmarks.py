"""The benchmark script runs; what it measures is for a quiet machine, not for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

from trim_lightning.runs.yardsticks import PoolScores, write_bergson

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


def test_scores_of_controls_have_the_layout_that_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import removals

    table = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
    removals.write_scores(tmp_path / "own", table)
    (tmp_path / "exported").mkdir()
    pool = PoolScores(None, table[:, 0], ["a", "b", "c"], table.T, True, 0, "facts")  # type: ignore[arg-type]
    write_bergson(pool, tmp_path / "exported")
    own, exported = tmp_path / "own", tmp_path / "exported"
    assert (own / "scores.bin").read_bytes() == (exported / "scores.bin").read_bytes()
    for name, read in (("info.json", json.loads), ("config.yaml", yaml.safe_load)):
        assert read((own / name).read_text()) == read((exported / name).read_text())


def test_what_removals_do_is_compared_question_by_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import removals

    changes, sums = np.random.default_rng(2).normal(size=(2, 40, 64))
    sums[:, 3] = 1.0
    found = removals.spearman(changes, sums)
    assert found[3] == 0
    for question in (0, 1, 63):
        expected = spearmanr(changes[:, question], sums[:, question]).statistic
        assert found[question] == pytest.approx(expected)
    people = np.repeat(np.arange(removals.PEOPLE), 4)
    assert removals.figure((changes, changes), people).startswith("+1.00 (+1.00 to +1.00)")


def test_the_ten_best_of_each_question_count_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import removals

    monkeypatch.setattr(removals, "WORK", tmp_path)
    monkeypatch.setattr(removals, "ORDERED", ("trim",))
    table = np.random.default_rng(3).normal(size=(30, 2)).astype(np.float32)
    removals.write_scores(tmp_path / removals.folder_of("trim"), table)
    assert (removals.read_scores(tmp_path / removals.folder_of("trim")) == table).all()
    removals.best_only()
    mask = removals.read_scores(tmp_path / removals.folder_of(f"trim{removals.BEST}"))
    assert (mask == (table >= np.sort(table, axis=0)[-10])).all()
