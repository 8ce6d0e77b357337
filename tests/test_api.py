"""TRIM from Python gives what the command line gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import trim_lightning
from running import run_select
from tiny_models import build_tiny_model, write_records
from trim_lightning.settings.schema import FallbackSettings, FingerprintSettings, PoolerSettings, SaliencySettings


@pytest.fixture(scope="module")
def model_and_records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], list[dict], Path]:
    """A tiny model, a pool, targets, and the folder that holds them."""
    folder = tmp_path_factory.mktemp("api")
    build_tiny_model("llama", folder / "model")
    pool = write_records(folder / "pool.jsonl", 40, seed=1)
    targets = write_records(folder / "targets.jsonl", 5, seed=2, edge_cases=False)
    return folder / "model", pool, targets, folder


@pytest.mark.parametrize(
    ("token_weight", "token_class"), [("none", "own"), ("idf", "own"), ("error", "own"), ("none", "next")]
)
def test_five_lines_agree_with_the_command_line(model_and_records, token_weight: str, token_class: str) -> None:
    model, pool, targets, folder = model_and_records
    scorer = trim_lightning.load(str(model), dtype="float32", store_dir=folder / "store", max_length=96)
    bank = scorer.fingerprint(targets, SaliencySettings(num_layers=3), FingerprintSettings(token_class))
    scores = scorer.score(iter(pool), bank, PoolerSettings(token_weight=token_weight))
    plain = scorer.score(iter(pool), scorer.fingerprint(targets, SaliencySettings(num_layers=3)))
    assert np.nanmax(abs(scores.score - plain.score)) > 0.002 or (token_weight, token_class) == ("none", "own")
    coreset = [pool[row] for row in scores.top(fraction=0.1)]

    directory = run_select(
        "model=hf", f"model.path={model}", "model.dtype=float32", "pool=jsonl", f"pool.path={folder / 'pool.jsonl'}",
        "target=jsonl", f"target.path={folder / 'targets.jsonl'}", "target.num_examples=null", "warmup=none",
        "saliency.num_layers=3", "max_length=96", "selection.fraction=0.1", "logger=none", "trainer=cpu",
        f"pooler.token_weight={token_weight}", f"fingerprint.token_class={token_class}",
        output_dir=folder / f"run_{token_weight}_{token_class}", store_dir=folder / "store",
    )  # fmt: skip
    table = pq.read_table(directory / "scores.parquet")
    expected = table["score"].to_numpy(zero_copy_only=False)
    assert np.isnan(scores.score).sum() == 1
    np.testing.assert_allclose(scores.score, expected, atol=1e-5)
    lines = (directory / "coreset.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == coreset


def test_settings_of_another_kind_or_type_are_user_errors(model_and_records) -> None:
    model, pool, targets, folder = model_and_records
    scorer = trim_lightning.load(str(model), dtype="float32", store_dir=folder / "store")
    saliency = SaliencySettings(num_layers=2)
    bank = scorer.fingerprint(targets, saliency)
    calls = {
        "saliency: this is a FingerprintSettings; give SaliencySettings": lambda: scorer.fingerprint(
            targets, FingerprintSettings("next"), saliency
        ),
        "fingerprint: this is a str": lambda: scorer.fingerprint(targets, saliency, "next"),
        "fingerprint.token_class=nxt: must be one of own, next; did you mean": lambda: scorer.fingerprint(
            targets, saliency, FingerprintSettings("nxt")
        ),
        "saliency: .*2.5": lambda: scorer.fingerprint(targets, SaliencySettings(num_layers=2.5)),
        "pooler: this is a FallbackSettings": lambda: scorer.score(pool, bank, FallbackSettings()),
        "pooler.name=men: must be one of": lambda: scorer.score(pool, bank, PoolerSettings(name="men")),
        "^dtype=float99: must be one of": lambda: trim_lightning.load(str(model), dtype="float99"),
        "scope=respnse: must be": lambda: trim_lightning.load(str(model), scope="respnse"),
    }
    for message, call in calls.items():
        with pytest.raises(trim_lightning.UserError, match=message):
            call()


def test_a_mistake_is_a_user_error(model_and_records) -> None:
    model, pool, targets, folder = model_and_records
    scorer = trim_lightning.load(str(model), dtype="float32", store_dir=folder / "store")
    with pytest.raises(trim_lightning.UserError, match="only 4 layers"):
        scorer.fingerprint(targets, SaliencySettings(num_layers=5))
    with pytest.raises(trim_lightning.UserError, match="no record"):
        scorer.fingerprint([{"prompt": "", "response": ""}])
    bank = scorer.fingerprint(targets)
    with pytest.raises(trim_lightning.UserError, match="record 1"):
        scorer.score([pool[0], {"prompt": 3, "response": "x"}], bank)
    with pytest.raises(trim_lightning.UserError, match="no records"):
        scorer.score([], bank, fallback=FallbackSettings(mode="zero"))
    scores = scorer.score(pool, bank)
    with pytest.raises(trim_lightning.UserError, match="not both"):
        scores.top(0.1, count=3)
    with pytest.raises(trim_lightning.UserError, match="between 1 and 40"):
        scores.top(count=41)
    assert len(scores.top()) == 2
