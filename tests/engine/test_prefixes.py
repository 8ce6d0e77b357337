"""Records that begin alike: which come together, what that spares, and that the scores stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from breaking import break_after
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from trim_lightning.engine import modules, scoring_pass
from trim_lightning.engine.batches import ShardBatches, plan_shards, shared_prefix
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.memory import part_of
from trim_lightning.engine.prefixes import computed_share, prefix_groups, spared_tokens
from trim_lightning.engine.scoring_pass import ScoringRequest, run_scoring_pass
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.stages.token_scores import StoredPass
from trim_lightning.tokens.tokenized import SomeRecords, TokenizedRecords
from trim_lightning.trim.fingerprints import FingerprintBank, TargetTokens, build_bank

Write = Callable[..., TokenizedRecords]
BUDGET = 2048
RESOURCES = Resources({"accelerator": "cpu", "devices": 1}, tokens_per_batch=BUDGET)


def pool(*kinds: tuple[int, int, int], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Records of kinds ``(number, prefix, own)``: how many, tokens of their prefix, most tokens of their own."""
    generator = np.random.default_rng(seed)
    records = []
    for number, prefix, own in kinds:
        head = generator.integers(3, 300, prefix)
        for _ in range(number):
            ids = np.concatenate([head, generator.integers(3, 300, generator.integers(1, own + 1))])
            records.append((ids, generator.integers(0, 3, len(ids))))
    return [records[place] for place in generator.permutation(len(records))]


def bank() -> FingerprintBank:
    classes = torch.arange(0, 300, 7)
    states = torch.randn(len(classes), 32, generator=torch.Generator().manual_seed(0))
    return build_bank([TargetTokens(classes, states, torch.ones(len(classes)))])


def scores(model: PreTrainedModel, records: TokenizedRecords, folder: Path, share: bool) -> tuple[Any, dict[int, Any]]:
    """Facts of a pass, and similarity and error of each record's tokens, ``[tokens, 2]``."""
    folder.mkdir(exist_ok=True)
    request = {folder: ScoringRequest({"": bank()}, "embedding", "all", errors=True)}
    facts = run_scoring_pass(model, records, request, resources=RESOURCES, share_prefixes=share)
    passed, found = StoredPass(folder, records), {}
    for index in range(len(passed)):
        shard = passed.shard(index)
        seen = shard.bank(0)
        assert seen.error is not None
        parts = np.split(np.stack([seen.similarity, seen.error], 1), np.cumsum(shard.lengths)[:-1])
        found.update(zip(shard.rows.tolist(), parts, strict=True))
    return facts, found


def test_records_that_begin_alike_share_batches(tokenized: Write) -> None:
    records = tokenized(pool((30, 100, 20), (30, 300, 20), (40, 0, 60)))
    groups = prefix_groups(records, BUDGET)
    heads = [tuple(records[row].token_ids[:50]) for row in range(len(records))]
    kinds = {group: {heads[row] for row in np.flatnonzero(groups == group)} for group in set(groups.tolist()) - {0}}
    assert len(kinds) == 2
    assert all(len(each) == 1 for each in kinds.values()), "a group has one prefix"
    assert (groups == 0).sum() == 40
    plan = plan_shards(records.lengths, BUDGET, groups=groups)
    rows = [row for shard in plan for batch in shard.batches for row in batch]
    assert sorted(rows) == list(range(100))
    assert all(len(set(groups[list(batch)])) == 1 for shard in plan for batch in shard.batches)
    share = spared_tokens(records, plan) / records.total_tokens
    assert computed_share(records, BUDGET) == pytest.approx(1 - share)
    assert share > 0.4
    mixed = plan_shards(records.lengths, BUDGET)
    assert spared_tokens(records, mixed) < spared_tokens(records, plan), "by length alone they are apart"


@pytest.mark.parametrize("kinds", [(60, 0, 60), (60, 20, 60), (60, 40, 900), (3, 100, 5)])
def test_what_does_not_pay_is_left_as_it_was(kinds: tuple[int, int, int], tokenized: Write) -> None:
    records = tokenized(pool(kinds))
    groups = prefix_groups(records, BUDGET)
    assert not groups.any()
    assert plan_shards(records.lengths, BUDGET, groups=groups) == plan_shards(records.lengths, BUDGET)


def test_rows_that_a_pass_leaves_out_are_of_no_group(tokenized: Write) -> None:
    records = tokenized(pool((40, 100, 20)))
    some = SomeRecords(records, np.arange(0, 40, 2))
    groups = prefix_groups(some, BUDGET)
    assert groups[::2].all()
    assert not groups[1::2].any()
    assert not prefix_groups(SomeRecords(records, np.arange(0)), BUDGET).any()


batches = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6)


@given(batches)
def test_a_batch_knows_what_all_its_records_begin_with(records: list[list[int]]) -> None:
    records = sorted(records, key=len, reverse=True)
    lengths = np.array(list(map(len, records)))
    ids = np.zeros((len(records), lengths.max()), np.int64)
    for line, record in enumerate(records):
        ids[line, : len(record)] = record
    alike = 0
    while alike < lengths.min() - 1 and len({record[alike] for record in records}) == 1:
        alike += 1
    pays = len(records) > 1 and 4 * alike * (len(records) - 1) >= lengths.sum()
    assert shared_prefix(ids, lengths) == (alike if pays else 0)


