"""The warm-up: a seeded draw of the right size, and the same scorer from memory and from the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from running import selection
from trim_lightning.pipeline.select import Selection
from trim_lightning.stages.scorer import draw_warmup_rows

lengths = st.lists(st.integers(0, 3), min_size=1, max_size=300).map(lambda values: np.array(values, dtype=np.int64))


@given(lengths=lengths, percent=st.integers(1, 100), seed=st.integers(0, 9))
def test_a_draw_is_seeded_and_of_the_right_size(lengths: np.ndarray, percent: int, seed: int) -> None:
    rows = draw_warmup_rows(lengths, percent / 100, seed)
    usable = np.flatnonzero(lengths)
    assert len(rows) == min(len(usable), max(1, int(Fraction(percent, 100) * len(lengths))))
    assert rows == sorted(set(rows))
    assert set(rows) <= set(usable.tolist())
    assert rows == draw_warmup_rows(lengths, percent / 100, seed)


def test_seeds_draw_different_rows_evenly() -> None:
    lengths = np.ones(200, dtype=np.int64)
    draws = [draw_warmup_rows(lengths, 0.29, seed) for seed in range(60)]
    assert {len(rows) for rows in draws} == {58}
    assert len({tuple(rows) for rows in draws}) == 60
    taken = np.bincount(np.concatenate(draws), minlength=200)
    assert taken.min() > 5
    assert taken.max() < 31  # 17.4 on average, standard deviation 3.5


# --------------------------------------------------------------------------------------- in a selection


@pytest.fixture
def run(
    tiny_folder: Callable[[str], Path], pool_file: Path, target_file: Path, tmp_path: Path
) -> Callable[..., Selection]:
    """Runs a selection with a warm-up on a store of the test's own."""

    def select(name: str, *overrides: str) -> Selection:
        return selection(
            "model=hf",
            f"model.path={tiny_folder('llama')}",
            "model.dtype=float32",
            "pool=jsonl",
            f"pool.path={pool_file}",
            "target=jsonl",
            f"target.path={target_file}",
            "warmup.fraction=0.25",
            "warmup.learning_rate=0.01",
            "saliency.num_layers=3",
            "trainer=cpu",
            "logger=none",
            *overrides,
            output_dir=tmp_path / name,
            store_dir=tmp_path / "store",
        )

    return select


def scores(done: Selection) -> list[dict[str, object]]:
    return pq.read_table(done.directory / "scores.parquet").to_pylist()


@pytest.mark.parametrize(
    "overrides", [[], ["model.dtype=bfloat16"], ["warmup.gradient_checkpointing=true"]], ids=lambda o: "".join(o)
)
def test_a_warmed_up_scorer_is_the_same_from_memory_and_from_the_store(
    overrides: list[str], run: Callable[..., Selection], tmp_path: Path
) -> None:
    fresh = run("fresh", *overrides)
    for stage in ("signals", "fingerprint", "score"):
        shutil.rmtree(tmp_path / "store" / stage)
    again = run("again", *overrides)
    stages = again.manifest["stages"]
    assert stages["warmup"]["cached"]
    assert not stages["score"]["cached"]
    assert scores(again) == scores(fresh)
    cold = run("cold", *overrides, "warmup=none")
    assert scores(cold) != scores(fresh)


def test_warm_up_books_what_it_trained_on(run: Callable[..., Selection]) -> None:
    stage = run("run", "warmup.epochs=3").manifest["stages"]["warmup"]
    assert not stage["cached"]
    assert stage["tokens"] > 0
    assert stage["tokens"] % 3 == 0
    half = run("half", "warmup.epochs=1").manifest["stages"]["warmup"]
    assert half["tokens"] == stage["tokens"] / 3
