"""The same config gives the same bytes, from an empty store and from a full one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cli.conftest import Inputs, Run
from running import run_select

COMPARED = ("scores.parquet", "coreset.jsonl", "token_scores.parquet", "target_tokens.parquet")


def manifest(directory: Path) -> dict[str, Any]:
    """Content of ``manifest.json``."""
    content: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return content


@pytest.fixture
def arguments(inputs: Inputs) -> list[str]:
    """A selection with warm-up (dropout included), groups and every file."""
    given = [argument for argument in inputs.arguments if not argument.startswith("paths.")]
    return [
        *given, "warmup.fraction=0.3", "warmup.lora_dropout=0.2", "target.group_field=subtask", "target.num_examples=3",
        "scoring.save_token_scores=true", "selection.fraction=0.3",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_fresh_stores_and_a_warm_one(dtype: str, arguments: list[str], tmp_path: Path) -> None:
    runs = [
        run_select(*arguments, f"model.dtype={dtype}", output_dir=tmp_path / f"run{number}", store_dir=tmp_path / store)
        for number, store in enumerate(("first", "second", "second"))
    ]
    for name in COMPARED:
        contents = {(run / name).read_bytes() for run in runs}
        assert len(contents) == 1, name
    banks = [load_file(run / "fingerprints.safetensors") for run in runs]  # the order of its metadata is free
    for bank in banks[1:]:
        assert bank.keys() == banks[0].keys()
        for name, values in bank.items():
            np.testing.assert_array_equal(values, banks[0][name])
    stages = ("warmup", "fingerprint", "score")
    assert [[manifest(run)["stages"][stage]["cached"] for stage in stages] for run in runs] == [
        [False] * 3, [False] * 3, [True] * 3,
    ]  # fmt: skip
    first, _, warm = (manifest(run) for run in runs)
    for stage in stages:
        assert first["stages"][stage]["key"] == warm["stages"][stage]["key"]
        assert first["stages"][stage]["tokens"] == warm["stages"][stage]["tokens"]
    assert first["counts"] == warm["counts"]
    assert first["inputs"] == warm["inputs"]


def test_the_command_line_gives_what_the_function_gives(
    run: Run, arguments: list[str], inputs: Inputs, tmp_path: Path
) -> None:
    store = inputs.root / "store"
    expected = run_select(*arguments, output_dir=tmp_path / "function", store_dir=store)
    assert run(*arguments, "paths.output_dir=command", f"paths.store_dir={store}").code == 0
    for name in COMPARED:
        assert (tmp_path / "command" / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("seed=1", {"warmup", "fingerprint", "score"}),
        ("warmup.epochs=1", {"warmup", "fingerprint", "score"}),
        ("target.num_examples=2", {"fingerprint", "score"}),
        ("saliency.num_layers=1", {"score"}),  # the target pass has read every layer
        ("saliency=row", {"score"}),
        ("pooler=max", set()),
        ("fallback=zero", set()),
        ("selection.fraction=0.5", set()),
        ("target.aggregate=mean", set()),
        ("logger=none", set()),
    ],
)
def test_only_what_a_key_touches_runs_again(
    change: str, again: set[str], arguments: list[str], inputs: Inputs, tmp_path: Path
) -> None:
    store = inputs.root / "store"
    run_select(*arguments, output_dir=tmp_path / "before", store_dir=store)
    passes = target_passes(store)
    after = run_select(*arguments, change, output_dir=tmp_path / "after", store_dir=store)
    stages = manifest(after)["stages"]
    assert {name for name in ("warmup", "score") if not stages[name]["cached"]} == again - {"fingerprint"}
    assert ("fingerprint" in again) == (target_passes(store) > passes)


def target_passes(store: Path) -> int:
    """Target passes in a store: each ran the model."""
    return sum(1 for _ in (store / "signals").iterdir())


def test_the_seed_decides_every_draw(arguments: list[str], inputs: Inputs, tmp_path: Path) -> None:
    scores = set()
    for place, seed in enumerate((0, 0, 1, 2)):
        output, store = tmp_path / str(place), inputs.root / "store"
        run_select(*arguments, f"seed={seed}", "method=random", output_dir=output, store_dir=store)
        scores.add((output / "scores.parquet").read_bytes())
    assert len(scores) == 3
