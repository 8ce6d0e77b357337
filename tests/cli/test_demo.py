"""`make demo`: what it runs, that its pictures stay true, and the pages that it names at its end."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from composing import compose_select, compose_train
from trim_lightning.report.comparison_page import NAME as COMPARISON
from trim_lightning.runs.names import REPORT, SELECTION

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "Makefile").read_text().partition("\ndemo: ")[2].partition("\n\n")[0]


def overrides(more: str = "") -> list[str]:
    """What `make demo ARGS=…` gives to train.py, of the first job."""
    (line,) = re.findall(r"train\.py -m (.+)", RECIPE)
    words = shlex.split(line.replace("$(ARGS)", more))
    return [word.partition(",")[0] for word in words if not word.startswith("hydra.")]


@pytest.mark.parametrize("more", ["", "experiment=demo_long"], ids=["short", "long"])
def test_both_demos_select_what_the_pages_show(more: str) -> None:
    """Pictures and live examples are of experiment=demo."""
    shown = compose_select(["experiment=demo", "paths.output_dir=out"])
    run = compose_train([*overrides(more), "paths.output_dir=out"])
    for part in ("model", "pool", "target", "warmup", "saliency", "fallback", "pooler", "method", "seed", "max_length"):
        assert getattr(run, part) == getattr(shown, part), part
    assert run.selection.count == shown.selection.count
    assert run.evaluation.limit == (50 if more else 24)  # the later recipe wins
    assert run.train.epochs == (8 if more else 3)


def test_it_ends_with_the_pages_to_open() -> None:
    (folder,) = re.findall(r"hydra\.sweep\.dir=(\S+)", RECIPE)
    pages = re.findall(r"(\S+\.html)", RECIPE)
    assert pages == [f"{folder}/0/{SELECTION}/{REPORT}", f"{folder}/{COMPARISON}"]
    assert RECIPE.splitlines()[-1].endswith('side by side"')
