"""Jobs of a multirun in processes of their own, as a cluster would run them."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import CONSOLE_SCRIPT, Inputs, run_process


@pytest.mark.parametrize("launcher", [pytest.param("submitit_local", marks=pytest.mark.slow), "joblib"])
def test_a_launcher_of_hydra_runs_the_jobs(launcher: str, inputs: Inputs, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    outcome = run_process(
        CONSOLE_SCRIPT, "-m", f"hydra/launcher={launcher}", "method=random,longest", *inputs.arguments,
        f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    coresets = [(tmp_path / "sweep" / job / "coreset.jsonl").read_bytes() for job in ("0", "1")]
    assert coresets[0] != coresets[1]
    assert all(coresets)


def test_jobs_that_would_write_into_one_folder_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    words = ["-m", "method=random,longest", *inputs.arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    words = [word for word in words if not word.startswith("paths.output_dir=")]
    same = run_process(CONSOLE_SCRIPT, *words, f"paths.output_dir={tmp_path / 'same'}", cwd=tmp_path)
    assert same.code == 2, same.err
    (line,) = [line for line in same.err.splitlines() if line.startswith("error: ")]
    assert (
        "several jobs would write there, one over the other; name the folder of all jobs with hydra.sweep.dir" in line
    )
    assert not (tmp_path / "same").exists()
    apart = f"paths.output_dir={tmp_path}/own/${{method.name}}"
    outcome = run_process(CONSOLE_SCRIPT, *words, apart, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "own").glob("*/coreset.jsonl")) == ["coreset.jsonl"] * 2
