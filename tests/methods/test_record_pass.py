"""The pass that rds, perplexity and ifd share: shards, a kill in the middle, damage, many batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trim_lightning.engine import record_pass
from trim_lightning.engine import shards as shards_module
from trim_lightning.engine.shards import finished_values, gather_values, values_path, write_facts, write_values

METHOD = ("method=perplexity", "method.mode=top", "scoring.tokens_per_batch=150")


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(record_pass.run_record_pass.__kwdefaults__, "shard_tokens", 200)


def shard_files(store: Path, state: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob(f"{state}/*/values-*.safetensors")}


@pytest.mark.usefixtures("small_shards")
def test_a_killed_pass_goes_on_where_it_was(method_runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = method_runs.run(*METHOD, store=tmp_path / "whole").scores.score
    expected = shard_files(tmp_path / "whole", "losses")
    assert len(expected) > 6

    written: list[int] = []

    def die_after_three(directory: Path, index: int, rows: np.ndarray, values: np.ndarray) -> None:
        if len(written) == 3:
            raise Killed
        write_values(directory, index, rows, values)
        written.append(index)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "write_values", die_after_three)
        with pytest.raises(Killed):
            method_runs.run(*METHOD, store=tmp_path / "killed")
    left = shard_files(tmp_path / "killed", "partial")
    assert len(left) == 3

    def note(directory: Path, index: int, rows: np.ndarray, values: np.ndarray) -> None:
        written.append(index)
        write_values(directory, index, rows, values)

    monkeypatch.setattr(shards_module, "write_values", note)
    resumed = method_runs.run(*METHOD, store=tmp_path / "killed")
    assert sorted(written) == list(range(len(expected))), "a shard was computed twice, or not at all"
    assert shard_files(tmp_path / "killed", "losses") == expected
    np.testing.assert_array_equal(resumed.scores.score, whole)


@pytest.mark.usefixtures("small_shards")
def test_batches_and_shards_do_not_change_the_values(method_runs) -> None:
    small = method_runs.run(*METHOD).scores.score
    large = method_runs.run("method=perplexity", "method.mode=top").scores.score
    np.testing.assert_allclose(small, large, atol=1e-5)


def test_a_second_run_loads_no_model(method_runs, request: pytest.FixtureRequest) -> None:
    for method in ("rds", "perplexity", "ifd"):
        method_runs.run(f"method={method}", "warmup=none")
    request.getfixturevalue("no_model")
    for method in ("rds", "perplexity", "ifd"):
        stages = method_runs.run(f"method={method}", "warmup=none").manifest["stages"]
        assert all(stage["cached"] for name, stage in stages.items() if name != "select")


def test_only_whole_shards_count_as_finished(tmp_path: Path) -> None:
    rows = [[0, 1], [2], [3, 4], [5]]
    for index, places in enumerate(rows[:3]):
        write_values(tmp_path, index, np.array(places), np.ones((len(places), 2)))
    assert finished_values(tmp_path, dict(enumerate(rows))) == {0, 1, 2}
    # one flipped bit of a number; rows of another plan; a file cut short; a leftover of a kill
    data = bytearray(values_path(tmp_path, 0).read_bytes())
    data[-1] ^= 1
    values_path(tmp_path, 0).write_bytes(data)
    values_path(tmp_path, 2).write_bytes(values_path(tmp_path, 2).read_bytes()[:-9])
    (tmp_path / ".values-000003.safetensors.abc").write_bytes(b"half")
    assert finished_values(tmp_path, dict(enumerate([[0, 1], [7], [3, 4], [5]]))) == set()
    assert list(tmp_path.iterdir()) == []


def test_values_come_back_by_row(tmp_path: Path) -> None:
    write_values(tmp_path, 0, np.array([3, 1]), np.array([[1.0, 2.0], [3.0, 4.0]]))
    write_values(tmp_path, 1, np.array([0]), np.array([[5.0, 6.0]]))
    write_facts(tmp_path, {"shards": 2})
    nan = [np.nan, np.nan]
    np.testing.assert_array_equal(gather_values(tmp_path, 4), [[5, 6], [3, 4], nan, [1, 2]])
