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
