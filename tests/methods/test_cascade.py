"""`scoring=cascade`: a cheap score for all, the full one for the best and a sample, and what that loses told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from composing import compose_select
from running import selection
from tiny_models import build_tiny_model, write_records
from trim_lightning.engine import batches
from trim_lightning.engine.token_shards import TokenShards
from trim_lightning.errors import UserError
from trim_lightning.methods import cascade
from trim_lightning.models.depth import cut_layers
from trim_lightning.models.load import load_model, load_tokenizer
from trim_lightning.models.source import find_model
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.pipeline.select import Selection
from trim_lightning.report.explain import explain_row
from trim_lightning.runs.reopened import open_run
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store
from trim_lightning.store.receipt import RECEIPT
from trim_lightning.sweep.plan import plan_job
from trim_lightning.sweep.planning_store import PlanningStore
from trim_lightning.sweep.sharing import share_passes

RECORDS, SAMPLE, LAYERS = 240, 60, 8
SHALLOW = ("scoring=cascade", "scoring.cascade.layers=6")


class Runs:
    """A pool, targets, and a model whose layers change little, so that the first say something of the last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        build_tiny_model("llama", root / "model", seed=3, layers=LAYERS)
        soften(root / "model")
        write_records(root / "pool.jsonl", RECORDS, seed=1)
        write_records(root / "targets.jsonl", 8, seed=2, edge_cases=False, groups=("first", "second"))

    def overrides(self, *more: str) -> list[str]:
        return [
            "model=hf", f"model.path={self.root / 'model'}", "model.dtype=float32", "max_length=96",
            "pool=jsonl", f"pool.path={self.root / 'pool.jsonl'}", "selection.fraction=0.1",
            "target=jsonl", f"target.path={self.root / 'targets.jsonl'}", "target.num_examples=null",
            "saliency.num_layers=2", "warmup=none", "trainer=cpu", "logger=none", *more,
        ]  # fmt: skip

    def __call__(self, name: str, *more: str, store: Path | None = None) -> Selection:
        return selection(*self.overrides(*more), output_dir=self.root / name, store_dir=store or self.root / "store")


