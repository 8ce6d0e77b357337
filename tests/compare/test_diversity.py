"""Figures of what a coreset holds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from running import run_select
from trim_lightning.compare.diversity import (
    compression,
    distinct_pairs,
    diversity,
    effective_number,
    near_duplicates,
    vendi_score,
)
from trim_lightning.compare.report import compare


def test_effective_number() -> None:
    assert effective_number([5, 5, 5]) == pytest.approx(3)
    assert effective_number([7]) == 1
    assert effective_number([3, 1]) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert effective_number([]) is None


def test_repetition() -> None:
    assert distinct_pairs(["a", "b", "a", "b", "a", "b"]) == 2 / 5
    assert distinct_pairs(["alone"]) is None
    varied, repeated = " ".join(map(str, range(500))), "the same again " * 500
    assert (compression(varied) or 0) < (compression(repeated) or 0)
    assert compression("") is None


def test_near_duplicates() -> None:
    pytest.importorskip("datasketch")
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    assert near_duplicates([long, f"{long} fifteen", "quite another text about something else"]) == pytest.approx(1 / 3)


def test_vendi_score() -> None:
    assert vendi_score(np.eye(5, 8) * 3) == pytest.approx(5)
    assert vendi_score(np.ones((5, 8))) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(3, 2), 4, axis=0)[:8]) == pytest.approx(2)  # more records than dimensions
    assert vendi_score(np.zeros((4, 2))) is None
    drawn = np.random.default_rng(0).normal(size=(6, 9))
    units = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(units @ units.T / 6)
    assert vendi_score(drawn) == pytest.approx(np.exp(-(values * np.log(values)).sum()))


def test_embeddings(tmp_path: Path, tiny_folder) -> None:
    """The vectors are those of ``method=rds``: position-weighted means of the last hidden states."""
    import torch

    from trim_lightning.api import load

    scorer = load(str(tiny_folder("llama")), dtype="float32", store_dir=tmp_path)
    records = [{"prompt": "add one", "response": "two"}, {"prompt": "where", "response": "here and there"}]
    vectors = scorer.embed(records)
    (sequences,) = scorer._encode(records)
    for vector, sequence in zip(vectors, sequences, strict=True):
        ids = torch.as_tensor(sequence.token_ids, dtype=torch.long)[None]
        with torch.inference_mode():
            hidden = scorer.model.model(ids).last_hidden_state[0]
        weights = torch.arange(1, len(hidden) + 1).float()
        expected = (weights[:, None] * hidden).sum(0) / weights.sum()
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)
    assert scorer.embed([]).shape == (0, vectors.shape[1])
    projected = load(str(tiny_folder("opt_projected")), dtype="float32", store_dir=tmp_path)
    assert projected.embed(records).shape == (2, 16)  # the last hidden states are narrower than those within


def test_a_run(tmp_path: Path, tiny_folder) -> None:
    pool = [
        {"prompt": "add one and two", "response": "three", "source": "sums"},
        {"prompt": "add two and two", "response": "it is four", "source": "sums"},
        {"prompt": "where is Vienna", "response": "in Austria", "source": "places"},
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pool))
    directory = run_select(
        "model=hf", f"model.path={tiny_folder('llama')}", "model.dtype=float32", "method=full", "pool=jsonl",
        f"pool.path={tmp_path / 'pool.jsonl'}", "target=from_pool", "logger=none",
        output_dir=tmp_path / "out", store_dir=tmp_path / "store",
    )  # fmt: skip
    report = compare([directory], all_pairs=False, samples=100, seed=0)
    found = diversity(report.runs[0])
    assert found == report.diversities[0]
    assert found is not None
    assert found.median_words == 5
    assert found.response_share == pytest.approx(6 / 17)
    assert found.kinds == 2
    assert found.effective_records is None
    embedded = compare([directory], all_pairs=False, samples=100, seed=0, embed=lambda records: np.eye(len(records)))
    assert embedded.diversities[0] is not None
    assert embedded.diversities[0].effective_records == pytest.approx(3)
    assert found.effective_kinds == pytest.approx(effective_number([2, 1]))
