"""The pass over the pool: resumed after a kill to the same bytes, and the same scores however it is batched."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from breaking import break_after
from transformers import PreTrainedModel

from running import run_select
from trim_lightning.engine import scoring_pass, sharded_pass, token_shards
from trim_lightning.engine import shards as shard_files
from trim_lightning.engine.batches import plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.shards import read_tensors
from trim_lightning.engine.token_shards import EXACT_BANKS, SCALE, bytes_of, codes_of, cosines_of, similarity_path
from trim_lightning.errors import UserError
from trim_lightning.settings.schema import FallbackSettings
from trim_lightning.stages.token_scores import StoredPass
from trim_lightning.store import StageKey, Store
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.trim.fingerprints import FingerprintBank, TargetTokens, build_bank

KEY = StageKey("score", 1, {"test": 1})
Scores = dict[str, tuple[float | None, ...]]
LENGTHS = [0, 30, 12, 7, 25, 0, 3, 18, 22, 9, 31, 1, 14, 0]


class Work:
    """One scoring pass over a small pool in five or more shards."""

    def __init__(self, model: PreTrainedModel, records: TokenizedRecords) -> None:
        self.model, self.records = model, records
        generator = torch.Generator().manual_seed(0)
        classes = torch.arange(0, 300, 11)
        self.banks: dict[str, FingerprintBank] = {
            group: build_bank(
                [TargetTokens(classes + shift, torch.randn(len(classes), 32, generator=generator), classes + 1.0)]
            )
            for shift, group in enumerate(("first", "second"))
        }

    def __call__(self, directory: Path) -> Mapping[str, Any]:
        return scoring_pass.run_scoring_pass(
            self.model,
            self.records,
            {directory: scoring_pass.ScoringRequest(self.banks, "embedding", "all")},
            resources=Resources({"accelerator": "cpu", "devices": 1}, tokens_per_batch=40),
        )


@pytest.fixture
def work(
    tiny_model: Callable[[str], PreTrainedModel], tokenized: Callable[..., TokenizedRecords], monkeypatch: Any
) -> Work:
    monkeypatch.setattr(scoring_pass, "plan_shards", functools.partial(plan_shards, shard_tokens=30))
    generator = np.random.default_rng(0)
    records = [(generator.integers(3, 300, length), generator.integers(0, 3, length)) for length in LENGTHS]
    return Work(tiny_model("llama"), tokenized(records))


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix == ".safetensors"}


def test_every_record_and_token_is_there_once(work: Work, tmp_path: Path) -> None:
    facts = work(tmp_path)
    assert facts["tokens"] == sum(LENGTHS)
    assert facts["shards"] >= 5
    passed = StoredPass(tmp_path, work.records)
    shards = [passed.shard(index) for index in range(len(passed))]
    noted = json.loads((tmp_path / "shards.json").read_text())
    assert noted["groups"] == passed.groups == ["first", "second"]
    assert noted["shard_records"] == [len(shard.rows) for shard in shards]
    rows = np.concatenate([shard.rows for shard in shards])
    assert sorted(rows.tolist()) == [row for row, length in enumerate(LENGTHS) if length]
    for shard in shards:
        sequences = [work.records[row] for row in shard.rows]
        scoped = [sequence.token_ids[sequence.roles > 0] for sequence in sequences]
        assert shard.lengths.tolist() == list(map(len, scoped))
        assert shard.token_ids.tolist() == np.concatenate(scoped).tolist()
        for place, bank in enumerate(work.banks.values()):
            tokens = shard.bank(place)
            assert len(tokens.similarity) == len(tokens.match) == len(shard.token_ids)
            assert set(tokens.match.tolist()) <= set(bank.token_ids.tolist())
            assert tokens.direct.tolist() == np.isin(shard.token_ids, bank.token_ids.numpy()).tolist()


def in_turns(banks: Mapping[str, FingerprintBank], number: int) -> dict[str, FingerprintBank]:
    """So many groups, of some banks in turns."""
    return {f"g{place}": list(banks.values())[place % len(banks)] for place in range(number)}


@pytest.mark.parametrize("number", [1, EXACT_BANKS, EXACT_BANKS + 1, 57])
def test_a_token_takes_at_most_six_bytes_and_two_a_bank(number: int, work: Work, tmp_path: Path) -> None:
    work.banks = in_turns(work.banks, number)
    work(tmp_path)
    passed = StoredPass(tmp_path, work.records)
    for index in range(len(passed)):
        tensors = read_tensors(similarity_path(tmp_path, index))
        tokens = tensors["similarity"].shape[1]
        taken = sum(tensor.nbytes for name, tensor in tensors.items() if name != "rows")
        assert taken == bytes_of(number) * tokens <= (6 + 2 * number) * tokens
    assert read_tensors(tmp_path / token_shards.MATCHES)["match"].shape == (number, work.model.config.vocab_size)


def test_sixteen_bits_are_what_float32_says_to_half_a_step(work: Work, tmp_path: Path) -> None:
    exact, short = tmp_path / "exact", tmp_path / "short"
    for directory, number in ((exact, 2), (short, 8)):
        directory.mkdir()
        work.banks = in_turns(work.banks, number)
        work(directory)
    for index in range(len(StoredPass(exact, work.records))):
        one, other = (StoredPass(directory, work.records).shard(index) for directory in (exact, short))
        for place in range(8):
            left, right = one.bank(place % 2), other.bank(place)
            np.testing.assert_allclose(left.similarity, right.similarity, rtol=0, atol=0.5001 / SCALE)
            assert (left.similarity != right.similarity).any()
            assert left.match.tolist() == right.match.tolist()


def test_codes_keep_the_ends_and_what_is_no_number() -> None:
    cosines = torch.tensor([-1.0000001, -1.0, 0.0, 1.0, 1.0000001, float("nan")])
    np.testing.assert_array_equal(cosines_of(codes_of(cosines).numpy()), [-1, -1, 0, 1, 1, np.nan])


def test_a_damaged_shard_of_a_finished_pass_is_told(work: Work, tmp_path: Path) -> None:
    work(tmp_path)
    path = similarity_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    passed = StoredPass(tmp_path, work.records)
    passed.shard(0)
    with pytest.raises(UserError, match=f"{path.name} cannot be read") as caught:
        passed.shard(1)
    assert "\n" not in str(caught.value)


def test_rows_are_found_in_the_shards_of_their_window(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = functools.partial(plan_shards, shard_tokens=30, window=4)
    monkeypatch.setattr(scoring_pass, "plan_shards", plan)
    monkeypatch.setattr(scoring_pass, "WINDOW", 4)
    work(tmp_path)
    passed = StoredPass(tmp_path, work.records)
    for row, length in enumerate(LENGTHS):
        shards = passed.indexes(range(row, row + 1))
        assert len(shards) < len(passed)
        held = [row in passed.shard(index).rows for index in shards]
        assert sum(held) == (length > 0)
        found = passed.matched({row: "second"}, FallbackSettings(mode="zero"))
        assert list(found) == [row] * (length > 0)
        for tokens in found.values():
            assert tokens.token_ids.tolist() == work.records[row].token_ids.tolist()
            known = np.isin(tokens.token_ids, work.banks["second"].token_ids.numpy())
            assert (tokens.similarity[tokens.scope & ~known] == 0).all()
            assert (tokens.similarity[tokens.scope & known] != 0).all()
            assert np.isnan(tokens.similarity[~tokens.scope]).all()


def test_a_block_of_rows_reads_only_the_shards_that_hold_it(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(tmp_path)
    whole, passed = StoredPass(tmp_path, work.records), StoredPass(tmp_path, work.records)
    holders = {int(row): index for index in range(len(whole)) for row in whole.shard(index).rows}
    read: list[int] = []
    real = StoredPass.shard

    def shard(self: StoredPass, index: int) -> Any:
        read.append(index)
        return real(self, index)

    monkeypatch.setattr(StoredPass, "shard", shard)
    for start in range(0, len(LENGTHS), 2):
        wanted = {holders[row] for row in (start, start + 1) if row in holders}
        read.clear()
        found = {int(row) for held in passed.holding(range(start, start + 2)) for row in held.rows}
        assert {row for row in (start, start + 1) if LENGTHS[row]} <= found
        assert set(read) == (set(range(len(whole))) if start == 0 else wanted)
        assert len(read) == len(set(read))


def test_a_broken_pass_goes_on_where_it_was_to_the_same_bytes(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store(tmp_path / "unbroken").get(KEY, work, resumable=True)
    store = Store(tmp_path / "broken")
    with monkeypatch.context() as patch:
        first = break_after(2, patch)
        with pytest.raises(RuntimeError, match="killed"):
            store.get(KEY, work, resumable=True)
    assert store.find(KEY) is None
    workspace = store.workspace_of(KEY)
    spent = json.loads((workspace / shard_files.CLOCK).read_text())["seconds"]
    names = [similarity_path(workspace, index).name for index in first]
    assert sorted(files_of(workspace)) == [token_shards.MATCHES, *names]
    before = {name: (workspace / name).stat().st_mtime_ns for name in names}
    with monkeypatch.context() as patch:
        second = break_after(99, patch)
        entry = store.get(KEY, work, resumable=True)
    assert entry.facts["seconds"] > spent, "the time of the first attempt counts"
    assert not set(first) & set(second), "finished shards are not computed again"
    after = {path.name: path.stat().st_mtime_ns for path in entry.path.glob("*.safetensors")}
    assert before.items() <= after.items(), "finished shards are not touched"
    assert files_of(entry.path) == files_of(whole.path)
    assert (entry.path / "shards.json").read_bytes() == (whole.path / "shards.json").read_bytes()
    assert {name: entry.facts[name] for name in ("tokens", "shards", "padding")} == {
        name: whole.facts[name] for name in ("tokens", "shards", "padding")
    }


@pytest.mark.parametrize("damage", ["cut", "flipped", "leftover", "missing"])
def test_a_damaged_shard_is_computed_again(
    damage: str, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(tmp_path)
    expected = files_of(tmp_path)
    (tmp_path / "shards.json").unlink()
    path = similarity_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 4] ^= 4
        path.write_bytes(data)
    else:
        path.unlink()
    if damage == "leftover":
        path.with_name(f".{path.name}.0123").write_bytes(data)
    with monkeypatch.context() as patch:
        written = break_after(99, patch)
        work(tmp_path)
    assert written == [1]
    assert files_of(tmp_path) == expected
    assert not list(tmp_path.glob(".similarity-*"))


def test_nothing_is_run_when_all_shards_are_there(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = work(tmp_path)

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a trainer was made")

    monkeypatch.setattr(sharded_pass, "make_trainer", fail)
    again = work(tmp_path)
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}


# ------------------------------------------------------------------------- whole selections, in float32


@pytest.fixture
def scores(
    tiny_folder: Callable[[str], Path], pool_file: Path, target_file: Path, store_dir: Path, tmp_path: Path
) -> Callable[..., Scores]:
    """Runs a selection and gives the score, mean, maximum and coverage by id."""

    def run(*overrides: str, architecture: str = "llama", pool: Path = pool_file) -> Scores:
        output = run_select(
            "model=hf",
            f"model.path={tiny_folder(architecture)}",
            "model.dtype=float32",
            "pool=jsonl",
            f"pool.path={pool}",
            "target=jsonl",
            f"target.path={target_file}",
            "warmup=none",
            "saliency.num_layers=3",
            "trainer=cpu",
            "logger=none",
            *overrides,
            output_dir=tmp_path / str(random.getrandbits(64)),
            store_dir=store_dir,
        )
        table = pq.read_table(output / "scores.parquet").to_pylist()
        return {line["id"]: tuple(line[name] for name in ("score", "mean", "max", "coverage")) for line in table}

    return run


def assert_same(one: Scores, two: Scores) -> None:
    assert one.keys() == two.keys()
    for name, values in one.items():
        if values[0] is None:
            assert two[name] == values
        else:
            assert two[name] == pytest.approx(values, abs=1e-5), name


def test_a_permuted_pool_gives_every_record_the_same_score(
    scores: Callable[..., Any], pool_file: Path, tmp_path: Path
) -> None:
    lines = pool_file.read_bytes().splitlines(keepends=True)
    random.Random(4).shuffle(lines)
    permuted = tmp_path / "permuted.jsonl"
    permuted.write_bytes(b"".join(lines))
    one, two = scores(), scores(pool=permuted)
    assert list(one) != list(two)
    assert_same(one, two)
    assert len({values[0] for values in one.values()}) > 30


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gemma3"])
def test_neither_batch_size_nor_padding_changes_a_score(architecture: str, scores: Callable[..., Any]) -> None:
    small = scores("scoring.tokens_per_batch=64", architecture=architecture)
    large = scores("scoring.tokens_per_batch=4096", architecture=architecture)
    alone = scores("scoring.tokens_per_batch=1", architecture=architecture)
    assert_same(small, large)
    assert_same(alone, large)
    assert sum(values[0] is None for values in large.values()) == 1


def test_a_record_has_the_same_score_in_a_pool_of_its_own(
    scores: Callable[..., Any], pool_file: Path, tmp_path: Path
) -> None:
    whole = scores()
    for row in (0, 4):
        single = tmp_path / f"{row}.jsonl"
        single.write_bytes(pool_file.read_bytes().splitlines(keepends=True)[row])
        assert_same(scores(pool=single), {f"r{row}": whole[f"r{row}"]})


def test_a_shared_pass_gives_every_reader_the_bytes_of_a_pass_of_its_own(work: Work, tmp_path: Path) -> None:
    first, second = work.banks.values()
    requests = {
        "one": scoring_pass.ScoringRequest({"": first}, "embedding", "all"),
        "two": scoring_pass.ScoringRequest({"": second}, "hidden", "response"),
        "three": scoring_pass.ScoringRequest({"b": first, "a": second}, "embedding", "prompt"),
        "four": scoring_pass.ScoringRequest({"": replace(first, token_class="next")}, "embedding", "response", True),
        "five": scoring_pass.ScoringRequest({"": first}, "hidden", "all", True),
    }

    def score(wanted: Mapping[Path, scoring_pass.ScoringRequest]) -> None:
        for directory in wanted:
            directory.mkdir(parents=True)
        resources = Resources({"accelerator": "cpu", "devices": 1}, tokens_per_batch=40)
        scoring_pass.run_scoring_pass(work.model, work.records, wanted, resources=resources)

    score({tmp_path / "shared" / name: request for name, request in requests.items()})
    for name, request in requests.items():
        score({tmp_path / "own" / name: request})
        assert files_of(tmp_path / "shared" / name) == files_of(tmp_path / "own" / name)
        shards = [tmp_path / way / name / "shards.json" for way in ("shared", "own")]
        assert shards[0].read_bytes() == shards[1].read_bytes()
