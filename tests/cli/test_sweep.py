"""A multirun runs what its jobs share once, and gives every job what it would have had alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .conftest import CONSOLE_SCRIPT, Inputs, run_process

AXES = ("saliency.num_layers=1,2,3", "pooler=mean,max")


def sweep(inputs: Inputs, tmp_path: Path, *overrides: str, code: int = 0) -> str:
    outcome = run_process(
        CONSOLE_SCRIPT, "-m", *inputs.arguments, f"paths.store_dir={tmp_path / 'store'}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", *overrides, cwd=tmp_path,
    )  # fmt: skip
    assert outcome.code == code, outcome.err
    return outcome.out + outcome.err


def test_the_jobs_share_one_pass(inputs: Inputs, tmp_path: Path) -> None:
    told = sweep(inputs, tmp_path, *AXES)
    assert "one pass over the pool for 6 jobs with 3 banks" in told
    assert len(re.findall(r"INFO +score: [\d,]+ tokens", told)) == 1
    assert told.count("score: from the store") == 6
    cells = [(layers, pooler) for layers in (1, 2, 3) for pooler in ("mean", "max")]
    for job, (layers, pooler) in enumerate(cells):
        alone = tmp_path / "alone"
        outcome = run_process(
            CONSOLE_SCRIPT, *inputs.arguments, f"paths.store_dir={tmp_path / 'store-alone'}",
            f"paths.output_dir={alone}", f"saliency.num_layers={layers}", f"pooler={pooler}", cwd=tmp_path,
        ) if job in (0, 5) else None  # fmt: skip
        manifest = json.loads((tmp_path / "sweep" / str(job) / "manifest.json").read_text())
        assert manifest["stages"]["score"]["cached"]
        assert manifest["config"]["saliency"]["num_layers"] == layers
        if outcome is not None:
            assert outcome.code == 0
            for name in ("scores.parquet", "coreset.jsonl"):
                assert (alone / name).read_bytes() == (tmp_path / "sweep" / str(job) / name).read_bytes()
    again = sweep(inputs, tmp_path, *AXES, "fallback.penalty=0.3")
    assert "one pass" not in again
    assert not re.findall(r"INFO +score: [\d,]+ tokens", again), "a new penalty needs no pass"


def test_failing_jobs_are_listed_and_do_not_stop_the_others(inputs: Inputs, tmp_path: Path) -> None:
    told = sweep(inputs, tmp_path, "saliency.num_layers=99,2,1", code=2)
    assert "1 of 3 jobs failed:" in told
    assert re.search(r"#0 .*saliency.num_layers=99.*: saliency.num_layers=99: tiny has only", told)
    assert [(tmp_path / "sweep" / job / "coreset.jsonl").exists() for job in "012"] == [False, True, True]


def test_sharing_can_be_switched_off(inputs: Inputs, tmp_path: Path) -> None:
    told = sweep(inputs, tmp_path, "saliency.num_layers=1,2", "hydra.launcher.share=false")
    assert "one pass" not in told
    assert len(re.findall(r"INFO +score: [\d,]+ tokens", told)) == 2


def test_another_launcher_runs_the_jobs_after_the_shared_pass(inputs: Inputs, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    told = sweep(inputs, tmp_path, "saliency.num_layers=1,2", "hydra/launcher@hydra.launcher.inner=joblib")
    assert "one pass over the pool for 2 jobs with 2 banks" in told
    assert [(tmp_path / "sweep" / job / "coreset.jsonl").exists() for job in "01"] == [True, True]