def soften(folder: Path) -> None:
    """Make the last layers' part in the hidden states small."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 0.3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(autouse=True)
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade, "SAMPLE_LEAST", SAMPLE)


@pytest.fixture(scope="module")
def plain(runs: Runs) -> Selection:
    return runs("plain", "report.enabled=false")


@pytest.fixture
def cascaded(runs: Runs) -> Selection:
    return runs("cascade", *SHALLOW, "scoring.cascade.recall=0.9", "scoring.save_token_scores=true")


def full_rows(result: Selection) -> NDArray[np.int64]:
    return np.flatnonzero(~np.isnan(result.scores.score))


def top(result: Selection) -> set[int]:
    return set(result.order[: int(0.1 * RECORDS)].tolist())


def test_the_best_by_the_cheap_score_and_the_sample_get_the_full_one(plain: Selection, cascaded: Selection) -> None:
    rows, counts = full_rows(cascaded), cascaded.manifest["counts"]
    assert SAMPLE < len(rows) < RECORDS - 20
    assert counts["scored_in_full"] == len(rows)
    assert (counts["scored_for_sample"], counts["wanted"], counts["unscored"]) == (SAMPLE, 24, 1)
    assert 0 <= counts["recall_bound"] < counts["expected_recall"] <= 1
    np.testing.assert_allclose(cascaded.scores.score[rows], plain.scores.score[rows], atol=1e-5)
    assert len(top(plain) & top(cascaded)) >= 21, "of 24"
    rank = np.zeros(RECORDS, int)
    rank[cascaded.order] = np.arange(1, len(cascaded.order) + 1)
    others = np.setdiff1d(cascaded.order, rows)
    assert rank[rows].max() < rank[others].min()
    cheap = cascaded.scores.cheap_score
    assert cheap is not None
    assert (np.diff(cheap[others[np.argsort(rank[others])]]) <= 0).all()
    assert f"scored in full  {len(rows)}; expected recall" in " ".join(cascaded.summary.split("\n"))


@pytest.mark.parametrize("keys", [("fingerprint=next",), ("pooler.token_weight=error", "scope=response")])
def test_states_and_weights_of_tokens_are_those_of_a_plain_run(
    keys: tuple[str, ...], runs: Runs, plain: Selection
) -> None:
    whole = runs(f"plain_{keys[0][-4:]}", *keys, "report.enabled=false")
    some = runs(f"cascade_{keys[0][-4:]}", *SHALLOW, *keys, "report.enabled=false")
    rows = full_rows(some)
    assert 0 < len(rows) < RECORDS - 20
    np.testing.assert_allclose(some.scores.score[rows], whole.scores.score[rows], atol=1e-5)
    assert np.nanmax(abs(whole.scores.score - plain.scores.score)) > 0.01


def test_the_files_tell_what_was_scored_how(plain: Selection, cascaded: Selection) -> None:
    table = pq.read_table(cascaded.directory / "scores.parquet")
    before = pq.read_table(plain.directory / "scores.parquet")
    assert table.column_names == [*before.column_names, "cheap_score"]
    in_full = table["score"].is_valid().to_numpy(zero_copy_only=False)
    assert in_full.sum() == len(full_rows(cascaded))
    assert table["cheap_score"].null_count == table["rank"].null_count == 1
    tokens = pq.read_table(cascaded.directory / "token_scores.parquet")
    some = [any(value is not None for value in values) for values in tokens["similarity"].to_pylist()]
    assert some == in_full.tolist()
    assert [len(ids) for ids in tokens["token_ids"].to_pylist()].count(0) == 0
    stages = cascaded.manifest["stages"]
    assert stages["score"]["tokens"] < plain.manifest["stages"]["score"]["tokens"]
    assert stages["cascade"]["tokens"] >= plain.manifest["stages"]["score"]["tokens"]
    page = (cascaded.directory / "report.html").read_text()
    assert f"{in_full.sum()} scored in full" in page


def test_records_of_both_passes_are_explained(runs: Runs, cascaded: Selection) -> None:
    run = open_run(cascaded.directory)
    rows = full_rows(cascaded)
    sample = cascade_sample(runs)
    for row in (int(np.intersect1d(rows, sample)[0]), int(np.setdiff1d(rows, sample)[0])):
        found = run.matched_tokens(row)
        assert found is not None
        assert found.scope.any()
    other = int(np.setdiff1d(cascaded.order, rows)[0])
    assert run.matched_tokens(other) is None
    verdict = " ".join(explain_row(run, other).verdict)
    assert "behind all that were scored in full" in verdict


def cascade_sample(runs: Runs) -> NDArray[np.int64]:
    """The rows that a pass alone was over, as the store has them."""
    from trim_lightning.engine.shards import read_tensors
    from trim_lightning.engine.token_shards import ROWS

    found = [read_tensors(path)["rows"] for path in (runs.root / "store" / "score").glob(f"*/{ROWS}")]
    return next(rows for rows in found if len(rows) == SAMPLE)


def test_recall_chooses_what_is_kept(runs: Runs) -> None:
    kept = [
        runs("recall", *SHALLOW, f"scoring.cascade.recall={recall}", "report.enabled=false").manifest["counts"]
        for recall in (0.6, 0.9)
    ]
    assert kept[0]["scored_in_full"] < kept[1]["scored_in_full"]
    assert [counts["expected_recall"] >= recall for counts, recall in zip(kept, (0.6, 0.9), strict=True)] == [True] * 2
    share = runs("share", *SHALLOW, "scoring.cascade.keep=0.3", "report.enabled=false")
    assert int(0.3 * RECORDS) <= len(full_rows(share)) <= int(0.3 * RECORDS) + SAMPLE


def test_where_the_cheap_score_is_no_guide_all_are_scored(
    runs: Runs, plain: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cascade.scores_by_method

    def shuffled(task: Any) -> Any:
        table = real(task)
        values = np.random.default_rng(5).normal(size=len(table)).astype(np.float32)
        return dataclasses.replace(table, score=np.where(np.isnan(table.score), np.float32(np.nan), values))

    monkeypatch.setattr(cascade, "scores_by_method", shuffled)
    for more in ([], ["scoring.cascade.keep=0.1"]):
        result = runs("no_guide", "scoring=cascade", "scoring.cascade.by=bm25", "report.enabled=false", *more)
        assert any("the cheap score is no guide" in line for line in result.manifest["warnings"])
        assert (~np.isnan(result.scores.score)).sum() == RECORDS - 1
        np.testing.assert_allclose(result.scores.score, plain.scores.score, atol=1e-5)
        assert result.chosen.tolist() == plain.chosen.tolist()


@pytest.mark.parametrize("method", ["bm25", "dsir"])
def test_a_method_without_a_model_may_be_the_guide(runs: Runs, method: str) -> None:
    result = runs(method, "scoring=cascade", f"scoring.cascade.by={method}", "report.enabled=false")
    alone = runs(f"{method}_alone", f"method={method}", "report.enabled=false")
    np.testing.assert_array_equal(result.scores.cheap_score, alone.scores.score)
    assert result.manifest["stages"]["cascade"]["tokens"] == 0


def test_the_warm_up_is_booked_once(runs: Runs) -> None:
    warm = ("warmup=lora", "warmup.fraction=0.1", "report.enabled=false")
    whole, shallow = runs("warm", *warm), runs("warm_cascade", *SHALLOW, *warm)
    stages = shallow.manifest["stages"]
    assert stages["warmup"]["tokens"] == whole.manifest["stages"]["warmup"]["tokens"] > 0
    passes = whole.manifest["stages"]["score"]["tokens"] + whole.manifest["stages"]["fingerprint"]["tokens"]
    assert stages["cascade"]["tokens"] == passes


def test_a_small_model_may_be_the_guide(runs: Runs) -> None:
    """The first three quarters of the layers, saved as a model of its own, guide as the view of them does."""
    folder = runs.root / "proxy"
    source = find_model(ModelSettings(path=str(runs.root / "model")), Store(runs.root / "store"))
    import torch

    model = load_model(source, torch.float32)
    cut_layers(model, 6)
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    proxy = runs("small", "scoring=cascade", f"scoring.cascade.model={folder}", "report.enabled=false")
    view = runs("view", *SHALLOW, "report.enabled=false")
    np.testing.assert_allclose(proxy.scores.cheap_score, view.scores.cheap_score, atol=1e-5)
    assert proxy.chosen.tolist() == view.chosen.tolist()
    with pytest.raises(UserError, match=r"scoring\.cascade\.model=.*nowhere.*no such directory"):
        runs("nowhere", "scoring=cascade", f"scoring.cascade.model={runs.root / 'nowhere' / 'at' / 'all'}")


@pytest.mark.parametrize("aggregate", ["max", "round_robin"])
def test_groups_of_targets(runs: Runs, aggregate: str) -> None:
    groups = ("target.group_field=subtask", f"target.aggregate={aggregate}", "report.enabled=false")
    plain, result = runs("grouped", *groups), runs("grouped_cascade", *groups, *SHALLOW)
    rows = full_rows(result)
    assert len(rows) < RECORDS - 1
    for name, scores in plain.scores.groups.items():
        np.testing.assert_allclose(result.scores.groups[name][rows], scores[rows], atol=1e-5)
    assert len(top(plain) & top(result)) >= 21


@pytest.mark.slow
def test_the_same_bytes_after_kills_in_every_pass(runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    more = (*SHALLOW, "scoring.cascade.recall=0.9", "report.enabled=false")
    monkeypatch.setattr(batches, "SHARD_TOKENS", 1500)
    real: Callable[..., None] = TokenShards.write
    written = [0, 0]  # in this attempt, in all

    def write(*arguments: Any) -> None:
        if written[0] == 3:
            raise KeyboardInterrupt
        real(*arguments)
        written[:] = [written[0] + 1, written[1] + 1]

    monkeypatch.setattr(TokenShards, "write", write)
    again, attempts = None, 0
    while again is None:
        written[0], attempts = 0, attempts + 1
        with suppress(KeyboardInterrupt):
            again = runs("killed", *more, store=tmp_path / "killed")
    monkeypatch.setattr(TokenShards, "write", real)
    assert attempts > 3
    straight = runs("straight", *more, store=tmp_path / "straight")
    for name in ("scores.parquet", "coreset.jsonl"):
        assert (again.directory / name).read_bytes() == (straight.directory / name).read_bytes()
    assert again.manifest["stages"]["score"]["key"] == straight.manifest["stages"]["score"]["key"]
    shards = list((tmp_path / "straight" / "score").glob("*/similarity-*"))
    assert written[1] == len(shards), "none was computed twice"


@pytest.mark.slow
def test_jobs_of_a_sweep_share_the_cheap_pass_and_the_sample(runs: Runs, tmp_path: Path) -> None:
    def jobs(store: Path) -> list[Any]:
        return [
            compose_select(
                [*runs.overrides(*SHALLOW), f"pooler={pooler}", f"saliency.num_layers={layers}", "report.enabled=false",
                 f"paths.store_dir={store}", f"paths.output_dir={tmp_path / 'out'}"]
            )
            for pooler in ("mean", "max")
            for layers in (1, 2)
        ]  # fmt: skip

    assert share_passes(jobs(tmp_path / "store")) == 2, "the cheap one and the sample's, each with two banks"
    shared = runs("shared", *SHALLOW, "pooler=max", "report.enabled=false", store=tmp_path / "store")
    alone = runs("alone", *SHALLOW, "pooler=max", "report.enabled=false", store=tmp_path / "other")
    assert shared.manifest["stages"]["cascade"]["cached"]
    for name in ("scores.parquet", "coreset.jsonl"):
        assert (shared.directory / name).read_bytes() == (alone.directory / name).read_bytes()


def test_a_plan_knows_the_passes(runs: Runs, cascaded: Selection, tmp_path: Path) -> None:
    def costs(store: Path, *more: str) -> list[tuple[str, int, bool, str]]:
        planning = PlanningStore(store)
        plan_job(
            compose_select([*runs.overrides(*more), f"paths.output_dir={tmp_path}", f"paths.store_dir={store}"]),
            planning,
        )
        known = {wanted.key.hex: wanted for wanted in planning.wanted if wanted.cost is not None}
        return [
            (wanted.cost.stage, wanted.cost.tokens, wanted.found, wanted.cost.assumed)
            for wanted in known.values()
            if wanted.cost is not None and wanted.cost.work == "scoring pass"
        ]

    every = cascaded.manifest["stages"]["tokenize"]["tokens"]
    (cheap, sample, rest) = costs(tmp_path / "empty", *SHALLOW)
    assert (cheap[0], cheap[1]) == ("cascade", every)
    assert sample[0] == rest[0] == "score"
    assert 0 < sample[1] < every / 2
    assert rest[3] == "25% of the records are scored in full after the sample"
    done = costs(runs.root / "store", *SHALLOW, "scoring.cascade.recall=0.9")
    assert [found for _, _, found, _ in done] == [True] * 3


def test_records_without_a_response_get_no_score_where_one_is_required(runs: Runs) -> None:
    result = runs("responses", *SHALLOW, "selection.require_response=true", "report.enabled=false")
    cheap = result.scores.cheap_score
    assert cheap is not None
    for row in (1, 2):  # an empty response, and nothing at all
        assert np.isnan(result.scores.score[row])
        assert np.isnan(cheap[row])
        assert row not in result.order
    assert len(full_rows(result)) == result.manifest["counts"]["scored_in_full"]


def test_a_pool_too_small_for_a_sample_is_scored_as_ever(
    runs: Runs, plain: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cascade, "SAMPLE_LEAST", 500)
    result = runs("few", *SHALLOW, "report.enabled=false")
    assert any("239 records are too few" in line for line in result.manifest["warnings"])
    assert result.manifest["stages"]["score"]["key"] == plain.manifest["stages"]["score"]["key"]
    assert "cascade" not in result.manifest["stages"]
    assert result.scores.cheap_score is None
    with pytest.raises(UserError, match=r"scoring\.cascade\.layers=99: .*has only 8 layers"):
        runs("few", "scoring=cascade", "scoring.cascade.layers=99")
    with pytest.raises(UserError, match=r"scoring\.cascade\.model=.*no such directory"):
        runs("few", "scoring=cascade", f"scoring.cascade.model={runs.root / 'none' / 'at' / 'all'}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scoring.cascade.layers=2"], r"scoring\.cascade\.layers=2: there is no cascade; add scoring=cascade"),
        (["scoring=cascade", "method=rds"], r"scoring=cascade: method=rds has no cheap score"),
        ([*SHALLOW, "scoring.cascade.by=bm25"], r"layers=6 and scoring\.cascade\.by=bm25: several cheap scores"),
        ([*SHALLOW, "scoring.cascade.keep=0.1", "scoring.cascade.recall=0.9"], r"keep=0\.1 and .*recall=0\.9"),
        (["scoring=cascade", "scoring.cascade.by=rds"], r"scoring\.cascade\.by=rds: must be one of bm25, dsir"),
    ],
)
def test_keys_that_do_not_go_together(runs: Runs, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(compose_select([*runs.overrides(*overrides), "paths.output_dir=unused"]))


def test_more_layers_than_there_are(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"scoring\.cascade\.layers=8: model has only 8 layers; ask for fewer"):
        runs("deep", "scoring=cascade", "scoring.cascade.layers=8")


def test_an_eighth_of_the_layers_is_the_default(runs: Runs) -> None:
    result = runs("default", "scoring=cascade", "report.enabled=false")
    receipt = json.loads(
        (runs.root / "store" / "score" / result.manifest["stages"]["cascade"]["key"] / RECEIPT).read_text()
    )
    assert receipt["key"]["inputs"]["scorer"]["layers"] == 1
