"""The GPU kit runs through on the CPU, keeps what it measured, and goes on when a part fails or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

KIT = Path(__file__).parents[2] / "benchmarks"
FAST, SLOW = ("agree", "out_of_memory"), ("saliency_memory", "scoring_1b", "scoring_7b", "training", "less", "compiled")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_part_runs_through_on_small_shapes(name: str, tiny: Any) -> None:
    import gpu

    result = gpu.PARTS[name](tiny)
    assert result["ok"] is not False, result["rows"]
    assert all(len(row) == 3 and all(isinstance(text, str) for text in row) for row in result["rows"])
    json.dumps(result)


def test_a_side_that_computes_otherwise_does_not_agree(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_checks

    calls, numbers = [], gpu_checks.numbers

    def other(*arguments: Any) -> Any:
        found = numbers(*arguments)
        calls.append(1)
        if len(calls) == 2:
            found["scores"] = found["scores"] + 1e-3
        return found

    monkeypatch.setattr(gpu_checks, "numbers", other)
    assert gpu_checks.agree(tiny)["ok"] is False


def test_parts_that_never_ran_out_of_memory_do_not_count(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    import gpu_checks

    monkeypatch.setattr(gpu_checks, "limited", lambda *_: contextlib.nullcontext())
    assert gpu_checks.out_of_memory(tiny)["ok"] is False


@pytest.mark.slow
def test_the_launcher_runs_commands_and_torchrun(tmp_path: Path) -> None:
    """The whole of it is `make gpu ARGS=tiny`."""
    file = tmp_path / "results.json"
    done = subprocess.run(
        ["bash", str(KIT / "gpu.sh"), "tiny", "end_to_end", "fsdp", f"file={file}"],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (entry,) = json.loads(file.read_text()).values()
    assert {name: part["ok"] for name, part in entry["parts"].items()} == {"end_to_end": True, "fsdp": True}
    assert entry["machine"]["torch"] == torch.__version__


def test_operations_are_counted_as_torch_counts_them() -> None:
    import numpy as np
    from torch.utils.flop_counter import FlopCounterMode

    import gpu_speed
    from gpu_materials import random_model

    model = random_model("tiny", "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=torch.zeros((1, 40), dtype=torch.long), use_cache=False)
    by_torch = sum(counter.get_flop_counts()["Global"].values())
    ours = gpu_speed.operations("tiny", np.array([40]))
    linear = sum(
        2 * 40 * part.weight.numel() for part in model.base_model.modules() if isinstance(part, torch.nn.Linear)
    )
    assert ours["linear"] == linear
    # torch counts all pairs of query and key, ours those that causal attention looks at
    full = ours["attention"] * 2 * 40 / 41
    assert by_torch in (pytest.approx(linear + full), pytest.approx(linear))


# --------------------------------------------------------------------------------------------- the results


ON = {"card": "Some Card", "memory_gib": 80.0, "driver": "1.2.3", "python": "3.12.3", "torch": "2.11.0"}


def test_results_are_merged_by_card_and_part(tmp_path: Path) -> None:
    from gpu_table import merge, read

    file = tmp_path / "results.json"
    merge(file, ON, "agree", {"ok": False, "rows": []})
    merge(file, {**ON, "card": "Other"}, "agree", {"ok": True, "rows": []})
    merge(file, {**ON, "driver": "1.2.4"}, "agree", {"ok": True, "rows": [], "took": 3})
    merge(file, ON, "less", {"ok": None, "rows": []})
    found = read(file)
    assert list(found) == ["Some Card", "Other"]
    assert found["Some Card"]["parts"]["agree"] == {"ok": True, "rows": [], "took": 3}
    assert list(found["Some Card"]["parts"]) == ["agree", "less"]


def test_a_kill_while_results_are_written_keeps_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_table

    file = tmp_path / "results.json"
    gpu_table.merge(file, ON, "agree", {"ok": True, "rows": []})
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gpu_table.merge(file, ON, "less", {"ok": True, "rows": []})
    assert file.read_bytes() == before


def test_the_section_names_card_versions_and_what_was_not_run(tmp_path: Path) -> None:
    from gpu_table import section

    parts = {
        "less": {"ok": None, "rows": [["LESS / TRIM", "3.1", ""]]},
        "agree": {"ok": False, "rows": [["scores", "2e-3", "≤ 1e-4"], ["loss", "1e-6", "≤ 1e-4"]]},
    }
    text = section({"Some Card": {"machine": ON, "parts": parts}}, ["agree", "less", "fsdp"])
    assert text.startswith("Some Card: 80.0 GiB, driver 1.2.3, python 3.12.3, torch 2.11.0.\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        ["`agree`", "scores", "2e-3", "≤ 1e-4", "**no**"],
        ["", "loss", "1e-6", "≤ 1e-4", ""],
        ["`less`", "LESS / TRIM", "3.1", "", ""],
    ]
    assert "Not run: `fsdp`." in text


# ------------------------------------------------------------------------------------------------ the runner


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The runner with parts of its own, which run as processes of the shell."""
    import gpu

    def child(name: str, tiny: bool, answer: Path, limit: float) -> dict[str, Any]:
        if name == "less":
            return {"ok": False, "rows": [], "took": 1, "failed": True}
        return {"ok": True, "rows": [["what", "value", ""]], "took": 1}

    monkeypatch.setattr(gpu, "child", child)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    return gpu


def test_what_a_card_has_had_is_left_out_and_what_failed_is_done_again(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kit, "machine", lambda: ON)
    assert kit.main(["agree", "less"]) == 1
    assert "error: not as wanted: less" in capsys.readouterr().err
    kit.main([])
    told = capsys.readouterr().out
    assert "--- agree:" not in told
    assert "--- less:" in told
    assert "--- bytes:" in told
    kit.main(["agree"])
    assert "--- agree:" in capsys.readouterr().out


def test_no_part_is_begun_without_time(kit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert kit.main(["tiny", "agree", "minutes=0.1"]) == 0
    assert "no time was left for agree" in capsys.readouterr().out


def test_arguments_that_mean_nothing(kit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert kit.main(["tiny", "agreed"]) == 2
    assert capsys.readouterr().err.startswith("error: agreed: no such part; there are agree, bytes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_tiny_mode_runs(kit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert kit.main(["agree"]) == 2
    assert capsys.readouterr().err == "error: no GPU here; `tiny` runs the kit on the CPU to see that it runs through\n"


@pytest.mark.parametrize(
    ("program", "told"), [("import time; time.sleep(60)", "not done after 1 s"), ("1 / 0", "failed")]
)
def test_a_part_that_hangs_or_fails_is_ended_and_told(
    program: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    (tmp_path / "part.py").write_text(program)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "part.py"))
    started = time.monotonic()
    result = gpu.child("agree", True, tmp_path / "answer.json", 1)
    assert time.monotonic() - started < 30
    assert result["ok"] is False
    assert result["failed"] is True
    assert told in result["rows"][0][1]


def test_the_wheels_are_of_the_versions_that_are_pinned() -> None:
    """Those that constraints.txt does not name are pinned in the list itself, as the Makefile has them."""
    root = KIT.parent
    lines = [line.split() for line in (KIT / "gpu-wheels.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (root / "constraints.txt").read_text().split()}
    assert [name for name, _ in lines if "==" not in name and name.replace("_", "-") not in pinned] == []
    assert [name for name, _ in lines if "==" in name] == ["trl==1.13.0"]
    assert "TRL := trl==1.13.0" in (root / "Makefile").read_text()
