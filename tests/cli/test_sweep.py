"""A multirun runs what its jobs share once, and gives every job what it would have had alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tiny_models import write_records

from .conftest import CONSOLE_SCRIPT, Inputs, Run, run_process

AXES = ("saliency.num_layers=1,2,3", "pooler=mean,max")


def arguments(inputs: Inputs, tmp_path: Path) -> list[str]:
    return ["-m", *inputs.arguments, f"paths.store_dir={tmp_path / 'store'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]


def sweep(run: Run, inputs: Inputs, tmp_path: Path, *overrides: str, code: int = 0) -> str:
    outcome = run(*arguments(inputs, tmp_path), *overrides)
    assert outcome.code == code, outcome.err
    return outcome.out + outcome.err


@pytest.mark.slow
def test_the_jobs_share_one_pass(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    told = sweep(run, inputs, tmp_path, *AXES)
    assert "one pass over the pool for 6 jobs with 3 banks" in told
    assert len(re.findall(r"INFO +score: [\d,]+ tokens", told)) == 1
    assert told.count("score: from the store") == 6
    cells = [(layers, pooler) for layers in (1, 2, 3) for pooler in ("mean", "max")]
    for job, (layers, pooler) in enumerate(cells):
        alone = tmp_path / "alone"
        outcome = run(
            *inputs.arguments, f"paths.store_dir={tmp_path / 'store-alone'}",
            f"paths.output_dir={alone}", f"saliency.num_layers={layers}", f"pooler={pooler}",
        ) if job in (0, 5) else None  # fmt: skip
        manifest = json.loads((tmp_path / "sweep" / str(job) / "manifest.json").read_text())
        assert manifest["stages"]["score"]["cached"]
        assert manifest["config"]["saliency"]["num_layers"] == layers
        if outcome is not None:
            assert outcome.code == 0
            for name in ("scores.parquet", "coreset.jsonl"):
                assert (alone / name).read_bytes() == (tmp_path / "sweep" / str(job) / name).read_bytes()
    again = sweep(run, inputs, tmp_path, *AXES, "fallback.penalty=0.3")
    assert "one pass" not in again
    assert not re.findall(r"INFO +score: [\d,]+ tokens", again), "a new penalty needs no pass"


def test_failing_jobs_are_listed_and_do_not_stop_the_others(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    told = sweep(run, inputs, tmp_path, "saliency.num_layers=99,2,1", code=2)
    assert "1 of 3 jobs failed:" in told
    assert re.search(r"#0 .*saliency.num_layers=99.*: saliency.num_layers=99: tiny has only", told)
    assert [(tmp_path / "sweep" / job / "coreset.jsonl").exists() for job in "012"] == [False, True, True]


@pytest.mark.slow
def test_sharing_can_be_switched_off(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    told = sweep(run, inputs, tmp_path, "saliency.num_layers=1,2", "hydra.launcher.share=false")
    assert "one pass" not in told
    assert len(re.findall(r"INFO +score: [\d,]+ tokens", told)) == 2


@pytest.mark.slow
def test_another_launcher_runs_the_jobs_after_the_shared_pass(inputs: Inputs, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    overrides = ("saliency.num_layers=1,2", "hydra/launcher@hydra.launcher.inner=joblib")
    outcome = run_process(CONSOLE_SCRIPT, *arguments(inputs, tmp_path), *overrides, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    told = outcome.out + outcome.err
    assert "one pass over the pool for 2 jobs with 2 banks" in told
    assert [(tmp_path / "sweep" / job / "coreset.jsonl").exists() for job in "01"] == [True, True]


def begin(inputs: Inputs, tmp_path: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    """Start a sweep over one store in a process group of its own."""
    return subprocess.Popen(
        [
            str(CONSOLE_SCRIPT), "-m", *inputs.arguments, f"pool.path={tmp_path / 'pool.jsonl'}",
            f"paths.store_dir={tmp_path / 'store'}", f"hydra.sweep.dir={tmp_path / name}",
            "scoring.tokens_per_batch=64", *AXES, *overrides,
        ],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def passes_of(told: str) -> list[str]:
    """What a sweep's own forward passes over the pool said."""
    return re.findall(r"INFO +score: [\d,]+ tokens", told)


def coresets(folder: Path) -> list[bytes]:
    return [(folder / str(job) / "scores.parquet").read_bytes() for job in range(6)]


@pytest.mark.slow
def test_two_sweeps_at_once_run_one_pass(inputs: Inputs, tmp_path: Path) -> None:
    write_records(tmp_path / "pool.jsonl", 400, seed=3)
    both = [begin(inputs, tmp_path, name) for name in ("first", "second")]
    told = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert len(passes_of(told[0]) + passes_of(told[1])) == 1
    assert len(re.findall(r"INFO +warmup: [\d,]+ tokens", told[0] + told[1])) == 1
    assert coresets(tmp_path / "first") == coresets(tmp_path / "second")
    assert (
        run_process(CONSOLE_SCRIPT.with_name("trim-store"), "--store", tmp_path / "store", "verify", cwd=tmp_path).code
        == 0
    )


@pytest.mark.slow
def test_a_killed_sweep_repeats_nothing_that_was_finished(inputs: Inputs, tmp_path: Path) -> None:
    write_records(tmp_path / "pool.jsonl", 1200, seed=3)
    killed = begin(inputs, tmp_path, "killed", "warmup=none")
    partial = tmp_path / "store" / "partial"
    deadline = time.monotonic() + 600
    # the pass writes a shard for each of the three banks; a few of them are to be kept
    while len(list(partial.glob("score-*/similarity-*.safetensors"))) < 12:
        assert killed.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    kept = {file: file.stat().st_mtime_ns for file in partial.glob("score-*/similarity-*.safetensors")}
    assert len({file.parent for file in kept}) == 3
    again = begin(inputs, tmp_path, "again", "warmup=none")
    told, _ = again.communicate(timeout=900)
    assert again.returncode == 0, told
    finished = {file.stat().st_mtime_ns for file in (tmp_path / "store" / "score").glob("*/similarity-*.safetensors")}
    folders = {file.parent for file in kept}
    whole = set.intersection(*({file.name for file in kept if file.parent == folder} for folder in folders))
    assert whole, "no shard that all banks had finished"
    assert {time for file, time in kept.items() if file.name in whole} <= finished, "a finished shard was written again"
    fresh = begin(inputs, tmp_path, "fresh", "warmup=none", f"paths.store_dir={tmp_path / 'other'}")
    fresh.communicate(timeout=900)
    assert coresets(tmp_path / "again") == coresets(tmp_path / "fresh")