def test_scores_are_the_same_and_fewer_tokens_run(
    tiny_model: Callable[[str], PreTrainedModel], tokenized: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tokenized(pool((30, 100, 20), (30, 300, 20), (40, 0, 60)))
    ran = {True: 0, False: 0}
    found = {}
    for share in ran:
        model = tiny_model("llama")

        def count(_: Any, inputs: Sequence[torch.Tensor], share: bool = share) -> None:
            ran[share] += inputs[0].shape[0] * inputs[0].shape[1]

        model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(count)
        facts, found[share] = scores(model, records, tmp_path / str(share), share)
        assert (facts["spared"] > 0.4) == share
    assert found[True].keys() == found[False].keys() == set(range(100))
    for row in found[True]:
        np.testing.assert_allclose(found[True][row][:, 0], found[False][row][:, 0], atol=2e-5)
        np.testing.assert_allclose(found[True][row][:, 1], found[False][row][:, 1], atol=6e-4)  # float16
    assert ran[True] < 0.6 * ran[False]
    monkeypatch.setattr(modules, "can_resume", lambda model: False)
    facts, kept = scores(tiny_model("llama"), records, tmp_path / "cannot", True)
    assert facts["spared"] == 0
    for row in kept:
        np.testing.assert_allclose(kept[row][:, 0], found[False][row][:, 0], atol=2e-5)


def test_where_keys_and_values_do_not_fit_records_are_computed_whole(
    tiny_model: Callable[[str], PreTrainedModel],
    tokenized: Write,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = tokenized(pool((5, 100, 10)))
    batch = ShardBatches(records, plan_shards(records.lengths, BUDGET), "all")[0]
    module = modules.ScoringPass(tiny_model("llama"), [(bank(), "embedding")], share_prefixes=True)
    module.on_predict_start()
    calls: list[int] = []

    def short_of_memory(model: PreTrainedModel, ids: torch.Tensor, prefix: int) -> torch.Tensor:
        calls.append(prefix)
        raise torch.OutOfMemoryError("too much")

    with torch.inference_mode():
        shared = module.predict_step(batch, 0)
        assert module.shares
        monkeypatch.setattr(modules, "states_after", short_of_memory)
        whole = [module.predict_step(batch, 0) for _ in range(2)]
    assert batch["prefix"] == 100
    assert calls == [100], "once: the next batches would not fit either"
    assert not module.shares
    assert "did not fit into memory" in caplog.text
    for found in whole:
        torch.testing.assert_close(found["similarity"], shared["similarity"], rtol=0, atol=2e-5)


def test_half_a_batch_keeps_its_prefix(tiny_model: Callable[[str], PreTrainedModel], tokenized: Write) -> None:
    records = tokenized(pool((5, 100, 10)))
    batch = ShardBatches(records, plan_shards(records.lengths, BUDGET), "all")[0]
    module = modules.ScoringPass(tiny_model("llama"), [(bank(), "embedding")], share_prefixes=True)
    module.on_predict_start()
    with torch.inference_mode():
        whole = module.predict_step(batch, 0)
        parts = [module.predict_step(part_of(batch, lines), 0) for lines in (slice(0, 3), slice(3, 4), slice(4, None))]
    similarity = torch.cat([part["similarity"] for part in parts], dim=-1)
    torch.testing.assert_close(whole["similarity"], similarity, rtol=0, atol=2e-5)


def test_a_pass_goes_on_after_a_kill_with_the_same_bytes(
    tiny_model: Callable[[str], PreTrainedModel], tokenized: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_pass, "plan_shards", partial(plan_shards, shard_tokens=2000, window=48))
    monkeypatch.setattr(scoring_pass, "prefix_groups", partial(prefix_groups, window=48))
    records = tokenized(pool((30, 100, 20), (30, 300, 20), (40, 0, 60)))
    facts, _ = scores(tiny_model("llama"), records, tmp_path / "once", True)
    assert facts["shards"] >= 5
    assert facts["spared"] > 0.2
    with monkeypatch.context() as patch:
        break_after(3, patch)
        with pytest.raises(RuntimeError, match="killed"):
            scores(tiny_model("llama"), records, tmp_path / "twice", True)
    scores(tiny_model("llama"), records, tmp_path / "twice", True)
    files = sorted((tmp_path / "once").glob("similarity-*.safetensors"))
    assert len(files) == facts["shards"]
    for file in files:
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes(), file.name


def test_divided_weights_count_on_one_call_a_batch(
    tiny_model: Callable[[str], PreTrainedModel], tokenized: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = modules.ScoringPass(tiny_model("llama"), [(bank(), "embedding")], share_prefixes=True)
    monkeypatch.setattr(modules, "in_step", lambda strategy: True)
    monkeypatch.setattr(module, "_trainer", SimpleNamespace(strategy=None))
    monkeypatch.setattr(modules, "states_after", None)
    ids = torch.randint(3, 300, (1, 40)).expand(4, -1)
    with torch.inference_mode():
        torch.testing.assert_close(module.states(ids, 30), last_hidden_states(module.model, ids))
